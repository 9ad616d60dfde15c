"""What differs between model families: positions, ends of turns, box codec. The only file that tells models apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# The grid of one picture in merged tokens (time, height, width), as the language model sees it.
Grid = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Family:
    """What the rest of the code must know of a family.

    `positions` maps (ids, image token id, grids of the pictures in order) to positions [d, n]. `shares` says which
    branches of an item may share a prefix: "all", or only chosen and rejected of one step ("pairs").
    """

    name: str
    positions: Callable[[np.ndarray, int, Sequence[Grid]], np.ndarray]
    codec: str
    end_of_turn: str | None = None  # None: the tokenizer's end of sequence


def mrope_positions(ids: np.ndarray, image_token: int, grids: Sequence[Grid]) -> np.ndarray:
    """Positions [3, n] (time, height, width) of the Qwen-VL families: text counts on, a picture spreads over its grid.

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


FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family("qwen2_vl", mrope_positions, codec="qwen2_vl", end_of_turn="<|im_end|>"),
    "qwen2_5_vl": Family("qwen2_5_vl", mrope_positions, codec="qwen2_5_vl", end_of_turn="<|im_end|>"),
}


def family_of(config: Any) -> Family:
    """The family of a model's config.

    Raises:
        ValueError: a family that is not known here.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(f"the model type {config.model_type!r} is not supported; known: {', '.join(sorted(FAMILIES))}")
    return family


def language_model(model: torch.nn.Module) -> torch.nn.Module:
    """The text decoder inside a vision-language model, through any adapter wrapped around it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.model.language_model


def vision_tower(model: torch.nn.Module) -> torch.nn.Module:
    """The vision tower (with its projector where that is part of it)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.model.visual
