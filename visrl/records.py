"""The records that flow from step to step, and append-only JSONL that survives a kill.

Every arrow of the loop is one JSONL file of these. They import nothing heavy: a data tool must start at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from visrl.box import Box, Size

Step = Literal["box", "answer"]
Origin = Literal["sampled", "random"]


class RecordError(ValueError):
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
    """

    id: str
    image: str
    question: str
    answer: str
    box: Box | None = None
    source: str = ""
    raw: Any = None
    size: Size | None = None


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


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the critic said of one trajectory, each score in [0, 1]; None is "could not be read", never 0."""

    sample_id: str
    round: int
    branch: int
    box_score: float | None
    answer_score: float | None
    raw: str = ""


@dataclass(frozen=True, slots=True)
class Preference:
    """A preference at one step of an item. Rows with one `id` are one item: they share pictures and a training step."""

    id: str
    step: Step
    prompt: str
    images: tuple[Picture, ...]
    chosen: str
    rejected: str
    weight: float = 1.0


Record = TypeVar("Record", Sample, Trajectory, Verdict, Preference)


def to_json(record: Sample | Trajectory | Verdict | Preference) -> dict[str, Any]:
    """The record as plain JSON values; boxes are lists of four fractions."""
    row = {field.name: getattr(record, field.name) for field in fields(record)}
    for name, value in row.items():
        if isinstance(value, Box):
            row[name] = value.as_list()
    if "images" in row:
        row["images"] = [picture_json(picture) for picture in row["images"]]
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
    """The record in `row`.

    Raises:
        RecordError: a field is missing or unknown, or a box is none.
    """
    if not isinstance(row, dict):
        raise RecordError(f"a {kind.__name__} must be a JSON object, this is {type(row).__name__}")
    row = dict(row)
    try:
        if row.get("box") is not None:
            row["box"] = Box(*row["box"])
        if "images" in row:
            row["images"] = tuple(_picture(entry) for entry in row["images"])
        if row.get("size") is not None:
            row["size"] = _size(row["size"])
        return kind(**row)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise RecordError(f"not a {kind.__name__}: {error}") from error


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, one by one.

    Raises:
        RecordError: a line is not JSON in UTF-8; the message names file and line.
    """
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise RecordError(f"{path}, line {number}: not UTF-8 ({error.reason}); mend or remove it") from error
            except json.JSONDecodeError as error:
                raise RecordError(f"{path}, line {number}: not JSON ({error.msg}); mend or remove this line") from error


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
    with open(part, "w", encoding="utf-8") as lines:
        for record in records:
            lines.write(_line(record))
            count += 1
    os.replace(part, path)
    return count


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` to `path` at once: who reads it, or goes on after a kill, sees the old text or the new one."""
    path, part = Path(path), Path(f"{path}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(text, encoding="utf-8")
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
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)

    def append(self, records: Iterable[Any]) -> None:
        self._file.write("".join(_line(record) for record in records))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _line(record: Any) -> str:
    row = record if isinstance(record, dict) else to_json(record)
    return json.dumps(row, ensure_ascii=False) + "\n"


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
