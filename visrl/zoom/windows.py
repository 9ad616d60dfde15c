"""From the numbers of a call to a window of pixels, and the size at which its crop is shown. Each protocol's own rule.

A window is in whole pixels of the picture that it is cut from; `shown` is the size that the model's processor gives
that picture, in which some protocols' coordinates are. Faults of a protocol's published code are off here unless they
are asked for by name (`ZoomProtocol.faults`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from visrl.box import Corners, Size, Window


class WindowError(ValueError):
    """Numbers that are no window of the picture; the message is what the protocol replies."""


@dataclass(frozen=True, slots=True)
class ShownSize:
    """How a crop is brought to size before it is shown: sides in multiples of `factor`, area within bounds."""

    factor: int
    min_pixels: int
    max_pixels: int
    resample: Image.Resampling = Image.Resampling.BICUBIC

    def __call__(self, crop: Image.Image) -> Image.Image:
        """`crop` at its size.

        Raises:
            WindowError: it is thinner than any model takes.
        """
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        try:
            height, width = smart_resize(crop.height, crop.width, self.factor, self.min_pixels, self.max_pixels)
        except ValueError as error:
            raise WindowError(str(error)) from error
        return crop if crop.size == (width, height) else crop.resize((width, height), self.resample)


def as_it_is(crop: Image.Image) -> Image.Image:
    """A crop that the model's processor alone brings to size."""
    return crop


def within_area(crop: Image.Image, low: int = 40_000, high: int = 2_000_000, side: int = 28) -> Image.Image:
    """Mini-o3: the area brought into bounds with the shape kept, no side under `side`."""
    scale = 1.0
    area = crop.width * crop.height
    if area > high:
        scale = math.sqrt(high / area)
    elif area < low:
        scale = math.sqrt(low / area)
    width, height = (max(side, int(length * scale)) for length in crop.size)
    return crop if crop.size == (width, height) else crop.resize((width, height), Image.Resampling.LANCZOS)


def twice_as_large(crop: Image.Image, factor: int = 28, high: int = 3840**2) -> Image.Image:
    """Chain-of-Focus: both sides doubled, to multiples of `factor`; no further than the area up to which its scripts
    show a picture, which is more than its model's processor takes."""
    scale = min(2.0, max(1.0, math.sqrt(high / (crop.width * crop.height))))
    width, height = (max(factor, round(scale * length / factor) * factor) for length in crop.size)
    return crop.resize((width, height), Image.Resampling.LANCZOS)


def to_square(side: int) -> Callable[[Image.Image], Image.Image]:
    """ViGoRL: the crop stretched to a square."""
    return lambda crop: crop.resize((side, side), Image.Resampling.LANCZOS)


# --- Windows ----------------------------------------------------------------------------------------------------------


def _scaled(numbers: Corners, size: Size, shown: Size) -> Corners:
    """Pixels of the picture as it is shown, in pixels of the picture."""
    x, y = size[0] / shown[0], size[1] / shown[1]
    return numbers[0] * x, numbers[1] * y, numbers[2] * x, numbers[3] * y


def _clamped(corners: Corners, size: Size) -> Corners:
    x0, y0, x1, y1 = corners
    return max(0.0, x0), max(0.0, y0), min(float(size[0]), x1), min(float(size[1]), y1)


def deepeyes_window(numbers: Corners, size: Size, shown: Size) -> Window:
    """Clamped to the picture; corners in order, sides over 30 pixels, an aspect ratio of at most 100."""
    x0, y0, x1, y1 = _clamped(_scaled(numbers, size, shown), size)
    width, height = x1 - x0, y1 - y0
    if width <= 0 or height <= 0 or max(width, height) / min(width, height) > 100 or min(width, height) <= 30:
        raise WindowError("Error: ZOOM IN ARGUMENTS ARE INVALID")
    return round(x0), round(y0), round(x1), round(y1)


def mini_o3_window(numbers: Corners, size: Size, shown: Size) -> Window:
    """Fractions of the picture, cut down to whole pixels and clamped to the last of them; aspect ratio under 200."""
    width, height = size
    x0, x1 = (min(max(int(value * width), 0), width - 1) for value in (numbers[0], numbers[2]))
    y0, y1 = (min(max(int(value * height), 0), height - 1) for value in (numbers[1], numbers[3]))
    if x0 > x1 - 1 or y0 > y1 - 1:
        raise WindowError(f"the box {list(numbers)} has no pixel in it")
    if max(x1 - x0, y1 - y0) / min(x1 - x0, y1 - y0) >= 200:
        raise WindowError(f"the box {list(numbers)} has an aspect ratio of 200 or more")
    return x0, y0, x1, y1


def pixel_reasoner_window(numbers: Corners, size: Size, shown: Size) -> Window:
    """Fractions where all four are below 1, else pixels; a tenth of the picture added on each side."""
    width, height = size
    x0, y0, x1, y1 = numbers if max(numbers) < 1 else (
        numbers[0] / width, numbers[1] / height, numbers[2] / width, numbers[3] / height
    )  # fmt: skip
    x0, y0, x1, y1 = max(0.0, x0 - 0.1), max(0.0, y0 - 0.1), min(1.0, x1 + 0.1), min(1.0, y1 + 0.1)
    window = int(x0 * width), int(y0 * height), int(x1 * width), int(y1 * height)
    sides = window[2] - window[0], window[3] - window[1]
    if min(sides) <= 28:
        raise WindowError(f"the crop of {sides[0]} x {sides[1]} pixels is too small: its sides must be above 28")
    return window


def chain_of_focus_window(numbers: Corners, size: Size, shown: Size) -> Window:
    """Inside the picture as it is shown; enlarged half as much again about its middle, clipped."""
    x0, y0, x1, y1 = numbers
    if not (0 <= x0 < x1 <= shown[0] and 0 <= y0 < y1 <= shown[1]):
        raise WindowError(f"Invalid bounding box: {list(numbers)}")
    x, y, half_width, half_height = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) * 0.75, (y1 - y0) * 0.75
    wide = _clamped((x - half_width, y - half_height, x + half_width, y + half_height), shown)
    left, top, right, bottom = (int(value) for value in _scaled(wide, size, shown))
    return left, top, max(right, left + 1), max(bottom, top + 1)


def qwen3vl_window(numbers: Corners, size: Size, shown: Size) -> Window:
    """Thousandths of the picture, clamped; a side under 32 pixels is grown about the middle, the other with it."""
    thousandths = (numbers[0] / 1000, numbers[1] / 1000, numbers[2] / 1000, numbers[3] / 1000)
    x0, y0, x1, y1 = _clamped(_scaled(thousandths, size, (1, 1)), size)
    width, height = x1 - x0, y1 - y0
    if width <= 0 or height <= 0:
        raise WindowError(f"Tool Execution Error the box {list(numbers)} is empty")
    if min(width, height) < 32:
        ratio = 32 / min(width, height)
        half_width, half_height = math.ceil(width * ratio / 2), math.ceil(height * ratio / 2)
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        grown = (
            math.floor(x - half_width),
            math.floor(y - half_height),
            math.ceil(x + half_width),
            math.ceil(y + half_height),
        )
        x0, y0, x1, y1 = _clamped(grown, size)
        if x1 - x0 <= 32 or y1 - y0 <= 32:
            raise WindowError(f"Tool Execution Error the box {list(numbers)} is too small")
    return round(x0), round(y0), round(x1), round(y1)


def point_window(offset: int) -> Callable[[Corners, Size, Size], Window]:
    """ViGoRL: the square of `offset` pixels each way about a point, clipped to the picture."""

    def window(numbers: tuple[float, ...], size: Size, shown: Size) -> Window:
        x, y = numbers[0] * size[0] / shown[0], numbers[1] * size[1] / shown[1]
        left, top = max(0, round(x - offset)), max(0, round(y - offset))
        right, bottom = min(size[0], round(x + offset)), min(size[1], round(y + offset))
        if left >= right or top >= bottom:
            raise WindowError(f"the point {list(numbers)} lies outside the picture")
        return left, top, right, bottom

    return window
