"""Our own JSONL: records as they flow between steps, and the short form of samples that users write by hand.

The one typed reader of it, whatever verb asks. The short form needs `image`, `question` and `answer`; `id`, `box` (four
fractions of the image), `looks` (a list of such boxes), `bbox` (four pixels, with `width` and `height`) and `source`
are optional. A number stands for its text, an `id` may be any JSON value, and keys of a row's own are kept in `raw`.
Knows no other format.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from visrl.box import Box, BoxError, Size, corner_fault
from visrl.data.rows import SAME, Parsed, RowFault, check_text, four_numbers, get_size, get_text
from visrl.data.sizes import Sizes
from visrl.prompts import IMAGE
from visrl.records import (
    Message,
    Picture,
    Preference,
    Record,
    RecordError,
    Sample,
    Trajectory,
    TrajectoryLook,
    Verdict,
    read_jsonl,
    to_json,
)

_SAMPLE_KEYS = {field.name for field in fields(Sample)} - {"repeat"}  # which is where a row stands, not what it says
_PREFERENCE_KEYS = {field.name for field in fields(Preference)}
_SHORT_KEYS = {"bbox", "width", "height", "split"}
_LIKE_BOX = ("bboxes", "boxes", "bboxs", "bbox_2d", "box_2d", "bounding_box")  # names of boxes elsewhere
VOTED = "the most frequent of several answers is taken, the first of equally frequent ones"


def read_records(kind: type[Record], path: str | os.PathLike[str]) -> Iterator[Record]:
    """The records of a JSONL file, one by one.

    Raises:
        RecordError: a line is not such a record; the message names file and line.
    """
    for number, row in enumerate(read_jsonl(path), start=1):
        try:
            yield from_json(kind, row, number)
        except RecordError as error:
            raise RecordError(f"{path}, row {number}: {error}") from error


def from_json(kind: type[Record], row: Any, number: int = 1) -> Record:
    """The record in a row: as `to_json` wrote it, or a sample in the short form.

    Raises:
        RecordError: a field is missing, unknown or of another type, or a box is none.
    """
    try:
        if kind in _FIELDS:
            return _typed(kind, row)
        (record,) = parse_own(row, number, Sizes()).records
    except (RowFault, BoxError) as error:
        raise RecordError(f"not a {kind.__name__}: {error}") from error
    if not isinstance(record, kind):
        raise RecordError(f"not a {kind.__name__}: it is a {type(record).__name__}")
    return record


def parse_own(raw: Any, number: int, sizes: Sizes) -> Parsed:
    """The sample or the preference of a row as users write it: of several answers one is taken, and the size that
    pixels need is looked up where the row has none. The notes say what was chosen for it.

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


def parse_visrl(raw: Any, number: int) -> tuple[Sample | Preference, ...]:
    """The sample or the preference of a row that says all by itself.

    Raises:
        RowFault, BoxError: the row's form or its box.
    """
    if not isinstance(raw, dict):
        raise RowFault("unparseable", f"a row must be a JSON object, this is {type(raw).__name__}")
    return (_preference(raw, number),) if "chosen" in raw else (_sample(raw, number),)


def one_answer(value: Any, column: str) -> tuple[str, bool]:
    """The most frequent of several answers, and whether they differ. They are a list of texts, or of objects with
    `answer`, or an object of such lists.

    Raises:
        RowFault: none of these, or no answer in it.
    """
    answers = answer_texts(value)
    if not answers:
        raise RowFault("unparseable", f"{column!r} must be an answer or a list of answers, it is {str(value)[:60]}")
    counts = Counter(answers)
    return counts.most_common(1)[0][0], len(counts) > 1  # in the order they were seen where equally frequent


def answer_texts(value: Any) -> list[str]:
    """Several answers as texts, in a form that `one_answer` takes; empty where it takes none."""
    if isinstance(value, dict):
        value = value.get("answer", value.get("text"))
    answers = [one.get("answer") if isinstance(one, dict) else one for one in value] if isinstance(value, list) else []
    return list(map(str, answers)) if all(type(answer) in (str, int, float) for answer in answers) else []


def with_size(raw: Any, sizes: Sizes) -> Any:
    """A row whose box in pixels says no size, with that of its image.

    Raises:
        RowFault: "no_size", where the image cannot be looked at.
    """
    if not isinstance(raw, dict) or raw.get("bbox") is None or not isinstance(raw.get("image"), str):
        return raw
    if any(raw.get(key) is not None for key in ("size", "width", "height")):
        return raw
    return raw | {"size": list(sizes.of(raw["image"]))}


def visrl_row(record: Sample | Preference) -> dict[str, Any]:
    """The row of a record; what is not known is left out."""
    row = to_json(record)
    row.pop("repeat", None)  # where a row stands says it again
    return {key: value for key, value in row.items() if value is not None}


def pool_row(sample: Sample) -> dict[str, Any]:
    """The row of the pool that preferences are made from: no boxes, and no raw row that could hold one."""
    return {key: value for key, value in visrl_row(sample).items() if key not in ("box", "looks", "raw")}


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
    """The images of a row; `size` is what stands beside them as [width, height], or None."""
    if isinstance(values, str):
        values = [values]
    if not isinstance(values, list):
        raise RowFault("unparseable", f"{key!r} must be a list of pictures")
    annotated = None if size is None else _side_list(size)
    return tuple(parse_picture(value, annotated) for value in values)


def text_or_number(raw: dict[str, Any], key: str, default: str | None = None) -> str:
    """The text under `key`. A number is read as its text: 7 as "7", 2.5 as "2.5".

    Raises:
        RowFault: it is missing (without a `default`), null, true or false, or no text; the message names the key.
    """
    value = raw.get(key, default)
    if type(value) is str:
        if not value.isascii():
            check_text(value, key)
        return value
    if type(value) is int or (type(value) is float and math.isfinite(value)):
        return str(value)
    if key not in raw:
        raise RowFault("unparseable", f"{key!r} is missing")
    hint = ""
    if value is None and default is not None:
        hint = ": give a text, or leave the key out"
    elif isinstance(value, bool):
        hint = ": write the word that is meant, as a text"
    raise RowFault("unparseable", f"{key!r} must be a text or a number, it is {json.dumps(value)[:60]}{hint}")


def row_name(raw: dict[str, Any], default: str) -> str:
    """The row's id as text, of whatever JSON type it is; `default` where it has none."""
    value = raw.get("id")
    if value is None:
        return default
    name = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    check_text(name, "id")
    return name


def _side_list(size: Any) -> Size:
    if isinstance(size, list) and len(size) == 2:
        width, height = size
        if type(width) is int and type(height) is int and 0 < width < 10**6 and 0 < height < 10**6:
            return width, height
    raise RowFault("unparseable", f"'size' must be [width, height] in whole pixels, not {str(size)[:60]}")


def _preference(raw: dict[str, Any], number: int) -> Preference:
    unknown = set(raw) - _PREFERENCE_KEYS
    if unknown:
        raise RowFault("unparseable", f"a preference has no {min(unknown)!r}; it has {sorted(_PREFERENCE_KEYS)}")
    prompt, chosen, rejected = get_text(raw, "prompt"), text_or_number(raw, "chosen"), text_or_number(raw, "rejected")
    step, weight = raw.get("step"), raw.get("weight", 1.0)
    if step not in ("box", "answer"):
        raise RowFault("unparseable", f'\'step\' must be "box" or "answer", not {str(step)[:60]}')
    if type(weight) not in (int, float) or not 0 <= weight < 1e6:
        raise RowFault("unparseable", f"'weight' must be a number from 0, not {str(weight)[:60]}")
    pictures = parse_pictures(raw.get("images"), None, "images")
    context = _context(raw.get("context", []))
    check_shown("\n".join([*(message.text for message in context), prompt]), pictures)
    return Preference(row_name(raw, f"row-{number}"), step, prompt, pictures, chosen, rejected, weight, context)


def check_shown(prompt: str, pictures: tuple[Picture, ...]) -> None:
    """That a preference's images can be shown: a whole one, then crops of it, each in its place in the prompt.

    Raises:
        RowFault: they cannot.
    """
    if not pictures:
        raise RowFault("no_picture", "a preference needs a picture")
    whole, *crops = pictures
    if whole.crop is not None or any(one.crop is None or one.ref != whole.ref for one in crops):
        raise RowFault("several_pictures", "'images' must be a whole picture, and after it crops of the same")
    if prompt.count(IMAGE) != len(pictures):
        raise RowFault("unparseable", f"{prompt.count(IMAGE)} {IMAGE} marks in the prompt but {len(pictures)} pictures")


def _context(values: Any) -> tuple[Message, ...]:
    """The conversation before a prompt: a system message or none, then user and assistant by turns."""
    if not isinstance(values, list):
        raise RowFault("unparseable", "'context' must be a list of {role, text}")
    messages = tuple(Message(get_text(value, "role"), get_text(value, "text")) for value in values)  # type: ignore[arg-type]
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    wanted = ["user", "assistant"] * (len(turns) // 2)
    if [message.role for message in turns] != wanted:
        raise RowFault("role", "'context' must be a system message or none, then turns of user and assistant")
    return messages


def _sample(raw: dict[str, Any], number: int) -> Sample:
    image, question = get_text(raw, "image"), without_mark(text_or_number(raw, "question"))
    answer, source = text_or_number(raw, "answer", ""), text_or_number(raw, "source", "")
    box = Box(*four_numbers(raw["box"], "box")) if raw.get("box") is not None else None
    size = _side_list(raw["size"]) if raw.get("size") is not None else None
    if raw.get("width") is not None or raw.get("height") is not None:
        size = get_size(raw)
    if raw.get("bbox") is not None:
        box = _from_pixels(raw["bbox"], size)
    name, looks = row_name(raw, f"row-{number}"), _looks(raw.get("looks"), box)
    return Sample(name, image, question, answer, box, source, _own_keys(raw), size, looks=looks)


def _looks(values: Any, box: Box | None) -> tuple[Box, ...] | None:
    """The true boxes of all looks of a row, whose one box, where it has that too, is among them.

    Raises:
        RowFault, BoxError: they are no list of boxes, or without the row's box.
    """
    if values is None:
        return None
    if not isinstance(values, list):
        raise RowFault(
            "unparseable", f"'looks' must be a list of boxes, empty where none is needed, not {values!r:.60}"
        )
    looks = tuple(Box(*four_numbers(value, f"looks[{place}]")) for place, value in enumerate(values))
    if box is not None and box not in looks:
        raise RowFault("unparseable", "'box' is none of 'looks': leave it out, or make it one of them")
    return looks


def without_mark(question: str) -> str:
    """The question without the mark of its image, which every prompt sets itself.

    Raises:
        RowFault: it holds several marks, or is nothing but one.
    """
    marks = question.count(IMAGE)
    if marks > 1:
        raise RowFault("unparseable", f"'question' holds {marks} {IMAGE} marks, and a row of ours shows one picture")
    question = question.replace(IMAGE, "").strip() if marks else question
    if not question.strip():
        raise RowFault("unparseable", "'question' is empty")
    return question


def _own_keys(raw: dict[str, Any]) -> Any:
    """What a row holds beyond a sample's fields: its `raw`, with keys of the row's own put to it. A row of the short
    form with such keys, and one with a box in pixels, is its own `raw`."""
    own = raw.keys() - _SAMPLE_KEYS
    if not own:
        return raw.get("raw")
    if raw.get("raw") is None:
        return raw
    if not isinstance(raw["raw"], dict):
        return raw
    return raw["raw"] | {key: raw[key] for key in raw if key in own and key not in _SHORT_KEYS}


def _from_pixels(pixels: Any, size: Size | None) -> Box:
    corners = four_numbers(pixels, "bbox")
    if size is None:
        raise RowFault("no_size", "'bbox' is in pixels and needs 'width' and 'height'; 'box' is in fractions")
    fault = corner_fault(corners, size)
    if fault is not None:
        raise BoxError(fault, f"the box {list(corners)} in pixels of {size[0]} × {size[1]} is {fault}")
    return Box.from_pixels(corners, size)


# --- What policy and critic gave, which only `to_json` writes ---------------------------------------------------------


_UNIONS = (UnionType, Union)  # of classes, and with a Literal among them


def _types(hint: Any) -> tuple[type, ...]:
    """The types that a field may hold by its annotation."""
    if get_origin(hint) in _UNIONS:
        return tuple(one for part in get_args(hint) for one in _types(part))
    if get_origin(hint) is Literal:
        return (str,)
    if get_origin(hint) is tuple:
        return (list,)
    return (int, float) if hint is float else (hint,)


def _words(hint: Any) -> tuple[str, ...]:
    """The words that a field may hold by its annotation, where those are all."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(word for part in get_args(hint) for word in _words(part)) if get_origin(hint) in _UNIONS else ()


_HINTS = {kind: get_type_hints(kind) for kind in (Trajectory, Verdict)}
_FIELDS: dict[type[Any], dict[str, tuple[type, ...]]] = {
    kind: {name: _types(hint) for name, hint in hints.items()} for kind, hints in _HINTS.items()
}
_LISTS: dict[type[Any], dict[str, tuple[type, ...]]] = {  # what the lists among them hold
    kind: {
        name: _types(get_args(hint)[0])
        for name, hint in hints.items()
        if get_origin(hint) is tuple and get_args(hint)[0] is not TrajectoryLook
    }
    for kind, hints in _HINTS.items()
}
_WORDS: dict[type[Any], dict[str, tuple[str, ...]]] = {
    kind: {name: _words(hint) for name, hint in hints.items()} for kind, hints in _HINTS.items()
}
_LOOK_KEYS = {field.name for field in fields(TrajectoryLook)}


def _typed(kind: type[Record], row: Any) -> Record:
    """The trajectory or the verdict in a row.

    Raises:
        RowFault, BoxError: a field is missing, unknown or of another type, or the box is none.
    """
    if not isinstance(row, dict):
        raise RowFault("unparseable", f"a row must be a JSON object, this is {type(row).__name__}")
    allowed = _FIELDS[kind]
    if row.get("box") is not None:
        row = row | {"box": Box(*four_numbers(row["box"], "box"))}
    for name, value in row.items():
        words: tuple[str, ...] = _WORDS[kind].get(name, ())
        if name in allowed and (type(value) not in allowed[name] or (words and value not in (*words, None))):
            known = f"; it is one of {', '.join(map(json.dumps, words))}" if words else ""
            raise RowFault("unparseable", f"{name!r} cannot be {json.dumps(value, default=str)[:60]}{known}")
    for name, held in _LISTS[kind].items():
        if name in row:
            if any(type(value) not in held for value in row[name]):
                raise RowFault("unparseable", f"{name!r} cannot hold {json.dumps(row[name], default=str)[:60]}")
            row = row | {name: tuple(row[name])}
    if kind is Trajectory:
        row = row | {"looks": tuple(map(_look, row.get("looks", ())))}
    try:
        record = kind(**row)
    except TypeError as error:  # a field too many or too few
        raise RowFault("unparseable", str(error)) from error
    if isinstance(record, Trajectory):
        _check_end(record)
    return record


def _look(value: Any) -> TrajectoryLook:
    """One of the looks of a trajectory.

    Raises:
        RowFault, BoxError: it is none.
    """
    if not isinstance(value, dict) or value.keys() != _LOOK_KEYS:
        raise RowFault("unparseable", f"'looks' must hold objects of text and box, not {json.dumps(value)[:60]}")
    text = value["text"]
    if type(text) is not str:
        raise RowFault("unparseable", f"the text of a look cannot be {json.dumps(text)[:60]}")
    return TrajectoryLook(text, Box(*four_numbers(value["box"], "box")))


def _check_end(tried: Trajectory) -> None:
    """That what a trajectory says of several looks goes together.

    Raises:
        RowFault: it does not.
    """
    if tried.end is None:
        if tried.looks or tried.path:
            raise RowFault("unparseable", "'looks' and 'path' are of several looks, and there is no 'end'")
        return
    if (tried.end == "answered") != (tried.answer is not None):
        raise RowFault("unparseable", f"'answer' and 'end' do not go together: it ended {tried.end!r}")
    if len(tried.path) != len(tried.looks):
        raise RowFault(
            "unparseable", "'path' must hold a place for the turn after each look, and 'looks' as many looks"
        )
    if tried.answers:
        raise RowFault("unparseable", "'answers' are of one look: after several each answer is a trajectory of its own")
