"""The KV tree: prefix caching over the prompts of a batch, and the slots in which its sequences decode side by side.

Prompts about one image form one prefix tree, which is one row of the KV cache; the sequences that continue them share
that row, each under a mask that shows it its ancestors and its own tokens. So a shared prefix lies in memory, and is
computed, once. An *entry* is one token's keys and values in a row. Two sequences from one crop and one from another:

    entries of a row     image + question | crop A | crop B | first tokens of 0 1 2 | second tokens of 0 1 2
    slot (tree, 0) sees         x         |   x    |        |                 x     |                  x
    slot (tree, 1) sees         x         |   x    |        |                   x   |                    x
    slot (tree, 2) sees         x         |        |   x    |                     x |                      x

Nothing here samples a token or runs a model.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from transformers import DynamicCache

from visrl.packing.tree import PrefixTree


@dataclass(slots=True)
class PrefixCache:
    """The prefix trees of one batch and their KV cache, one row of it per tree.

    `entries[b]` gives the entry in row b of every token of tree b, in the order of the tree.
    """

    trees: dict[str, PrefixTree]
    cache: DynamicCache
    entries: list[np.ndarray]
    length: int = 0  # entries of a row

    @staticmethod
    def of(keys: Iterable[str]) -> PrefixCache:
        """Empty trees of these names."""
        trees = {key: PrefixTree() for key in keys}
        return PrefixCache(trees, DynamicCache(), [np.empty(0, np.int64) for _ in trees])

    def of_some(self, keys: Iterable[str]) -> PrefixCache:
        """The trees of these names, in their order, with their rows of the cache; this one is of no more use then."""
        rows = {key: row for row, key in enumerate(self.trees)}
        chosen = {key: rows[key] for key in keys}
        self.cache.batch_select_indices(torch.tensor(list(chosen.values())))
        trees = {key: self.trees[key] for key in chosen}
        return PrefixCache(trees, self.cache, [self.entries[row] for row in chosen.values()], self.length)


@dataclass(slots=True)
class Slots:
    """The slots of the running batch, [trees, forks]: which sequence decodes in each, and what it sees.

    A fork is a sequence that continues a prompt of its tree. Slots whose sequences have ended are compacted away.
    """

    numbers: np.ndarray  # of the requests; −1 where a tree has fewer sequences than others
    active: np.ndarray
    tokens: np.ndarray  # the last that was sampled
    visible: np.ndarray  # [trees, forks, entries]
    next_position: np.ndarray  # of `tokens`
    depth: int  # of a position: 3 with M-RoPE, else 1
    cache: DynamicCache

    @staticmethod
    def of(groups: dict[str, list[int]], prefix: PrefixCache, prompts: dict[int, np.ndarray]) -> Slots:
        """A slot for every sequence of each tree, which sees the entries of its prompt; none has sampled a token."""
        shape = len(groups), max(len(members) for members in groups.values())
        numbers, next_position = np.full(shape, -1), np.zeros(shape, dtype=np.int64)
        visible = np.zeros((*shape, prefix.length), dtype=bool)
        depth = 0
        for b, (members, tree) in enumerate(zip(groups.values(), prefix.trees.values(), strict=True)):
            depth = len(tree.positions[0])
            at_entry = np.zeros(prefix.length, dtype=np.int64)
            at_entry[prefix.entries[b]] = np.concatenate(tree.positions, axis=1).max(axis=0)
            for j, n in enumerate(members):
                numbers[b, j] = n
                visible[b, j, prompts[n]] = True
                next_position[b, j] = at_entry[prompts[n]].max() + 1
        return Slots(numbers, numbers >= 0, np.zeros_like(numbers), visible, next_position, depth, prefix.cache)

    @property
    def running(self) -> list[int]:
        """The numbers of the requests that run, in the order of their slots."""
        return self.numbers[self.active].tolist()

    @property
    def positions(self) -> np.ndarray:
        """[depth, trees, forks], of `tokens`"""
        return np.repeat(self.next_position[None], self.depth, axis=0)

    def put(self, tokens: dict[int, int]) -> None:
        """The token that was sampled for each request; those that are not named have ended."""
        for b, j in zip(*np.nonzero(self.active), strict=True):
            n = int(self.numbers[b, j])
            self.active[b, j] = n in tokens
            self.tokens[b, j] = tokens.get(n, 0)

    def extend(self) -> None:
        """An entry for the token of every slot, which that slot alone sees."""
        trees, forks = self.numbers.shape
        own = np.broadcast_to(np.eye(forks, dtype=bool), (trees, forks, forks))
        self.visible = np.concatenate([self.visible, own], axis=2)

    def compact(self) -> None:
        """Leave out trees and forks that have ended, once they are half of all.

        The prefix cache is left as it is: the rows that stay are copied, which takes half its memory at most.
        """
        rows, columns = self.numbers.shape
        trees = np.flatnonzero(self.active.any(axis=1))
        forks = int(self.active.sum(axis=1).max())
        self._select(trees if 2 * len(trees) <= rows else np.arange(rows), forks if 2 * forks <= columns else columns)

    def join(self, other: Slots) -> None:
        """Take in the sequences of `other`. What has ended is compacted away, and in time entries that nobody sees."""
        for slots in (self, other):
            slots._select(np.flatnonzero(slots.active.any(axis=1)), int(slots.active.sum(axis=1).max()))
            slots._evict_unseen()
        forks, entries = np.maximum(self.visible.shape[1:], other.visible.shape[1:])

        def joined(one: np.ndarray, two: np.ndarray, nothing: int = 0) -> np.ndarray:
            wide = [_widened(a, 1, forks, nothing) for a in (one, two)]
            return np.concatenate([_widened(a, 2, entries, nothing) if a.ndim == 3 else a for a in wide])

        self.numbers = joined(self.numbers, other.numbers, -1)
        self.active, self.tokens = joined(self.active, other.active), joined(self.tokens, other.tokens)
        self.visible = joined(self.visible, other.visible)
        self.next_position = joined(self.next_position, other.next_position)
        self.cache = _joined(self.cache, other.cache, int(entries))

    def _select(self, trees: np.ndarray, forks: int) -> None:
        """Leave out all trees but these, and of each all but its first forks; those that go on come first."""
        rows, columns = self.numbers.shape
        if (len(trees), forks) == (rows, columns):
            return
        # A fork may move, for its entries are known by what it sees.
        kept = trees[:, None], np.argsort(~self.active[trees], axis=1, kind="stable")[:, :forks]
        self.numbers, self.active, self.tokens = self.numbers[kept], self.active[kept], self.tokens[kept]
        self.visible, self.next_position = self.visible[kept], self.next_position[kept]
        if len(trees) < rows:
            self.cache = _copied(self.cache)
            self.cache.batch_select_indices(torch.from_numpy(trees))

    def _evict_unseen(self) -> None:
        """Evict entries once half of them are seen by nobody: what a tree's slots see moves to its first entries."""
        seen = (self.visible & self.active[..., None]).any(axis=1)
        width = int(seen.sum(axis=1).max())
        if 2 * width > seen.shape[1]:
            return
        order = np.argsort(~seen, axis=1, kind="stable")[:, :width]
        self.visible = np.take_along_axis(self.visible, order[:, None], axis=2)
        self.cache = _copied(self.cache)
        for layer in _layers(self.cache):
            index = torch.from_numpy(order).to(layer.keys.device)[:, None, :, None]
            layer.keys = torch.take_along_dim(layer.keys, index, dim=2)
            layer.values = torch.take_along_dim(layer.values, index, dim=2)


def _widened(array: np.ndarray, axis: int, width: int, nothing: int) -> np.ndarray:
    """`array` made as wide as `width` along an axis."""
    missing = [(0, width - array.shape[axis] if n == axis else 0) for n in range(array.ndim)]
    return np.pad(array, missing, constant_values=nothing)


def _copied(cache: DynamicCache) -> DynamicCache:
    """A cache of its own with the keys and values of another, which may then be replaced here alone."""
    own = copy(cache)
    own.layers = [copy(layer) for layer in cache.layers]
    return own


def _joined(one: DynamicCache, two: DynamicCache, entries: int) -> DynamicCache:
    """The rows of two caches in one of so many entries. Layer by layer, so that only one lies in memory twice."""

    def together(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.cat([pad(part, (0, 0, 0, entries - part.shape[2])) for part in (a, b)])

    for mine, theirs in zip(_layers(one), _layers(two), strict=True):
        mine.keys, mine.values = together(mine.keys, theirs.keys), together(mine.values, theirs.values)
        theirs.keys = theirs.values = None
    return one


def _layers(cache: DynamicCache) -> list[Any]:
    """The layers that hold keys and values [rows, heads, entries, dim]; in some models a layer borrows another's."""
    layers: list[Any] = cache.layers
    return [layer for layer in layers if layer.get_seq_length()]
