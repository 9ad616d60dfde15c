"""Boxes drawn on images, and images as data URIs: the one look of a box in report, terminal and server.

Colours are fixed hex values because an image does not follow the page's light or dark theme. Nothing here knows what
a box means: the caller says colour and label.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from visrl.box import Box

Mark = tuple[Box, str, str]  # the box, its colour as "#rrggbb", its label ("" for none)

# Amber against blue survives every common colour blindness; near-black is neither.
TRUE_COLOUR = "#111318"
FIRST_COLOUR = "#e07b00"
LAST_COLOUR = "#2563eb"
SAME_COLOUR = "#6b7280"
HALO = "#ffffff"

Rectangle = tuple[float, float, float, float]


def annotate(image: Image.Image, boxes: Sequence[Mark]) -> Image.Image:
    """A copy of `image` with `boxes` drawn on it, each outlined in white so that it shows on any ground.

    Later boxes lie above earlier ones; labels keep clear of each other where there is room.
    """
    drawn = image.convert("RGB").copy()
    draw = ImageDraw.Draw(drawn)
    line = max(2, round(min(drawn.size) / 150))
    font = ImageFont.load_default(size=max(11, round(min(drawn.size) / 26)))
    outlines = [_inside(box.to_pixels(drawn.size), drawn.size) for box, _, _ in boxes]
    for outline, (_, colour, _) in zip(outlines, boxes, strict=True):
        draw.rectangle(_grown(outline, 1), outline=HALO, width=line + 2)
        draw.rectangle(outline, outline=colour, width=line)
    placed: list[Rectangle] = []
    for outline, (_, colour, label) in zip(outlines, boxes, strict=True):
        if label:
            placed.append(_write_label(draw, outline, colour, label, font, drawn.size, placed))
    return drawn


def shrink(image: Image.Image, longest: int) -> Image.Image:
    """`image`, scaled down where its longer side exceeds `longest` pixels."""
    scale = longest / max(image.size)
    if scale >= 1:
        return image
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BOX)


def data_uri(image: Image.Image, limit: int | None = None) -> str:
    """`image` as a JPEG data URI, so that a page needs no second file; coarser until it has at most `limit` characters.

    An image that is too long even at the coarsest quality is given at that quality.
    """
    for quality in (86, 75, 60, 40, 20):
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=quality, optimize=True, subsampling=0 if quality > 60 else 2)
        uri = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
        if limit is None or len(uri) <= limit:
            break
    return uri


def _inside(corners: Rectangle, size: tuple[int, int]) -> Rectangle:
    """The corners kept on the canvas and in order, so that a sliver at the edge is drawn too."""
    x0, y0, x1, y1 = corners
    left, top = min(x0, size[0] - 2), min(y0, size[1] - 2)
    return left, top, max(left + 1, min(x1, size[0] - 1)), max(top + 1, min(y1, size[1] - 1))


def _grown(corners: Rectangle, by: float) -> Rectangle:
    x0, y0, x1, y1 = corners
    return x0 - by, y0 - by, x1 + by, y1 + by


def _write_label(
    draw: ImageDraw.ImageDraw,
    outline: Rectangle,
    colour: str,
    label: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    size: tuple[int, int],
    placed: Sequence[Rectangle],
) -> Rectangle:
    """Write `label` at the first place around `outline` that is on the canvas and free; returns where it went."""
    x0, y0, x1, y1 = outline
    left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
    pad = 3
    width, height = right - left + 2 * pad, bottom - top + 2 * pad
    corners = [
        (x0, y0 - height), (x0, y1), (x1 - width, y1), (x1 - width, y0 - height), (x1, y0), (x0 - width, y0),
        (x1, y1 - height), (x0 - width, y1 - height), (x0, y0),
    ]  # fmt: skip
    tags = [(x, y, x + width, y + height) for x, y in corners]
    on_canvas = [tag for tag in tags if tag[0] >= 0 and tag[1] >= 0 and tag[2] <= size[0] and tag[3] <= size[1]]
    free = [tag for tag in on_canvas if not any(_touch(tag, other) for other in placed)]
    tag = (free or on_canvas or tags[-1:])[0]
    draw.rectangle(tag, fill=colour)
    draw.text((tag[0] + pad - left, tag[1] + pad - top), label, font=font, fill=_readable_on(colour))
    return tag


def _touch(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _readable_on(colour: str) -> str:
    """Black or white, whichever reads better on `colour` (relative luminance by its usual weights)."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"
