"""ShareGPT with `dataset_info.json`, as LLaMA-Factory and the reference write it: SFT sets and rankings, in and out.

An entry of `dataset_info.json` names a file's columns and, for ours, its `box_space`: whether three-decimal boxes are
fractions of the image or of Visual-CoT's padded square. Knows no other format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visrl.box import Box, BoxError, Size
from visrl.codecs import BOX_SPACES, BoxSpace
from visrl.data.native import parse_pictures
from visrl.data.rows import Row, RowFault, check_text, four_numbers, get_text, read_rows
from visrl.data.sizes import Sizes
from visrl.data.viscot import bare_question
from visrl.prompts import IMAGE
from visrl.records import Picture, Preference, RecordError, Sample, Step

INFO = "dataset_info.json"
_SFT_COLUMNS = {"messages": "conversations", "images": "images"}
STEP_COLUMNS = {name: name for name in ("chosen", "rejected", "chosen_step", "rejected_step")}
# Our own column: the chosen box in fractions, where its text is not three decimals (a family's own way of writing).
CHOSEN_CROP = "chosen_crop"
_TAGS = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt", "system_tag": "system",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """What `dataset_info.json` says of one data set. `box_space` is None where nothing is said."""

    name: str
    path: Path
    ranking: bool = False
    columns: dict[str, str] = field(default_factory=lambda: dict(_SFT_COLUMNS))
    tags: dict[str, str] = field(default_factory=lambda: dict(_TAGS))
    box_space: BoxSpace | None = None

    def column(self, name: str) -> str:
        return self.columns.get(name, "")


def read_info(folder: str | os.PathLike[str]) -> dict[str, Entry]:
    """The data sets of a folder's `dataset_info.json`, by name; entries of formats other than ShareGPT are left out.

    Raises:
        RecordError: no such file, no JSON object, or an entry that cannot be used; the message names it.
    """
    path = Path(folder) / INFO
    try:
        info = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RecordError(f"no {path} ({error.strerror}): it names the data sets of this folder") from error
    except ValueError as error:
        raise RecordError(f"{path} is not JSON: {error}") from error
    if not isinstance(info, dict):
        raise RecordError(f"{path} must hold an object of data sets by name")
    entries = {}
    for name, value in info.items():
        if (
            isinstance(value, dict)
            and value.get("formatting") == "sharegpt"
            and isinstance(value.get("file_name"), str)
        ):
            entries[name] = _entry(name, value, path)
    return entries


def find_entry(path: str | os.PathLike[str], name: str | None = None) -> Entry:
    """The entry for a data file, from the `dataset_info.json` beside it; the usual columns where there is none.

    `path` may be the folder and `name` the data set's. Of several entries for one file that with most columns is taken.

    Raises:
        RecordError: no data set of that name, with the names there are.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    entries = read_info(folder) if (folder / INFO).is_file() else {}
    if name is not None:
        if name not in entries:
            raise RecordError(
                f"{folder / INFO} has no data set {name!r}; it has: {', '.join(sorted(entries)) or 'none'}"
            )
        return entries[name]
    if path.is_dir():
        raise RecordError(f"{path} is a folder: name one of its data sets: {', '.join(sorted(entries)) or 'none'}")
    of_file = [entry for entry in entries.values() if entry.path == path]
    return max(of_file, key=lambda entry: len(entry.columns), default=Entry(path.stem, path, columns={}))


def read_sharegpt(entry: Entry, sizes: Sizes, box_space: BoxSpace | None = None) -> Iterator[Row]:
    """The rows of a data set; rankings become preferences, the others samples."""
    space = entry.box_space or box_space
    return read_rows(entry.path, lambda raw, number: parse_sharegpt(raw, number, entry, sizes, space))


def parse_sharegpt(
    raw: Any, number: int, entry: Entry, sizes: Sizes, box_space: BoxSpace | None = None
) -> tuple[Sample | Preference, ...]:
    """The records of one row: one sample, one preference, or the two preferences of a step-level item.

    Raises:
        RowFault, BoxError: the row's form, or a chosen box that is none.
    """
    if not isinstance(raw, dict):
        raise RowFault("unparseable", f"a row must be a JSON object, this is {type(raw).__name__}")
    entry = entry if entry.columns else _usual(entry, raw)
    turns = _turns(raw, entry)
    pictures = parse_pictures(raw.get(entry.column("images"), []), raw.get("size"), entry.column("images"))
    marks = sum(text.count(IMAGE) for _, text in turns)
    if marks != len(pictures):
        raise RowFault("unparseable", f"{marks} {IMAGE} marks but {len(pictures)} pictures")
    if not pictures:
        raise RowFault("no_picture", "the row has no picture")
    name = str(raw.get("id", f"{entry.name}/row-{number}"))
    check_text(name, "id")
    if entry.ranking:
        return _preferences(raw, name, turns, pictures, entry, sizes, box_space)
    return (_sample(raw, name, turns, pictures, entry, sizes, box_space),)


def _usual(entry: Entry, raw: dict[str, Any]) -> Entry:
    """The columns of a row that no `dataset_info.json` describes, by the names in common use."""
    messages = "messages" if "messages" in raw else "conversations"
    ranking = "chosen" in raw or "chosen_step" in raw
    columns = {"messages": messages, "images": "images"}
    columns |= {name: name for name in STEP_COLUMNS if ranking and name in raw}
    tags = dict(_TAGS)
    if messages == "messages":
        tags |= {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    return Entry(entry.name, entry.path, ranking, columns, tags, entry.box_space)


def _turns(raw: dict[str, Any], entry: Entry) -> list[tuple[str, str]]:
    """(role tag, text) of each message."""
    turns = raw.get(entry.column("messages"))
    if not isinstance(turns, list) or not turns:
        raise RowFault("unparseable", f"{entry.column('messages')!r} must be a list of messages")
    return [_turn(turn, entry) for turn in turns]


def _turn(turn: Any, entry: Entry) -> tuple[str, str]:
    return get_text(turn, entry.tags["role_tag"]), get_text(turn, entry.tags["content_tag"])


def read_box(text: str, picture: Picture, sizes: Sizes, space: BoxSpace) -> Box:
    """The box that a three-decimal text means in `space`; the padded square needs the picture's size."""
    size: Size = (picture.size or sizes.of(picture.ref)) if space == "padded_square" else (1, 1)
    return BOX_SPACES[space].parse(text, size, size)


def _sample(
    raw: dict[str, Any], name: str, turns: list[tuple[str, str]], pictures: tuple[Picture, ...], entry: Entry,
    sizes: Sizes, space: BoxSpace | None,
) -> Sample:  # fmt: skip
    """An SFT row as a sample: round 1 answers with a box, round 2 shows the crop and answers the question."""
    asked = [text for role, text in turns if role == entry.tags["user_tag"]]
    said = [text for role, text in turns if role == entry.tags["assistant_tag"]]
    if not asked or not said:
        raise RowFault("unparseable", "a row must hold a question and an answer")
    whole = pictures[0]
    box = next((picture.crop for picture in pictures if picture.crop), None)
    answer = said[-1]
    if space is not None and box is None and bare_question(asked[0]) != asked[0].replace(IMAGE, "").strip():
        box = read_box(said[0], whole, sizes, space)  # the question asked for a box, so the first reply is one
        answer = said[-1] if len(said) > 1 else ""
    return Sample(name, whole.ref, bare_question(asked[0]), answer, box, entry.name, raw, whole.size)


def _preferences(
    raw: dict[str, Any], name: str, turns: list[tuple[str, str]], pictures: tuple[Picture, ...], entry: Entry,
    sizes: Sizes, space: BoxSpace | None,
) -> tuple[Preference, ...]:  # fmt: skip
    """The preferences of a ranking row. Boxes with no named `box_space` are of the image, as the authors crop them."""
    prompt = turns[-1][1]
    chosen, rejected = (_reply(raw, entry, column) for column in ("chosen", "rejected"))
    if not (entry.column("chosen_step") and raw.get(entry.column("chosen_step")) is not None):
        if chosen is None or rejected is None:
            raise RowFault("unparseable", "a ranking needs a chosen and a rejected reply")
        step: Step = "box" if _is_box(chosen) and _is_box(rejected) else "answer"
        return (Preference(name, step, prompt, pictures, chosen, rejected),)
    box, worse = (_reply(raw, entry, column) for column in ("chosen_step", "rejected_step"))
    if box is None or worse is None:
        raise RowFault("unparseable", "a ranking of boxes needs both chosen_step and rejected_step")
    whole = pictures[0]
    rows = [Preference(name, "box", prompt, (whole,), box, worse)]
    if chosen is not None and rejected is not None:
        # Both answers see the crop of the chosen box, as in the objective of stage 2.
        given = raw.get(CHOSEN_CROP)
        chosen_box = Box(*four_numbers(given, CHOSEN_CROP)) if given else read_box(box, whole, sizes, space or "image")
        crop = Picture(whole.ref, chosen_box, whole.size)
        rows.append(Preference(name, "answer", f"{prompt}\n{IMAGE}", (whole, crop), chosen, rejected))
    return tuple(rows)


def _reply(raw: dict[str, Any], entry: Entry, column: str) -> str | None:
    value = raw.get(entry.column(column))
    if value is None:
        return None
    if isinstance(value, str):
        check_text(value, column)
        return value
    return _turn(value, entry)[1]


def _is_box(text: str) -> bool:
    try:
        BOX_SPACES["image"].parse(text, (1, 1), (1, 1))
    except BoxError:
        return False
    return True


def _entry(name: str, value: dict[str, Any], path: Path) -> Entry:
    columns, tags = value.get("columns", {}), value.get("tags", {})
    texts = [
        *(columns.values() if isinstance(columns, dict) else [1]),
        *(tags.values() if isinstance(tags, dict) else [1]),
    ]
    if not all(isinstance(text, str) for text in texts):
        raise RecordError(f"{path}: 'columns' and 'tags' of {name!r} must map names to names")
    space = value.get("box_space")
    if space is not None and space not in BOX_SPACES:
        raise RecordError(f"{path}: box_space of {name!r} must be one of {', '.join(BOX_SPACES)}, not {space!r}")
    return Entry(
        name,
        path.parent / value["file_name"],
        bool(value.get("ranking", False)),
        _SFT_COLUMNS | columns,
        _TAGS | tags,
        space,
    )
