"""Dual IoU: recall and precision of boxes where a question has several true ones (TreeVGR, arXiv 2507.07999).

Without precision a policy that writes more and larger boxes is never worse off; without recall one that finds a single
object is done. Reads the true boxes of a sample from the row it came from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from visrl.box import Box, Size, iou
from visrl.data.rows import RowFault, four_numbers
from visrl.records import RecordError, Sample
from visrl.rewards.detection import truth_box

# Keys of a row that hold several boxes in pixels: TreeVGR's objects, Visual-CoT's corners, and the plural of our own.
IN_PIXELS = ("target_instances", "bboxs", "bboxes")


def dual_iou(predicted: Sequence[Box], truths: Sequence[Box]) -> float:
    """½ (recall + precision), in [0, 1]: the mean over the true boxes of the best IoU that a predicted one has with
    each, and the mean over the predicted boxes of the best IoU that each has with a true one. 0 where nothing is
    predicted.

    Raises:
        ValueError: no true box.
    """
    if not truths:
        raise ValueError("dual IoU needs a true box")
    if not predicted:
        return 0.0
    recall = math.fsum(max(iou(box, truth) for box in predicted) for truth in truths) / len(truths)
    precision = math.fsum(max(iou(box, truth) for truth in truths) for box in predicted) / len(predicted)
    return (recall + precision) / 2


def true_boxes(sample: Sample, size: Size) -> list[Box]:
    """The true boxes of a sample, in an image of `size` where it does not say its own: the several of its row
    (`IN_PIXELS`, each a box or an object with `bbox`), else its true looks or the one box that it has, else none.

    Raises:
        RecordError: the row holds something else under one of these keys.
    """
    row: dict[str, Any] = sample.raw if isinstance(sample.raw, dict) else {}
    key = next((key for key in IN_PIXELS if row.get(key)), None)
    if key is None:
        return list(sample.true_looks or ())
    given = row[key]
    if not isinstance(given, list):
        raise RecordError(f"sample {sample.id!r}: {key!r} must be a list of boxes in pixels; it is {str(given)[:60]}")
    return [_box(sample, one, key, sample.size or size) for one in given]


def _box(sample: Sample, given: Any, key: str, size: Size) -> Box:
    corners = given.get("bbox") if isinstance(given, dict) else given
    try:
        box = truth_box(four_numbers(corners, key), size)
    except RowFault as error:
        raise RecordError(f"sample {sample.id!r}: {error}") from error
    if box is None:
        raise RecordError(f"sample {sample.id!r}: {key!r}: {corners} is no box in {size[0]} × {size[1]} pixels")
    return box
