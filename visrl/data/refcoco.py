"""RefCOCO, RefCOCO+ and RefCOCOg as JSONL: an expression and its box, in and out. Knows no other format."""

from __future__ import annotations

from typing import Any

from visrl.box import Box, BoxError, Size, corner_fault
from visrl.data.rows import four_numbers, get_size, get_text
from visrl.data.viscot import need_box, number_of, pixel_list, sample_id, split_of
from visrl.records import Sample


def parse_refcoco(raw: Any, number: int) -> tuple[Sample]:
    """The sample of a row: the expression as its question, the box in fractions, no answer.

    Raises:
        RowFault, BoxError: the row's form or its box.
    """
    ref, expression = get_text(raw, "img_path"), get_text(raw, "expression")
    size = get_size(raw)
    corners = four_numbers(raw.get("bbox"), "bbox")
    fault = corner_fault(corners, size)
    if fault is not None:
        raise BoxError(fault, f"the box {list(corners)} in pixels of {size[0]} × {size[1]} is {fault}")
    source = str(raw.get("dataset_name", "refcoco")).rpartition("/")[2]
    name = sample_id(source, raw, number, "sent_id")
    return (Sample(name, ref, expression, "", Box.from_pixels(corners, size), source, raw, size),)


def refcoco_row(sample: Sample, size: Size, number: int) -> dict[str, Any]:
    """The row that says what `sample` says."""
    raw = sample.raw if isinstance(sample.raw, dict) else {}
    return {
        "img_path": sample.image,
        "expression": sample.question,
        "bbox": pixel_list(need_box(sample), size),
        "dataset_name": raw.get("dataset_name", sample.source),
        "height": size[1],
        "width": size[0],
        "image_id": raw.get("image_id", number),
        "sent_id": raw.get("sent_id", number_of(sample, number)),
        "split": split_of(sample),
    }
