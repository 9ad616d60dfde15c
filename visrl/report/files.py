"""Reading the files of a run that may still be going on. Knows no run, only lines and objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from visrl.records import RecordError, read_jsonl
from visrl.report.shapes import Shape, fault

Row = dict[str, Any]


class ReportError(ValueError):
    """A run folder that no report can be made of; the message names file and remedy."""


def read_rows(path: Path, shape: type[Shape]) -> list[Row]:
    """The objects of a JSONL file, each of the shape given; an unfinished last line is left out.

    Raises:
        ReportError: another line is not JSON, or not of that shape.
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
        wrong = fault(row, shape)
        if wrong is not None:
            raise ReportError(f"{path}, row {number}: {wrong}; run the step that writes this file again")
    return rows


def read_object(path: Path, shape: type[Shape]) -> Row:
    """The object of a JSON file, of the shape given.

    Raises:
        ReportError: it is not JSON, or not of that shape.
    """
    try:
        value: Row = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path} is not JSON ({error}); remove it and run the step that writes it again") from error
    wrong = "no JSON object" if not isinstance(value, dict) else fault(value, shape)
    if wrong is not None:
        raise ReportError(f"{path}: {wrong}; remove it and run the step that writes it again")
    return value
