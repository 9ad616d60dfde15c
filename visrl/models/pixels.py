"""Image processors that take a smallest and a largest number of pixels (Qwen-VL), and the grids of images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image

from visrl.box import Size
from visrl.models.family import Grid, ImageInputs, PixelRange

PIXEL_LIMITS = ("shortest_edge", "longest_edge")  # as these processors call their limits, which are areas all the same
THINNEST = 200  # the ratio of sides from which on they refuse an image


def has_limits(image_processor: Any) -> bool:
    """Whether the limits of a processor's sizes are numbers of pixels: of those that cut images into merged patches."""
    size = getattr(image_processor, "size", None) or {}
    patches = all(getattr(image_processor, name, None) is not None for name in ("patch_size", "merge_size"))
    return patches and all(size.get(name) for name in PIXEL_LIMITS)


def limited_size(image_processor: Any, size: Size, limits: PixelRange) -> Size:
    """Width and height that the processor gives an image of `size`: whole merged patches, between the limits.

    Raises:
        ValueError: an image that is far too thin.
    """
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    low, high = (limits[name] for name in PIXEL_LIMITS)
    height, width = smart_resize(size[1], size[0], _merged_patch(image_processor), low, high)
    return width, height


def covering_limits(image_processor: Any, limits: Sequence[PixelRange]) -> PixelRange:
    """Limits under which every image that was sized under any of `limits` stays as it is.

    They are wider than the limits themselves: a side is rounded up or down to a whole number of merged patches, which
    makes a thin image larger, or smaller, than the limit it was sized by.
    """
    unit = _merged_patch(image_processor)
    low, high = (max(limit[name] for limit in limits) for name in PIXEL_LIMITS)
    # (h + unit)(w + unit) for h · w = low, at the thinnest shape that a processor takes.
    sides = (low * THINNEST) ** 0.5 + (low / THINNEST) ** 0.5
    both = unit**2, max(high, math.ceil(low + unit * sides + unit**2))
    return dict(zip(PIXEL_LIMITS, both, strict=True))


def limited_images(
    processor: Any, images: Sequence[Image.Image], limits: PixelRange, takes: Sequence[str]
) -> Iterator[tuple[ImageInputs, str, Grid, Size]]:
    """Of each image, preprocessed in one batch: what the model takes of it, the text that stands for it, its grid, and
    its size."""
    image_processor = processor.image_processor
    processed, placeholders = processor._process_images(list(images), size=limits)
    grids = processed["image_grid_thw"]
    pixels = torch.split(processed["pixel_values"], grids.prod(-1).tolist())
    patch, merge = image_processor.patch_size, image_processor.merge_size
    others = [name for name in takes if name != "pixel_values"]  # a row of each for an image
    for number, (grid, values, placeholder) in enumerate(zip(grids, pixels, placeholders, strict=True)):
        time, height, width = grid.tolist()
        # Copies: a part of the batch's tensor would keep all of it in memory.
        rows = {name: torch.as_tensor(processed[name])[number : number + 1].clone() for name in others}
        inputs = {"pixel_values": values.clone(), **rows}
        yield inputs, placeholder, (time, height // merge, width // merge), (width * patch, height * patch)


def grid_of(processor: Any, inputs: ImageInputs, tokens: int) -> Grid:
    """The grid in merged tokens of an image whose processor does not resize it by pixel limits: as its inputs say it,
    else all in a row."""
    if "image_grid_thw" not in inputs:
        return 1, 1, tokens
    time, height, width = inputs["image_grid_thw"].flatten().tolist()
    merge = getattr(processor.image_processor, "merge_size", 1)
    return time, height // merge, width // merge


def _merged_patch(image_processor: Any) -> int:
    """The side in pixels of what becomes one token."""
    return image_processor.patch_size * image_processor.merge_size
