"""Reading prediction files that other programs wrote: rows out, or one sentence that names file, row and remedy.

Knows what a row looks like, not what it is worth.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visrl.data.rows import json_items
from visrl.records import BadLine, RecordError, bad_line

PathLike = str | os.PathLike[str]
Rows = list[dict[str, Any]]


def read_predictions(path: PathLike) -> Rows:
    """The objects in a JSONL file or a JSON list.

    Raises:
        RecordError: no such file, nothing in it, or a row that is no object.
    """
    if not Path(path).is_file():
        raise RecordError(f"no file at {path}")
    rows = list(json_items(path))
    if not rows:
        raise RecordError(f"{path} holds no rows")
    for number, row in enumerate(rows, start=1):
        if isinstance(row, BadLine):
            raise bad_line(path, row)
        if not isinstance(row, dict):
            raise RecordError(f"{path}, row {number}: not a JSON object")
    return rows


def predicted_text(row: Mapping[str, Any], where: str) -> str | None:
    """What the model wrote; None where it gave no answer.

    Raises:
        RecordError: the row has no `text`.
    """
    if "text" not in row:
        raise RecordError(f"{where}: no `text`; this is no prediction of Visual-CoT's scripts")
    text = row["text"]
    if text is not None and not isinstance(text, str):
        raise RecordError(f"{where}: `text` must be a text or null, not {json.dumps(text)[:80]}")
    return text


def files_by_dataset(folder: PathLike) -> dict[str, Path]:
    """The prediction files in a folder by data set: `NAME.jsonl`, or the one JSONL file in the folder `NAME`.

    Raises:
        RecordError: none, or a folder with several.
    """
    files = {path.stem: path for path in sorted(Path(folder).glob("*.jsonl"))}
    for sub in sorted(path for path in Path(folder).iterdir() if path.is_dir()):
        inside = sorted(sub.glob("*.jsonl"))
        if len(inside) > 1:
            raise RecordError(f"{sub} holds {len(inside)} JSONL files; keep the one that is to be scored")
        if inside:
            files[sub.name] = inside[0]
    if not files:
        raise RecordError(f"{folder} holds no JSONL files; name a prediction file or the folder they are in")
    return files
