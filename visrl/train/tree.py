"""Token paths → prefix tree → one packed sequence: every token that paths share is computed once.

Each token sees its ancestors only and keeps the position it has on its own path, so log-probabilities equal those of
separate sequences. The file knows token ids, positions and pictures; it knows no loss and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from visrl.models.encode import EncodedView, TokenPath, common_prefix

BUCKET = 64  # packed lengths are multiples of this, so that few distinct shapes occur
ATTENTION_TOKENS = 600  # the bin length at which attention costs about as much as the rest of a small layer


@dataclass(slots=True)
class Tree:
    """The prefix tree of some paths, laid out as one sequence in the order in which tokens were first met."""

    ids: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    views: list[EncodedView] = field(default_factory=list)
    paths: list[tuple[np.ndarray, TokenPath]] = field(default_factory=list)  # packed places of each path's tokens
    segments: list[tuple[int, int, np.ndarray]] = field(default_factory=list)  # new tokens [a, b) and their ancestors
    size: int = 0
    _keys: list[np.ndarray] = field(default_factory=list)
    _view_numbers: dict[str, int] = field(default_factory=dict)

    def add(self, path: TokenPath, image_token: int, *, recompute_last: bool = False) -> None:
        """Merge `path` in at its longest prefix of equal tokens and equal pictures.

        With `recompute_last` its last token is always new, so that a forward pass over new tokens predicts what
        follows even where the whole path was known.
        """
        keys = self._identify(path, image_token)
        shared, host = 0, None
        for number, other in enumerate(self._keys):
            length = common_prefix(keys, other)
            if length > shared:
                shared, host = length, number
        shared = min(shared, len(path.ids) - 1) if recompute_last else shared
        ancestors = self.paths[host][0][:shared] if host is not None else np.empty(0, dtype=np.int64)
        fresh = len(path.ids) - shared
        places = np.concatenate([ancestors, np.arange(self.size, self.size + fresh)])
        self.segments.append((self.size, self.size + fresh, ancestors))
        self.ids.append(path.ids[shared:])
        self.positions.append(path.positions[:, shared:])
        self.views.extend(self._fresh_views(path, image_token, shared))
        self.paths.append((places, path))
        self._keys.append(keys)
        self.size += fresh

    def _identify(self, path: TokenPath, image_token: int) -> np.ndarray:
        """The path's ids, with each picture token replaced by a number of its own picture and place."""
        keys = path.ids.copy()
        places = np.flatnonzero(keys == image_token)
        expected = sum(view.tokens for view in path.views)
        if len(places) != expected:
            raise ValueError(f"{len(places)} image tokens for {expected} image features in one path")
        done = 0
        for view in path.views:
            number = self._view_numbers.setdefault(view.key, len(self._view_numbers))
            keys[places[done : done + view.tokens]] = -1 - (number << 24) - np.arange(view.tokens)
            done += view.tokens
        return keys

    @staticmethod
    def _fresh_views(path: TokenPath, image_token: int, shared: int) -> list[EncodedView]:
        """The pictures whose tokens lie behind the shared prefix."""
        before = int((path.ids[:shared] == image_token).sum())
        views, done = [], 0
        for view in path.views:
            if done >= before:
                views.append(view)
            elif done + view.tokens > before:
                raise ValueError("a prefix ends inside a picture")
            done += view.tokens
        return views


@dataclass(slots=True)
class Packed:
    """Trees side by side, ready for a model's own forward; N = bins × bin length, T response tokens, K logits.

    `mask` [bins, 1, length, length] is true where a token may look. Row `row[t]` of the kept logits predicts response
    token `target[t]`, which belongs to branch `branch[t]`.
    """

    input_ids: torch.Tensor  # [1, N]
    position_ids: torch.Tensor  # [d, 1, N], or [1, N] where d is 1
    mask: torch.Tensor
    pixel_values: torch.Tensor | None
    image_grid_thw: torch.Tensor | None
    keep: torch.Tensor  # [K] places whose logits are needed
    row: torch.Tensor  # [T]
    target: torch.Tensor  # [T]
    branch: torch.Tensor  # [T]
    branches: int
    tokens: int  # of the trees, padding left out
    naive_tokens: int  # of the same paths as separate sequences

    def to(self, device: torch.device | str) -> Packed:
        """This batch with every tensor on `device`."""
        moved = {name: getattr(self, name) for name in self.__slots__}
        for name, value in moved.items():
            if isinstance(value, torch.Tensor):
                moved[name] = value.to(device, non_blocking=True)
        return Packed(**moved)


def grow(groups: Sequence[Sequence[TokenPath]], image_token: int) -> list[Tree]:
    """One tree per group of paths (an item, or all items of one picture)."""
    trees = []
    for group in groups:
        tree = Tree()
        for path in group:
            tree.add(path, image_token)
        trees.append(tree)
    return trees


def pack(trees: Sequence[Tree], *, bin_length: int = 512, pad_id: int = 0) -> Packed:
    """Lay `trees` into bins of equal length; branches are numbered in the order of the trees and their paths.

    A bin holds as many trees as fit `bin_length`; a longer tree makes all bins as long as it needs.
    """
    length, offsets, bins = _choose_bins([tree.size for tree in trees], bin_length)
    total = bins * length
    depth = trees[0].positions[0].shape[0]
    ids = np.full(total, pad_id, dtype=np.int64)
    positions = np.zeros((depth, total), dtype=np.int64)
    mask = torch.zeros(bins, 1, length, length, dtype=torch.bool)
    mask[:, 0].diagonal(dim1=1, dim2=2).fill_(True)  # padding sees itself: no row is empty
    predictors, targets, branches = [], [], []
    branch = 0
    for tree, offset in zip(trees, offsets, strict=True):
        ids[offset : offset + tree.size] = np.concatenate(tree.ids)
        positions[:, offset : offset + tree.size] = np.concatenate(tree.positions, axis=1)
        _fill_mask(mask[offset // length, 0], tree, offset % length)
        for places, path in tree.paths:
            predictors.append(offset + places[path.start - 1 : -1])
            targets.append(path.ids[path.start :])
            branches.append(np.full(len(path.ids) - path.start, branch))
            branch += 1
    keep, row = np.unique(np.concatenate(predictors), return_inverse=True)
    views = [view for _, tree in sorted(zip(offsets, trees, strict=True), key=lambda p: p[0]) for view in tree.views]
    position_ids = torch.from_numpy(positions)
    return Packed(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=position_ids if depth == 1 else position_ids[:, None],
        mask=mask,
        pixel_values=torch.cat([view.pixel_values for view in views]) if views else None,
        image_grid_thw=torch.cat([view.image_grid_thw for view in views]) if views else None,
        keep=torch.from_numpy(keep),
        row=torch.from_numpy(row),
        target=torch.from_numpy(np.concatenate(targets)),
        branch=torch.from_numpy(np.concatenate(branches)),
        branches=branch,
        tokens=sum(tree.size for tree in trees),
        naive_tokens=sum(len(path.ids) for tree in trees for _, path in tree.paths),
    )


def _choose_bins(sizes: Sequence[int], limit: int) -> tuple[int, list[int], int]:
    """Bin length, offsets and bin count that cost least: padding costs, and so does attention in long bins."""
    longest, total = max(sizes), sum(sizes)
    top = max(longest, min(limit, total))
    best = None
    for length in range(-(-longest // BUCKET) * BUCKET, -(-top // BUCKET) * BUCKET + 1, BUCKET):
        offsets, bins = _place(sizes, length)
        cost = bins * length * (1 + length / ATTENTION_TOKENS)
        if best is None or cost < best[0]:
            best = (cost, length, offsets, bins)
    assert best is not None
    return best[1:]


def _place(sizes: Sequence[int], length: int) -> tuple[list[int], int]:
    """Offsets of trees in bins of `length`, longest first into the first bin with room, and how many bins."""
    free: list[int] = []
    offsets = [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        size = sizes[number]
        home = next((b for b, room in enumerate(free) if room >= size), len(free))
        if home == len(free):
            free.append(length)
        offsets[number] = home * length + length - free[home]
        free[home] -= size
    return offsets, len(free)


def _fill_mask(mask: torch.Tensor, tree: Tree, offset: int) -> None:
    """Let every token of `tree` see its ancestors and itself; `mask` is [length, length]."""
    for first, last, ancestors in tree.segments:
        a, b = offset + first, offset + last
        mask[a:b, a:b] = torch.ones(b - a, b - a, dtype=torch.bool).tril_()
        if len(ancestors):
            mask[a:b, torch.from_numpy(offset + ancestors)] = True
