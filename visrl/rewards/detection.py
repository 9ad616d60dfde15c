"""Was the box right? The published rule to the letter, and ours beside it. Text and numbers in; knows no files.

Published (Visual-CoT): the predicted fractions times the long side against the truth shifted into the padded square,
correct where IoU > 0.5, everything computed in single precision. Ours: the codec reads the text, `box.iou` compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from visrl.box import Box, BoxError, Size, corner_fault, iou, padding
from visrl.codecs import CODECS, Codec
from visrl.replies import spoken

THRESHOLD = 0.5
_NOISE = 1e-9  # an IoU of exactly 0.5 that floating point puts above 0.5 is not above it
_PIXEL_DECIMALS = 6  # truth that reaches outside by floating-point noise only is not bad


@dataclass(frozen=True, slots=True)
class Detection:
    """One predicted box under both rules. `iou` and `hit` are ours; None where the truth itself is no box."""

    box: Box | None
    iou: float | None
    hit: bool | None
    hit_published: bool
    unparseable: bool  # under the published rule
    bad_truth: bool


def judge_boxes(
    texts: Sequence[str | None], truths: Sequence[Sequence[float]], sizes: Sequence[Size], codec: str = "viscot"
) -> list[Detection]:
    """Both rules on Visual-CoT's detection or RefCOCO predictions.

    `texts` are the model's answers (None: it gave none), `truths` four pixels (x0, y0, x1, y1) of the original image,
    `sizes` its width and height. `codec` names how our reading takes the text; the published rule knows one way only.
    """
    numbers = [read_published_box(text) for text in texts]
    squares = [_square_pixels(four, size) for four, size in zip(numbers, sizes, strict=True)]
    shifted = [_shifted(truth, size) for truth, size in zip(truths, sizes, strict=True)]
    predicted_N4, shifted_N4 = (np.array(rows, np.float64).reshape(-1, 4) for rows in (squares, shifted))
    hits = _iou_published(predicted_N4, shifted_N4) > np.float32(THRESHOLD)
    return [
        _detection(text, truth, size, CODECS[codec], bool(hit), four is None)
        for text, truth, size, hit, four in zip(texts, truths, sizes, hits, numbers, strict=True)
    ]


def judge_lmms(predicted: Sequence[float], truth: Sequence[float], text: str | None, codec: str = "visrl") -> Detection:
    """lmms-eval's RefCOCO rule and ours: `predicted` and `truth` are fractions of the image, as that task logs them.

    Its rule is IoU ≥ 0.5; what it cannot parse it logs as four zeros. Our reading takes the logged `text`, or where it
    was not logged the four numbers.
    """
    four = [float(value) for value in predicted]
    unparseable = not any(four)
    said = text if text is not None else f"[{', '.join(f'{value:.6f}' for value in four)}]"
    hit = corner_iou(four, truth) >= THRESHOLD
    return _detection(None if unparseable and text is None else said, truth, (1, 1), CODECS[codec], hit, unparseable)


def published_hit(text: str | None, truth: Sequence[float], size: Size) -> bool:
    """Whether one predicted box is right under the published rule; text and truth as in `judge_boxes`."""
    return judge_boxes([text], [truth], [size])[0].hit_published


def corner_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """IoU of four corners each, boxes or not, as lmms-eval's RefCOCO task and TreeBench's script have it: double
    precision, signed areas. 0 where it would divide by 0."""
    shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union else 0.0


def truth_box(corners: Sequence[float], size: Size) -> Box | None:
    """The ground truth as a box, or None where its pixels are inverted, empty or outside an image of `size`."""
    rounded = [round(value, _PIXEL_DECIMALS) for value in corners]
    return None if corner_fault(rounded, size) else Box.from_pixels(rounded, size)


def is_hit(overlap: float) -> bool:
    """Whether an IoU in double precision is above one half by more than floating point alone can make it."""
    return overlap > THRESHOLD + _NOISE


# --- The published rule -----------------------------------------------------------------------------------------------


def read_published_box(text: str | None) -> list[float] | None:
    """The first four numbers of a predicted box, to the letter of the published scorer; None is unparseable."""
    if not isinstance(text, str):
        return None
    parts = text.replace(" .", "").replace("[", "").replace("]", "").split(", ")
    try:
        return [float(parts[index]) for index in range(4)]
    except (ValueError, IndexError):
        return None


def _square_pixels(four: list[float] | None, size: Size) -> list[float]:
    return [float("nan")] * 4 if four is None else [value * max(size) for value in four]


def _shifted(truth: Sequence[float], size: Size) -> list[float]:
    _, left, top = padding(size)
    return [truth[0] + left, truth[1] + top, truth[2] + left, truth[3] + top]


def _iou_published(predicted_N4: NDArray[np.float64], truth_N4: NDArray[np.float64]) -> NDArray[np.float32]:
    """IoU (N) as the published scorer has it; not `box.iou`: single precision, signed areas, not-a-number allowed.

    Inverted boxes have no intersection, whatever the sign of their area; a row that is not a number is never above 0.5.
    """
    with np.errstate(all="ignore"):
        a, b = predicted_N4.astype(np.float32), truth_N4.astype(np.float32)
        sides = np.clip(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), 0, None)
        shared = sides[:, 0] * sides[:, 1]
        area_a = (a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1])
        area_b = (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
        return shared / (area_a + area_b - shared)


# --- Our reading ------------------------------------------------------------------------------------------------------


def parse_box(text: str | None, size: Size, codec: Codec) -> Box | None:
    """The one box in `text`, or None. What reaches from a padded square's image into its padding is cut off there."""
    if text is None:
        return None
    try:
        return codec.parse(spoken(text), size, size)
    except BoxError as error:
        if error.fault != "outside" or codec.name != "viscot":
            return None
    try:
        CODECS["visrl"].parse(text, size, size)  # the same text as fractions of the square: outside that, it is wrong
        return codec.mend(text, size, size).box
    except BoxError:
        return None


def _detection(
    text: str | None, truth: Sequence[float], size: Size, codec: Codec, hit_published: bool, unparseable: bool
) -> Detection:
    box, true_box = parse_box(text, size, codec), truth_box(truth, size)
    if true_box is None:
        return Detection(box, None, None, hit_published, unparseable, bad_truth=True)
    overlap = 0.0 if box is None else iou(box, true_box)
    return Detection(box, overlap, is_hit(overlap), hit_published, unparseable, bad_truth=False)
