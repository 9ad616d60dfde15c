"""Critics: one score for the box, one for the answer, each in [0, 1] or None where none could be read.

A critic sees the question, the picture, the crop window, the reference answer and the answer; never a true box. The
oracle for drawn scenes knows what is drawn and judges exactly; model critics follow the same interface.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from visrl.box import Box, CropRule, Size, crop_window
from visrl.data.scenes import GLYPH_HEIGHT, SIDE, PixelBox, Tag, find_question
from visrl.evaluate.metrics import exact_match
from visrl.records import RecordError, Sample, Trajectory, Verdict

ILLEGIBLE_HEIGHT = 5.0  # px of a shown digit up to which it cannot be read (in the whole picture it has 3.5)
LEGIBLE_HEIGHT = 16.0  # px from which on it counts as fully legible


class Critic(Protocol):
    """Scores trajectories. A trajectory with an error gets no scores."""

    name: str

    def judge(self, samples: Sequence[Sample], trajectories: Sequence[Trajectory]) -> list[Verdict]:
        """One verdict per trajectory, in order; `samples` holds the sample of each."""
        ...


class SceneOracle:
    """An exact critic for drawn scenes.

    The box score asks whether the crop holds what the question needs and whether it can be read there: the share of
    the content inside the crop × its legibility at the size the crop is shown with × (half + half the share of the
    tag inside, for a number without its tag answers nothing). The answer score is 1 or 0.
    """

    name = "oracle"

    def __init__(self, shown_size: Callable[[Size], Size], crop_rule: CropRule = "exact") -> None:
        self.shown_size = shown_size  # the size in pixels at which a crop of some size is shown
        self.crop_rule: CropRule = crop_rule

    def judge(self, samples: Sequence[Sample], trajectories: Sequence[Trajectory]) -> list[Verdict]:
        return [self._judge(*pair) for pair in zip(samples, trajectories, strict=True)]

    def _judge(self, sample: Sample, trajectory: Trajectory) -> Verdict:
        key = (trajectory.sample_id, trajectory.round, trajectory.branch)
        if trajectory.box is None or trajectory.answer is None:
            return Verdict(*key, None, None, trajectory.error or "nothing to judge")
        return Verdict(*key, self.box_score(sample, trajectory.box), exact_match(trajectory.answer, [sample.answer]))

    def box_score(self, sample: Sample, box: Box) -> float:
        """How well the crop of `box` lets the question be answered, in [0, 1].

        Raises:
            RecordError: the sample is not one of a drawn scene.
        """
        try:
            scene, question = find_question(sample.id)
        except ValueError as error:
            raise RecordError(f"the oracle judges drawn scenes only: {error}") from error
        tag: Tag = scene.tags[question.target]
        window = crop_window(box, (SIDE, SIDE), self.crop_rule)
        size = (window[2] - window[0], window[3] - window[1])
        shown = self.shown_size(size)
        height = GLYPH_HEIGHT * min(shown[0] / size[0], shown[1] / size[1])
        legible = min(1.0, max(0.0, (height - ILLEGIBLE_HEIGHT) / (LEGIBLE_HEIGHT - ILLEGIBLE_HEIGHT)))
        return _share(tag.content, window) * legible * (0.5 + 0.5 * _share(tag.box, window))


def _share(part: PixelBox, window: tuple[float, float, float, float]) -> float:
    """The share of `part` that lies inside `window`."""
    width = min(part[2], window[2]) - max(part[0], window[0])
    height = min(part[3], window[3]) - max(part[1], window[1])
    return max(0.0, width) * max(0.0, height) / ((part[2] - part[0]) * (part[3] - part[1]))
