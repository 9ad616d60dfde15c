"""Positions of tokens on their path: by depth, or in three dimensions where images spread over their grid (M-RoPE)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from visrl.models.family import Grid


def mrope_positions(ids: np.ndarray, image_token: int, grids: Sequence[Grid]) -> np.ndarray:
    """Positions [3, n] (time, height, width) of the Qwen-VL families: text counts on, an image spreads over its grid.

    Equal to the model's own `get_rope_index` (tested), without its per-token Python loop.
    """
    positions = np.empty((3, len(ids)), dtype=np.int64)
    here = start = 0
    places = np.flatnonzero(ids == image_token)
    seen = 0
    for time, height, width in grids:
        first = int(places[seen])
        text = first - here
        positions[:, here:first] = start + np.arange(text)
        start += text
        count = time * height * width
        t, h, w = np.unravel_index(np.arange(count), (time, height, width))
        positions[:, first : first + count] = start + np.stack([t, h, w])
        start += max(height, width)
        here = first + count
        seen += count
    positions[:, here:] = start + np.arange(len(ids) - here)
    return positions


def depth_positions(ids: np.ndarray, image_token: int, grids: Sequence[Grid]) -> np.ndarray:
    """Positions [1, n]: the depth of each token on its path."""
    return np.arange(len(ids), dtype=np.int64)[None]
