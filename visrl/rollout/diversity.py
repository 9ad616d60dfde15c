"""The diversity controller of VisRL's Algorithm 1: two boxes that agree too much are made to disagree.

If IoU(B1, B2) ≥ T, the second is replaced by a random box of similar size that does not overlap the first. Geometry
only: it knows no model and no text.
"""

from __future__ import annotations

import numpy as np

from visrl.box import Box, iou, overlap

TRIGGER = 0.2  # T of the paper; the released code replaces above 0.05
MIN_SIDE = 0.02  # of the image: a thinner strip is no room


def needs_replacing(first: Box, second: Box, trigger: float = TRIGGER) -> bool:
    """Whether the controller acts on these two boxes."""
    return iou(first, second) >= trigger


def random_box_apart(first: Box, like: Box, seed: int) -> Box | None:
    """A random box of the size of `like` that does not overlap `first`, or None where the image has no room.

    Uniform over all places of that size beside, above or below `first`. Where none is left (a large box), the size
    shrinks into the largest free strip.
    """
    rng = np.random.default_rng(seed)
    strips = _free_strips(first)
    fitting = [s for s in strips if s.width >= like.width and s.height >= like.height]
    if fitting:
        # A strip is drawn in proportion to the places it offers; overlaps of strips at the corners count twice.
        room = np.array([(s.width - like.width + 1e-9) * (s.height - like.height + 1e-9) for s in fitting])
        strip = fitting[int(rng.choice(len(fitting), p=room / room.sum()))]
        width, height = like.width, like.height
    else:
        if not strips:
            return None
        strip = max(strips, key=lambda s: min(s.width, like.width) * min(s.height, like.height))
        width, height = min(strip.width, like.width), min(strip.height, like.height)
    x = strip.x0 + rng.random() * (strip.width - width)
    y = strip.y0 + rng.random() * (strip.height - height)
    box = Box(x, y, min(x + width, 1.0), min(y + height, 1.0))
    assert overlap(first, box) < 1e-9
    return box


def _free_strips(box: Box) -> list[Box]:
    """The parts of the image left of, right of, above and below `box`, those at least `MIN_SIDE` thick."""
    strips = []
    if box.x0 >= MIN_SIDE:
        strips.append(Box(0, 0, box.x0, 1))
    if 1 - box.x1 >= MIN_SIDE:
        strips.append(Box(box.x1, 0, 1, 1))
    if box.y0 >= MIN_SIDE:
        strips.append(Box(0, 0, 1, box.y0))
    if 1 - box.y1 >= MIN_SIDE:
        strips.append(Box(0, box.y1, 1, 1))
    return strips
