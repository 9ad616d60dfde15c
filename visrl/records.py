"""The records that flow from step to step, and JSONL: one reader of lines, and journals that survive a kill.

Every arrow of the loop is one JSONL file of these. They import nothing heavy: a data tool must start at once. How a row
becomes a record again is `visrl.data.native`'s matter.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

from visrl.box import Box, Size
from visrl.errors import UserError

Step = Literal["box", "answer"]
Origin = Literal["sampled", "random"]
# How several looks came to their end: "answered"; neither call nor answer came ("no_call"); it still called at its last
# turn ("turns"); it was shown as many pictures as it may ("pictures"); a turn was cut short ("tokens"); no turn came
# ("failed").
End = Literal["answered", "no_call", "turns", "pictures", "tokens", "failed"]
Place = tuple[str] | tuple[str, int]  # an id, and how many rows before have it where any has

MAX_ROW = 1 << 24  # bytes: a row longer than this is taken for damage, not read into memory
MAX_DEPTH = 200  # lists and objects in each other; what works on rows may call itself twice for each
TOO_DEEP = f"it is nested too deeply: more than {MAX_DEPTH} lists and objects in each other"
DECODER = json.JSONDecoder()
_ENCODER = json.JSONEncoder(ensure_ascii=False)  # json.dumps would make one for every line
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)  # a whole string, so that brackets in it do not count
_STEPS = {"[": 1, "{": 1, "]": -1, "}": -1}


class RecordError(UserError, ValueError):
    """A line that is not the record it should be; the message names file, line and remedy."""


class VisrlWarning(UserWarning):
    """Something that a user should know and that does not stop the work."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image by reference: a path, a data URL or `scene:POOL/INDEX`, whole or cropped to `crop`.

    `size` is its annotated width and height, where known: it decides which way up the image is opened.
    """

    ref: str
    crop: Box | None = None
    size: Size | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """A question about an image. `raw` is the row it came from, so that a format is written back as it was read.

    `size` is the annotated width and height of the image, where known: boxes were annotated on the image that way up.
    An `id` is the user's, and may stand for several rows: `repeat` counts the rows of the data set before this one that
    have the same, and both together (`place`) tell a sample from all others of its data set. `looks` are the true boxes
    of all looks in their order, none where the question needs none; None says nothing but the `box`.
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
    looks: tuple[Box, ...] | None = None

    @property
    def place(self) -> Place:
        """What tells this sample from all others of its data set; the id alone where that is enough."""
        return place_of(self.id, self.repeat)

    @property
    def true_looks(self) -> tuple[Box, ...] | None:
        """The true boxes in the order in which they are looked at: `looks`, or the one `box`; None where neither is
        known."""
        return (self.box,) if self.looks is None and self.box is not None else self.looks


@dataclass(frozen=True, slots=True)
class TrajectoryLook:
    """One of several looks: what the policy wrote, and the box that it meant."""

    text: str
    box: Box


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One rollout of a question: a box, and the answer given from its crop. A failed one is a record with its `error`.

    `box_text` is what the policy wrote, or the codec's text where the diversity controller put a random box. `answers`
    holds all that were sampled from the crop, `answer` first; it is empty where there is no more than the one.

    Where the policy looks as often as it wants to, `end` says how it came to an end (None: one look is the rule),
    `looks` are all that it took, of which `box_text` and `box` are the last, and `path` is the place of each turn after
    the first among those that were sampled beside it. Only one that ended "answered" has an answer.
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
    answers: tuple[str, ...] = ()
    looks: tuple[TrajectoryLook, ...] = ()
    end: End | None = None
    path: tuple[int, ...] = ()

    @property
    def place(self) -> Place:
        """The `place` of its sample."""
        return place_of(self.sample_id, self.repeat)

    @property
    def can_be_judged(self) -> bool:
        """Whether there is something to score: an answer, and where one look is the rule the box that it is from."""
        return self.answer is not None and (self.box is not None or self.end is not None)

    @property
    def all_answers(self) -> tuple[str, ...]:
        """Every answer that there is, however many were sampled."""
        return self.answers or (() if self.answer is None else (self.answer,))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the critic said of one trajectory, each score in [0, 1]; None is "could not be read", never 0.

    `answer_scores` are those of the trajectory's `answers`, `answer_score` first; empty where it has no more than one.
    """

    sample_id: str
    round: int
    branch: int
    box_score: float | None
    answer_score: float | None
    raw: str = ""
    repeat: int = 0  # of the sample
    answer_scores: tuple[float | None, ...] = ()
    path: tuple[int, ...] = ()  # of the trajectory

    @property
    def place(self) -> Place:
        """The `place` of its sample."""
        return place_of(self.sample_id, self.repeat)

    @property
    def all_scores(self) -> tuple[float | None, ...]:
        """The score of every answer, in the order of the trajectory's."""
        return self.answer_scores or (self.answer_score,)


@dataclass(frozen=True, slots=True)
class Message:
    """What is said to a model, or by it; `<image>` in a text marks the place of each picture."""

    role: Literal["system", "user", "assistant", "tool"]
    text: str


@dataclass(frozen=True, slots=True)
class Preference:
    """A preference at one step of an item. A box and an answer preference that belong together (`belongs_to`) are one
    item: they share images and a training step.

    `images` are the whole picture and the crops that the policy was shown before. After several looks the step is "box"
    where either side is one more look, and "answer" where both answer.

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


Record = TypeVar("Record", Sample, Trajectory, Verdict, Preference)


def place_of(name: str, repeat: int) -> Place:
    """A user's id with what tells its rows apart. Seeds are named by it, so an id of one row stands alone."""
    return (name, repeat) if repeat else (name,)


def place_name(place: Place) -> str:
    """A place as text, for what is hashed or drawn by lot: the id, where one row has it."""
    return "\x1f".join(map(str, place))


def belongs_to(item: Sequence[Preference], preference: Preference) -> bool:
    """Whether `preference`, the next in its file, is one more step of the last `item`: the same id and picture, and a
    step after so many crops as the item lacks. Ids may repeat: whatever else has the same one is another item."""
    if not item or item[-1].id != preference.id or item[-1].images[:1] != preference.images[:1]:
        return False
    return all((one.step, len(one.images)) != (preference.step, len(preference.images)) for one in item)


def to_json(record: Sample | Trajectory | Verdict | Preference) -> dict[str, Any]:
    """The record as plain JSON values; boxes are lists of four fractions."""
    row = {field.name: getattr(record, field.name) for field in fields(record)}
    for name in _LEFT_OUT:
        if name in row and not row[name]:
            del row[name]
    if isinstance(record, Sample | Trajectory):
        row["looks"] = _looks_json(record)
        if row["looks"] is None:
            del row["looks"]
    for name, value in row.items():
        if isinstance(value, Box):
            row[name] = value.as_list()
    if "images" in row:
        row["images"] = [picture_json(picture) for picture in row["images"]]
    if context := row.pop("context", ()):
        row["context"] = [{"role": message.role, "text": message.text} for message in context]
    return row


def _looks_json(record: Sample | Trajectory) -> list[Any] | None:
    """The looks of a sample or of a trajectory as its row holds them; None where it says nothing of them."""
    if isinstance(record, Sample):
        return None if record.looks is None else [box.as_list() for box in record.looks]
    return [{"text": look.text, "box": look.box.as_list()} for look in record.looks] or None


def picture_json(picture: Picture) -> str | dict[str, Any]:
    """A picture as its row holds it: the reference alone, or an object with crop (fractions) and size (pixels)."""
    if picture.crop is None and picture.size is None:
        return picture.ref
    row: dict[str, Any] = {"ref": picture.ref}
    if picture.crop is not None:
        row["crop"] = picture.crop.as_list()
    if picture.size is not None:
        row["size"] = list(picture.size)
    return row


_KINDS = (Sample, Trajectory, Verdict, Preference)
_LEFT_OUT = ("repeat", "answers", "answer_scores", "end", "path")  # of a row, where there is nothing to say

# --- JSON by lines ----------------------------------------------------------------------------------------------------


class BadLine(str):
    """A line that is not JSON, as it stood; bytes that are not UTF-8 are kept as lone surrogates."""

    number: int = 0  # of the line in its file, or of the row in a list
    has_end: bool = True


def read_jsonl(path: str | os.PathLike[str], *, unfinished: Literal["refuse", "leave_out"] = "refuse") -> Iterator[Any]:
    """The values of a JSONL file, one by one; a byte order mark and blank lines are passed by.

    A last line without a line end that is not JSON is what a kill cut off: with `unfinished="leave_out"` it is left
    out, as `Journal` cuts it off where it goes on.

    Raises:
        RecordError: a line is not JSON in UTF-8; the message names file and line.
    """
    with open(path, "rb") as file:
        for value in json_lines(file, path):
            if isinstance(value, BadLine):
                if unfinished == "leave_out" and not value.has_end:
                    return
                raise bad_line(path, value)
            yield value


def json_lines(file: BinaryIO, name: str | os.PathLike[str]) -> Iterator[Any]:
    """The value of every line that is not blank. A line that is not JSON comes as a `BadLine`.

    Raises:
        RecordError: a line of more than `MAX_ROW` bytes.
    """
    number = 0
    while line := file.readline(MAX_ROW):
        number += 1
        if len(line) >= MAX_ROW:
            raise RecordError(f"{name}, line {number}: longer than {MAX_ROW:,} characters; is this a JSONL file?")
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            value = json_value(line.decode())
        except ValueError:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            if not line.strip():
                continue
            value = BadLine(line.rstrip(b"\n").decode("utf-8", "surrogateescape"))
            value.number, value.has_end = number, line.endswith(b"\n")
        yield value


def json_value(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, or nested deeper than `MAX_DEPTH`.
    """
    if is_deep(text):
        raise ValueError(TOO_DEEP)
    return DECODER.decode(text)


def is_deep(text: str, start: int = 0, end: int | None = None) -> bool:
    """Whether a JSON text, that of `text` from `start` to `end`, is nested deeper than `MAX_DEPTH`."""
    end = len(text) if end is None else end
    if text.count("[", start, end) + text.count("{", start, end) <= MAX_DEPTH:
        return False
    return any(depth > MAX_DEPTH for _, depth in bracket_depths(text, start, end))


def bracket_depths(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The place after each bracket of a JSON text, and how many lists and objects are open there."""
    depth = 0
    for found in _BRACKETS.finditer(text, start, end):
        if (step := _STEPS.get(found[0], 0)) != 0:
            depth += step
            yield found.end(), depth


def bad_line(path: str | os.PathLike[str], line: BadLine) -> RecordError:
    """What is raised where a line that is not JSON cannot be used."""
    return RecordError(f"{path}, line {line.number}: {line_fault(line)}; mend or remove this line")


def line_fault(line: BadLine) -> str:
    """What is wrong with a line, in a few words."""
    try:
        line.encode()
        json_value(line)
    except UnicodeEncodeError:
        return "not UTF-8"
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg} at character {error.pos + 1}"
    except ValueError as error:  # nested too deeply, or a number of thousands of digits
        return f"not JSON: {error}"
    return "not JSON"


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

    Each `append` ends in one flush. A line that a kill left unfinished (see `read_jsonl`) is cut off when the journal
    is opened again, so a resumed run sees whole lines only.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _end_last_line(self.path)
        self._file = open(self.path, "ab")  # noqa: SIM115 (closed in close)

    def append(self, records: Iterable[Any]) -> None:
        """Write the records; they are on disk when this returns."""
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


def _end_last_line(path: Path) -> None:
    """Cut off a last line that a kill left unfinished; one that only lacks its line end is given it."""
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
        if whole == end:
            return
        file.seek(whole)
        if any(isinstance(value, BadLine) for value in json_lines(file, path)):
            file.truncate(whole)
        else:
            file.seek(end)
            file.write(b"\n")
