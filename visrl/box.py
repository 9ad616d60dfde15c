"""Boxes: the only home of box arithmetic, box text and crop windows.

A `Box` is always in fractions of the original image. Text exists only at the edge: a codec turns a box into the text
that a model family was trained on, and back, bound to the size of the original and to the size the processor gave it.
Nothing here knows about models, tensors or files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Size = tuple[int, int]  # width, height in pixels
Window = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the original

BoxFault = Literal["no_box", "count", "not_a_number", "inverted", "outside", "empty", "more_than_one"]
CropRule = Literal["exact", "margin", "viscot_square"]

MIN_CROP_SIDE = 28  # px: one merged patch of the Qwen2-VL family
MAX_CROP_ASPECT = 200  # the Qwen2-VL family's processors refuse more
VISCOT_HALF_SIDE = 112  # px: Visual-CoT's crop is a square of at least 224 px
MARGIN = 0.1  # of the box's own width and height, added on each side by the crop rule "margin"


class BoxError(ValueError):
    """A text or four numbers that are no box; `fault` says why in one word, the message in a sentence."""

    def __init__(self, fault: BoxFault, message: str) -> None:
        super().__init__(message)
        self.fault: BoxFault = fault


@dataclass(frozen=True, slots=True)
class Box:
    """A box in fractions of the original image: 0 ≤ x0 < x1 ≤ 1 and 0 ≤ y0 < y1 ≤ 1.

    Raises:
        BoxError: the numbers are inverted, empty or outside.
    """

    x0: float
    y0: float
    x1: float
    y1: float

    def __post_init__(self) -> None:
        fault = box_fault(self.x0, self.y0, self.x1, self.y1)
        if fault is not None:
            raise BoxError(fault, f"the box {self.as_list()} is {fault}: it must be 0 ≤ x0 < x1 ≤ 1, 0 ≤ y0 < y1 ≤ 1")

    @property
    def width(self) -> float:
        return self.x1 - self.x0

    @property
    def height(self) -> float:
        return self.y1 - self.y0

    @property
    def area(self) -> float:
        return self.width * self.height

    @property
    def center(self) -> tuple[float, float]:
        return (self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2

    def as_list(self) -> list[float]:
        return [self.x0, self.y0, self.x1, self.y1]

    def to_pixels(self, size: Size) -> tuple[float, float, float, float]:
        """The corners in pixels of an image of `size` (width, height)."""
        width, height = size
        return self.x0 * width, self.y0 * height, self.x1 * width, self.y1 * height

    @staticmethod
    def from_pixels(corners: Iterable[float], size: Size) -> Box:
        """The box with these pixel corners (x0, y0, x1, y1) in an image of `size` (width, height)."""
        x0, y0, x1, y1 = corners
        width, height = size
        return Box(x0 / width, y0 / height, x1 / width, y1 / height)


def box_fault(x0: float, y0: float, x1: float, y1: float) -> BoxFault | None:
    """Why these four fractions are not a box, or None where they are one."""
    if not all(abs(value) < float("inf") for value in (x0, y0, x1, y1)):
        return "not_a_number"
    if x0 > x1 or y0 > y1:
        return "inverted"
    if x0 == x1 or y0 == y1:
        return "empty"
    if min(x0, y0) < 0 or max(x1, y1) > 1:
        return "outside"
    return None


def overlap(a: Box, b: Box) -> float:
    """The area that two boxes share, in fractions of the image."""
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(0.0, width) * max(0.0, height)


def iou(a: Box, b: Box) -> float:
    """Intersection over union, in [0, 1]."""
    shared = overlap(a, b)
    return shared / (a.area + b.area - shared)


def enclosing(boxes: Iterable[Box]) -> Box:
    """The smallest box around all of `boxes` (Visual-CoT merges several boxes like this)."""
    corners = [box.as_list() for box in boxes]
    return Box(
        min(c[0] for c in corners), min(c[1] for c in corners), max(c[2] for c in corners), max(c[3] for c in corners)
    )


# --- Crop windows ---------------------------------------------------------------------------------------------------


def crop_window(box: Box, size: Size, rule: CropRule = "exact") -> Window:
    """The pixel window that is cropped for `box` in an image of `size`: every crop of the project comes from here.

    "exact" is the box, rounded outward, and enlarged where needed to 28 px a side and an aspect ratio under 200;
    "margin" is the same with a tenth of the box added on each side; "viscot_square" is the published protocol's
    square of at least 224 px, shifted inside the image.
    """
    width, height = size
    x0, y0, x1, y1 = box.to_pixels(size)
    if rule == "viscot_square":
        half = max((x1 - x0) / 2, (y1 - y0) / 2, VISCOT_HALF_SIDE)
        left, right = _shifted_inside((x0 + x1) / 2 - half, (x0 + x1) / 2 + half, width)
        top, bottom = _shifted_inside((y0 + y1) / 2 - half, (y0 + y1) / 2 + half, height)
        return left, top, right, bottom
    if rule == "margin":
        dx, dy = MARGIN * (x1 - x0), MARGIN * (y1 - y0)
        x0, y0, x1, y1 = max(0.0, x0 - dx), max(0.0, y0 - dy), min(width, x1 + dx), min(height, y1 + dy)
    min_width = max(MIN_CROP_SIDE, (y1 - y0) / (MAX_CROP_ASPECT - 1))
    min_height = max(MIN_CROP_SIDE, (x1 - x0) / (MAX_CROP_ASPECT - 1))
    left, right = _at_least(x0, x1, min_width, width)
    top, bottom = _at_least(y0, y1, min_height, height)
    return left, top, right, bottom


def _at_least(low: float, high: float, minimum: float, limit: int) -> tuple[int, int]:
    """[low, high] widened around its middle to `minimum`, shifted inside [0, limit], rounded outward to pixels."""
    if high - low < minimum:
        middle = (low + high) / 2
        low, high = middle - minimum / 2, middle + minimum / 2
    return _shifted_inside(low, high, limit)


def _shifted_inside(low: float, high: float, limit: int) -> tuple[int, int]:
    if low < 0:
        low, high = 0.0, high - low
    if high > limit:
        low, high = low - (high - limit), float(limit)
    # 1e-6 px forgives the floating-point error of fractions that stand for whole pixels.
    return max(0, int(low + 1e-6)), min(limit, -int(-(high - 1e-6) // 1))


# --- Codecs ---------------------------------------------------------------------------------------------------------

_NUMBER = r"-?\d+(?:\.\d+)?"
_FOUR = re.compile(rf"\[\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\]")


@dataclass(frozen=True, slots=True)
class Codec:
    """How one model family writes a box: `format` and `parse` are bound to the sizes given at each call.

    `original` is the size of the picture as it lies on disk, `processed` the size that the processor gave it.
    """

    name: str
    format: Callable[[Box, Size, Size], str]
    parse: Callable[[str, Size, Size], Box]


def _format_visrl(box: Box, original: Size, processed: Size) -> str:
    return "[" + ", ".join(f"{value:.3f}" for value in box.as_list()) + "]"


def _parse_visrl(text: str, original: Size, processed: Size) -> Box:
    found = _FOUR.findall(text)
    if not found:
        raise BoxError("no_box", f"no box like [0.1, 0.2, 0.3, 0.4] in {text[:80]!r}")
    if len(found) > 1:
        raise BoxError("more_than_one", f"{len(found)} boxes where one is wanted in {text[:80]!r}")
    return Box(*(float(number) for number in found[0]))


CODECS: dict[str, Codec] = {"visrl": Codec("visrl", _format_visrl, _parse_visrl)}
