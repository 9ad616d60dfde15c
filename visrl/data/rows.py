"""Rows of data files, one by one: JSON lists and JSONL as streams, in and out. Knows no format and no image.

Every row of every file becomes one `DataRow`: good with its records, or bad with a fault in one word and a reason in a
sentence. `raw` is what stood there, so that a file can be written back as it was read, bad rows included.
"""

from __future__ import annotations

import codecs
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from visrl.box import BoxError
from visrl.prompts import IMAGE
from visrl.records import (
    DECODER,
    MAX_ROW,
    TOO_DEEP,
    BadLine,
    Preference,
    RecordError,
    Sample,
    bracket_depths,
    is_deep,
    json_line,
    json_lines,
    line_fault,
)

CHUNK = 1 << 20  # characters read at a time from a JSON list

# Faults that are a row's form; "inverted", "outside" and "empty" are a box's.
_BOX_TEXT_FAULTS = {"no_box", "count", "not_a_number", "more_than_one"}


class RowFault(ValueError):
    """A row that gives no record; `fault` says why in one word, the message in a sentence."""

    def __init__(self, fault: str, message: str) -> None:
        super().__init__(message)
        self.fault = fault


@dataclass(frozen=True, slots=True)
class DataRow:
    """One row of a data file: `records` where it is good, else `fault` and `reason`. Rows are numbered from 1.

    `notes` name what a good row holds and its records have no place for; equal sentences are counted together.
    """

    number: int
    raw: Any
    records: tuple[Sample | Preference, ...] = ()
    fault: str = ""
    reason: str = ""
    notes: tuple[str, ...] = ()


Records = tuple[Sample | Preference, ...]


class Parsed(NamedTuple):
    """What a row gives: its records, and notes on what is left out."""

    records: Records
    notes: tuple[str, ...] = ()


def format_notes(notes: Counter[str]) -> list[str]:
    """Notes of many rows, a line each."""
    return [f"in {count:,} {'row' if count == 1 else 'rows'} {note}" for note, count in notes.most_common()]


SAME = "the chosen and the rejected reply are the same: there is nothing to prefer"

Parse = Callable[[Any, int], Records | Parsed]


def read_rows(path: str | os.PathLike[str], parse: Parse) -> Iterator[DataRow]:
    """The rows of a JSON list or JSONL file. `parse` makes records of one row or raises `RowFault` or `BoxError`.

    Raises:
        RecordError: the file is not there, or a JSON list is damaged so that what follows cannot be read.
    """
    for number, raw in enumerate(json_items(path), start=1):
        yield parsed_row(raw, number, parse)


def parsed_row(raw: Any, number: int, parse: Parse) -> DataRow:
    """The row that `parse` makes of `raw`, good or bad."""
    if isinstance(raw, BadLine):
        return DataRow(number, raw, fault="unparseable", reason=f"the line is {line_fault(raw)}")
    try:
        parsed = parse(raw, number)
        records, notes = parsed if isinstance(parsed, Parsed) else (parsed, ())
        for record in records:
            if isinstance(record, Sample):
                _refuse_marks(record)
        return DataRow(number, raw, records, notes=notes)
    except RowFault as error:
        return DataRow(number, raw, fault=error.fault, reason=str(error))
    except BoxError as error:
        fault = "unparseable" if error.fault in _BOX_TEXT_FAULTS else error.fault
        return DataRow(number, raw, fault=fault, reason=str(error))


def _refuse_marks(sample: Sample) -> None:
    """A prompt marks the places of its images itself: a mark in a question or an answer would stand for another."""
    for key, text in (("question", sample.question), ("answer", sample.answer)):
        if IMAGE in text:
            raise RowFault("unparseable", f"the {key} holds an {IMAGE} mark: {text[:60]!r}")


def json_items(path: str | os.PathLike[str]) -> Iterator[Any]:
    """The values of a JSON list, or of the lines of a JSONL file; a line that is not JSON comes as a `BadLine`.

    A file of any length is read in a few megabytes of memory.

    Raises:
        RecordError: the file is not there, or a JSON list is damaged; the message names file, row and place.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise RecordError(f"no data at {path} ({error.strerror})") from error
    except ValueError as error:  # a name that no file system takes
        raise RecordError(f"no data at {str(path)!r} ({error})") from error
    with file:
        if _is_list(file):
            yield from _list_items(io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape"), str(path))
        else:
            yield from json_lines(file, path)


def _is_list(file: io.BufferedReader) -> bool:
    """Whether a file holds a JSON list; its byte order mark and the blanks before its first value are read."""
    if file.peek(3).startswith(codecs.BOM_UTF8):
        file.read(3)
    while ahead := file.peek(1):
        blanks = len(ahead) - len(ahead.lstrip())
        file.read(blanks)
        if blanks < len(ahead):
            return ahead[blanks : blanks + 1] == b"["
    return False


def _list_items(file: IO[str], path: str) -> Iterator[Any]:
    """The values of a JSON list, whose `[` comes next."""
    text, place, number = file.read(1), 1, 1
    try:
        while True:
            text, place = _next_char(file, text, place)
            if text[place] == "]":
                break
            if number > 1:
                if text[place] != ",":
                    raise ValueError(f"{text[place]!r} where ',' or ']' must stand")
                text, place = _next_char(file, text, place + 1)
            value, text, place = _next_value(file, text, place)
            if isinstance(value, BadLine):
                value.number = number
            yield value
            number += 1
        if text[place + 1 :].strip() or file.read(CHUNK).strip():
            raise ValueError("something follows the end of the list")
    except ValueError as error:
        what = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise RecordError(f"{path}, row {number}: {what}; nothing from here on can be read: mend the file") from error


def _next_char(file: IO[str], text: str, place: int) -> tuple[str, int]:
    """The buffer, and the place in it of the next character that is no space; reads on where the buffer ends."""
    while True:
        while place < len(text) and text[place] in " \t\r\n":
            place += 1
        if place < len(text):
            return text, place
        text, place = file.read(CHUNK), 0
        if not text:
            raise ValueError("the list has no end")


def _next_value(file: IO[str], text: str, place: int) -> tuple[Any, str, int]:
    """The value that starts at `place`, the buffer, and the place after it; reads on until the value is whole."""
    while True:
        problem: json.JSONDecodeError | None = None
        try:
            value, end = DECODER.raw_decode(text, place)
            # What follows a number may be more of it: `1` of `1.5`.
            if end < len(text) and (not isinstance(value, (int, float)) or text[end] in " \t\r\n,]"):
                return (BadLine(text[place:end]) if is_deep(text, place, end) else value), text, end
        except json.JSONDecodeError as error:
            problem = error
        except RecursionError:
            depths = bracket_depths(text, place, len(text))
            whole = next((end for end, depth in depths if depth == 0), None)  # where it ends, without reading it
            if whole is not None:
                return BadLine(text[place:whole]), text, whole
            problem = json.JSONDecodeError(TOO_DEEP, "", 0)
        if len(text) - place > MAX_ROW:
            raise problem or ValueError(f"a row of more than {MAX_ROW:,} characters")
        more = file.read(max(CHUNK, len(text) - place))
        if not more:
            raise problem or ValueError("the list has no end")
        text, place = text[place:] + more, 0


class Writer:
    """A data file being written: a JSON list where the name ends in `.json`, else JSONL. Whole, or not there at all."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.count = 0
        self._part = Path(f"{self.path}.part")
        self._list = self.path.suffix == ".json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._part, "wb")  # noqa: SIM115 (closed in __exit__)

    def write(self, raw: Any) -> None:
        if self._list:
            self._file.write(b",\n" if self.count else b"[\n")
        self._file.write(json_bytes(raw))
        if not self._list:
            self._file.write(b"\n")
        self.count += 1

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._list:
            self._file.write(b"\n]\n" if self.count else b"[]\n")
        self._file.close()
        if kind is None:
            os.replace(self._part, self.path)
        else:
            self._part.unlink()


def json_bytes(raw: Any) -> bytes:
    """`raw` as one line of JSON in UTF-8; a line that was not JSON as it stood."""
    if isinstance(raw, BadLine):
        return raw.encode("utf-8", "surrogateescape")
    return json_line(raw)[:-1]


# --- Parts of a row, or a fault that names the key ------------------------------------------------------------------


def get_text(raw: Any, key: str) -> str:
    """`raw[key]`, a string that UTF-8 can hold."""
    value = raw.get(key) if isinstance(raw, dict) else None
    if not isinstance(value, str):
        what = "null" if value is None and isinstance(raw, dict) and key in raw else _shown(value)
        raise RowFault("unparseable", f"{key!r} must be a string, it is {what}")
    if not value.isascii():
        check_text(value, key)
    return value


def check_text(value: str, key: str) -> None:
    """Refuse a text that no file in UTF-8 can hold.

    Raises:
        RowFault: "unparseable", with the name of the `key`.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowFault("unparseable", f"{key!r} holds half a character (a lone surrogate)") from error


def get_size(raw: Any) -> tuple[int, int]:
    """`width` and `height` of a row, positive whole numbers."""
    width, height = raw.get("width"), raw.get("height")
    if type(width) is float and type(height) is float and width.is_integer() and height.is_integer():
        width, height = int(width), int(height)
    if not (type(width) is int and type(height) is int and width > 0 and height > 0):
        raise RowFault("unparseable", f"width and height must be positive whole numbers, not {width!r} and {height!r}")
    return width, height


def four_numbers(value: Any, key: str) -> tuple[float, float, float, float]:
    """`value` as four finite numbers."""
    if not isinstance(value, list) or len(value) != 4:
        raise RowFault("unparseable", f"{key!r} must be four numbers, it is {_shown(value)}")
    for number in value:
        if (type(number) is not int and type(number) is not float) or not -1e12 < number < 1e12:
            raise RowFault("unparseable", f"{key!r} must be four numbers, it is {_shown(value)}")
    x0, y0, x1, y1 = value
    return x0, y0, x1, y1


def _shown(value: Any) -> str:
    return "missing" if value is None else repr(value)[:60]
