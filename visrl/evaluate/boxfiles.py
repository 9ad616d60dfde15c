"""Scoring box files that other programs wrote, without running a model: files in, result rows and totals out.

They are Visual-CoT's detection and RefCOCO predictions, or the samples that lmms-eval's RefCOCO task logs. The formats
are in docs/EVALUATION.md; the rules are in detection.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visrl.box import Size
from visrl.codecs import CODECS
from visrl.evaluate.predictions import PathLike, Rows, files_by_dataset, predicted_text, read_predictions
from visrl.evaluate.published import VISCOT_QUESTIONS, average, average_published_detection, missing_datasets
from visrl.records import RecordError
from visrl.rewards.detection import Detection, judge_boxes, judge_lmms
from visrl.rewards.results import values_of


def score_boxes(
    predictions: PathLike, truth: PathLike | None = None, dataset: str = "", codec: str | None = None
) -> Rows:
    """Result rows of a detection or RefCOCO prediction file, one per line, in order.

    With `truth` (a detection or RefCOCO JSONL) box and size come from its rows, aligned line by line; otherwise from
    the prediction rows themselves, as Visual-CoT's scripts write them. `codec` names how our reading takes the text;
    left out, it is the protocol's own. The published rule does not depend on it.

    Raises:
        RecordError: an empty or unreadable file, files of different length, or a row without what it needs.
    """
    rows = read_predictions(predictions)
    if any(_lmms_entry(row) is not None for row in rows):
        return [_lmms_row(row, f"{predictions}, row {number}", dataset, number, codec or "visrl")
                for number, row in enumerate(rows, start=1)]  # fmt: skip
    truths, truth_file = rows, predictions
    if truth is not None:
        truths, truth_file = read_predictions(truth), truth
        if len(truths) != len(rows):
            raise RecordError(
                f"{predictions} has {len(rows)} rows and {truth} {len(truths)}; they must belong together line by line"
            )
    boxes, sizes = [], []
    for number, row in enumerate(truths, start=1):
        box, size = _truth(row, f"{truth_file}, row {number}", truth is None)
        boxes.append(box)
        sizes.append(size)
    texts = [predicted_text(row, f"{predictions}, row {number}") for number, row in enumerate(rows, start=1)]
    found = judge_boxes(texts, boxes, sizes, codec or "viscot")
    return [
        _box_row(str(number), dataset, text, one) | {"question": str(row.get("expression") or row.get("prompt") or "")}
        for number, (row, text, one) in enumerate(zip(truths, texts, found, strict=True), start=1)
    ]


def score_box_files(
    predictions: str | Path, truth: str | Path | None = None, codec: str | None = None
) -> tuple[Rows, dict[str, Any]]:
    """`score_boxes` of a file with its `box_totals`, or of a folder of them by data set with their `folder_totals`.

    Raises:
        RecordError: no such codec, a data set that `truth` has no file for, or whatever `score_boxes` refuses.
    """
    predictions, truth = Path(predictions), None if truth is None else Path(truth)
    if codec is not None and codec not in CODECS:
        raise RecordError(f"no codec {codec!r}; there are {', '.join(CODECS)}")
    if not predictions.is_dir():
        rows = score_boxes(predictions, truth, codec=codec)
        return rows, box_totals(rows)
    files = files_by_dataset(predictions)
    truths = {} if truth is None else files_by_dataset(truth)
    lacking = [name for name in files if truth is not None and name not in truths]
    if lacking:
        raise RecordError(f"{truth} holds no file for {', '.join(lacking)}")
    by_name = {name: score_boxes(path, truths.get(name), name, codec) for name, path in files.items()}
    totals = folder_totals({name: box_totals(group) for name, group in by_name.items()})
    return [row for group in by_name.values() for row in group], totals


def box_totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | int | None]:
    """What `eval score` prints of a detection or RefCOCO file: counts, and accuracy as published and as ours.

    `correct` and `accuracy_published` follow the published rule over all rows; `accuracy` is ours over the rows whose
    ground truth is a box (None where no row has one); `unparseable` counts under the published rule.
    """
    correct = sum(row["hit_published"] or 0 for row in rows)  # a failed question is a wrong one there
    ours = values_of(rows, "hit", "left_out")
    return {
        "n": len(rows),
        "correct": int(correct),
        "accuracy_published": correct / len(rows),
        "accuracy": sum(ours) / len(ours) if ours else None,
        "unparseable": sum(row["unparseable"] for row in rows),
        "bad_truth": sum(row["bad_truth"] for row in rows),
    }


def folder_totals(totals: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Several data sets' `box_totals` with their averages: ours over all of them, the published one without the zeros.

    `missing` names the data sets of the Visual-CoT benchmark that are not there; nothing stands in for them.
    """
    published = {name: float(total["accuracy_published"]) for name, total in totals.items()}
    ours = {name: total["accuracy"] for name, total in totals.items()}
    known = [value for value in ours.values() if value is not None]
    return {
        "datasets": dict(totals),
        "average_published": average_published_detection(published),
        "average": average({name: value for name, value in ours.items() if value is not None}) if known else None,
        "missing": missing_datasets(totals) if set(totals) & set(VISCOT_QUESTIONS) else [],
    }


def _box_row(name: str, dataset: str, text: str | None, one: Detection) -> dict[str, Any]:
    return {
        "id": name,
        "dataset": dataset,
        "box_text": text,
        "box": one.box.as_list() if one.box else None,
        "iou": one.iou,
        "hit": None if one.hit is None else int(one.hit),
        "hit_published": int(one.hit_published),
        "unparseable": one.unparseable,
        "bad_truth": one.bad_truth,
    }


def _truth(row: Mapping[str, Any], where: str, can_name: bool) -> tuple[list[float], Size]:
    missing = [name for name in ("bbox", "height", "width") if row.get(name) is None]
    if missing:
        remedy = "; give the data set's JSONL with --truth" if can_name else ""
        raise RecordError(f"{where}: no {' and no '.join(missing)}{remedy}")
    box = _four(row["bbox"], f"{where}: bbox")
    size = (row["width"], row["height"])
    if not all(isinstance(side, int) and side > 0 for side in size):
        raise RecordError(f"{where}: width and height must be whole pixels above 0, not {size[0]!r} and {size[1]!r}")
    return box, size


def _four(value: Any, where: str) -> list[float]:
    if not isinstance(value, list) or len(value) != 4 or not all(isinstance(one, (int, float)) for one in value):
        raise RecordError(f"{where} must be four numbers, not {json.dumps(value)[:80]}")
    return value


def _lmms_entry(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The record that lmms-eval logs under each of its RefCOCO metrics: predicted and true box as fractions."""
    entries = (value for name, value in row.items() if name.startswith("refcoco_") and isinstance(value, dict))
    return next((entry for entry in entries if "pred" in entry and "bbox" in entry), None)


def _lmms_row(row: Mapping[str, Any], where: str, dataset: str, number: int, codec: str) -> dict[str, Any]:
    entry = _lmms_entry(row)
    if entry is None:
        raise RecordError(f"{where}: no `refcoco_…` record with `pred` and `bbox`, as the other rows have")
    text: Any = row.get("filtered_resps", row.get("resps"))
    while isinstance(text, list):
        text = text[0] if text else None
    truth, said = _four(entry["bbox"], f"{where}: bbox"), _four(entry["pred"], f"{where}: pred")
    one = judge_lmms(said, truth, text if isinstance(text, str) else None, codec)
    name = str(row.get("doc_id", number))
    return _box_row(name, dataset, text, one) | {"question": str(entry.get("answer", ""))}
