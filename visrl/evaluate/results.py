"""Results: one JSON object a question, and what they add up to under both readings. Knows no models and no benchmark.

A result row holds `id`, the data set (`dataset`, or `kind` in drawn scenes) and any of the columns below, each in
[0, 1] or null. Null is "failed or could not be read": never 0 by itself. The two readings of a column:

- `counted`: every row counts, null as 0, as published scores have it;
- `left_out`: rows with null are left out, and, for boxes, those whose ground truth is no box (`bad_truth`).

The truth lies between the two; where they differ by much, the failures are the finding.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from visrl.box import Box, iou
from visrl.records import RecordError, Sample, read_jsonl
from visrl.rewards.detection import is_hit
from visrl.rewards.metrics import METRICS, string_scores
from visrl.rewards.reply_scores import is_score
from visrl.statistics import interval, mean_interval

Row = Mapping[str, Any]
Key = tuple[str, str, int]  # data set, id, and how many rows before have both
Reading = Literal["counted", "left_out"]

READINGS: tuple[Reading, ...] = ("counted", "left_out")
BOX_COLUMNS = ("hit_published", "hit", "iou")
ANSWER_COLUMNS = ("judge_published", "judge", "correct", "exact", "relaxed", "anls", "vqa")
COLUMNS = (*ANSWER_COLUMNS, *BOX_COLUMNS)
NAME, SCORES = "results.jsonl", "scores.json"  # what `visrl eval` leaves in its folder


def read_results(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The result rows of a JSONL file, or of `results.jsonl` in a folder. An id may stand for several rows where each
    says by its `repeat` which it is, as `visrl eval` writes them.

    Raises:
        RecordError: no such file, no rows, a row without id or column, a value outside [0, 1], or a question twice.
    """
    file = Path(path) / NAME if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise RecordError(f"no results at {file}; make them with `visrl eval` or `visrl eval score --out`")
    rows = list(read_jsonl(file))
    seen: set[Key] = set()
    for number, row in enumerate(rows, start=1):
        fault = _fault(row)
        if fault is None and key_of(row) in seen:
            fault = f"the id {row['id']!r} comes a second time in its data set"
        if fault is not None:
            raise RecordError(f"{file}, row {number}: {fault}")
        seen.add(key_of(row))
    if not rows:
        raise RecordError(f"{file} holds no results; run the evaluation that should have written it again")
    return rows


def _fault(row: Any) -> str | None:
    if not isinstance(row, dict) or "id" not in row:
        return "not a result: it needs an `id`"
    if type(row.get("repeat", 0)) is not int:
        return f"repeat is {repr(row['repeat'])[:80]}; it counts the rows of one id"
    columns = [name for name in COLUMNS if name in row]
    if not columns:
        return f"not a result: it has none of the columns {', '.join(COLUMNS)}"
    for name in columns:
        value = row[name]
        if value is not None and not is_score(value):
            return f"{name} is {repr(value)[:80]}; it must be null or lie between 0 and 1"
    return next((fault for name in ("box", "true_box") if (fault := _box_fault(name, row.get(name)))), None)


def _box_fault(name: str, value: Any) -> str | None:
    try:
        if value is None or (isinstance(value, list) and len(value) == 4 and Box(*value)):
            return None
        return f"{name} is {str(value)[:80]}; it must be null or four fractions of the picture"
    except (TypeError, ValueError) as error:
        return f"{name} is {str(value)[:80]}: {str(error)[:160]}"


def result_row(
    sample: Sample,
    *,
    prediction: str | None,
    box_text: str | None = None,
    box: Box | None = None,
    error: str | None = None,
) -> dict[str, Any]:
    """The result row of one question: what a model looked at and answered, with IoU and the string metrics.

    A box text that holds no box, an empty one too, is the model's own failure: it scores 0 in every column, and no
    reading leaves it out. `error` beside an empty text says that no reply came, unless it is of the box ("box: …").
    With no box asked for (a control), leave `box_text` and `box` out. A sample without a box has a bad truth; one
    without an answer gets no string metrics.
    """
    no_reply = not box_text and error is not None and not error.startswith("box: ")
    unparseable = box_text is not None and box is None and not no_reply
    row: dict[str, Any] = {
        "id": sample.id,
        "dataset": sample.source,
        "question": sample.question,
        "answer": sample.answer,
        "image": sample.image,
        "prediction": prediction,
        "error": None if unparseable else error,
        **({"repeat": sample.repeat} if sample.repeat else {}),
    }
    if sample.answer:
        row.update(string_scores(prediction, [sample.answer]))
    if sample.answer and unparseable:
        row.update(dict.fromkeys(METRICS, 0.0))
    if box_text is None and box is None:
        return row
    failed = box is None and not unparseable
    overlap = None if failed or sample.box is None else 0.0 if box is None else iou(box, sample.box)
    return row | {
        "true_box": sample.box.as_list() if sample.box else None,
        "box": box.as_list() if box else None,
        "box_text": box_text,
        "iou": overlap,
        "hit": None if overlap is None else int(is_hit(overlap)),
        "unparseable": unparseable,
        "bad_truth": sample.box is None,
    }


def dataset_of(row: Row) -> str:
    """The data set (or kind of scene) a row belongs to."""
    return str(row.get("dataset") or row.get("kind") or "")


def key_of(row: Row) -> Key:
    """What names a question within one benchmark: rows of two checkpoints with equal keys are a pair."""
    return dataset_of(row), str(row["id"]), row.get("repeat", 0)


def columns_of(rows: Iterable[Row]) -> list[str]:
    """The columns that the rows hold, in the order of `COLUMNS`."""
    present = {name for row in rows for name in row}
    return [name for name in COLUMNS if name in present]


def value_of(row: Row, column: str, reading: Reading) -> float | None:
    """What a row counts for in a column under a reading; None: the row is left out."""
    value = row.get(column)
    if reading == "counted":
        return 0.0 if value is None else float(value)
    if value is None or (column in BOX_COLUMNS and row.get("bad_truth")):
        return None
    return float(value)


def values_of(rows: Iterable[Row], column: str, reading: Reading) -> list[float]:
    """The values of a column under a reading."""
    return [value for row in rows if (value := value_of(row, column, reading)) is not None]


def by_dataset(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each data set, in the order in which the data sets first come."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(dataset_of(row), []).append(row)
    return groups


def summarise(rows: Sequence[Row], seed: int = 0) -> dict[str, Any]:
    """Counts, and for each column both readings with 95 % intervals, per data set and as the unweighted mean of them.

    `{"n", "failed", "unparseable", "bad_truth", "columns": {column: {reading: {"n", "mean", "low", "high"} | None,
    "unread"}}, "datasets": {name: the same without "datasets"}}`; with one data set only its mean is that mean.
    """
    groups = by_dataset(rows)
    datasets = {name: _one_dataset(group, seed) for name, group in groups.items()}
    columns: dict[str, Any] = {}
    for column in columns_of(rows):
        columns[column] = {"unread": sum(row.get(column) is None for row in rows)}
        for reading in READINGS:
            values = {name: values_of(group, column, reading) for name, group in groups.items()}
            whole = all(values.values())  # a mean over fewer data sets than there are is another figure: none is given
            columns[column][reading] = {"n": sum(map(len, values.values())), **_mean(values, seed)} if whole else None
    return {**_counts(rows), "columns": columns, "datasets": datasets}


def _one_dataset(rows: Sequence[Row], seed: int) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for column in columns_of(rows):
        columns[column] = {"unread": sum(row.get(column) is None for row in rows)}
        for reading in READINGS:
            values = values_of(rows, column, reading)
            columns[column][reading] = {"n": len(values), **interval(values, seed)} if values else None
    return {**_counts(rows), "columns": columns}


def _counts(rows: Sequence[Row]) -> dict[str, int]:
    return {
        "n": len(rows),
        "failed": sum(row.get("error") is not None for row in rows),
        "unparseable": sum(bool(row.get("unparseable")) for row in rows),
        "bad_truth": sum(bool(row.get("bad_truth")) for row in rows),
    }


def _mean(values: Mapping[str, Sequence[float]], seed: int) -> dict[str, float]:
    only = next(iter(values.values())) if len(values) == 1 else None
    return mean_interval(values, seed) if only is None else interval(only, seed)
