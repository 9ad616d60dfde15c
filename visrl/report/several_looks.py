"""Several looks: what a warm-up and online reinforcement make of questions that need no look, one or two, by kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from visrl.report.evaluations import Evaluation, read_evaluations
from visrl.report.measures import Score
from visrl.report.shapes import JsonObject
from visrl.rewards.results import dataset_name
from visrl.statistics import interval

LOOKS = "looks"  # the folder of a run that its lessons of several looks lie in
WARM_UP, ONLINE = "warm-up", "online"  # the trainings in it, in their order,
EVALUATED = "{}-eval"  # and the folder of the evaluation after each


@dataclass(frozen=True, slots=True)
class LooksTaken:
    """What one checkpoint did with the questions of one kind: how many there are, the shares of them that were answered
    right (with its 95 % interval) and without a look, and the mean number of looks."""

    n: int
    right: Score
    at_once: float
    looks: float


def read_lessons(folder: Path) -> list[tuple[str, Evaluation]]:
    """The evaluations of several looks in the folder of a run, with their titles, in the order of training."""
    found = {one.name: one for one in read_evaluations(folder / LOOKS)}
    names = {name: EVALUATED.format(name) for name in (WARM_UP, ONLINE)}
    return [(name.capitalize(), found[evaluated]) for name, evaluated in names.items() if evaluated in found]


def looks_by_kind(evaluations: Sequence[Evaluation]) -> list[tuple[str, list[LooksTaken | None]]]:
    """Every kind of question with what each of the evaluations did with it, in the order of their data sets."""
    kinds = dict.fromkeys(dataset_name(row) for one in evaluations for row in one.rows.values())
    return [(kind.removeprefix("scenes-"), [_taken(one, kind) for one in evaluations]) for kind in kinds]


def _taken(evaluation: Evaluation, kind: str) -> LooksTaken | None:
    rows: list[JsonObject] = [row for row in evaluation.rows.values() if dataset_name(row) == kind]
    if not rows:
        return None
    looks = [len(row.get("looks") or ()) for row in rows]
    right = Score(**interval([float(row["correct"]) for row in rows]))
    at_once = sum(not count for count in looks) / len(rows)
    return LooksTaken(len(rows), right, at_once, sum(looks) / len(rows))
