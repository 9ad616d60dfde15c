"""Decoding with recurrent layers, whose state knows one sequence: a cache row for each, which grows token by token.

Prompts share what they begin with in their prefill only: it is computed run by run, and every branch takes a copy of
the states and the keys and values in which the run before it ends. Nothing is kept for the next batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from visrl.engines.base import Completion, Request
from visrl.engines.decoding import DecodeBatch, OnToken
from visrl.models.attention import attending_trees
from visrl.models.calls import cache_argument, forward_arguments
from visrl.models.encode import EncodedView, Encoder, TokenPath
from visrl.models.family import join_images
from visrl.models.parts import base_model
from visrl.models.tree_runs import runs_of
from visrl.packing.tree import PrefixTree, group_by_image


class StatefulModel:
    """A model whose recurrent layers hand on a state, and how many prompt tokens it has computed."""

    def __init__(self, model: torch.nn.Module, encoder: Encoder) -> None:
        self.model, self.encoder = model, encoder
        self.prefilled_tokens = 0  # counted for benchmarks

    def prefill(self, prompts: Sequence[TokenPath]) -> Iterator[tuple[int, DynamicCache, torch.Tensor]]:
        """Compute prompts about one image; for each, its number, the cache behind it and the logits [vocabulary] of
        what follows. A cache may be needed for other prompts: take a copy of it."""
        tree = PrefixTree()
        for prompt in prompts:
            tree.add(prompt, self.encoder.image_token_id, recompute_last=True)
        ids, positions = np.concatenate(tree.ids), np.concatenate(tree.positions, axis=1)
        ends: dict[int, list[int]] = {}
        for number, (places, _) in enumerate(tree.paths):
            ends.setdefault(int(places[-1]), []).append(number)
        runs, above = runs_of(tree.segments, tree.size)
        left = [above.count(number) for number in range(len(runs))]  # runs that still need the cache of this one
        caches: dict[int, DynamicCache] = {}
        views = list(tree.views)
        for number, (places, parent) in enumerate(zip(runs, above, strict=True)):
            if parent < 0:
                cache = DynamicCache(config=base_model(self.model).config)
            else:
                left[parent] -= 1
                cache = deepcopy(caches[parent]) if left[parent] else caches.pop(parent)
            known = cache.get_seq_length()
            sees = np.concatenate([np.ones((len(places), known), bool), np.tri(len(places), dtype=bool)], axis=1)
            shown = self._views_of(ids[places], views)
            logits = self.forward(ids[None, places], positions[:, None, places], sees[None], cache, shown)[0]
            self.prefilled_tokens += len(places)
            for path in ends.get(int(places[-1]), ()):
                yield path, cache, logits
            if left[number]:
                caches[number] = cache

    def _views_of(self, ids: np.ndarray, views: list[EncodedView]) -> list[EncodedView]:
        """The images whose tokens these are, taken from the front of `views`."""
        missing, taken = int((ids == self.encoder.image_token_id).sum()), []
        while missing:
            taken.append(views.pop(0))
            missing -= taken[-1].tokens
        return taken

    def forward(
        self,
        ids: np.ndarray,
        positions: np.ndarray,
        sees: np.ndarray,
        cache: DynamicCache,
        views: Sequence[EncodedView] = (),
    ) -> torch.Tensor:
        """Logits [rows, vocabulary] in fp32 of the last of tokens [rows, queries], which are appended to `cache`;
        `positions` is [depth, rows, queries], `sees` [rows, queries, entries]."""
        device = next(self.model.parameters()).device
        family = self.encoder.family
        position_ids = torch.from_numpy(np.ascontiguousarray(positions)).to(device)
        images = join_images(family, [view.inputs for view in views])
        keeps = {"logits_to_keep": 1} if "logits_to_keep" in forward_arguments(self.model) else {}
        mask = torch.from_numpy(sees)[:, None].to(device)
        with attending_trees(self.model):
            logits: torch.Tensor = self.model(
                input_ids=torch.from_numpy(ids).to(device),
                attention_mask={"full_attention": mask, str(family.recurrent): None},
                position_ids=position_ids[0] if len(position_ids) == 1 else position_ids,
                use_cache=True,
                **{cache_argument(self.model): cache},
                **{name: tensor.to(device) for name, tensor in images.items()},
                **keeps,
            ).logits
        return logits[:, -1].float()


class StatefulBatch(DecodeBatch):
    """A running batch with a cache row for each sequence, in the order of `sequences`."""

    def __init__(self, model: StatefulModel, on_token: OnToken | None = None) -> None:
        super().__init__(model.encoder, on_token)
        self._model = model
        self._cache: DynamicCache | None = None
        self._known = np.zeros(0, dtype=np.int64)  # entries of each row, which end with the row
        self._next = np.zeros(0, dtype=np.int64)  # position of the next token of each row

    @torch.inference_mode()
    def add(self, requests: Mapping[int, Request]) -> dict[int, Completion]:
        sequences, failed = self.start(requests)
        rows: dict[int, tuple[DynamicCache, torch.Tensor]] = {}
        for members in group_by_image({n: sequence.prompt.views for n, sequence in sequences.items()}).values():
            samples: dict[int, list[int]] = {}  # of each prompt
            for n in members:
                samples.setdefault(id(sequences[n].prompt), []).append(n)
            numbers = list(samples.values())
            for path, cache, logits in self._model.prefill([sequences[own[0]].prompt for own in numbers]):
                rows |= {n: (deepcopy(cache), logits) for n in numbers[path]}
        if not rows:
            return failed
        fresh = {n: sequences[n] for n in rows}
        self._cache = _joined([*([self._cache] if self._cache else []), *(cache for cache, _ in rows.values())])
        self._known = np.r_[self._known, [len(one.prompt.ids) for one in fresh.values()]]
        self._next = np.r_[self._next, [int(one.prompt.positions.max()) + 1 for one in fresh.values()]]
        self.sequences |= fresh
        return failed | self._sampled(list(rows), torch.stack([logits for _, logits in rows.values()]))

    @torch.inference_mode()
    def step(self) -> dict[int, Completion]:
        if self._cache is None:
            return {}
        ids = np.array(list(self.last_tokens.values()))
        depth = len(next(iter(self.sequences.values())).prompt.positions)
        positions = np.tile(self._next[None, :, None], (depth, 1, 1))
        entries = self._cache.get_seq_length()
        sees = np.arange(entries + 1) >= entries - self._known[:, None]
        logits = self._model.forward(ids[:, None], positions, sees[:, None], self._cache)
        self._known, self._next = self._known + 1, self._next + 1
        return self._sampled(list(self.sequences), logits)

    def _sampled(self, numbers: Sequence[int], logits: torch.Tensor) -> dict[int, Completion]:
        """Sample a token of each of these sequences; the rows of those that end go."""
        before = list(self.sequences)
        ended = self.sample(numbers, logits)
        stay = np.array([n for n, number in enumerate(before) if number in self.sequences], dtype=np.int64)
        if len(stay) < len(before):
            self._known, self._next = self._known[stay], self._next[stay]
            if not len(stay):
                self._cache = None
            elif self._cache is not None:
                rows: Any = torch.from_numpy(stay).to(logits.device)
                self._cache.reorder_cache(rows)
                _cut(self._cache, int(self._known.max()))
        return ended


def _joined(caches: Sequence[DynamicCache]) -> DynamicCache:
    """The rows of several caches in the first of them; shorter ones are padded at their beginning."""
    own = caches[0]
    entries = max(cache.get_seq_length() for cache in caches)

    def together(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([pad(part, (0, 0, entries - part.shape[-2], 0)) for part in parts])

    for layers in zip(*(cache.layers for cache in caches), strict=True):
        mine = layers[0]
        if isinstance(mine, CacheLayerMixin) and mine.is_initialized:
            mine.keys, mine.values = together([one.keys for one in layers]), together([one.values for one in layers])
        if isinstance(mine, LinearAttentionCacheLayerMixin):
            for kind in ("conv_states", "recurrent_states"):
                states = [getattr(one, kind) for one in layers]
                for number, state in states[0].items():
                    if state is not None:
                        states[0][number] = torch.cat([one[number] for one in states])
    return own


def _cut(cache: DynamicCache, entries: int) -> None:
    """Keep the last entries of all rows: none has more."""
    layers: list[Any] = [layer for layer in cache.layers if isinstance(layer, CacheLayerMixin) and layer.is_initialized]
    for layer in layers:
        layer.keys, layer.values = layer.keys[:, :, -entries:], layer.values[:, :, -entries:]
