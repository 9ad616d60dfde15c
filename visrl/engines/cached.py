"""Decoding over a prefix-shared KV cache: prefill what is new in the prompts, then sample a token of each per step.

For families whose tokens see their ancestors only; for the others see recompute.py. Where entries lie and who sees them
is kv_tree.py's; what a batch is, and how a token is sampled, decoding.py's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

import numpy as np
import torch
from transformers import DynamicCache

from visrl.conversation import PromptError
from visrl.engines.base import Completion, Request
from visrl.engines.decoding import DecodeBatch, OnToken, RunningSequence
from visrl.engines.kv_tree import PrefixCache, Slots
from visrl.models.attention import attending_trees
from visrl.models.calls import cache_argument
from visrl.models.derive import cached_inputs
from visrl.models.encode import EncodedView, Encoder
from visrl.models.family import join_images
from visrl.packing.forward import logits_at
from visrl.packing.tree import group_by_image


class CachedModel:
    """A model with the prefix cache of the last batch: the same images asked about again, or some of them, prefill only
    what is new."""

    def __init__(self, model: torch.nn.Module, encoder: Encoder) -> None:
        self.model, self.encoder = model, encoder
        self.prefilled_tokens = 0  # counted for benchmarks
        self.prefix: PrefixCache | None = None  # None while a batch is using it
        self._cache_argument = cache_argument(model)

    def prefill(
        self, groups: dict[str, list[int]], sequences: Mapping[int, RunningSequence]
    ) -> tuple[PrefixCache, dict[int, np.ndarray], dict[int, torch.Tensor]]:
        """Compute what the prompts of `groups` (see `group_by_image`) add to the prefix cache; for every request, the
        entries of its prompt and the logits [vocabulary] of its first token.
        """
        prefix = self.prefix
        if prefix is None or not groups.keys() <= prefix.trees.keys():
            prefix = PrefixCache.of(groups)
        elif list(prefix.trees) != list(groups):
            prefix = prefix.of_some(groups)  # the other questions are answered
        self.prefix = None  # a failure below must not leave half a cache behind
        before = [tree.size for tree in prefix.trees.values()]
        seen_views = [len(tree.views) for tree in prefix.trees.values()]
        home: dict[int, tuple[int, int]] = {}  # request → (tree, number of its path there)
        for b, (key, members) in enumerate(groups.items()):
            tree, added = prefix.trees[key], {}
            for number in members:
                path = sequences[number].prompt
                if id(path) not in added:
                    added[id(path)] = len(tree.paths)
                    tree.add(path, self.encoder.image_token_id, recompute_last=True)
                home[number] = (b, added[id(path)])
        trees = list(prefix.trees.values())
        keep = {(b, int(trees[b].paths[p][0][-1])) for b, p in home.values()}
        logits = self._prefill_new(prefix, before, seen_views, keep)
        prompts = {n: prefix.entries[b][trees[b].paths[p][0]] for n, (b, p) in home.items()}
        first = {n: logits[b, int(trees[b].paths[p][0][-1])] for n, (b, p) in home.items()}
        return prefix, prompts, first

    def _prefill_new(
        self, prefix: PrefixCache, before: list[int], seen_views: list[int], keep: set[tuple[int, int]]
    ) -> dict[tuple[int, int], torch.Tensor]:
        """Run the model over every tree's new tokens; logits at the (tree, place) pairs of `keep`."""
        trees = list(prefix.trees.values())
        width = max(tree.size - old for tree, old in zip(trees, before, strict=True))
        start = prefix.length
        ids = np.full((len(trees), width), self.encoder.tokenizer.pad_token_id or 0, dtype=np.int64)
        depth = trees[0].positions[0].shape[0]
        positions = np.zeros((depth, len(trees), width), dtype=np.int64)
        mask = np.zeros((len(trees), width, start + width), dtype=bool)
        mask[:, np.arange(width), start + np.arange(width)] = True
        views: list[EncodedView] = []
        for b, (tree, old) in enumerate(zip(trees, before, strict=True)):
            fresh = tree.size - old
            prefix.entries[b] = np.concatenate([prefix.entries[b], start + np.arange(fresh)])
            if fresh:
                ids[b, :fresh] = np.concatenate(tree.ids)[old:]
                positions[:, b, :fresh] = np.concatenate(tree.positions, axis=1)[:, old:]
            for first, last, ancestors in tree.segments:
                if first >= old:
                    own = slice(first - old, last - old)
                    mask[b, own, prefix.entries[b][ancestors]] = True
                    mask[b, own, start + first - old : start + last - old] |= np.tri(last - first, dtype=bool)
            views += tree.views[seen_views[b] :]
            self.prefilled_tokens += fresh
        columns = sorted({place - before[b] for b, place in keep})
        out = self.forward(ids, positions, mask, prefix.cache, views, columns)
        prefix.length += width
        rank = {column: number for number, column in enumerate(columns)}
        return {(b, place): out[b, rank[place - before[b]]] for b, place in keep}

    def forward(
        self,
        ids: np.ndarray,
        positions: np.ndarray,
        mask: np.ndarray,
        cache: DynamicCache,
        views: Sequence[EncodedView],
        columns: list[int],
    ) -> torch.Tensor:
        """Logits [trees, columns, vocabulary] in fp32 of tokens [trees, queries], whose keys and values are appended to
        `cache`; `positions` is [depth, trees, queries], `mask` [trees, queries, entries].
        """
        device = next(self.model.parameters()).device
        position_ids = torch.from_numpy(np.ascontiguousarray(positions)).to(device)
        tokens = torch.from_numpy(ids).to(device)
        seen = cached_inputs(self.encoder.family, tokens, torch.from_numpy(mask).to(device))
        images = join_images(self.encoder.family, [view.inputs for view in views])
        with attending_trees(self.model):
            return logits_at(
                self.model,
                torch.tensor(columns, device=device),
                input_ids=tokens,
                position_ids=position_ids[0] if len(position_ids) == 1 else position_ids,
                use_cache=True,
                **seen,
                **{self._cache_argument: cache},
                **{name: tensor.to(device) for name, tensor in images.items()},
            ).float()


class CachedBatch(DecodeBatch):
    """A running batch over the KV cache: the sequences of one image decode side by side in one row of it."""

    def __init__(self, model: CachedModel, on_token: OnToken | None = None) -> None:
        super().__init__(model.encoder, on_token)
        self._model = model
        self._slots: Slots | None = None
        self._prefix: PrefixCache | None = None  # of the slots, where no others have joined them

    @torch.inference_mode()
    def add(self, requests: Mapping[int, Request]) -> dict[int, Completion]:
        for alone in (True, False):
            shown = [one.conversation.views for one in requests.values() if (len(one.conversation.views) == 1) == alone]
            with suppress(PromptError):  # `start` prepares each by itself then, and says which cannot be
                self.encoder.encode_views([view for views in shown for view in views], alone=alone)
        sequences, failed = self.start(requests)
        if not sequences:
            return failed
        groups = group_by_image({n: sequence.prompt.views for n, sequence in sequences.items()})
        prefix, prompts, logits = self._model.prefill(groups, sequences)
        slots = Slots.of(groups, prefix, prompts)
        self.sequences |= sequences
        ended = failed | self.sample(slots.running, torch.stack([logits[n] for n in slots.running]))
        slots.put(self.last_tokens)
        if self._slots is None:
            self._slots, self._prefix = slots, prefix
        elif slots.running:
            self._slots.join(slots)
            self._prefix = None
        self._give_back_prefix()
        return ended

    @torch.inference_mode()
    def step(self) -> dict[int, Completion]:
        slots = self._slots
        if slots is None:
            return {}
        slots.compact()
        slots.extend()
        columns = list(range(slots.numbers.shape[1]))
        logits = self._model.forward(slots.tokens, slots.positions, slots.visible, slots.cache, [], columns)
        slots.next_position = slots.next_position + 1
        ended = self.sample(slots.running, logits[torch.from_numpy(slots.active).to(logits.device)])
        slots.put(self.last_tokens)
        self._give_back_prefix()
        return ended

    def _give_back_prefix(self) -> None:
        """Once all sequences have ended, leave the prefix cache, without what was decoded, to whatever comes next."""
        if len(self):
            return
        if self._prefix is not None:
            self._prefix.cache.crop(self._prefix.length - self._prefix.cache.get_seq_length())
            self._model.prefix = self._prefix
        self._slots = self._prefix = None
