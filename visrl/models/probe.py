"""A proof at loading: whether the models of a checkpoint take a packed prefix tree, found on a small random copy.

What they may take comes from processor, signature and config (derive.py). Each of it is held against the model's own
calls on its own processor's inputs, one sequence at a time: the log-probability of every response within `SAME_LOGPS`,
the gradient of every weight within `SAME_GRADIENTS`; and a plain causal mask must miss by `MISSES`, or the trial would
not see a mistake. What is found is kept in a cache (proofs.py).
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import DynamicCache

from visrl.conversation import Conversation, View, answer_conversation, focus_conversation
from visrl.models.attention import set_attention, use_tree_attention
from visrl.models.derive import Clues, cached_inputs, candidates, end_of_turn, found_family
from visrl.models.encode import EncodedView, TokenPath, common_prefix
from visrl.models.families import (
    Family,
    cache_argument,
    family_of,
    join_images,
    language_model,
    plain_family,
    switch_off_dropout,
)
from visrl.models.folder import first_line
from visrl.models.found import Found, Measured
from visrl.models.proofs import keep, kept, key_of
from visrl.models.settings import ModelSettings
from visrl.models.small import renumbered, small_copy
from visrl.models.tree_encoder import TreeEncoder, image_options
from visrl.models.trial import lay_out, logps, sums_of

SAME_LOGPS, SAME_GRADIENTS = 1e-5, 1e-4  # largest relative errors
MISSES = 1e-3  # what a plain causal mask must be wrong by
LOUD = 0.07  # of the noise on the copy's weights, so that every token matters
SIDES = ((120, 80), (72, 60))  # width and height of the trial's image and of its crop
SAID = (("[0.10, 0.20, 0.50, 0.70]", "[0.15, 0.25, 0.30, 0.40]"), ("7", "42.\n"))  # to the two prompts
QUESTION = "Which digit is on the card?"

# A small copy of a config, with its tokens renumbered where numbers are given.
Build = Callable[[Any, torch.Tensor | None], torch.nn.Module]


class NoProof(ValueError):
    """Why a model is not proved to take a prefix tree: a sentence's end."""


def find_family(processor: Any, config: Any) -> Family:
    """The family of a processor and a config: as its entry says it, else as a trial finds it. `Family.plain` says why
    its models take no prefix tree, where they take none: such a model trains and decodes in the plain form."""
    family = family_of(config)
    if not family.plain:
        return family
    if not type(config).__module__.startswith("transformers."):
        return plain_family(config.model_type, "its code came with the checkpoint")
    found = proved(processor, config)
    if isinstance(found, Found):
        return found_family(found, config)
    try:
        with _foreign("no end of a turn"):
            end = end_of_turn(processor, processor.chat_template)
    except NoProof:  # a template that is no good is told when prompts are tried
        end = None
    return replace(plain_family(config.model_type, found), end_of_turn=end)


def proved(processor: Any, config: Any) -> Found | str:
    """What `prove` finds, or why it finds nothing: out of the cache, where the same was tried before."""
    key = key_of(processor, config)
    known = kept(key)
    if known is None:
        try:
            known = prove(processor, config)
        except NoProof as error:
            known = str(error)
        keep(key, known)
    return known


def prove(processor: Any, config: Any, build: Build = small_copy) -> Found:
    """What the models of a config take, held against their own calls on the copy that `build` makes.

    Raises:
        NoProof: nothing of what they may take gives what their own calls give.
    """
    started = time.process_time()
    with _foreign("its processor does not show images one by one"):
        encoder = TreeEncoder(processor, config, ModelSettings())
        ends = end_of_turn(processor, str(encoder.chat_template))
        encoder.end_of_turn = ends or encoder.end_of_turn
        clues = clues_of(encoder)
    with _foreign("its own calls cannot be made"):
        calls = [
            native(encoder, talk, response + encoder.end_of_turn)
            for talk, said in zip(talks(), SAID, strict=True)
            for response in said
        ]
        numbers = renumbered(config, (one for call in calls for one in call["input_ids"].flatten().tolist()))
    try:
        return _found(encoder, clues, calls, ends, build, numbers, started)
    except NoProof:
        if numbers is None:
            raise
        return _found(encoder, clues, calls, ends, build, None, started)  # some forwards know tokens by number


def _found(
    encoder: TreeEncoder,
    clues: Clues,
    calls: Sequence[Mapping[str, torch.Tensor]],
    ends: str | None,
    build: Build,
    numbers: torch.Tensor | None,
    started: float,
) -> Found:
    """See `prove`; `calls` are what its processor makes of the trial's prompts and responses."""
    with _foreign("no small copy of its model can be made"), _apart():
        model: Any = build(encoder.config, numbers).eval()
        for weight in model.parameters():
            weight.data.add_(torch.randn_like(weight) * LOUD)
    switch_off_dropout(model)
    with _foreign("its inputs are not understood"):
        tried = candidates(clues, model, encoder.processor)
    if isinstance(tried, str):
        raise NoProof(tried)
    with _foreign("its own calls cannot be made"):
        proof = Proof(model, encoder, calls, numbers, replace(next(tried), end_of_turn=ends))
    faults: list[str] = []
    missed: list[str] = []
    errors: list[float] = []
    for found in proof.ways(tried):
        try:
            with _foreign("its forward refuses a packed row"):
                errors.append(proof.error_of(found))
        except NoProof as refusal:
            faults.append(str(refusal))
            continue
        if errors[-1] < SAME_LOGPS:
            try:
                return proof.hold(found, errors[-1], started)
            except NoProof as refusal:
                missed.append(str(refusal))
    if missed or not errors:
        raise NoProof((missed or faults)[0])
    raise NoProof(f"no mask gives what its own calls give (the nearest is {min(errors):.0e} off)")


# --- The trial's parts ------------------------------------------------------------------------------------------------


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
                lambda: torch.stack([self._own(number) for number in range(len(self.calls))])
            )

    def ways(self, others: Iterator[Found]) -> Iterator[Found]:
        """What is to be tried, with what is known by now."""
        for found in (self.first, *others):
            yield replace(found, end_of_turn=self.first.end_of_turn)

    def _numbered(self, ids: torch.Tensor) -> torch.Tensor:
        """What the copy calls tokens."""
        return ids if self.numbers is None else self.numbers[ids]

    def error_of(self, found: Found) -> float:
        """The largest relative error of log-probabilities, without gradients."""
        with torch.no_grad():
            return relative(self._packed(found), self.logps)

    def hold(self, found: Found, error: float, started: float) -> Found:
        """What was found, once its gradients are held, too, and a causal mask was seen to miss.

        Raises:
            NoProof: they differ, or it does not.
        """
        self.model.train()  # some forwards take more then
        with _foreign("its forward refuses a packed row that is trained"):
            _, gradients = self._differentiated(lambda: self._packed(found))
        self.model.eval()
        whole = torch.cat([one.flatten() for one in self.gradients.values()]).norm()
        if gradients.keys() != self.gradients.keys():
            raise NoProof("other weights have gradients in the tree than in its own calls")
        off = max(
            float((gradients[name] - own).norm() / max(own.norm(), 1e-3 * whole))
            for name, own in self.gradients.items()
        )
        if not off < SAME_GRADIENTS:
            raise NoProof(f"the gradients of the tree differ from its own calls' by {off:.0e}")
        with torch.no_grad():
            wrong = relative(self._packed(found, is_causal=True), self.logps)
        if not wrong > MISSES:
            raise NoProof(f"the trial sees nothing: a plain causal mask gives the same ({wrong:.0e})")
        seconds = time.process_time() - started
        return replace(found, cached=self._holds_cached(found), measured=Measured(error, off, wrong, seconds))

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
            with torch.no_grad(), _foreign("no cache"):
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

    def _packed(self, found: Found, *, is_causal: bool = False) -> torch.Tensor:
        """Summed log-probabilities of all responses, out of packed rows."""
        family = found_family(found, self.model.config)
        trees = [[path for paths in self.groups for path in paths]] if found.shares == "all" else self.groups
        rows = [[tree] for tree in trees] if found.row_per_prompt else [trees]
        use_tree_attention(self.model)
        sums = []
        for row in rows:
            trial = lay_out(row, self.encoder.image_token_id)
            length = trial.layout.ids.shape[-1]
            mask = torch.ones(length, length, dtype=torch.bool).tril() if is_causal else None
            sums.append(sums_of(self.model, family, trial, self._numbered, mask=mask))
        return torch.cat(sums)

    def _own(self, number: int) -> torch.Tensor:
        path = self.paths[number]
        logits = self.model(**self.calls[number], use_cache=False).logits[0]
        return logps(logits[path.start - 1 : -1], self._numbered(torch.from_numpy(path.ids[path.start :])))

    def _differentiated(self, sums_of_all: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.model.zero_grad()
        sums = sums_of_all()
        (sums * torch.linspace(-1, 2, len(sums))).sum().backward()
        named = {name: weight.grad.clone() for name, weight in self.model.named_parameters() if weight.grad is not None}
        return sums.detach(), named


def talks() -> list[Conversation]:
    """The two prompts of the trial: a question about an image, and about it and a crop of it."""
    whole, crop = (
        View(f"trial {number}", _image(number, size), is_crop=number > 0) for number, size in enumerate(SIDES)
    )
    return [focus_conversation(QUESTION, whole), answer_conversation(QUESTION, whole, crop)]


def _image(seed: int, size: tuple[int, int]) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def clues_of(encoder: TreeEncoder) -> Clues:
    """What the processor makes of the trial's images, alone and together, and of its second prompt."""
    processor, images = encoder.processor, [_image(number, size) for number, size in enumerate(SIDES)]
    options = image_options(processor)
    made = [processor._process_images([shown], **options) for shown in ([images[0]], [images[1]], images)]
    inputs = [{name: _tensor(value) for name, value in dict(one).items()} for one, _ in made]
    both = [{name: value for name, value in one.items() if value is not None} for one in inputs]
    return Clues(
        alone=(both[0], both[1]),
        together=both[2],
        placeholders=((made[0][1][0], made[1][1][0]), tuple(made[2][1])),
        prompt=native(encoder, talks()[1], ""),
    )


def _tensor(value: Any) -> torch.Tensor | None:
    try:
        return torch.as_tensor(value)
    except (ValueError, TypeError, RuntimeError):  # ragged lists, texts
        return None


def native(encoder: TreeEncoder, talk: Conversation, response: str) -> dict[str, torch.Tensor]:
    """What a processor's own call makes of a prompt with a response."""
    images = [[view.image for view in talk.views]]
    made = encoder.processor(
        images=images, text=[encoder.render(talk) + response], return_tensors="pt", add_special_tokens=False
    )
    return {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}


def taken(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of a processor's inputs that the model's forward names."""
    names = inspect.signature(model.forward).parameters
    kept = {name: value for name, value in inputs.items() if name in names}
    return {name: value.float() if value.is_floating_point() else value for name, value in kept.items()}


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


@contextmanager
def _apart() -> Iterator[None]:
    """Random numbers of the trial's own within."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@contextmanager
def _foreign(what: str) -> Iterator[None]:
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
