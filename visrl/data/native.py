"""Our own JSONL: samples and preferences as they flow between steps, and the short form that users write by hand.

The short form needs `image`, `question` and `answer`; `id`, `box` (four fractions of the image), `bbox` (four pixels,
with `width` and `height`) and `source` are optional. Knows no other format.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from visrl.box import Box, BoxError, Size, corner_fault
from visrl.data.rows import RowFault, check_text, four_numbers, get_size, get_text
from visrl.records import Picture, Preference, RecordError, Sample, from_json, to_json

_SAMPLE_KEYS = {field.name for field in fields(Sample)}
_PREFERENCE_KEYS = {field.name for field in fields(Preference)}
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


def parse_picture(value: Any, size: Size | None = None) -> Picture:
    """A path, or `{ref, crop, size}` with the crop's box in fractions and the annotated width and height.

    Raises:
        RowFault, BoxError: it is neither.
    """
    if isinstance(value, str):
        check_text(value, "images")
        return Picture(value, None, size)
    ref, crop = get_text(value, "ref"), value.get("crop")
    if value.get("size") is not None:
        size = _side_list(value["size"])
    return Picture(ref, Box(*four_numbers(crop, "crop")) if crop is not None else None, size)


def parse_pictures(values: Any, size: Any, key: str) -> tuple[Picture, ...]:
    """The pictures of a row; `size` is what stands beside them as [width, height], or None."""
    if isinstance(values, str):
        values = [values]
    if not isinstance(values, list):
        raise RowFault("unparseable", f"{key!r} must be a list of pictures")
    annotated = None if size is None else _side_list(size)
    return tuple(parse_picture(value, annotated) for value in values)


def _side_list(size: Any) -> Size:
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and 0 < side < 10**6 for side in size)):
        raise RowFault("unparseable", f"'size' must be [width, height] in whole pixels, not {str(size)[:60]}")
    return size[0], size[1]


def _preference(raw: dict[str, Any]) -> Preference:
    name, prompt, chosen, rejected = (get_text(raw, key) for key in ("id", "prompt", "chosen", "rejected"))
    step, weight = raw.get("step"), raw.get("weight", 1.0)
    if step not in ("box", "answer"):
        raise RowFault("unparseable", f'\'step\' must be "box" or "answer", not {str(step)[:60]}')
    if type(weight) not in (int, float) or not 0 <= weight < 1e6:
        raise RowFault("unparseable", f"'weight' must be a number from 0, not {str(weight)[:60]}")
    unknown = set(raw) - _PREFERENCE_KEYS
    if unknown:
        raise RowFault("unparseable", f"a preference has no {sorted(unknown)[0]!r}; it has {sorted(_PREFERENCE_KEYS)}")
    pictures = parse_pictures(raw.get("images"), None, "images")
    if not pictures:
        raise RowFault("no_picture", "a preference needs a picture")
    return Preference(name, step, prompt, pictures, chosen, rejected, weight)


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
    if row.get("box") is not None:
        Box(*four_numbers(row["box"], "box"))
    pixels = row.pop("bbox", None)
    if "width" in row or "height" in row:
        row["size"] = list(get_size(row))
    size = row["size"] = _side_list(row["size"]) if row.get("size") is not None else None
    if pixels is not None:
        row["box"] = _fractions(pixels, size)
    for key in _SHORT_KEYS & set(row):
        row.pop(key)
        row["raw"] = raw.get("raw", raw)
    return from_json(Sample, row)


def _fractions(pixels: Any, size: Size | None) -> list[float]:
    corners = four_numbers(pixels, "bbox")
    if size is None:
        raise RowFault("no_size", "'bbox' is in pixels and needs 'width' and 'height'; 'box' is in fractions")
    fault = corner_fault(corners, size)
    if fault is not None:
        raise BoxError(fault, f"the box {list(corners)} in pixels of {size[0]} × {size[1]} is {fault}")
    return Box.from_pixels(corners, size).as_list()
