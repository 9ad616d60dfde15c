"""The records that flow from step to step, and append-only JSONL that survives a kill.

Every arrow of the loop is one JSONL file of these. They import nothing heavy: a data tool must start at once.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from visrl.box import Box, Size
from visrl.errors import UserError

Step = Literal["box", "answer"]
Origin = Literal["sampled", "random"]
Place = tuple[str] | tuple[str, int]  # an id, and how many rows before have it where any has


class RecordError(UserError, ValueError):
    """A line that is not the record it should be; the message names file, line and remedy."""


class VisrlWarning(UserWarning):
    """Something that a user should know and that does not stop the work."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture by reference: a path, a data URL or `scene:POOL/INDEX`, whole or cropped to `crop`.

    `size` is its annotated width and height, where known: it decides which way up the picture is opened.
    """

    ref: str
    crop: Box | None = None
    size: Size | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """A question about a picture. `raw` is the row it came from, so that a format is written back as it was read.

    `size` is the annotated width and height of the picture, where known: boxes were drawn on the picture that way up.
    An `id` is the user's, and may stand for several rows: `repeat` counts the rows of the data set before this one that
    have the same, and both together (`place`) tell a sample from all others of its data set.
    """

    id: str
    image: str
    question: str
    answer: str
    box: Box | None = None
    source: str = ""
    raw: Any = None
    size: Size | None = None
    repeat: int = 0

    @property
    def place(self) -> Place:
        """What tells this sample from all others of its data set; the id alone where that is enough."""
        return place_of(self.id, self.repeat)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One try at a question: a box, and the answer given from its crop. A failed try is a record with its `error`.

    `box_text` is what the policy wrote, or the codec's text where the diversity controller put a random box.
    """

    sample_id: str
    round: int
    branch: int
    box_text: str
    box: Box | None
    origin: Origin
    answer: str | None
    engine: str
    seed: int
    error: str | None = None
    repeat: int = 0  # of the sample

    @property
    def place(self) -> Place:
        """The `place` of its sample."""
        return place_of(self.sample_id, self.repeat)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the critic said of one trajectory, each score in [0, 1]; None is "could not be read", never 0."""

    sample_id: str
    round: int
    branch: int
    box_score: float | None
    answer_score: float | None
    raw: str = ""
    repeat: int = 0  # of the sample

    @property
    def place(self) -> Place:
        """The `place` of its sample."""
        return place_of(self.sample_id, self.repeat)


@dataclass(frozen=True, slots=True)
class Message:
    """What is said to a model, or by it; `<image>` in a text marks the place of each picture."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True, slots=True)
class Preference:
    """A preference at one step of an item. A box and an answer preference that belong together (`belongs_to`) are one
    item: they share pictures and a training step.

    `context` is the conversation before the prompt, where there is one: a system message, then turns of user and
    assistant. Pictures are in the order of their marks in context and prompt.
    """

    id: str
    step: Step
    prompt: str
    images: tuple[Picture, ...]
    chosen: str
    rejected: str
    weight: float = 1.0
    context: tuple[Message, ...] = ()


_ENCODER = json.JSONEncoder(ensure_ascii=False)  # json.dumps would make one for every line

Record = TypeVar("Record", Sample, Trajectory, Verdict, Preference)


def place_of(name: str, repeat: int) -> Place:
    """A user's id with what tells its rows apart. Seeds are named by it, so an id of one row stands alone."""
    return (name, repeat) if repeat else (name,)


def place_name(place: Place) -> str:
    """A place as text, for what is hashed or drawn by lot: the id, where one row has it."""
    return "\x1f".join(map(str, place))


def belongs_to(item: Sequence[Preference], preference: Preference) -> bool:
    """Whether `preference`, the next in its file, is one more step of the last `item`: the same id and picture, and a
    step that the item lacks. Ids may repeat: whatever else has the same one is another item."""
    if not item or item[-1].id != preference.id or item[-1].images[:1] != preference.images[:1]:
        return False
    return all(one.step != preference.step for one in item)


def to_json(record: Sample | Trajectory | Verdict | Preference) -> dict[str, Any]:
    """The record as plain JSON values; boxes are lists of four fractions."""
    row = {field.name: getattr(record, field.name) for field in fields(record)}
    if not row.get("repeat", 1):
        del row["repeat"]
    for name, value in row.items():
        if isinstance(value, Box):
            row[name] = value.as_list()
    if "images" in row:
        row["images"] = [picture_json(picture) for picture in row["images"]]
    if context := row.pop("context", ()):
        row["context"] = [{"role": message.role, "text": message.text} for message in context]
    return row


def picture_json(picture: Picture) -> str | dict[str, Any]:
    if picture.crop is None and picture.size is None:
        return picture.ref
    row: dict[str, Any] = {"ref": picture.ref}
    if picture.crop is not None:
        row["crop"] = picture.crop.as_list()
    if picture.size is not None:
        row["size"] = list(picture.size)
    return row


def _picture(entry: str | dict[str, Any]) -> Picture:
    if isinstance(entry, str):
        return Picture(entry)
    crop, size = entry.get("crop"), entry.get("size")
    return Picture(entry["ref"], Box(*crop) if crop else None, _size(size) if size else None)


def _size(value: Any) -> Size:
    width, height = value
    if not (isinstance(width, int) and isinstance(height, int) and min(width, height) > 0):
        raise ValueError(f"size must be [width, height] in whole pixels, not {value!r}")
    return width, height


def from_json(kind: type[Record], row: dict[str, Any]) -> Record:
    """The record in `row`, as `to_json` wrote it. What users write by hand is read by `visrl.data.native`.

    Raises:
        RecordError: a field is missing, unknown or of another type, or a box is none.
    """
    if not isinstance(row, dict):
        raise RecordError(f"a {kind.__name__} must be a JSON object, this is {type(row).__name__}")
    row = dict(row)
    try:
        if row.get("box") is not None:
            row["box"] = Box(*row["box"])
        if "images" in row:
            row["images"] = tuple(_picture(entry) for entry in row["images"])
        if "context" in row:
            row["context"] = tuple(Message(entry["role"], entry["text"]) for entry in row["context"])
        if row.get("size") is not None:
            row["size"] = _size(row["size"])
        for name, allowed in _TYPES[kind].items():
            if name in row and type(row[name]) not in allowed:
                raise TypeError(f"{name!r} cannot be {json.dumps(row[name], default=str)[:60]}")
        return kind(**row)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise RecordError(f"not a {kind.__name__}: {error}") from error


def _types(hint: Any) -> tuple[type, ...]:
    """The types that a field may hold by its annotation."""
    if isinstance(hint, UnionType):
        return tuple(one for part in get_args(hint) for one in _types(part))
    if get_origin(hint) is Literal:
        return (str,)
    return (int, float) if hint is float else (get_origin(hint) or hint,)


_KINDS = (Sample, Trajectory, Verdict, Preference)
_TYPES: dict[type[Any], dict[str, tuple[type, ...]]] = {
    kind: {name: _types(hint) for name, hint in get_type_hints(kind).items() if hint is not Any} for kind in _KINDS
}


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The values of a JSONL file, one by one; a byte order mark before the first is passed by.

    Raises:
        RecordError: a line is not JSON in UTF-8; the message names file and line.
    """
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                yield json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise RecordError(f"{path}, line {number}: not UTF-8 ({error.reason}); mend or remove it") from error
            except json.JSONDecodeError as error:
                raise RecordError(f"{path}, line {number}: not JSON ({error.msg}); mend or remove this line") from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nested without end
                raise RecordError(f"{path}, line {number}: cannot be read ({error}); mend or remove it") from error


def read_records(kind: type[Record], path: str | os.PathLike[str]) -> Iterator[Record]:
    """The records of a JSONL file, one by one.

    Raises:
        RecordError: a line is not such a record; the message names file and line.
    """
    for number, row in enumerate(read_jsonl(path), start=1):
        try:
            yield from_json(kind, row)
        except RecordError as error:
            raise RecordError(f"{path}, row {number}: {error}") from error


def write_records(path: str | os.PathLike[str], records: Iterable[Any]) -> int:
    """Write `records` to `path` at once: the file is whole or not there. Returns how many."""
    count = 0
    part = Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "wb") as lines:
        for record in records:
            lines.write(json_line(record))
            count += 1
    os.replace(part, path)
    return count


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` to `path` at once: who reads it, or goes on after a kill, sees the old text or the new one."""
    path, part = Path(path), Path(f"{path}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(utf8(text))
    os.replace(part, path)
    return path


class Journal:
    """An append-only JSONL file written in batches, for long work that may be killed at any moment.

    Each `append` ends in one flush. A line that a kill left unfinished is cut off when the journal is opened again,
    so a resumed run sees whole lines only.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _cut_unfinished_line(self.path)
        self._file = open(self.path, "ab")  # noqa: SIM115 (closed in close)

    def append(self, records: Iterable[Any]) -> None:
        self._file.write(b"".join(map(json_line, records)))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def json_line(record: Any) -> bytes:
    """A record, or any JSON value, as one line of UTF-8 that can be read back."""
    return utf8(_ENCODER.encode(to_json(record) if isinstance(record, _KINDS) else record)) + b"\n"


def utf8(text: str) -> bytes:
    """`text` in UTF-8. Half a character (a lone surrogate, which JSON can hold as an escape and UTF-8 cannot) becomes
    its escape: within JSON that is what it was, and the file can be read back."""
    return text.encode("utf-8", "backslashreplace")


def _cut_unfinished_line(path: Path) -> None:
    with open(path, "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        whole = end  # where the last whole line ends; looked for from the end, for files may be long
        while whole:
            start = max(0, whole - (1 << 16))
            file.seek(start)
            place = file.read(whole - start).rfind(b"\n")
            if place >= 0:
                whole = start + place + 1
                break
            whole = start
        if whole < end:
            file.truncate(whole)
