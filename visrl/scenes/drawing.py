"""The image of a scene, the same pixels on every machine."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from PIL import Image, ImageDraw

from visrl.scenes.scene import COLOURS, DIGITS, DOT_RADIUS, GLYPH_SCALE, INK, SIDE, PixelBox, Scene, Tag, parse_ref


@lru_cache(maxsize=256)
def draw(scene: Scene) -> Image.Image:
    """The image of a scene, 672 × 672 RGB. Do not write into it: images are shared, and the last are kept."""
    return draw_anew(scene)


def draw_anew(scene: Scene) -> Image.Image:
    """`draw` for who shows a scene once: nothing is kept."""
    image = Image.merge("RGB", (*_shading()[:1], Image.new("L", (SIDE, SIDE), scene.tint), *_shading()[1:]))
    pen = ImageDraw.Draw(image)
    faint = (190, scene.tint - 20, 190)
    for line in scene.lines:
        pen.line(line, fill=faint, width=3)
    for shape, box in scene.outlines:
        _draw_shape(pen, shape, box, outline=faint, width=3)
    for tag in scene.tags:
        _draw_tag(pen, tag)
    return image


@lru_cache(maxsize=1)
def _shading() -> tuple[Image.Image, Image.Image]:
    """Red and blue of every background. The shading tells a patch where it is: a tiny vision tower without absolute
    positions finds that out very slowly by itself."""
    ramp = Image.linear_gradient("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR).point(lambda v: 150 + v * 0.4)
    return ramp.rotate(90), ramp


def draw_ref(ref: str) -> Image.Image:
    """The image that `scene:POOL/INDEX` names, and the like (`parse_ref`)."""
    return draw(parse_ref(ref))


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, box: PixelBox, **style: Any) -> None:
    x0, y0, x1, y1 = box
    cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
    if shape == "square":
        pen.rectangle(box, **style)
    elif shape == "circle":
        pen.ellipse(box, **style)
    else:
        pen.polygon([(cx, y0), (x1, cy), (cx, y1), (x0, cy)], **style)


def _draw_tag(pen: ImageDraw.ImageDraw, tag: Tag) -> None:
    _draw_shape(pen, tag.shape, tag.box, fill=COLOURS[tag.colour])
    radius, dot_side = DOT_RADIUS * tag.scale, GLYPH_SCALE * tag.scale
    for x, y in tag.dots:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=INK)
    left, top = tag.content[:2]
    for place, digit in enumerate(tag.text):
        for row, dots in enumerate(DIGITS[digit]):
            for column, dot in enumerate(dots):
                if dot == "#":
                    x = left + (place * 6 + column) * dot_side
                    y = top + row * dot_side
                    pen.rectangle((x, y, x + dot_side - 1, y + dot_side - 1), fill=INK)
