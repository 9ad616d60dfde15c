"""The trees of one batch with their keys and values, and the samples that are drawn from them side by side: where each
token lies, and what it may see. Nothing here draws a token or runs a model.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache

from visrl.train.tree import Tree


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
    visible: np.ndarray  # [trees, forks, slots]
    next_position: np.ndarray  # of a sample's first token
    cache: DynamicCache

    @staticmethod
    def of(groups: dict[str, list[int]], forest: Forest, places: dict[int, np.ndarray]) -> Field:
        """The samples of each tree, every one seeing the slots of its path (`places`)."""
        shape = len(groups), max(len(members) for members in groups.values())
        grid, next_position = np.full(shape, -1), np.zeros(shape, dtype=np.int64)
        visible = np.zeros((*shape, forest.length), dtype=bool)
        for b, (members, tree) in enumerate(zip(groups.values(), forest.trees.values(), strict=True)):
            at_slot = np.zeros(forest.length, dtype=np.int64)
            at_slot[forest.slots[b]] = np.concatenate(tree.positions, axis=1).max(axis=0)
            for j, n in enumerate(members):
                grid[b, j] = n
                visible[b, j, places[n]] = True
                next_position[b, j] = at_slot[places[n]].max() + 1
        return Field(grid, grid >= 0, visible, next_position, forest.cache)

    def grow(self) -> None:
        """Give the next token of every sample a slot, which that sample alone sees."""
        trees, forks = self.grid.shape
        own = np.broadcast_to(np.eye(forks, dtype=bool), (trees, forks, forks))
        self.visible = np.concatenate([self.visible, own], axis=2)

    def close_up(self, ids: np.ndarray) -> np.ndarray:
        """Leave out trees and forks that have ended, once they are half of all; what stays of `ids` [trees, forks].

        The forest's own cache is left as it is: the rows that stay are copied, which takes half its memory at most.
        """
        rows, columns = self.grid.shape
        trees = np.flatnonzero(self.alive.any(axis=1))
        if 2 * len(trees) > rows:
            trees = np.arange(rows)
        forks = int(self.alive.sum(axis=1).max())
        if 2 * forks > columns:
            forks = columns
        if (len(trees), forks) == (rows, columns):
            return ids
        # Forks that go on come first; a fork may move, for its slots are known by what it sees.
        kept = trees[:, None], np.argsort(~self.alive[trees], axis=1, kind="stable")[:, :forks]
        self.grid, self.alive, self.visible = self.grid[kept], self.alive[kept], self.visible[kept]
        self.next_position = self.next_position[kept]
        if len(trees) < rows:
            self.cache = _rows_of(self.cache, trees)
        return ids[kept]


def _rows_of(cache: DynamicCache, rows: np.ndarray) -> DynamicCache:
    """A cache of its own that holds some rows of another."""
    chosen = copy(cache)
    chosen.layers = [copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(torch.from_numpy(rows))
    return chosen
