"""What a model takes, held against its own calls: log-probabilities, gradients, a mask that must miss, a cache."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from visrl.models.asked import SAID, taken, talks
from visrl.models.attention import set_attention, use_tree_attention
from visrl.models.calls import cache_argument, takes_features
from visrl.models.derive import cached_inputs, found_family
from visrl.models.encode import EncodedView, TokenPath, common_prefix
from visrl.models.family import Family, join_images
from visrl.models.folder import first_line
from visrl.models.found import Found, Measured
from visrl.models.parts import language_model, recurrent_layers
from visrl.models.settings import ModelSettings
from visrl.models.tree_encoder import TreeEncoder
from visrl.models.trial import lay_out, logps, sums_of

SAME_LOGPS, SAME_GRADIENTS = 1e-5, 1e-4  # largest relative errors
RECURRENT_GRADIENTS = 3e-4  # linear attention sums a run in another order than a sequence
MISSES = 1e-3  # what a plain causal mask must be wrong by


class NoProof(ValueError):
    """Why a model is not proved to take a prefix tree: a sentence's end."""

    contradicted = False


class Contradicted(NoProof):
    """What was tried does not give what the model's own calls give."""

    contradicted = True


@contextmanager
def foreign(what: str) -> Iterator[None]:
    """Code that is not ours within, on a config that nobody has tried: whatever it raises is a reason.

    Raises:
        NoProof: what came of it, in a sentence.
    """
    try:
        yield
    except NoProof:
        raise
    except Exception as error:
        raise NoProof(f"{what} ({type(error).__name__}: {first_line(error)})") from error


class Proof:
    """The model's own calls on some paths, and what it takes held against them."""

    def __init__(
        self,
        model: Any,
        encoder: TreeEncoder,
        calls: Sequence[Mapping[str, torch.Tensor]],
        numbers: torch.Tensor | None,
        found: Found,
    ) -> None:
        self.model, self.first, self.numbers = model, found, numbers
        family = found_family(found, model.config)
        self.encoder = TreeEncoder(encoder.processor, encoder.config, ModelSettings(), family)
        self.encoder.end_of_turn = encoder.end_of_turn
        self.groups = [self.encoder.encode(talk, said) for talk, said in zip(talks(), SAID, strict=True)]
        self.paths = [path for paths in self.groups for path in paths]
        for path, call in zip(self.paths, calls, strict=True):
            if call["input_ids"][0].tolist() != path.ids.tolist():
                raise NoProof("its processor makes other tokens of a whole prompt than of its parts")
        self.calls = [taken(model, {**call, "input_ids": self._numbered(call["input_ids"])}) for call in calls]
        with own_attention(model):
            self.logps, self.gradients = self._differentiated(
                torch.stack([self._own(number) for number in range(len(self.calls))])
            )

    def ways(self, others: Iterator[Found]) -> Iterator[Found]:
        """What is to be tried, with what is known by now."""
        for found in (self.first, *others):
            yield replace(found, end_of_turn=self.first.end_of_turn)

    def _numbered(self, ids: torch.Tensor) -> torch.Tensor:
        """What the copy calls tokens."""
        return ids if self.numbers is None else self.numbers[ids]

    def packed(self, found: Found) -> tuple[torch.Tensor, float]:
        """Summed log-probabilities of all responses out of packed rows, [paths], and their largest relative error."""
        self.model.train()  # some forwards take more then
        sums = self._packed(found)
        return sums, relative(sums, self.logps)

    def hold(self, found: Found, sums: torch.Tensor, error: float, started: float) -> Found:
        """What was found, once the gradients of what `packed` gave are held, too, and a causal mask was seen to miss.

        Raises:
            NoProof: they differ, or it does not.
        """
        with foreign("its forward refuses a packed row that is trained"):
            _, gradients = self._differentiated(sums)
        self.model.eval()
        whole = torch.cat([one.flatten() for one in self.gradients.values()]).norm()
        if gradients.keys() != self.gradients.keys():
            raise Contradicted("other weights have gradients in the tree than in its own calls")
        off = max(
            float((gradients[name] - own).norm() / max(own.norm(), 1e-3 * whole))
            for name, own in self.gradients.items()
        )
        if not off < (RECURRENT_GRADIENTS if recurrent_layers(self.model) else SAME_GRADIENTS):
            raise Contradicted(f"the gradients of the tree differ from its own calls' by {off:.0e}")
        with torch.no_grad():
            wrong = relative(self._packed(found, is_causal=True), self.logps)
        if not wrong > MISSES:
            raise NoProof(f"the trial sees nothing: a plain causal mask gives the same ({wrong:.0e})")
        seconds = time.process_time() - started
        measured = Measured(error, off, wrong, seconds)
        cached, features = self._holds_cached(found), self._holds_features(found)
        return replace(found, cached=cached, features=features, measured=measured)

    def _holds_features(self, found: Found) -> bool:
        """Whether log-probabilities are those of its own calls where features of each image, made by themselves, are
        given in the place of images."""
        try:
            with torch.no_grad(), foreign("no features"):
                return (
                    takes_features(self.model) and relative(self._packed(found, features=True), self.logps) < SAME_LOGPS
                )
        except NoProof:
            return False

    def _holds_cached(self, found: Found) -> bool:
        """Whether the second prompt and its response, continued from a KV cache of what they share with the first, have
        the log-probability of its own call."""
        if found.sees != "ancestors" or found.shares != "all" or found.counts:
            return False
        family = found_family(found, self.model.config)
        first, path = self.groups[0][0], self.groups[1][0]
        shared = min(common_prefix(first.ids, path.ids), first.start - 1)
        cache, rows = DynamicCache(), []
        views = (path.views[:1], path.views[1:])
        try:
            with torch.no_grad(), foreign("no cache"):
                for start, stop, own in ((0, shared, views[0]), (shared, len(path.ids), views[1])):
                    rows.append(self._continued(family, path, start, stop, own, cache))
        except NoProof:
            return False
        logits = torch.cat(rows)[path.start - 1 : -1]
        error = relative(logps(logits, self._numbered(torch.from_numpy(path.ids[path.start :]))), self.logps[2])
        return error < SAME_LOGPS

    def _continued(
        self, family: Family, path: TokenPath, start: int, stop: int, views: Sequence[EncodedView], cache: DynamicCache
    ) -> torch.Tensor:
        """Logits [stop − start, vocabulary] of a part of a path, over the cache of what comes before it."""
        ids = torch.from_numpy(path.ids[start:stop])[None]
        sees = torch.ones(stop, stop, dtype=torch.bool).tril()[None, start:stop]
        positions = torch.from_numpy(path.positions[:, start:stop])[:, None]
        return self.model(
            input_ids=self._numbered(ids),
            position_ids=positions[0] if len(positions) == 1 else positions,
            use_cache=True,
            **{cache_argument(self.model): cache},
            **cached_inputs(family, ids, sees),
            **join_images(family, [view.inputs for view in views]),
        ).logits[0]

    def _packed(self, found: Found, *, is_causal: bool = False, features: bool = False) -> torch.Tensor:
        """Summed log-probabilities of all responses, out of packed rows, `features` in the place of images."""
        family = found_family(found, self.model.config)
        trees = [[path for paths in self.groups for path in paths]] if found.shares == "all" else self.groups
        rows = [[tree] for tree in trees] if found.row_per_prompt else [trees]
        use_tree_attention(self.model)
        sums = []
        for row in rows:
            trial = lay_out(row, self.encoder.image_token_id)
            length = trial.layout.ids.shape[-1]
            mask = torch.ones(length, length, dtype=torch.bool).tril() if is_causal else None
            sums.append(sums_of(self.model, family, trial, self._numbered, mask=mask, features=features))
        return torch.cat(sums)

    def _own(self, number: int) -> torch.Tensor:
        path = self.paths[number]
        logits = self.model(**self.calls[number], use_cache=False).logits[0]
        return logps(logits[path.start - 1 : -1], self._numbered(torch.from_numpy(path.ids[path.start :])))

    def _differentiated(self, sums: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.model.zero_grad()
        (sums * torch.linspace(-1, 2, len(sums))).sum().backward()
        named = {name: weight.grad.clone() for name, weight in self.model.named_parameters() if weight.grad is not None}
        return sums.detach(), named


def relative(values: torch.Tensor, right: torch.Tensor) -> float:
    """The largest relative error; infinite where anything is no number."""
    off = float(((values.detach() - right).abs() / right.abs()).max())
    return off if np.isfinite(off) else float("inf")


@contextmanager
def own_attention(model: Any) -> Iterator[None]:
    """The plainest attention of the model's own within."""
    config: Any = language_model(model).config
    before = config._attn_implementation
    set_attention(config, "eager")
    try:
        yield
    finally:
        set_attention(config, before)
