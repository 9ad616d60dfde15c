"""Rows of ours with what their readers need beside them: the size of a picture, and one answer of several."""

from __future__ import annotations

from collections import Counter
from typing import Any

from visrl.data.native import parse_visrl
from visrl.data.rows import SAME, Parsed, RowFault
from visrl.data.sizes import Sizes

_LIKE_BOX = ("bboxes", "boxes", "bboxs", "bbox_2d", "box_2d", "bounding_box")  # names of boxes elsewhere
VOTED = "the most frequent of several answers is taken, the first of equally frequent ones"


def parse_own(raw: Any, number: int, sizes: Sizes) -> Parsed:
    """The sample or the preference of a row, with notes on what was chosen for it.

    Raises:
        RowFault, BoxError: the row's form or its box.
    """
    notes: tuple[str, ...] = ()
    if isinstance(raw, dict) and "chosen" in raw and raw["chosen"] == raw.get("rejected"):
        notes = (SAME,)
    if isinstance(raw, dict) and "chosen" not in raw:
        key = next((key for key in ("answer", "answers") if isinstance(raw.get(key), (list, dict))), None)
        if key is not None and (key == "answer" or raw.get("answer") is None):
            answer, differ = one_answer(raw[key], key)
            raw = raw | {"answers": raw[key], "answer": answer}
            notes = (VOTED,) if differ else ()
        if all(raw.get(key) is None for key in ("box", "bbox")):
            notes += tuple(
                f"{key!r} is not read: a box is given as 'box' or 'bbox'" for key in _LIKE_BOX if raw.get(key)
            )
    return Parsed(parse_visrl(with_size(raw, sizes), number), notes)


def one_answer(value: Any, column: str) -> tuple[str, bool]:
    """The most frequent of several answers, and whether they differ. They are a list of texts, or of objects with
    `answer`, or an object of such lists.

    Raises:
        RowFault: none of these, or no answer in it.
    """
    if isinstance(value, dict):
        value = value.get("answer", value.get("text"))
    answers = [one.get("answer") if isinstance(one, dict) else one for one in value] if isinstance(value, list) else []
    if not answers or not all(type(answer) in (str, int, float) for answer in answers):
        raise RowFault("unparseable", f"{column!r} must be an answer or a list of answers, it is {str(value)[:60]}")
    counts = Counter(map(str, answers))
    return counts.most_common(1)[0][0], len(counts) > 1  # in the order they were seen where equally frequent


def with_size(raw: Any, sizes: Sizes) -> Any:
    """A row whose box in pixels says no size, with that of its picture.

    Raises:
        RowFault: "no_size", where the picture cannot be looked at.
    """
    if not isinstance(raw, dict) or raw.get("bbox") is None or not isinstance(raw.get("image"), str):
        return raw
    if any(raw.get(key) is not None for key in ("size", "width", "height")):
        return raw
    return raw | {"size": list(sizes.of(raw["image"]))}
