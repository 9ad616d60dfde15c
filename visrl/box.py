"""Boxes: the only home of box arithmetic and crop windows.

A `Box` is always in fractions of the original image. Text exists only at the edge: visrl/codecs.py turns a box into the
text that a model family was trained on, and back. Nothing here knows about text, models, tensors or files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from visrl.errors import UserError

Size = tuple[int, int]  # width, height in pixels
Window = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the original
Corners = tuple[float, float, float, float]  # the same, not yet on whole pixels and not yet checked

BoxFault = Literal["no_box", "count", "not_a_number", "inverted", "outside", "empty", "more_than_one"]
CropRule = Literal["exact", "margin", "viscot_square"]

MIN_CROP_SIDE = 28  # px: enough for one token of every family, whatever its patches
MAX_CROP_ASPECT = 200  # the thinnest crop that every family's image processor takes
VISCOT_HALF_SIDE = 112  # px: Visual-CoT's crop is a square of at least 224 px
MARGIN = 0.1  # of the box's own width and height, added on each side by the crop rule "margin"


class BoxError(UserError, ValueError):
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
    if 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1:  # first, because files hold hundreds of thousands of good boxes
        return None
    if not all(abs(value) < float("inf") for value in (x0, y0, x1, y1)):
        return "not_a_number"
    if x0 > x1 or y0 > y1:
        return "inverted"
    if x0 == x1 or y0 == y1:
        return "empty"
    return "outside"


def corner_fault(corners: Sequence[float], size: Size) -> BoxFault | None:
    """Why these pixel corners are no box in an image of `size`, or None. Exact: a thousandth of a pixel is outside."""
    x0, y0, x1, y1 = corners
    if 0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]:
        return None
    fault = box_fault(x0, y0, x1, y1)
    if fault not in (None, "outside"):
        return fault
    return "outside" if min(x0, y0) < 0 or x1 > size[0] or y1 > size[1] else None


@dataclass(frozen=True, slots=True)
class Clamped:
    """A box brought inside its image, and how far its furthest corner was moved, in fractions of the image."""

    box: Box
    moved: float


def clamp(x0: float, y0: float, x1: float, y1: float) -> Clamped:
    """The part of these four fractions that lies inside the image, with a report of what was cut off.

    Raises:
        BoxError: they are inverted or empty, no numbers, or lie wholly outside.
    """
    fault = box_fault(x0, y0, x1, y1)
    corners = [x0, y0, x1, y1]
    if fault not in (None, "outside"):
        raise BoxError(fault, f"the box {corners} is {fault}: clamping cannot mend that")
    inside = [min(1.0, max(0.0, value)) for value in corners]
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        raise BoxError("outside", f"the box {corners} lies wholly outside its image")
    return Clamped(Box(*inside), max(abs(a - b) for a, b in zip(corners, inside, strict=True)))


def with_sides_moved(box: Box, left: float, top: float, right: float, bottom: float) -> Box:
    """`box` with each side moved outward by this share of its width or height (inward below 0), kept in the image.

    Raises:
        BoxError: nothing is left of it.
    """
    return clamp(
        box.x0 - left * box.width,
        box.y0 - top * box.height,
        box.x1 + right * box.width,
        box.y1 + bottom * box.height,
    ).box


def padding(size: Size) -> tuple[int, int, int]:
    """Visual-CoT's padded square of an image of `size`: its side and what is added left and above, in pixels."""
    side = max(size)
    return side, (side - size[0]) // 2, (side - size[1]) // 2


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
