"""Opening and cropping pictures: the one safe way in. Nothing here knows about models."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from visrl.box import Box, CropRule, crop_window
from visrl.records import Picture

MAX_PIXELS = 100_000_000  # a picture larger than this is taken for a decompression bomb


class ImageError(ValueError):
    """A picture that cannot be used; the message names it and says why."""


def open_image(ref: str, root: str | Path | None = None) -> Image.Image:
    """The picture `ref` as RGB: a path (relative ones under `root`) or `scene:POOL/INDEX`, which is drawn.

    Raises:
        ImageError: missing, unreadable, truncated or larger than `MAX_PIXELS`.
    """
    if ref.startswith("scene:"):
        from visrl.data.scenes import draw_ref

        return draw_ref(ref)
    path = Path(ref) if root is None else Path(root) / ref
    if not path.is_file():
        raise ImageError(f"no picture at {path}")
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"{path} has {image.width} × {image.height} pixels, more than {MAX_PIXELS:,}")
            image.load()
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{path} cannot be read as a picture: {error}") from error


def crop(image: Image.Image, box: Box, rule: CropRule = "exact") -> Image.Image:
    """The part of `image` that `box` means under `rule`. The only place that makes a crop."""
    return image.crop(crop_window(box, image.size, rule))


def open_picture(picture: Picture, root: str | Path | None = None, rule: CropRule = "exact") -> Image.Image:
    """The picture, cropped where it says so."""
    image = open_image(picture.ref, root)
    return crop(image, picture.crop, rule) if picture.crop else image
