"""Opening and cropping pictures: the one safe way in. Nothing here knows about models."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

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
    return decode_image(path, str(path))


def decode_image(
    source: Path | BinaryIO, name: str, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """The picture in a file or stream as RGB; `formats` (Pillow's names) bounds which decoders may see the bytes.

    Raises:
        ImageError: unreadable, truncated, of another format or larger than `max_pixels`; the message opens with `name`.
    """
    try:
        with Image.open(source, formats=formats) as image:
            if image.width * image.height > max_pixels:
                raise ImageError(f"{name} has {image.width} × {image.height} pixels, more than {max_pixels:,}")
            image.load()
            return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} has more than {max_pixels:,} pixels") from error
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{name} cannot be read as a picture: {error}") from error


def crop(image: Image.Image, box: Box, rule: CropRule = "exact") -> Image.Image:
    """The part of `image` that `box` means under `rule`. The only place that makes a crop."""
    return image.crop(crop_window(box, image.size, rule))


def open_picture(picture: Picture, root: str | Path | None = None, rule: CropRule = "exact") -> Image.Image:
    """The picture, cropped where it says so."""
    image = open_image(picture.ref, root)
    return crop(image, picture.crop, rule) if picture.crop else image
