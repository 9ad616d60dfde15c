"""Reading the files of a run that may still be going on. Knows no run, only lines and objects."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visrl.records import RecordError, read_jsonl

Row = dict[str, Any]


class ReportError(ValueError):
    """A run folder that no report can be made of; the message names file and remedy."""


def read_rows(path: Path, needs: Sequence[str] = ()) -> list[Row]:
    """The objects of a JSONL file, each holding the keys `needs`; an unfinished last line is left out.

    Raises:
        ReportError: another line is not JSON, no object, or without one of the keys.
    """
    rows: list[Row] = []
    try:
        for row in read_jsonl(path):
            rows.append(row)  # one by one: what came before a bad line stays
    except RecordError as error:
        # A kill can only have spoilt the last line, and left no line end.
        if path.read_bytes().endswith(b"\n"):
            raise ReportError(str(error)) from error
    for number, row in enumerate(rows, start=1):
        absent = [key for key in needs if key not in row] if isinstance(row, dict) else ["object"]
        if absent:
            raise ReportError(f"{path}, row {number}: no {absent[0]!r}; run the step that writes this file again")
    return rows


def read_object(path: Path) -> Row:
    """The object of a JSON file.

    Raises:
        ReportError: it is not JSON, or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ReportError(f"{path} is not JSON ({error}); remove it and run the step that writes it again") from error
    if not isinstance(value, dict):
        raise ReportError(f"{path} must hold a JSON object; remove it and run the step that writes it again")
    return value
