"""The control boxes that bound a score: random and centre, as Visual-CoT's scripts draw them, but with a seed.

They are drawn in the padded square, like the published ones. What lies in the padding is cut off, and a random box that
lies there wholly is drawn again: nothing of the picture could be cropped from it.
"""

from __future__ import annotations

import random
from typing import Literal

from visrl.box import Box, BoxError, Size, clamp, padding
from visrl.conversation import seed_of

Control = Literal["random", "center"]

_CENTER = (0.25, 0.25, 0.75, 0.75)


def control_box(control: Control, size: Size, sample_id: str, seed: int = 0) -> Box:
    """The control box of a question about a picture of `size`; the same for the same seed and sample.

    "random" has its middle anywhere in the padded square and half-sides uniform between 0 and half of it, cut off at
    the edges; "center" is the middle half of each axis.

    Raises:
        BoxError: the picture is so thin that its centre box is empty.
    """
    if control == "center":
        return _in_picture(_CENTER, size)
    rng = random.Random(seed_of(seed, sample_id, "control"))
    while True:
        x, y, half_height, half_width = rng.random(), rng.random(), rng.random() / 2, rng.random() / 2
        try:
            return _in_picture((x - half_width, y - half_height, x + half_width, y + half_height), size)
        except BoxError:
            continue


def _in_picture(square: tuple[float, float, float, float], size: Size) -> Box:
    side, left, top = padding(size)
    width, height = size
    x0, x1 = ((value * side - left) / width for value in square[0::2])
    y0, y1 = ((value * side - top) / height for value in square[1::2])
    return clamp(x0, y0, x1, y1).box
