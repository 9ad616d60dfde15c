"""What takes the place of a model's own box in a control: a random, centred or true box, or another question's.

Two ways to draw random and centre ones: as Visual-CoT's scripts do (`published_control`), and with the size of the true
box, so that only the place differs (`matched_control`). Both depend on a seed and the question alone. Which question of
the same image is the other one (`other_questions`) depends on the seed, the question, and the questions of a run about
its image; of a drawn scene, on the scene alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from visrl.box import Box, BoxError, Size, clamp, iou, padding
from visrl.engines.base import seed_of
from visrl.records import Sample
from visrl.scenes import Scene, SceneQuestion, find_question, questions_of, true_box

Control = Literal["random", "center"]

_CENTER = (0.25, 0.25, 0.75, 0.75)
SAME_REGION = 0.5  # above this IoU two true boxes are one region: either would count as a hit of the other


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


# --- Another question about the same image ----------------------------------------------------------------------------


def other_questions(samples: Sequence[Sample], seed: int = 0) -> list[Sample | None]:
    """For each sample another question about its image and about another region of it; None where there is none.

    Of a drawn scene it is one of the scene's own questions, about another tag, be it among `samples` or not: of the
    same kind where the scene has one, for then the tag alone differs. Elsewhere it is one of `samples` about the same
    image whose text is another, and whose true box is, where both are known.
    """
    by_image: dict[str, list[Sample]] = {}
    for sample in samples:
        by_image.setdefault(sample.image, []).append(sample)
    found: list[Sample | None] = []
    for sample in samples:
        candidates = _other_tags(sample)
        if candidates is None:
            candidates = [other for other in by_image[sample.image] if _is_elsewhere(sample, other)]
        chance = np.random.default_rng(seed_of(seed, *sample.place, "other"))
        found.append(candidates[int(chance.integers(len(candidates)))] if candidates else None)
    return found


def drawn_question(sample: Sample) -> tuple[Scene, SceneQuestion] | None:
    """The scene and the question of a sample that was drawn here; None for any other, and where its id names none."""
    if not sample.image.startswith("scene:"):
        return None
    try:
        scene, question = find_question(sample.id)
    except ValueError:  # a user's own question about a scene
        return None
    return (scene, question) if scene.ref == sample.image and question.text == sample.question else None


def same_region(a: Box, b: Box) -> bool:
    """Whether two true boxes are of one and the same region: annotators draw it twice with other corners."""
    return iou(a, b) > SAME_REGION


def _other_tags(sample: Sample) -> list[Sample] | None:
    """The questions of a drawn scene about other tags than the sample's; None where it is no drawn one."""
    drawn = drawn_question(sample)
    if drawn is None:
        return None
    scene, asked = drawn
    others = [question for question in questions_of(scene) if question.target != asked.target]
    alike = [question for question in others if question.kind == asked.kind]
    return [
        replace(
            sample,
            id=f"{scene.name}:{question.text}",
            question=question.text,
            answer=question.answer,
            box=true_box(scene, question),
            source=f"scenes-{question.kind}",
            repeat=0,
        )
        for question in alike or others
    ]


def _is_elsewhere(sample: Sample, other: Sample) -> bool:
    if " ".join(sample.question.casefold().split()) == " ".join(other.question.casefold().split()):
        return False
    return sample.box is None or other.box is None or not same_region(sample.box, other.box)
