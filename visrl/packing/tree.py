"""Token paths → prefix tree: every token that paths share is computed once.

Each token sees its ancestors only and keeps the position it has on its own path, so log-probabilities equal those of
separate sequences. The file knows token ids, positions and pictures; it knows no loss and no model. pack.py lays trees
out for a forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from visrl.models.encode import EncodedView, TokenPath, common_prefix


@dataclass(slots=True)
class Tree:
    """The prefix tree of some paths, laid out as one sequence in the order in which tokens were first met."""

    ids: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    views: list[EncodedView] = field(default_factory=list)
    paths: list[tuple[np.ndarray, TokenPath]] = field(default_factory=list)  # packed places of each path's tokens
    segments: list[tuple[int, int, np.ndarray]] = field(default_factory=list)  # new tokens [a, b) and their ancestors
    branches: list[int] = field(default_factory=list)  # the number of each path in the batch, from `grow`
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


def grow(groups: Sequence[Sequence[TokenPath]], image_token: int, *, pairs_only: bool = False) -> list[Tree]:
    """One tree per group of paths (an item, or all items of one picture); branches are numbered in their order.

    With `pairs_only` there is one tree per prompt: only the responses to it share anything.
    """
    trees: list[Tree] = []
    count = 0
    for group in groups:
        by_prompt: dict[object, Tree] = {}
        for path in group:
            prompt = (path.ids[: path.start].tobytes(), *(view.key for view in path.views)) if pairs_only else None
            tree = by_prompt.setdefault(prompt, Tree())
            tree.add(path, image_token)
            tree.branches.append(count)
            count += 1
        trees += by_prompt.values()
    return trees
