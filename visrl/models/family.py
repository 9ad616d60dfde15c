"""What the rest of the code must know of a model family, and where the tokens of a packed call lie: what rows of the
table (families.py) and what trials find (derive.py) are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from visrl.models.found import Axis, Found
from visrl.models.tree_runs import Segment

# The grid of one image in merged tokens (time, height, width), as the language model sees it.
Grid = tuple[int, int, int]
# What a processor makes of images, by the names of the model's inputs.
ImageInputs = dict[str, torch.Tensor]
# A smallest and a largest number of pixels, by the names of `PIXEL_LIMITS`.
PixelRange = dict[str, int]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tokens of one packed forward call lie, for the masks of families that need more than ancestors.

    The ancestor mask `ancestors` [bins, 1, length, length] is true from a token to its ancestors and itself. [bins,
    length]: `depth` counts ancestors, `prompt` is true before the response, `block` numbers runs of image tokens and is
    −1 elsewhere. `segments` says where in the row, bins one after the other, the parts of each tree lie.
    """

    ids: torch.Tensor
    ancestors: torch.Tensor
    depth: torch.Tensor
    prompt: torch.Tensor
    block: torch.Tensor
    images: list[list[ImageInputs]]  # of each tree, in the order in which they lie
    segments: list[Segment]

    @property
    def all_images(self) -> list[ImageInputs]:
        """The images of all trees, in the order in which they lie."""
        return [image for tree in self.images for image in tree]


@dataclass(frozen=True, slots=True)
class Family:
    """What the rest of the code must know of a family.

    `positions` maps (ids, image token id, grids of the images in order) to positions [d, n]: d is 3 with M-RoPE, else
    1. `shares` says which branches of an item may share a prefix: "all", or only chosen and rejected of one prompt
    ("pairs"). With `row_per_prompt` every tree is a row of its own and only trees with as many images share a call.
    `inputs` maps a layout to what the model takes beside ids and positions: masks and images.
    """

    name: str
    positions: Callable[[np.ndarray, int, Sequence[Grid]], np.ndarray]
    codec: str
    inputs: Callable[[Layout, Family], dict[str, Any]]
    end_of_turn: str | None = None  # None: the tokenizer's end of sequence
    shares: Literal["all", "pairs"] = "all"
    row_per_prompt: bool = False
    takes: tuple[str, ...] = ("pixel_values",)  # what of a processor's output the model takes
    axis: int = 0  # along which images are joined
    pixel_limits: bool = False  # whether the image processor takes a smallest and largest number of pixels
    alone_differs: bool = False  # whether an image alone is cut otherwise than one among several
    chat_template: str | None = None  # for processors that come without one
    parts: tuple[str, str, str] = ("language_model", "vision_tower", "multi_modal_projector")  # of the model
    window: int | None = None  # tokens that sliding layers look back; set by `family_of`
    recurrent: str | None = None  # what the config calls layers that hand on a state; set by `family_of`
    chunk: int | None = None  # tokens in a chunk, which layers of chunks look back to the beginning of
    layers: tuple[str, ...] = ()  # kinds of attention layers, where each takes a mask of its own; by `family_of`
    masks_window: bool = False  # whether `inputs` masks what lies outside the window
    keeps_features: bool = True  # whether features of an image do not depend on what else is in its row
    note: str = ""
    found: Found | None = None  # what a trial found out (see probe.py)
    untried: str = ""  # why no trial holds an entry, a sentence's end
    plain: str = ""  # why its models take no prefix tree, a sentence's end; empty where they take one

    @property
    def cacheable(self) -> bool:
        """Whether a token sees its ancestors and nothing else, so that a KV cache holds what comes before it."""
        return not self.plain and (self.found.cached if self.found else self.inputs is causal)


# --- Images of a call, and the mask of most --------------------------------------------------------------------------


def join_images(family: Family, images: Sequence[ImageInputs]) -> ImageInputs:
    """The inputs of several images as one, in their order, smaller ones padded with zeros."""
    axes = dict(family.found.axes) if family.found else {}
    return {name: joined(images, name, axes.get(name, family.axis)) for name in family.takes} if images else {}


def joined(images: Sequence[ImageInputs], name: str, axis: Axis) -> torch.Tensor:
    """One input of several images along `axis`; "patches" are numbers of patches, which count on from image to image
    (−1 is none)."""
    tensors = [image[name] for image in images]
    if axis == "patches":
        patches = [0, *(image["pixel_values"].shape[:2].numel() for image in images[:-1])]
        before = torch.tensor(patches).cumsum(0).tolist()
        return torch.cat([torch.where(one >= 0, one + first, one) for one, first in zip(tensors, before, strict=True)])
    return _join(tensors, axis)


def _join(tensors: list[torch.Tensor], axis: int) -> torch.Tensor:
    axis = min(axis, tensors[0].dim() - 1) % tensors[0].dim()
    largest = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [big - size for size, big in zip(tensor.shape, largest, strict=True)]
        missing[axis] = 0
        if any(missing):
            tensor = torch.nn.functional.pad(tensor, [pad for more in reversed(missing) for pad in (0, more)])
        padded.append(tensor)
    return torch.cat(padded, dim=axis)


def causal(layout: Layout, family: Family) -> dict[str, Any]:
    """Its ancestors."""
    return {"attention_mask": layout.ancestors, **join_images(family, layout.all_images)}
