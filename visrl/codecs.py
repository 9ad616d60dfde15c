"""Box text: one codec per model family, the only place where a box is written as text or read from it.

Each codec writes the text that its family was trained on, bound at every call to the size of the original image and
to the size that the processor really gave it. The scale is never guessed from the size of the numbers. Nothing here
knows about models or files. Formats and their sources are listed in docs/DATA.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from visrl.box import Box, BoxError, CropRule, Size, clamp, crop_window, iou, padding

BoxSpace = Literal["image", "padded_square"]
Scale = tuple[float, float]  # a number in the text is fraction × scale + shift; this is (scale, shift) of one axis

SELF_TEST_IOU = 0.98
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")
_LIST = re.compile(r"\[([^\[\]]*)\]")
_PAIRS = re.compile(r"\(([^()]*\)\s*,\s*\([^()]*)\)")
_BBOX_2D = re.compile(r"[\"']bbox_2d[\"']\s*:\s*\[([^\[\]]*)\]")
_BOX_TAG = re.compile(r"<box>([^<>]*)</box>")
_LOCS = re.compile(r"((?:<loc[0-9]+>)+)")


@dataclass(frozen=True, slots=True)
class Mended:
    """A box read in tolerant mode, and what had to be mended, one sentence each (none: the text was strict)."""

    box: Box
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Codec:
    """How one model family writes a box: `format`, `parse` and `mend` are bound to the sizes given at each call.

    `original` is the size of the image as it lies on disk, `processed` the size that the processor gave it.
    """

    name: str
    template: str  # takes the four numbers as {0} to {3}, in the order x0, y0, x1, y1
    pattern: re.Pattern[str]  # its one group holds the numbers of one box
    separator: re.Pattern[str]  # between the numbers in that group
    scales: Callable[[Size, Size], tuple[Scale, Scale]]
    decimals: int = 0
    digits: int = 1  # zeros are put before a number until it has this many
    y_first: bool = False  # the template puts y before x

    def format(self, box: Box, original: Size, processed: Size) -> str:
        """The text of `box`, its corners rounded to the codec's grid and never so that it becomes empty.

        Raises:
            BoxError: the image is so thin that the grid has no two lines in it.
        """
        scale_x, scale_y = self.scales(original, processed)
        x0, x1 = self._on_grid(box.x0, box.x1, scale_x)
        y0, y1 = self._on_grid(box.y0, box.y1, scale_y)
        numbers = (f"{value / 10**self.decimals:0{self.digits}.{self.decimals}f}" for value in (x0, y0, x1, y1))
        return self.template.format(*numbers)

    def parse(self, text: str, original: Size, processed: Size) -> Box:
        """The one box in `text`. What reaches over the edge by no more than the codec's own rounding is brought inside.

        Raises:
            BoxError: no box, more than one, not four numbers, inverted, empty, or outside the image.
        """
        found = [self._tokens(group) for group in self.pattern.findall(text)]
        fours = [tokens for tokens in found if len(tokens) == 4]
        shown = text[:80]
        if not found:
            raise BoxError("no_box", f"no box in the form {self._example()} in {shown!r}")
        if len(fours) > 1 or (not fours and len(found) > 1):
            raise BoxError("more_than_one", f"{max(len(fours), len(found))} boxes where one is wanted in {shown!r}")
        tokens = fours[0] if fours else found[0]
        if not all(map(_NUMBER.fullmatch, tokens)):
            wrong = next(token for token in tokens if not _NUMBER.fullmatch(token))
            raise BoxError("not_a_number", f"{wrong[:20]!r} is not a number in {shown!r}")
        if len(tokens) != 4:
            raise BoxError("count", f"{len(tokens)} numbers where a box has four in {shown!r}")
        return self._box([float(token) for token in tokens], original, processed, shown)

    def mend(self, text: str, original: Size, processed: Size) -> Mended:
        """The box in `text`, read as generously as can be without guessing a scale; the notes say what was mended.

        Takes the first of several boxes, the first four of several numbers, numbers without their brackets, swapped
        corners, and clamps what reaches outside.

        Raises:
            BoxError: fewer than four numbers, an empty box, or one that lies wholly outside the image.
        """
        try:
            return Mended(self.parse(text, original, processed))
        except BoxError as error:
            fault = error.fault
        notes = []
        groups = [_NUMBER.findall(group) for group in self.pattern.findall(text)]
        numbers = next((group for group in groups if len(group) >= 4), [])
        if len(groups) > 1:
            notes.append(f"took the first of {len(groups)} boxes")
        if not numbers:
            numbers = _NUMBER.findall(text)
            notes.append(f"took numbers that are not in the form {self._example()}")
        if len(numbers) < 4:
            raise BoxError("no_box" if fault == "no_box" else "count", f"not four numbers in {text[:80]!r}")
        if len(numbers) > 4:
            notes.append(f"took the first four of {len(numbers)} numbers")
        x0, y0, x1, y1 = self._fractions([float(number) for number in numbers[:4]], original, processed)
        if x0 > x1 or y0 > y1:
            x0, y0, x1, y1 = min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)
            notes.append("swapped corners that were inverted")
        clamped = clamp(x0, y0, x1, y1)
        if clamped.moved > 0:
            notes.append(f"clamped what reached {clamped.moved:.4f} of the picture outside it")
        return Mended(clamped.box, tuple(notes))

    def writes(self, token: str) -> bool:
        """Whether `token`, one of a model's own, is a part of this codec's text."""
        return token in self.template or self.pattern.fullmatch(token) is not None

    @property
    def in_processed_pixels(self) -> bool:
        """Whether the text changes with the size that the processor gives an image."""
        return self.scales is _processed_pixels

    def unit(self, original: Size, processed: Size) -> tuple[float, float]:
        """The distance between two lines of the codec's grid, in fractions of the image's width and height."""
        (scale_x, _), (scale_y, _) = self.scales(original, processed)
        return 10**-self.decimals / scale_x, 10**-self.decimals / scale_y

    def _on_grid(self, low: float, high: float, scale: Scale) -> tuple[int, int]:
        """The nearest grid lines to [low, high], apart by at least one line and inside the image up to rounding."""
        lines = scale[0] * 10**self.decimals
        shift = scale[1] * 10**self.decimals
        first, last = round(low * lines + shift), round(high * lines + shift)
        if first < last:
            return first, last
        below = math.floor((low + high) / 2 * lines + shift)
        for line in (below, below + 1, below - 1):
            if shift - 0.5 <= line and line + 1 <= shift + lines + 0.5:
                return line, line + 1
        raise BoxError("empty", f"a picture this thin cannot be given a box in the form {self._example()}")

    def _tokens(self, group: str) -> list[str]:
        return [token for token in self.separator.split(group.strip()) if token]

    def _fractions(self, numbers: list[float], original: Size, processed: Size) -> tuple[float, float, float, float]:
        if self.y_first:
            numbers = [numbers[1], numbers[0], numbers[3], numbers[2]]
        (scale_x, shift_x), (scale_y, shift_y) = self.scales(original, processed)
        x0, y0, x1, y1 = numbers
        return (x0 - shift_x) / scale_x, (y0 - shift_y) / scale_y, (x1 - shift_x) / scale_x, (y1 - shift_y) / scale_y

    def _box(self, numbers: list[float], original: Size, processed: Size, shown: str) -> Box:
        x0, y0, x1, y1 = self._fractions(numbers, original, processed)
        if min(x0, y0) < 0 or max(x1, y1) > 1:
            half_x, half_y = (unit / 2 for unit in self.unit(original, processed))
            x0, x1, y0, y1 = (
                _forgiven(x0, half_x),
                _forgiven(x1, half_x),
                _forgiven(y0, half_y),
                _forgiven(y1, half_y),
            )
        try:
            return Box(x0, y0, x1, y1)
        except BoxError as error:
            raise BoxError(error.fault, f"the box in {shown!r} is {error.fault}") from error

    def _example(self) -> str:
        return self.template.format("x0", "y0", "x1", "y1")


def _forgiven(value: float, rounding: float) -> float:
    """`value` brought into [0, 1] where it lies outside by no more than `rounding`."""
    if -rounding - 1e-9 <= value < 0:
        return 0.0
    return 1.0 if 1 < value <= 1 + rounding + 1e-9 else value


# --- What the families write (REFERENCE: box conventions by model family) ---------------------------------------------


def _thousand(original: Size, processed: Size) -> tuple[Scale, Scale]:
    return (1000.0, 0.0), (1000.0, 0.0)


def _image(original: Size, processed: Size) -> tuple[Scale, Scale]:
    return (1.0, 0.0), (1.0, 0.0)


def _padded_square(original: Size, processed: Size) -> tuple[Scale, Scale]:
    side, left, top = padding(original)
    return (original[0] / side, left / side), (original[1] / side, top / side)


def _processed_pixels(original: Size, processed: Size) -> tuple[Scale, Scale]:
    return (float(processed[0]), 0.0), (float(processed[1]), 0.0)


def _bins(original: Size, processed: Size) -> tuple[Scale, Scale]:
    return (1023.0, 0.0), (1023.0, 0.0)


_COMMA = re.compile(r"\s*,\s*")
_SPACE = re.compile(r"\s+")
_LOC_MARKS = re.compile("[<loc>]+")
_BRACKETS = "[{0}, {1}, {2}, {3}]"
_JSON = '{{"bbox_2d": [{0}, {1}, {2}, {3}]}}'
_BETWEEN_PAIRS = re.compile(r"\s*\)?\s*,\s*\(?\s*")


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Codec("visrl", _BRACKETS, _LIST, _COMMA, _image, decimals=3),
        Codec("viscot", _BRACKETS, _LIST, _COMMA, _padded_square, decimals=3),
        Codec("qwen2_vl", "<|box_start|>({0},{1}),({2},{3})<|box_end|>", _PAIRS, _BETWEEN_PAIRS, _thousand),
        Codec("qwen2_5_vl", _JSON, _BBOX_2D, _COMMA, _processed_pixels),
        Codec("qwen3_vl", _JSON, _BBOX_2D, _COMMA, _thousand),
        Codec("internvl", "<ref>region</ref><box>[[{0}, {1}, {2}, {3}]]</box>", _LIST, _COMMA, _thousand),
        Codec("minicpm", "<box>{0} {1} {2} {3}</box>", _BOX_TAG, _SPACE, _thousand),
        Codec("paligemma", "<loc{1}><loc{0}><loc{3}><loc{2}>", _LOCS, _LOC_MARKS, _bins, digits=4, y_first=True),
    )
}

# What `box_space` in a data set's entry means: which of the two three-decimal texts its boxes are written in.
BOX_SPACES: dict[BoxSpace, Codec] = {"image": CODECS["visrl"], "padded_square": CODECS["viscot"]}

# --- The start-up self-test -------------------------------------------------------------------------------------------

# The same crop, pixels 100 to 500 by 50 to 250 of an image of 1,000 × 400 that a processor made 504 × 196, worked out
# by hand in each family's text. A codec that is wrong in both directions would pass a round trip; not this.
_KNOWN_SIZES: tuple[Size, Size] = ((1000, 400), (504, 196))
_KNOWN_BOX = Box(0.1, 0.125, 0.5, 0.625)
_KNOWN_TEXTS = {
    "visrl": "[0.100, 0.125, 0.500, 0.625]",
    "viscot": "[0.100, 0.350, 0.500, 0.550]",
    "qwen2_vl": "<|box_start|>(100,125),(500,625)<|box_end|>",
    "qwen2_5_vl": '{"bbox_2d": [50, 24, 252, 122]}',
    "qwen3_vl": '{"bbox_2d": [100, 125, 500, 625]}',
    "internvl": "<ref>region</ref><box>[[100, 125, 500, 625]]</box>",
    "minicpm": "<box>100 125 500 625</box>",
    "paligemma": "<loc0128><loc0102><loc0639><loc0512>",
}
_TEST_BOXES = ((0.0, 0.0, 1.0, 1.0), (0.1, 0.05, 0.9, 0.6), (0.0, 0.3, 0.7, 1.0), (0.35, 0.0, 1.0, 0.9))


def self_test(
    codec: Codec, original: Size, processed: Size, rule: CropRule = "exact", *, shown: Size | None = None
) -> float:
    """Send known boxes through format, parse and crop at these sizes; the smallest IoU found.

    Boxes are written as a model that sees the image at `shown` writes them (None: at `processed`) and read at
    `processed`. They lie on whole pixels of what is shown, so that an image of few pixels is no excuse.

    Raises:
        BoxError: a crop overlaps with what was meant by less than `SELF_TEST_IOU`: nothing may be trained or served.
    """
    shown = shown or processed
    try:
        lowest = min(_iou_of_known_text(codec), _iou_of_round_trips(codec, original, processed, shown, rule))
    except BoxError as error:
        raise BoxError(error.fault, f"the box codec {codec.name!r} cannot read what it should: {error}") from error
    if lowest < SELF_TEST_IOU:
        raise BoxError(
            "outside",
            f"the box codec {codec.name!r} crops with IoU {lowest:.3f} of what was meant at {original} shown as "
            f"{shown} and read as {processed}, below {SELF_TEST_IOU}: choose the codec of this model's family or "
            "larger pictures",
        )
    return lowest


def _iou_of_known_text(codec: Codec) -> float:
    return iou(codec.parse(_KNOWN_TEXTS[codec.name], *_KNOWN_SIZES), _KNOWN_BOX)


def _iou_of_round_trips(codec: Codec, original: Size, processed: Size, shown: Size, rule: CropRule) -> float:
    """The smallest IoU, of boxes and of crop windows, between what is written for `shown` and read at `processed`."""
    lowest = 1.0
    width, height = shown
    for x0, y0, x1, y1 in _TEST_BOXES:
        box = Box(
            round(x0 * width) / width,
            round(y0 * height) / height,
            round(x1 * width) / width,
            round(y1 * height) / height,
        )
        read = codec.parse(codec.format(box, original, shown), original, processed)
        meant, got = crop_window(box, original, rule), crop_window(read, original, rule)
        # Windows are rounded outward to whole pixels, so the least difference may move an edge by one.
        got_forgiven = [b if abs(a - b) <= 1 else a for a, b in zip(got, meant, strict=True)]
        windows = iou(Box.from_pixels(meant, original), Box.from_pixels(got_forgiven, original))
        lowest = min(lowest, windows, iou(box, read))
    return lowest
