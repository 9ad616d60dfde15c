"""Opening and cropping images: the one safe way in. Nothing here knows about models."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from visrl.box import Box, CropRule, Size, crop_window
from visrl.data_url import MAX_BYTES, DataUrlError, is_data_url, read_data_url
from visrl.image_files import ImageError, without_metadata
from visrl.image_modes import to_rgb
from visrl.image_rows import is_row_ref, read_row_image

MAX_PIXELS = 100_000_000  # an image larger than this is taken for a decompression bomb
# Decoders that may see the bytes. Others are left out because nobody needs them here, and some start programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")

_TURNS = {  # by the EXIF orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SAME_SHAPE = 0.01  # two sizes whose aspect ratios differ by less are one image at two scales

# What Pillow's decoders raise on bytes that are not the image they claim to be.
_DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError, MemoryError,
    struct.error, zlib.error,
)  # fmt: skip


def open_image(ref: str | bytes, root: str | Path | None = None, size: Size | None = None) -> Image.Image:
    """The image `ref` as RGB, the right way up.

    `ref` is a path (relative ones under `root`), the file's bytes, a data URL, a row of a table
    (`visrl.image_rows`), or `scene:POOL/INDEX`, which is drawn.
    `size` is the annotated width and height: where given, it decides the orientation, else the EXIF tag does where it
    can be read. Of an animation or of several pages the first is the image.

    Raises:
        ImageError: missing, unreadable, truncated, larger than `MAX_PIXELS` or `MAX_BYTES`, made to keep a decoder busy
            (`visrl.image_files`), of samples without a known range, or not of the annotated shape.
    """
    if isinstance(ref, str) and ref.startswith("scene:"):
        return _drawn(ref)
    source, name = _source(ref, root)
    return decode_image(source, name, size=size)


def decode_image(
    source: Path | BinaryIO,
    name: str,
    max_pixels: int = MAX_PIXELS,
    formats: tuple[str, ...] | None = None,
    size: Size | None = None,
) -> Image.Image:
    """The image in a file or stream as RGB; `formats` (Pillow's names) bounds which decoders may see the bytes.

    Raises:
        ImageError: unreadable, truncated, of another format, larger than `max_pixels` or not of the annotated shape
            `size`; the message opens with `name`.
    """
    with _opened(source, name, max_pixels, formats or FORMATS) as (image, orientation):
        turn = _turn(image.size, orientation, size, name)
        image.load()
        rgb = to_rgb(image, name)
        return rgb.transpose(turn) if turn is not None else rgb


def image_size(ref: str | bytes, root: str | Path | None = None) -> Size:
    """The width and height that `open_image` gives without an annotation, from the file's header alone.

    Raises:
        ImageError: missing, no image, or larger than `MAX_PIXELS`. Damage after the header is not seen.
    """
    if isinstance(ref, str) and ref.startswith("scene:"):
        return _drawn(ref).size
    source, name = _source(ref, root)
    with _opened(source, name, MAX_PIXELS, FORMATS, header_only=True) as (image, orientation):
        return (image.height, image.width) if _is_quarter_turn(_TURNS.get(orientation)) else image.size


def image_path(ref: str, root: str | Path | None = None) -> Path | None:
    """Where the image `ref` lies under `root`, or None.

    Of `cot/gqa/1.jpg` also `gqa/1.jpg` and `1.jpg` are looked for, so that `root` may be the folder of one data set.
    """
    parts = Path(ref).parts
    starts = [0] if root is None or Path(ref).is_absolute() else range(len(parts))
    for start in starts:
        path = Path(root or ".", *parts[start:])
        try:
            if path.is_file():
                return path
        except (OSError, ValueError):  # a name that no file system takes
            return None
    return None


def names_file(ref: str) -> bool:
    """Whether `ref` is the path of an image, and not a scene to draw, the image itself or a row of a table."""
    return not ref.startswith("scene:") and not is_data_url(ref) and not is_row_ref(ref)


def crop(image: Image.Image, box: Box, rule: CropRule = "exact") -> Image.Image:
    """The part of `image` that `box` means under `rule`. The only place that makes a crop."""
    return image.crop(crop_window(box, image.size, rule))


def _drawn(ref: str) -> Image.Image:
    from visrl.scenes import draw_ref

    try:
        return draw_ref(ref)
    except (ValueError, IndexError, KeyError) as error:
        raise ImageError(f"{ref[:80]} names no drawn scene: {error}") from error


def _source(ref: str | bytes, root: str | Path | None) -> tuple[Path | BinaryIO, str]:
    """Where the bytes of an image come from, and what to call it in an error."""
    if isinstance(ref, bytes):
        if len(ref) > MAX_BYTES:
            raise ImageError(f"a picture of {len(ref):,} bytes, more than {MAX_BYTES:,}")
        return io.BytesIO(ref), f"a picture of {len(ref):,} bytes"
    if is_data_url(ref):
        try:
            return io.BytesIO(read_data_url(ref)), f"the data URL {ref[:30]}…"
        except DataUrlError as error:
            raise ImageError(f"the data URL {ref[:30]}… {error}") from error
    if ref.startswith(("http://", "https://")):
        raise ImageError(f"{ref[:200]} is not fetched: download the picture and give its path")
    if is_row_ref(ref):
        return io.BytesIO(read_row_image(ref)), ref[:200]
    path = image_path(ref, root)
    if path is None:
        raise ImageError(f"no picture at {Path(root or '.') / ref}")
    return path, str(path)


@contextmanager
def _opened(
    source: Path | BinaryIO, name: str, max_pixels: int, formats: tuple[str, ...], header_only: bool = False
) -> Iterator[tuple[Image.Image, int]]:
    """The image with its header read and its work found bearable, and the EXIF orientation.

    What a decoder raises becomes an `ImageError`.
    """
    try:
        with _stream(source, name) as file:
            pixels = without_metadata(file, name, max_pixels, header_only)
            with Image.open(pixels.stream, formats=formats) as image:
                if image.width * image.height > max_pixels:
                    raise ImageError(f"{name} has {image.width} × {image.height} pixels, more than {max_pixels:,}")
                yield image, pixels.orientation
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} has more than {max_pixels:,} pixels") from error
    except UnidentifiedImageError as error:  # its own words hold the address of the stream in memory
        raise ImageError(f"{name} cannot be read as a picture: none of {', '.join(formats)} is in it") from error
    except _DECODER_ERRORS as error:
        raise ImageError(f"{name} cannot be read as a picture: {error}") from error


def _stream(source: Path | BinaryIO, name: str) -> AbstractContextManager[BinaryIO]:
    """The file or stream from its beginning.

    Raises:
        ImageError: a file of more than `MAX_BYTES`.
    """
    if not isinstance(source, Path):
        source.seek(0)
        return nullcontext(source)
    if (size := source.stat().st_size) > MAX_BYTES:
        raise ImageError(f"{name} has {size:,} bytes, more than {MAX_BYTES:,}")
    return source.open("rb")


def _turn(stored: Size, orientation: int, size: Size | None, name: str) -> Image.Transpose | None:
    """How to turn an image of the `stored` size: to its annotated `size`, or by its EXIF tag without annotation."""
    turn = _TURNS.get(orientation)
    if size is None:
        return turn
    turned = (stored[1], stored[0]) if _is_quarter_turn(turn) else stored
    if stored == size:
        return None
    if turned == size:
        return turn
    if _same_shape(stored, size):
        return None
    if _same_shape(turned, size):
        return turn
    raise ImageError(
        f"{name} is {stored[0]} × {stored[1]} but annotated as {size[0]} × {size[1]}: another picture lies there"
    )


def _is_quarter_turn(turn: Image.Transpose | None) -> bool:
    return turn in (_TURNS[5], _TURNS[6], _TURNS[7], _TURNS[8])


def _same_shape(a: Size, b: Size) -> bool:
    return abs(a[0] * b[1] - a[1] * b[0]) <= _SAME_SHAPE * a[0] * b[1]
