"""Positions as a model's own method finds them (`get_rope_index`): what a trial holds `positions.mrope_positions`
against, which is faster, and what is taken where images lie otherwise.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from visrl.models.masks import marked
from visrl.models.small import small_model

Method = Callable[..., Any]


def method_of(model: Any) -> Method | None:
    """The model's method that finds positions of more than one dimension; None where it counts tokens."""
    return getattr(model, "get_rope_index", None) or getattr(getattr(model, "model", None), "get_rope_index", None)


def method_without_weights(config: Any) -> Method | None:
    """`method_of` a model of a config that has no weights."""
    with torch.device("meta"):
        return method_of(small_model(config, narrow=True))


def found_by(
    method: Method, ids: np.ndarray, image_ids: tuple[int, ...], images: Mapping[str, torch.Tensor]
) -> np.ndarray:
    """Positions [3, n] of one sequence `ids` [n] that shows `images`, whose tokens are `image_ids`."""
    row = torch.from_numpy(ids)[None]
    known = {
        "input_ids": row,
        "attention_mask": torch.ones_like(row),
        "mm_token_type_ids": marked(row, image_ids),
        **images,
    }
    names = inspect.signature(method).parameters
    positions, _ = method(**{name: value for name, value in known.items() if name in names})
    return positions[:, 0].numpy()
