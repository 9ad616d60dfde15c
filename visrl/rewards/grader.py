"""A grader that is a plain function: samples and trajectories in, a box score and an answer score of each out.

What it gives back is checked: a fault of a reward is said in a sentence and stops the run, for a score that was made up
in its place would be learned from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

from visrl.errors import UserError
from visrl.plugins import raised
from visrl.records import Sample, Trajectory, Verdict
from visrl.rewards.critic import verdict_of, without_scores

Grade = tuple[float | None, float | None]  # of the box and of the answer, each in [0, 1]; None: there is none
Grader = Callable[[Sequence[Sample], Sequence[Trajectory]], Sequence[Grade]]
PARTS = ("box", "answer")


class GraderError(UserError, RuntimeError):
    """A grader that raised, or gave back what is no scores; the message says which and for what."""


class FunctionCritic:
    """A grader as a critic. It is asked about trajectories that have a box and an answer, or after several looks an
    answer; others get no scores.

    One with several answers is shown it once for each, in one call; its box has the score that came with the first.
    """

    sampled_tokens = 0

    def __init__(self, name: str, grader: Grader) -> None:
        self.name = name
        self.grader = grader

    def judge(self, samples: Sequence[Sample], trajectories: Sequence[Trajectory]) -> list[Verdict]:
        """One verdict per trajectory, in order; `samples` holds the sample of each.

        Raises:
            GraderError: as `grade`.
        """
        whole = [tried.can_be_judged for tried in trajectories]
        shown = [
            (sample, tried if not tried.answers else replace(tried, answer=answer, answers=()))
            for sample, tried, has in zip(samples, trajectories, whole, strict=True)
            if has
            for answer in tried.all_answers
        ]
        grades = iter(grade(self.name, self.grader, [one for one, _ in shown], [one for _, one in shown]))
        return [self._verdict(tried, grades) if has else without_scores(tried)
                for tried, has in zip(trajectories, whole, strict=True)]  # fmt: skip

    @staticmethod
    def _verdict(tried: Trajectory, grades: Iterator[Grade]) -> Verdict:
        own = [next(grades) for _ in tried.all_answers]
        return verdict_of(tried, own[0][0], [score for _, score in own])


def grade(name: str, grader: Grader, samples: Sequence[Sample], trajectories: Sequence[Trajectory]) -> list[Grade]:
    """What the grader called `name` says of each trajectory, checked.

    Raises:
        GraderError: it raised; it gave back another number of pairs than there are trajectories; or a score is no
            number from 0 to 1 (NaN is none, either) and not None.
    """
    if not trajectories:
        return []
    try:
        found: Any = grader(samples, trajectories)
    except Exception as error:  # whatever a user's function raises: it is told, with its place, and ends the run
        raise GraderError(f"critic {name} stopped with {raised(error)}") from error
    try:
        grades = list(found)
    except TypeError as error:
        raise GraderError(f"critic {name} gave back {type(found).__name__}, and not a list of pairs") from error
    if len(grades) != len(trajectories):
        raise GraderError(f"critic {name} gave back {len(grades)} pairs for {len(trajectories)} trajectories")
    return [_checked(name, tried, one) for tried, one in zip(trajectories, grades, strict=True)]


def _checked(name: str, tried: Trajectory, given: Any) -> Grade:
    which = f"sample {tried.sample_id!r}, round {tried.round}, branch {tried.branch}"
    if not isinstance(given, tuple | list) or len(given) != len(PARTS):
        raise GraderError(f"critic {name}: {which}: give the scores of box and answer as a pair, not {given!r}"[:500])
    for part, score in zip(PARTS, given, strict=True):
        if score is None or (isinstance(score, Real) and 0 <= float(score) <= 1):  # NaN is neither
            continue
        number = isinstance(score, Real) and not math.isnan(float(score))
        fault = "is not from 0 to 1" if number else "is no number from 0 to 1; None says that there is no score"
        raise GraderError(f"critic {name}: {which}: the {part} score {score!r} {fault}"[:500])
    box, answer = (None if score is None else float(score) for score in given)
    return box, answer
