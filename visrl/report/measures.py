"""Measures of checkpoints and evaluations: scores with intervals, by the titles they are shown with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from visrl.records import place_name, place_of
from visrl.report.shapes import JsonObject
from visrl.rewards.results import Measure, summarise_measures

TITLES: dict[Measure, str] = {
    "answer_accuracy": "Answers right",
    "box_iou": "Mean IoU of the box",
    "box_accuracy_50": "Boxes with IoU > 0.5",
    "right_object": "Boxes on the right object",
}


@dataclass(frozen=True, slots=True)
class Score:
    """A mean with its 95 % interval, all in [0, 1]."""

    mean: float
    low: float
    high: float


Scores = dict[str, Score]  # by measure; a measure that does not apply is absent


def measure_rows(rows: Sequence[JsonObject]) -> Scores:
    """The measures of evaluation rows, with their intervals."""
    return {name: Score(**entry) for name, entry in summarise_measures(rows).items()}


def read_scores(entry: JsonObject, measures: Iterable[str] = TITLES) -> Scores:
    """The scores in an entry of `summary.json` or `scores.json`."""
    return {name: Score(**{key: entry[name][key] for key in ("mean", "low", "high")})
            for name in measures if isinstance(entry.get(name), dict)}  # fmt: skip


def question_name(row: JsonObject) -> str:
    """What tells a question from the others of its run: its id, and where several rows have that, which of them."""
    return place_name(place_of(str(row["id"]), row.get("repeat", 0)))
