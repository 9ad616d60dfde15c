"""Boxes of ms-swift's grounding rows: `<ref-object>` and `<bbox>` marks, filled from the row's `objects`."""

from __future__ import annotations

from typing import Any

from visrl.box import Box, BoxError, Size, corner_fault
from visrl.data.dialogs import Dialog, Turn
from visrl.data.rows import RowFault, check_text, four_numbers
from visrl.data.sizes import Sizes
from visrl.records import Picture

REFERENCE, BOX = "<ref-object>", "<bbox>"
_KEYS = {"ref", "bbox", "bbox_type", "image_id"}


def filled_turns(dialog: Dialog, objects: Any, sizes: Sizes) -> tuple[tuple[Turn, ...], dict[int, Box]]:
    """The turns with what is referred to by name, and the box of each turn (by its place) that is nothing but a box.

    Boxes are pixels of the image ("real", its own size is looked up where the row has none) or fractions ("norm1").

    Raises:
        RowFault, BoxError: objects of another form or number than the marks, points, and boxes within words: a sample
            holds one box, or an answer in words.
    """
    texts = [*(turn.text for turn in dialog.turns), *filter(None, (dialog.chosen, dialog.rejected))]
    marks = [sum(text.count(mark) for text in texts) for mark in (REFERENCE, BOX)]
    if objects is None and not any(marks):
        return dialog.turns, {}
    names, boxes = _objects(objects or {}, dialog)
    for mark, count, values, key in zip((REFERENCE, BOX), marks, (names, boxes), ("ref", "bbox"), strict=True):
        if count != len(values):
            raise RowFault("objects", f"{count} {mark} marks but {len(values)} in objects[{key!r}]")
    if dialog.is_ranking and any(marks):
        raise RowFault("objects", f"{REFERENCE} and {BOX} marks are read in rows with one reply, not in rankings")
    turns, found = [], {}
    for place, turn in enumerate(dialog.turns):
        text = turn.text
        is_box = turn.role == "assistant" and text.replace(REFERENCE, "").strip() == BOX
        if BOX in text and not is_box:
            raise RowFault(
                "objects", f"turn {place + 1} holds {BOX} among words or several: a reply is one box or words"
            )
        while REFERENCE in text:
            text = text.replace(REFERENCE, names.pop(0), 1)
        if is_box:
            found[place] = _box(boxes.pop(0), (objects or {}).get("bbox_type", "real"), dialog.pictures[0], sizes)
        turns.append(Turn(turn.role, text))
    return tuple(turns), found


def _objects(objects: Any, dialog: Dialog) -> tuple[list[str], list[Any]]:
    if not isinstance(objects, dict):
        raise RowFault("objects", f"'objects' must be an object with ref and bbox, it is {type(objects).__name__}")
    if unknown := sorted(set(objects) - _KEYS):
        raise RowFault("objects", f"'objects' has no {unknown[0]!r}; it has {', '.join(sorted(_KEYS))}")
    names, boxes = objects.get("ref") or [], objects.get("bbox") or []
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names) and isinstance(boxes, list)):
        raise RowFault("objects", "objects['ref'] must be a list of names and objects['bbox'] a list of boxes")
    for name in names:
        check_text(name, "ref")
        if any(mark in name for mark in (REFERENCE, BOX)):
            raise RowFault("objects", f"objects['ref'] holds a mark itself: {name[:60]!r}")
    if objects.get("bbox_type") not in (None, "real", "norm1"):
        raise RowFault("objects", f'bbox_type must be "real" or "norm1", not {str(objects["bbox_type"])[:60]!r}')
    other = objects.get("image_id") or []
    if not isinstance(other, list) or any(place != 0 for place in other) or len(_refs(dialog)) > 1:
        raise RowFault("objects", "'objects' are read for rows about one picture")
    return list(names), list(boxes)


def _refs(dialog: Dialog) -> set[str]:
    return {picture.ref for picture in dialog.pictures}


def _box(corners: Any, kind: str | None, picture: Picture, sizes: Sizes) -> Box:
    if isinstance(corners, list) and len(corners) == 2:
        raise RowFault("objects", f"objects['bbox'] holds a point, {corners}; boxes are read")
    numbers = four_numbers(corners, "bbox")
    if kind == "norm1":
        return Box(*numbers)
    size: Size = picture.size or sizes.of(picture.ref)
    fault = corner_fault(numbers, size)
    if fault is not None:
        raise BoxError(fault, f"the box {list(numbers)} in pixels of {size[0]} × {size[1]} is {fault}")
    return Box.from_pixels(numbers, size)
