"""What a box is on, and what its crop holds: the right object among those of its image, and the evidence of the answer.

Geometry over boxes that are known; what is not known is None, and measures nothing. Knows no policy and no rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from visrl.box import Box, CropRule, Size, crop_window, iou, overlap
from visrl.records import Sample
from visrl.rollout.controls import drawn_question, same_region
from visrl.scenes import SIDE, close_up

EVIDENCE_SHARE = 0.5  # of the evidence that a crop must hold: then the middle of it lies in the crop, too


def other_objects(samples: Sequence[Sample], boxes: Mapping[str, Sequence[Box]] | None = None) -> list[tuple[Box, ...]]:
    """For each sample the known objects of its image but the one asked about, as boxes in fractions of the image.

    Of a drawn scene these are its other tags; elsewhere the true boxes of the other samples about the same image, those
    aside that are the sample's own region drawn twice (`controls.same_region`). `boxes` are those true boxes where
    `samples` are only some of a data set (see `boxes_by_image`). Empty where no other object is known.
    """
    boxes = boxes_by_image(samples) if boxes is None else boxes
    return [_other_objects(sample, boxes.get(sample.image, ())) for sample in samples]


def boxes_by_image(samples: Iterable[Sample]) -> dict[str, list[Box]]:
    """The true boxes of samples, by the image that they are on."""
    found: dict[str, list[Box]] = {}
    for sample in samples:
        if sample.box is not None:
            found.setdefault(sample.image, []).append(sample.box)
    return found


def _other_objects(sample: Sample, boxes: Sequence[Box]) -> tuple[Box, ...]:
    if sample.box is None:
        return ()
    drawn = drawn_question(sample)
    if drawn is not None:
        scene, asked = drawn
        tags = [tag.box for number, tag in enumerate(scene.tags) if number != asked.target]
        return tuple(Box.from_pixels(tag, (SIDE, SIDE)) for tag in tags)
    truth = sample.box
    return tuple(dict.fromkeys(box for box in boxes if not same_region(box, truth)))


def is_on_right_object(box: Box | None, truth: Box, others: Sequence[Box]) -> bool:
    """Whether the object that a box overlaps most, by IoU, is the one asked about; never without a box, or where it
    overlaps none."""
    if box is None:
        return False
    share = iou(box, truth)
    return share > 0 and all(iou(box, other) < share for other in others)


def evidence_of(sample: Sample) -> Box | None:
    """The region that must be seen to answer: the true box, and on a drawn tag the smallest box around its number or
    its dots. None where no true box is known."""
    drawn = None if sample.box is None else drawn_question(sample)
    return sample.box if drawn is None else close_up(*drawn, 0.0)


def is_grounded(box: Box | None, evidence: Box, size: Size, rule: CropRule) -> bool:
    """Whether the crop that `rule` makes of a box in an image of `size` pixels holds the evidence: half of its area or
    more. Then the crop holds its middle, too: a part that lacks it on one axis is less than half.

    Whether what the crop holds is large enough to be read is another matter: the crop of a box around everything is
    grounded.
    """
    if box is None:
        return False
    window = Box.from_pixels(crop_window(box, size, rule), size)
    return overlap(window, evidence) >= EVIDENCE_SHARE * evidence.area
