"""Reading and checking the result files of `visrl eval`; what a row holds is in rewards/results.py."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from visrl.box import Box
from visrl.records import RecordError, read_jsonl
from visrl.rewards.reply_scores import is_score
from visrl.rewards.results import COLUMNS, Key, key_of

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


def facts_of(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What the scores in a folder of `visrl eval` say of the run beside its figures; nothing where there are none.

    Raises:
        RecordError: they are not JSON.
    """
    file = Path(path) / SCORES
    if not file.is_file():
        return {}
    try:
        scores = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordError(f"{file} is not JSON ({error}); run the evaluation that writes it again") from error
    return scores if isinstance(scores, dict) else {}


def mode_of(path: str | os.PathLike[str]) -> str | None:
    """The mode of a run of `visrl eval`, by the scores in its folder; None where there are none.

    Raises:
        RecordError: they are not JSON.
    """
    mode = facts_of(path).get("mode")
    return mode if isinstance(mode, str) else None


def _fault(row: Any) -> str | None:
    if not isinstance(row, dict) or "id" not in row:
        return "not a result: it needs an `id`"
    if type(row.get("repeat", 0)) is not int:
        return f"repeat is {repr(row['repeat'])[:80]}; it counts the rows of one id"
    columns = [name for name in COLUMNS if name in row]
    if not columns and not row.get("skipped"):
        return f"not a result: it has none of the columns {', '.join(COLUMNS)}"
    for name in columns:
        value = row[name]
        if value is not None and not is_score(value):
            return f"{name} is {repr(value)[:80]}; it must be null or lie between 0 and 1"
    if not isinstance(looks := row.get("looks", []), list):
        return f"looks is {str(looks)[:80]}; it lists the boxes of all looks"
    boxes = [("box", row.get("box")), ("true_box", row.get("true_box"))]
    boxes += [(f"looks[{number}]", box) for number, box in enumerate(looks)]
    return next((fault for name, box in boxes if (fault := _box_fault(name, box))), None)


def _box_fault(name: str, value: Any) -> str | None:
    try:
        if value is None or (isinstance(value, list) and len(value) == 4 and Box(*value)):
            return None
        return f"{name} is {str(value)[:80]}; it must be null or four fractions of the picture"
    except (TypeError, ValueError) as error:
        return f"{name} is {str(value)[:80]}: {str(error)[:160]}"
