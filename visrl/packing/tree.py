"""Token sequences → prefix tree: tokens that sequences share from their beginning are there, and computed, once.

Each token sees its ancestors only and keeps the position it has in its own sequence, so log-probabilities equal those
of separate sequences. Training packs the tree of an item (pack.py); decoding keeps the tree of a batch beside its KV
cache (engines/kv_tree.py). The file knows token ids, positions and images; it knows no loss and no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from visrl.conversation import View
from visrl.models.encode import EncodedView, TokenPath, common_prefix


@dataclass(slots=True)
class PrefixTree:
    """The prefix tree of some paths, as one packed sequence in the order in which tokens were first met.

    The paths 1 2 3 and 1 2 4 5 make `ids` 1 2 3 4 5; the places of their tokens in it are 0 1 2 and 0 1 3 4. There are
    two segments: [0, 3) without ancestors, and [3, 5), whose ancestors are at 0 and 1.
    """

    ids: list[np.ndarray] = field(default_factory=list)  # of each segment
    positions: list[np.ndarray] = field(default_factory=list)  # of each segment, [d, n]
    views: list[EncodedView] = field(default_factory=list)  # the images, in the order of their tokens
    paths: list[tuple[np.ndarray, TokenPath]] = field(default_factory=list)  # each with the places of its tokens
    segments: list[tuple[int, int, np.ndarray]] = field(default_factory=list)  # first, last + 1, places of ancestors
    branches: list[int] = field(default_factory=list)  # the number of each path in the batch, from `prefix_trees`
    size: int = 0
    _keys: list[np.ndarray] = field(default_factory=list)
    _view_numbers: dict[str, int] = field(default_factory=dict)

    def add(self, path: TokenPath, image_token: int, *, recompute_last: bool = False) -> None:
        """Merge `path` in at its longest prefix of equal tokens and equal images.

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
        """The path's ids, with each image token replaced by a number of its own image and place in it."""
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
        """The images whose tokens lie behind the shared prefix."""
        before = int((path.ids[:shared] == image_token).sum())
        views, done = [], 0
        for view in path.views:
            if done >= before:
                views.append(view)
            elif done + view.tokens > before:
                raise ValueError("a prefix ends inside a picture")
            done += view.tokens
        return views


def group_by_image(views: Mapping[int, Sequence[View | EncodedView]]) -> dict[str, list[int]]:
    """The numbers of prompts, given with the images of each, together where they show the same image first: what may
    share a prefix tree. A prompt without images stands by itself."""
    groups: dict[str, list[int]] = {}
    for number, shown in views.items():
        groups.setdefault(shown[0].key if shown else f"prompt {number}", []).append(number)
    return groups


def prefix_trees(
    groups: Sequence[Sequence[TokenPath]], image_token: int, *, pairs_only: bool = False
) -> list[PrefixTree]:
    """One tree per group of paths (an item, or all items of one image); branches are numbered in their order.

    With `pairs_only` there is one tree per prompt: only the responses to it share anything.
    """
    trees: list[PrefixTree] = []
    count = 0
    for group in groups:
        by_prompt: dict[object, PrefixTree] = {}
        for path in group:
            prompt = (path.ids[: path.start].tobytes(), *(view.key for view in path.views)) if pairs_only else None
            tree = by_prompt.setdefault(prompt, PrefixTree())
            tree.add(path, image_token)
            tree.branches.append(count)
            count += 1
        trees += by_prompt.values()
    return trees
