"""The boxes that bound a score when they take the place of the model's own: random, centre, true, the whole image.

Two ways to draw random and centre ones: as Visual-CoT's scripts do (`published_control`), and with the size of the true
box, so that only the place differs (`matched_control`). Both depend on a seed and the question alone.
"""

from __future__ import annotations

import random
from typing import Literal

import numpy as np

from visrl.box import Box, BoxError, Size, clamp, padding
from visrl.engines.base import seed_of
from visrl.records import Sample

Control = Literal["random", "center"]

_CENTER = (0.25, 0.25, 0.75, 0.75)


def matched_control(control: Control, sample: Sample, seed: int = 0) -> Box:
    """A box of the true box's size: at a random place, or in the middle of the image.

    Raises:
        BoxError: the sample has no true box.
    """
    width, height = require_box(sample).width, require_box(sample).height
    if control == "center":
        return Box(0.5 - width / 2, 0.5 - height / 2, 0.5 + width / 2, 0.5 + height / 2)
    rng = np.random.default_rng(seed_of(seed, *sample.place, "control"))
    x, y = rng.random() * (1 - width), rng.random() * (1 - height)
    return Box(x, y, x + width, y + height)


def require_box(sample: Sample) -> Box:
    """The true box of a sample.

    Raises:
        BoxError: it has none.
    """
    if sample.box is None:
        raise BoxError("no_box", f"question {sample.id} has no true box, which this control needs")
    return sample.box


def published_control(control: Control, size: Size, sample_id: str, seed: int = 0) -> Box:
    """The control box of a question about an image of `size`, as Visual-CoT's scripts draw it, but with a seed.

    It is drawn in the padded square. "random" has its middle anywhere there and half-sides uniform between 0 and half
    of it, cut off at the edges; "center" is the middle half of each axis. What lies in the padding is cut off, and a
    random box that lies there wholly is drawn again: nothing of the image could be cropped from it.

    Raises:
        BoxError: the image is so thin that its centre box is empty.
    """
    if control == "center":
        return _in_image(_CENTER, size)
    rng = random.Random(seed_of(seed, sample_id, "control"))
    while True:
        x, y, half_height, half_width = rng.random(), rng.random(), rng.random() / 2, rng.random() / 2
        try:
            return _in_image((x - half_width, y - half_height, x + half_width, y + half_height), size)
        except BoxError:
            continue


def _in_image(square: tuple[float, float, float, float], size: Size) -> Box:
    side, left, top = padding(size)
    width, height = size
    x0, x1 = ((value * side - left) / width for value in square[0::2])
    y0, y1 = ((value * side - top) / height for value in square[1::2])
    return clamp(x0, y0, x1, y1).box
