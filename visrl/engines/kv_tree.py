"""The trees of one batch with their keys and values, and the samples that are drawn from them side by side: where each
token lies, and what it may see. Nothing here draws a token or runs a model.
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

from visrl.packing.tree import Tree


@dataclass(slots=True)
class Forest:
    """The trees of one batch and their keys and values: one cache row per tree.

    `slots[b]` gives the cache slot of every token of tree b, in the order of the tree.
    """

    trees: dict[str, Tree]
    cache: DynamicCache
    slots: list[np.ndarray]
    length: int = 0

    @staticmethod
    def of(keys: Iterable[str]) -> Forest:
        """Empty trees of these names."""
        trees = {key: Tree() for key in keys}
        return Forest(trees, DynamicCache(), [np.empty(0, np.int64) for _ in trees])


@dataclass(slots=True)
class Field:
    """The samples that are being drawn, [trees, forks], and what each may see; it closes up as they end."""

    grid: np.ndarray  # the row that is drawn there; −1 where a tree has fewer samples than others
    alive: np.ndarray
    tokens: np.ndarray  # the last that was drawn
    visible: np.ndarray  # [trees, forks, slots]
    next_position: np.ndarray  # of `tokens`
    depth: int  # of a position
    cache: DynamicCache

    @staticmethod
    def of(groups: dict[str, list[int]], forest: Forest, places: dict[int, np.ndarray]) -> Field:
        """The samples of each tree, every one seeing the slots of its path (`places`); none has drawn a token yet."""
        shape = len(groups), max(len(members) for members in groups.values())
        grid, next_position = np.full(shape, -1), np.zeros(shape, dtype=np.int64)
        visible = np.zeros((*shape, forest.length), dtype=bool)
        depth = 0
        for b, (members, tree) in enumerate(zip(groups.values(), forest.trees.values(), strict=True)):
            depth = len(tree.positions[0])
            at_slot = np.zeros(forest.length, dtype=np.int64)
            at_slot[forest.slots[b]] = np.concatenate(tree.positions, axis=1).max(axis=0)
            for j, n in enumerate(members):
                grid[b, j] = n
                visible[b, j, places[n]] = True
                next_position[b, j] = at_slot[places[n]].max() + 1
        return Field(grid, grid >= 0, np.zeros_like(grid), visible, next_position, depth, forest.cache)

    @property
    def numbers(self) -> list[int]:
        """The rows being drawn, in the order of the field."""
        return self.grid[self.alive].tolist()

    @property
    def positions(self) -> np.ndarray:
        """[depth, trees, forks], of `tokens`"""
        return np.repeat(self.next_position[None], self.depth, axis=0)

    def put(self, tokens: dict[int, int]) -> None:
        """What was drawn for each row; those that are not named have ended."""
        for b, j in zip(*np.nonzero(self.alive), strict=True):
            n = int(self.grid[b, j])
            self.alive[b, j] = n in tokens
            self.tokens[b, j] = tokens.get(n, 0)

    def grow(self) -> None:
        """Give the token of every sample a slot, which that sample alone sees."""
        trees, forks = self.grid.shape
        own = np.broadcast_to(np.eye(forks, dtype=bool), (trees, forks, forks))
        self.visible = np.concatenate([self.visible, own], axis=2)

    def close_up(self) -> None:
        """Leave out trees and forks that have ended, once they are half of all.

        The forest's own cache is left as it is: the rows that stay are copied, which takes half its memory at most.
        """
        rows, columns = self.grid.shape
        trees = np.flatnonzero(self.alive.any(axis=1))
        forks = int(self.alive.sum(axis=1).max())
        self._keep(trees if 2 * len(trees) <= rows else np.arange(rows), forks if 2 * forks <= columns else columns)

    def join(self, other: Field) -> None:
        """Take in the samples of another field. What has ended is left out, and slots that nobody sees in time."""
        for field in (self, other):
            field._keep(np.flatnonzero(field.alive.any(axis=1)), int(field.alive.sum(axis=1).max()))
            field._give_up_slots()
        forks, slots = np.maximum(self.visible.shape[1:], other.visible.shape[1:])

        def joined(one: np.ndarray, two: np.ndarray, nothing: int = 0) -> np.ndarray:
            wide = [_widened(a, 1, forks, nothing) for a in (one, two)]
            return np.concatenate([_widened(a, 2, slots, nothing) if a.ndim == 3 else a for a in wide])

        self.grid = joined(self.grid, other.grid, -1)
        self.alive, self.tokens = joined(self.alive, other.alive), joined(self.tokens, other.tokens)
        self.visible = joined(self.visible, other.visible)
        self.next_position = joined(self.next_position, other.next_position)
        self.cache = _joined(self.cache, other.cache, int(slots))

    def _keep(self, trees: np.ndarray, forks: int) -> None:
        """Leave out all trees but these, and of each all but its first forks; those that go on come first."""
        rows, columns = self.grid.shape
        if (len(trees), forks) == (rows, columns):
            return
        # A fork may move, for its slots are known by what it sees.
        kept = trees[:, None], np.argsort(~self.alive[trees], axis=1, kind="stable")[:, :forks]
        self.grid, self.alive, self.tokens = self.grid[kept], self.alive[kept], self.tokens[kept]
        self.visible, self.next_position = self.visible[kept], self.next_position[kept]
        if len(trees) < rows:
            self.cache = _copied(self.cache)
            self.cache.batch_select_indices(torch.from_numpy(trees))

    def _give_up_slots(self) -> None:
        """Leave out slots once half of them are seen by nobody: what a tree's samples see moves to its first slots."""
        seen = (self.visible & self.alive[..., None]).any(axis=1)
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


def _joined(one: DynamicCache, two: DynamicCache, slots: int) -> DynamicCache:
    """The rows of two caches in one of so many slots. Layer by layer, so that only one lies in memory twice."""

    def together(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.cat([pad(part, (0, 0, 0, slots - part.shape[2])) for part in (a, b)])

    for mine, theirs in zip(_layers(one), _layers(two), strict=True):
        mine.keys, mine.values = together(mine.keys, theirs.keys), together(mine.values, theirs.values)
        theirs.keys = theirs.values = None
    return one


def _layers(cache: DynamicCache) -> list[Any]:
    """The layers that hold keys and values [rows, heads, slots, dim]; some models have layers that borrow another's."""
    layers: list[Any] = cache.layers
    return [layer for layer in layers if layer.get_seq_length()]
