"""Our own JSONL: samples and preferences as they flow between steps, and the short form that users write by hand.

The short form needs `image`, `question` and `answer`; `id`, `box` (four fractions of the image), `bbox` (four pixels,
with `width` and `height`) and `source` are optional. Knows no other format.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from visrl.box import Box, BoxError, corner_fault
from visrl.data.rows import RowFault, check_text, four_numbers, get_size, get_text
from visrl.records import Preference, RecordError, Sample, from_json, to_json

_SAMPLE_KEYS = {field.name for field in fields(Sample)}
_SHORT_KEYS = {"bbox", "width", "height", "split"}


def parse_visrl(raw: Any, number: int) -> tuple[Sample | Preference, ...]:
    """The sample or the preference of a row.

    Raises:
        RowFault, BoxError: the row's form or its box.
    """
    if not isinstance(raw, dict):
        raise RowFault("unparseable", f"a row must be a JSON object, this is {type(raw).__name__}")
    try:
        if "chosen" in raw:
            return (_preference(raw),)
        return (_sample(raw, number),)
    except RecordError as error:
        raise RowFault("unparseable", str(error)) from error


def visrl_row(record: Sample | Preference) -> dict[str, Any]:
    """The row of a record; what is not known is left out."""
    row = to_json(record)
    return {key: value for key, value in row.items() if value is not None}


def pool_row(sample: Sample) -> dict[str, Any]:
    """The row of the pool that preferences are made from: no box, and no raw row that could hold one."""
    row = visrl_row(sample)
    row.pop("box", None)
    row.pop("raw", None)
    return row


def _preference(raw: dict[str, Any]) -> Preference:
    for key in ("id", "prompt", "chosen", "rejected"):
        get_text(raw, key)
    if raw.get("step") not in ("box", "answer"):
        raise RowFault("unparseable", f'\'step\' must be "box" or "answer", not {raw.get("step")!r}')
    _check_boxes([entry.get("crop") for entry in raw.get("images") or [] if isinstance(entry, dict)])
    return from_json(Preference, raw)


def _sample(raw: dict[str, Any], number: int) -> Sample:
    unknown = set(raw) - _SAMPLE_KEYS - _SHORT_KEYS
    if unknown and "raw" not in raw:
        # A row with keys of its own keeps them: it is its own raw.
        row = {key: value for key, value in raw.items() if key not in unknown} | {"raw": raw}
    else:
        row = dict(raw)
    for key in ("image", "question"):
        get_text(row, key)
    answer, source = row.get("answer", ""), row.setdefault("source", "")
    if not isinstance(answer, str) or not isinstance(source, str):
        raise RowFault("unparseable", "'answer' and 'source' must be strings")
    check_text(answer, "answer")
    row["answer"] = answer
    row["id"] = str(row.get("id", f"row-{number}"))
    check_text(row["id"], "id")
    _check_boxes([row.get("box")])
    pixels = row.pop("bbox", None)
    if "width" in row or "height" in row:
        row["size"] = get_size(row)
    if pixels is not None:
        row["box"] = _fractions(pixels, row)
    for key in _SHORT_KEYS & set(row):
        row.pop(key)
        row["raw"] = raw.get("raw", raw)
    return from_json(Sample, row)


def _fractions(pixels: Any, row: dict[str, Any]) -> list[float]:
    corners = four_numbers(pixels, "bbox")
    if "size" not in row:
        raise RowFault("no_size", "'bbox' is in pixels and needs 'width' and 'height'; 'box' is in fractions")
    fault = corner_fault(corners, row["size"])
    if fault is not None:
        raise BoxError(fault, f"the box {list(corners)} in pixels of {row['size']} is {fault}")
    return Box.from_pixels(corners, row["size"]).as_list()


def _check_boxes(boxes: list[Any]) -> None:
    for box in boxes:
        if box is not None:
            Box(*four_numbers(box, "box"))
