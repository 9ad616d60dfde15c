"""Pixels of every mode that Pillow decodes, as RGB of 8 bits: wide samples are scaled and not cut off."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visrl.image_files import ImageError

# What the samples of a wide grey image run to, where the file does not say so: the first that holds the largest.
FLOAT_RANGES = (1.0, 255.0, 65535.0)
INTEGER_RANGES = (255.0, 65535.0, 4294967295.0)
_OVERSHOOT = 0.1  # of the range of floating point: filters and calibrations do, and what does is clipped

_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
_WHITE_IS_ZERO, _UNSIGNED = 0, 1


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """The loaded image as RGB, transparency shown on white. An RGB image is given back as it is.

    Grey of 16 bits runs from 0 to 65,535 (of 12 bits in TIFF to 4,095). Grey of 32 bits and of floating point does not
    say what white is: the first of `INTEGER_RANGES` or `FLOAT_RANGES` that holds the image's largest value is.

    Raises:
        ImageError: a sample is no number, or far below 0 or above every range; the message opens with `name`.
    """
    if image.mode.startswith("I") or image.mode == "F":
        return _grey(image, name)
    if image.mode == "LAB":
        return _from_lab(image)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # to the same mode would be a copy


def _grey(image: Image.Image, name: str) -> Image.Image:
    """An image of one wide channel. Its transparent value, which PNG has, is shown white."""
    tags: dict[int, Any] = dict(getattr(image, "tag_v2", {}))
    samples = np.asarray(image)
    if image.mode == "I" and tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0] == _UNSIGNED:
        samples = samples.view(np.uint32)  # Pillow keeps unsigned samples of 32 bits in signed ones
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        top = 4095.0 if tags.get(_BITS_PER_SAMPLE) == (12,) else 65535.0
    elif image.mode == "F":
        top = _top(samples, FLOAT_RANGES, _OVERSHOOT, name)
    else:
        top = _top(samples, INTEGER_RANGES, 0, name)
    if samples.dtype.itemsize == 2:  # a table of all values is quicker, and needs no floats of the image's size
        grey = _scaled(np.arange(65536), top)[samples]
    else:
        grey = _scaled(samples, top)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[samples == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _scaled(samples: NDArray[Any], top: float) -> NDArray[np.uint8]:
    """The samples in 8 bits, where `top` is white."""
    scaled = samples.astype(np.float32)
    scaled *= 255.0 / top
    np.clip(np.rint(scaled, out=scaled), 0, 255, out=scaled)
    return scaled.astype(np.uint8)


def _top(samples: NDArray[Any], ranges: tuple[float, ...], overshoot: float, name: str) -> float:
    """What counts as white: the first range that holds the samples, which may leave it by `overshoot` of it.

    Raises:
        ImageError: no range holds the samples.
    """
    low, high = float(samples.min()), float(samples.max())
    top = next((top for top in ranges if high <= top * (1 + overshoot)), None)
    # What is below black is measured by what is there: from -1,000 to 1,000 is no image that is nearly black.
    if top is not None and low >= -overshoot * max(high, ranges[0]):
        return top
    raise ImageError(
        f"{name} holds samples from {low:g} to {high:g}, of which none is known to be white: scale them to 0 to "
        f"{ranges[0]:g} and save it anew"
    )


def _from_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
    assert converted is not None  # None is given in place only
    return converted
