"""What `visrl eval` left in a folder: its scores, and the answers that can be looked at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from visrl.evaluate.results import NAME as RESULTS
from visrl.evaluate.results import SCORES, read_results
from visrl.report.measures import Scores, question_name, read_scores
from visrl.report.shapes import EvaluationShape, JsonObject, read_run_object
from visrl.rewards.results import dataset_name, is_right, right_column


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `visrl eval` found: `facts` are its `scores.json`, `scores` its columns, failures counted 0.

    `rows` are its answers by data set and id, those about an image; each has `correct`, by the column `right_by`.
    """

    name: str  # of its folder
    facts: JsonObject
    scores: Scores
    rows: dict[str, JsonObject]
    right_by: str

    @property
    def title(self) -> str:
        return self.name


def read_evaluations(folder: Path) -> list[Evaluation]:
    """What `visrl eval` wrote to the folder, or to folders in it."""
    found = []
    for path in [folder / SCORES, *sorted(folder.glob(f"*/{SCORES}"))]:
        if path.is_file():
            facts = read_run_object(path, EvaluationShape)
            counted = {column: entry.get("counted") for column, entry in facts.get("columns", {}).items()}
            scores = read_scores(counted, tuple(counted))
            found.append(Evaluation(path.parent.resolve().name, facts, scores, *_answers(path.parent / RESULTS)))
    return found


def _answers(path: Path) -> tuple[dict[str, JsonObject], str]:
    """The rows of `results.jsonl` that can be looked at, each with `correct`, and the column that says so."""
    rows = read_results(path) if path.is_file() else []
    rows = [row for row in rows if row.get("image") and not row.get("skipped")]
    right_by = right_column(rows)
    named = {" ".join(part for part in (dataset_name(row), question_name(row)) if part): row for row in rows}
    return {name: row | {"correct": is_right(row, right_by)} for name, row in named.items()}, right_by
