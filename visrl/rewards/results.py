"""Results: the row of one question, and what rows add up to. One schema and one summary for every verb.

A `Result` is written in one of two shapes: `eval_row` for `visrl eval` (results.jsonl: a data set, string metrics, null
for what failed) and `loop_row` for the checkpoints of a loop and a training's held-out rollouts (eval/*.jsonl: a kind
of question, `correct`, failures counted as wrong). Rows of both shapes hold `id`, a data set (`dataset` or `kind`) and
some of `COLUMNS`, each in [0, 1] or null. Null is "failed or could not be read": never 0 by itself. The two readings of
a column:

- `counted`: every row counts, null as 0, as published scores have it;
- `left_out`: rows with null are left out, and, for boxes, those whose ground truth is no box (`bad_truth`).

The truth lies between the two; where they differ by much, the failures are the finding.

Rows with one `group` are one question, asked several times: they count as one value, their mean.

What does not apply to a question is neither: a row that was `skipped` (a control that the question has not) counts in
no column, and a row without one of `CONDITIONAL` not in that one; both are counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from visrl.box import Box, CropRule, Size, iou
from visrl.records import End, Sample
from visrl.rewards.detection import is_hit
from visrl.rewards.grounding import evidence_of, is_grounded, is_on_right_object
from visrl.rewards.metrics import METRICS, exact_match, string_scores
from visrl.rollout.greedy import WRITTEN_MODES, Mode
from visrl.rollout.rollout import Refusal, failure
from visrl.rollout.steps import Look
from visrl.statistics import interval, mean_interval
from visrl.zoom.episode import ZoomedLook

Row = Mapping[str, Any]
Key = tuple[str, str, int]  # data set, id, and how many rows before have both
Group = tuple[str, str]  # data set, and what rows about one question share
Reading = Literal["counted", "left_out"]
Measure = Literal["answer_accuracy", "box_iou", "box_accuracy_50", "right_object"]

READINGS: tuple[Reading, ...] = ("counted", "left_out")
# Of the questions alone whose image has another known object, of those whose evidence is known (see grounding.py), and
# of one row alone of those that are asked in several orders of their options.
CONDITIONAL = ("right_object", "grounded", "circular")
BOX_COLUMNS = ("hit_published", "hit", "iou", "iou_published", "right_object", "grounded")
ANSWER_COLUMNS = (
    "judge_published", "judge", "correct_published", "correct", "circular", "exact", "relaxed", "anls", "vqa",
)  # fmt: skip
COLUMNS = (*ANSWER_COLUMNS, *BOX_COLUMNS)
MEASURES: tuple[Measure, ...] = ("answer_accuracy", "box_iou", "box_accuracy_50", "right_object")
NO_OTHER = "no other question on its image"  # why mode "other_question" skips a question
KIND_MEASURES: tuple[Measure, ...] = ("answer_accuracy", "box_iou", "right_object")  # shown by kind of question
# What says of an answer that it is right, the surest first; at 0.5 a judge finds it more right than wrong.
RIGHT_BY = ("correct", "correct_published", "judge", "exact", "hit")


# --- The row of a question --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one question: where was looked, what was answered, or why neither.

    `box_text` is what stands for the box in the conversation (None: no box was asked for); in most controls nobody
    wrote it (see `written`). An `error` beside an empty text says that no reply came, unless it is of the box
    ("box: …"). `size` is that of the image as it was opened, in pixels; `others` are the known objects of the image
    that are not asked about; `reply` is the answer with what was thought aloud. `skipped` says why the mode does not
    apply to the question. Where a protocol looks several times, `looks` are all of them, `box` is the last, and `end`
    says how the episode ended.
    """

    sample: Sample
    prediction: str | None = None
    box_text: str | None = None
    box: Box | None = None
    error: str | None = None
    mode: Mode = "own"
    size: Size | None = None
    crop_rule: CropRule = "exact"
    others: tuple[Box, ...] = ()
    skipped: str | None = None
    reply: str | None = None
    looks: tuple[ZoomedLook, ...] | None = None
    end: End | None = None

    @classmethod
    def of(
        cls,
        sample: Sample,
        look: Look | Refusal,
        mode: Mode,
        crop_rule: CropRule = "exact",
        others: tuple[Box, ...] = (),
    ) -> Result:
        """The result of one rollout, or of a question that could not be asked."""
        if isinstance(look, Look):
            size = look.whole.size
            reply = look.answer_completion.text if look.answer_completion else None
            text = None if look.looks == () and look.error is None else look.text
            return cls(
                sample, look.answer, text, look.box, look.error, mode, size, crop_rule, others, None, reply, look.looks,
                look.end,
            )  # fmt: skip
        return cls(sample, None, "", None, failure(look), mode, None, crop_rule, others)

    @property
    def written(self) -> str | None:
        """The box text that the model itself wrote, about this question or the other one of its mode; None where it was
        asked for none."""
        return self.box_text if self.mode in WRITTEN_MODES else None

    @property
    def shown(self) -> Box | None:
        """The box whose crop was shown; None without one, and where the whole image was."""
        return None if self.mode in ("no_box", "no_crop") else self.box

    @property
    def unparseable(self) -> bool:
        """Whether the model wrote a text that holds no box, an empty one too: its own failure."""
        if self.written is None or self.box is not None:
            return False
        return bool(self.written) or self.error is None or self.error.startswith("box: ")

    @property
    def failure(self) -> str | None:
        """Why no reply came; None where one did, be it a wrong one."""
        return None if self.unparseable else self.error

    def conditional(self) -> dict[str, bool]:
        """Those of `CONDITIONAL` that apply: is the box on the right object, does its crop hold the evidence? Both are
        false without a box."""
        found: dict[str, bool] = {}
        if self.skipped or self.mode in ("no_box", "no_crop") or self.sample.box is None:
            return found
        if self.others:
            found["right_object"] = is_on_right_object(self.shown, self.sample.box, self.others)
        evidence = evidence_of(self.sample)
        if evidence is not None and self.sample.answer and (self.shown is None or self.size):
            size = self.size or (1, 1)  # without a box nothing is cropped
            found["grounded"] = is_grounded(self.shown, evidence, size, self.crop_rule)
        return found

    def eval_row(self) -> dict[str, Any]:
        """The row of `visrl eval`. An unparseable box scores 0 in every column, and no reading leaves it out.

        A sample without a box has a bad truth; one without an answer gets no string metrics.
        """
        sample = self.sample
        row: dict[str, Any] = {
            "id": sample.id,
            "dataset": sample.source,
            "question": sample.question,
            "answer": sample.answer,
            "image": sample.image,
            "prediction": self.prediction,
            "error": self.failure,
            **({"repeat": sample.repeat} if sample.repeat else {}),
            **({"skipped": self.skipped} if self.skipped else {}),
            **self._looked(),
        }
        if sample.answer:
            row.update(string_scores(self.prediction, [sample.answer]))
        if sample.answer and self.unparseable:
            row.update(dict.fromkeys(METRICS, 0.0))
        if self.written is None and self.shown is None:
            return row
        unknown = self.shown is None and not self.unparseable
        overlap = None if unknown else _overlap(self.shown, sample.box)
        return row | {
            "true_box": sample.box.as_list() if sample.box else None,
            "box": self.shown.as_list() if self.shown else None,
            "box_text": self.written,
            "iou": overlap,
            "hit": None if overlap is None else int(is_hit(overlap)),
            "unparseable": self.unparseable,
            "bad_truth": sample.box is None,
            **{name: None if unknown else int(value) for name, value in self.conditional().items()},
        }

    def loop_row(self) -> dict[str, Any]:
        """The row of a loop's checkpoint: without a box IoU 0 and a wrong answer, with the error kept."""
        sample = self.sample
        return {
            "id": sample.id,
            "kind": sample.source.removeprefix("scenes-"),
            "mode": self.mode,
            "question": sample.question,
            "answer": sample.answer,
            "image": sample.image,
            "true_box": sample.box.as_list() if sample.box else None,
            "box": self.box.as_list() if self.box else None,
            "box_text": self.box_text,
            "prediction": self.prediction,
            "correct": None if self.skipped else self._is_exact(),
            "iou": None if self.skipped else _overlap(self.box, sample.box),
            **self.conditional(),
            "error": self.error,
            **({"repeat": sample.repeat} if sample.repeat else {}),
            **({"skipped": self.skipped} if self.skipped else {}),
            **self._looked(),
        }

    def _looked(self) -> dict[str, Any]:
        """All looks and how they came to an end, where the model said how often it looks."""
        return {} if self.looks is None else {"looks": [one.box.as_list() for one in self.looks], "end": self.end}

    def _is_exact(self) -> bool:
        return self.prediction is not None and exact_match(self.prediction, [self.sample.answer]) == 1.0


def _overlap(box: Box | None, truth: Box | None) -> float | None:
    """IoU, 0 without a box, None without a true one."""
    return None if truth is None else 0.0 if box is None else iou(box, truth)


# --- Reading rows -----------------------------------------------------------------------------------------------------


def dataset_name(row: Row) -> str:
    """The data set (or kind of scene) a row belongs to."""
    return str(row.get("dataset") or row.get("kind") or "")


def key_of(row: Row) -> Key:
    """What names a question within one benchmark: rows of two checkpoints with equal keys are a pair."""
    return dataset_name(row), str(row["id"]), row.get("repeat", 0)


def columns_of(rows: Iterable[Row]) -> list[str]:
    """The columns that the rows hold, in the order of `COLUMNS`."""
    present = {name for row in rows for name in row}
    return [name for name in COLUMNS if name in present]


def applies(row: Row, column: str) -> bool:
    """Whether a row has anything to say in a column, be it null."""
    return not row.get("skipped") and (column in row or column not in CONDITIONAL)


def value_of(row: Row, column: str, reading: Reading) -> float | None:
    """What a row counts for in a column under a reading; None: the row is left out."""
    if not applies(row, column):
        return None
    value = row.get(column)
    if reading == "counted":
        return 0.0 if value is None else float(value)
    if value is None or (column in BOX_COLUMNS and row.get("bad_truth")):
        return None
    return float(value)


def values_of(rows: Iterable[Row], column: str, reading: Reading) -> list[float]:
    """The values of a column under a reading, one for every question."""
    return means_of_groups((group_of(row), value_of(row, column, reading)) for row in rows)


def group_of(row: Row) -> Group | None:
    """What names the question of a row that was asked several times; None of any other row."""
    group = row.get("group")
    return None if group is None else (dataset_name(row), str(group))


def means_of_groups(values: Iterable[tuple[Group | None, float | None]]) -> list[float]:
    """The values without None, those of one group as their mean, in the order in which each first comes."""
    found: list[list[float]] = []
    places: dict[Group, int] = {}
    for group, value in values:
        if value is None:
            continue
        if group is not None and group in places:
            found[places[group]].append(value)
            continue
        if group is not None:
            places[group] = len(found)
        found.append([value])
    return [own[0] if len(own) == 1 else math.fsum(own) / len(own) for own in found]


def measure_of(row: Row, measure: Measure) -> float | None:
    """What a row with `correct` counts for in a measure; None where it does not apply: without a true box, or without
    another object on the image."""
    if measure == "answer_accuracy":
        return value_of(row, "correct", "left_out")
    if measure == "right_object":
        return value_of(row, measure, "left_out")
    overlap = value_of(row, "iou", "left_out")
    return overlap if overlap is None or measure == "box_iou" else float(is_hit(overlap))


def by_dataset(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each data set (or kind), in the order in which they first come."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(dataset_name(row), []).append(row)
    return groups


def right_column(rows: Sequence[Row]) -> str:
    """The column that says which of these answers are right: the surest that holds a value."""
    present = [column for column in RIGHT_BY if any(column in row for row in rows)] or [RIGHT_BY[0]]
    return next((column for column in present if any(row.get(column) is not None for row in rows)), present[0])


def is_right(row: Row, column: str) -> bool:
    """Whether an answer is right, by the column that says so."""
    value = row.get(column)
    return row.get("error") is None and value is not None and value >= (0.5 if column == "judge" else 1)


# --- What rows add up to ----------------------------------------------------------------------------------------------


def summarise_measures(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Answers right, mean IoU, boxes with IoU > 0.5 and on the right object, each with its 95 % interval: `{measure:
    {"mean", "low", "high"}}`. A measure that no row has is absent."""
    values = {measure: _measured(rows, measure) for measure in MEASURES}
    return {measure: interval(own) for measure, own in values.items() if own}


def summarise_kinds(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """The number of rows and the means of answers, IoU and boxes on the right object for each kind of question, by
    name; a mean that no row has is absent."""
    found: dict[str, dict[str, float]] = {}
    for kind, own in sorted(by_dataset(rows).items()):
        found[kind] = {"n": len(own)}
        for measure in KIND_MEASURES:
            if values := _measured(own, measure):
                found[kind][measure] = sum(values) / len(values)
    return found


def looks_taken(rows: Sequence[Row]) -> dict[str, Any]:
    """`{"looks": {"mean", "ends"}}`: how often was looked on average, and how many episodes ended in which way; empty
    where the protocol has one look."""
    counts = [len(row["looks"]) for row in rows if "looks" in row]
    if not counts:
        return {}
    ends = Counter(str(row["end"]) for row in rows if row.get("end"))
    return {"looks": {"mean": sum(counts) / len(counts), "ends": dict(sorted(ends.items()))}}


def training_measures(rows: Sequence[Row]) -> dict[str, float]:
    """What a training run watches: accuracy, parse rate, mean IoU and the share above 0.5 where boxes are known, the
    share on the right object where images have several, and `score`, the mean of accuracy and IoU.

    Accuracy, IoU and right object have their 95 % intervals beside them (`iou_low`, `iou_high`); `n` is how many rows
    there are. Where the model says how often it looks, there are the mean number of looks and the share without one,
    and what is parsed is all but a box that cannot be read.
    """
    found = _with_interval("accuracy", _measured(rows, "answer_accuracy"))
    found["parse_rate"] = _mean([float(_is_read(row)) for row in rows])
    if looked := [row for row in rows if "looks" in row]:
        found["looks_mean"] = _mean([len(row["looks"]) for row in looked])
        found["no_look"] = _mean([float(not row["looks"] and row["error"] is None) for row in looked])
    if overlaps := _measured(rows, "box_iou"):
        found |= _with_interval("iou", overlaps)
        found["iou_50"] = _mean(_measured(rows, "box_accuracy_50"))
    if on_object := _measured(rows, "right_object"):
        found |= _with_interval("right_object", on_object)
    found["score"] = (found["accuracy"] + found.get("iou", found["accuracy"])) / 2
    found["n"] = len(rows)
    return found


def _is_read(row: Row) -> bool:
    return row["box"] is not None or (row.get("looks") == [] and row["error"] is None)


def _with_interval(name: str, values: Sequence[float]) -> dict[str, float]:
    known = interval(values)
    return {name: known["mean"], f"{name}_low": known["low"], f"{name}_high": known["high"]}


def summarise(rows: Sequence[Row], seed: int = 0) -> dict[str, Any]:
    """Counts, and for each column both readings with 95 % intervals, per data set and as the unweighted mean of them.

    `{"n", "skipped", "failed", "unparseable", "bad_truth", "columns": {column: {reading: {"n", "mean", "low", "high"} |
    None, "unread"}}, "datasets": {name: the same without "datasets"}}`; with one data set only its mean is that mean.
    `n` counts the skipped too, which count in no column; `not_applicable` of a column are the others that do not.
    """
    groups = by_dataset(rows)
    datasets = {name: _summarise_groups({name: group}, seed) for name, group in groups.items()}
    return {**_summarise_groups(groups, seed), "datasets": datasets}


def _summarise_groups(groups: Mapping[str, Sequence[Row]], seed: int) -> dict[str, Any]:
    rows = [row for group in groups.values() for row in group]
    columns: dict[str, Any] = {}
    for column in columns_of(rows):
        concerned = [row for row in rows if applies(row, column)]
        columns[column] = {"unread": sum(row.get(column) is None for row in concerned)}
        if column in CONDITIONAL:
            columns[column]["not_applicable"] = sum(not row.get("skipped") for row in rows) - len(concerned)
        for reading in READINGS:
            values = {name: values_of(group, column, reading) for name, group in groups.items()}
            whole = all(values.values())  # a mean over fewer data sets than there are is another figure: none is given
            columns[column][reading] = (
                {"n": sum(map(len, values.values())), **_mean_interval(values, seed)} if whole else None
            )
    counts = {
        "n": len(rows),
        "skipped": sum(bool(row.get("skipped")) for row in rows),
        "failed": sum(row.get("error") is not None for row in rows),
        "unparseable": sum(bool(row.get("unparseable")) for row in rows),
        "bad_truth": sum(bool(row.get("bad_truth")) for row in rows),
    }
    return {**counts, "columns": columns}


def _mean_interval(values: Mapping[str, Sequence[float]], seed: int) -> dict[str, float]:
    only = next(iter(values.values())) if len(values) == 1 else None
    return mean_interval(values, seed) if only is None else interval(only, seed)


def _measured(rows: Iterable[Row], measure: Measure) -> list[float]:
    return [value for row in rows if (value := measure_of(row, measure)) is not None]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
