"""Rows of TSV files with pictures in base64, as VLMEvalKit distributes benchmarks: gigabytes, a row at a time.

A row's cells may be quoted as pandas quotes them, with tabs, line breaks and doubled quotes inside. A picture is
checked to be base64 and left where it lies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from visrl.data.rows import RowFault
from visrl.image_rows import tsv_ref
from visrl.progress import reading
from visrl.records import RecordError

Row = dict[str, Any]

MAX_LINE = 1 << 28  # bytes of a row of a TSV file; the largest distributed picture has a tenth of it in base64
MAX_BREAKS = 1_000  # lines of one quoted cell
MAX_INDEX = 64  # a "picture" of at most so many characters is the index of the row that holds it (VLMEvalKit)
_BUFFER = 1 << 22  # bytes read from the disk at once
_BASE64 = bytes(range(48, 58)) + bytes(range(65, 91)) + bytes(range(97, 123)) + b"+/="


def tsv_rows(path: Path, pictures: Sequence[str]) -> Iterator[tuple[int, Row | RowFault]]:
    """The rows of a TSV file with their numbers from 1, each as texts by name, or as the fault that it has. In columns
    of `pictures` base64 becomes the reference of the picture; the index of a row before becomes that row's.

    Raises:
        RecordError: its first line holds no names of columns.
    """
    tell = reading(path.name, path.stat().st_size)
    with open(path, "rb", buffering=_BUFFER) as file:
        try:
            _, head, places = _record(file)
            names = [_text(head, place) for place in places] or [""]  # an empty file
        except RowFault as fault:
            raise RecordError(f"{path}: no line of column names: {fault}") from fault
        names[0] = names[0].removeprefix("\ufeff")
        if len(names) < 2 or len(set(names)) < len(names):
            raise RecordError(
                f"{path}: its first line holds no names of columns with tabs between them; is it a TSV file?"
            )
        known: dict[str, str] = {}  # the pictures by the index of their row
        number = 0
        while True:
            number += 1
            try:
                start, line, places = _record(file)
                if not places:
                    return
                yield number, _tsv_row(path, names, start, line, places, pictures, known)
            except RowFault as fault:
                yield number, fault
            tell(file.tell())


def _tsv_row(
    path: Path, names: list[str], start: int, line: bytes, places: list[tuple[int, int]], pictures: Sequence[str],
    known: dict[str, str],
) -> Row:  # fmt: skip
    if len(places) != len(names):
        raise RowFault("unparseable", f"{len(places)} cells where the first line names {len(names)}")
    row: Row = {}
    for name, place in zip(names, places, strict=True):
        if name not in pictures:
            row[name] = _text(line, place)
            continue
        begin, end = place
        if line[begin : begin + 1] == b'"':
            begin, end = begin + 1, end - 1
        if end - begin > MAX_INDEX:
            row[name] = _checked_picture(path, start, line, begin, end)
        else:
            row[name] = line[begin:end].decode("ascii", "replace").strip()
    for name in set(pictures) & set(row):
        if len(row[name]) <= MAX_INDEX and not row[name].startswith("tsv:"):
            if row[name] not in known:
                raise RowFault(
                    "no_picture", f"{name!r} is {row[name]!r}: no base64, and no row before it has that index"
                )
            row[name] = known[row[name]]
    if row.get("index") and isinstance(row.get("image"), str):
        known[str(row["index"])] = row["image"]
    return row


def _checked_picture(path: Path, start: int, line: bytes, begin: int, end: int) -> str:
    text = line[begin:end]
    if text.translate(None, _BASE64) or len(text) % 4:
        raise RowFault("no_picture", "its picture is no base64")
    return tsv_ref(path, start + begin, end - begin)


def _record(file: BinaryIO) -> tuple[int, bytes, list[tuple[int, int]]]:
    """Where the next record starts in the file, its bytes without the line's end, and where its cells lie in them; no
    cells at the end of the file. Quoted cells may hold tabs and line breaks, as pandas writes them.

    Raises:
        RowFault: a cell's quote is never closed, or the row has no end.
    """
    start = file.tell()
    line = file.readline(MAX_LINE)
    while line in (b"\n", b"\r\n"):  # pandas passes blank lines by
        start = file.tell()
        line = file.readline(MAX_LINE)
    for _ in range(MAX_BREAKS):
        if len(line) >= MAX_LINE:
            raise RowFault("unparseable", f"the row has more than {MAX_LINE:,} bytes")
        whole = line.rstrip(b"\r\n")
        places = _cells(whole) if whole else []
        if places is not None:
            return start, whole, places
        more = file.readline(MAX_LINE)
        if not more:
            break
        line += more
    raise RowFault("unparseable", "a quoted cell is not closed")


def _cells(line: bytes) -> list[tuple[int, int]] | None:
    """Where the cells lie in a line, quotes included; None where a quoted cell goes on in the next line."""
    places: list[tuple[int, int]] = []
    start = 0
    while True:
        if line[start : start + 1] == b'"':
            end = line.find(b'"', start + 1)
            while end >= 0 and line[end + 1 : end + 2] == b'"':
                end = line.find(b'"', end + 2)
            if end < 0:
                return None
            end += 1
            if line[end : end + 1] not in (b"", b"\t"):
                raise RowFault("unparseable", f"cell {len(places) + 1} goes on after its closing quote")
        else:
            end = line.find(b"\t", start)
            end = len(line) if end < 0 else end
        places.append((start, end))
        if end >= len(line):
            return places
        start = end + 1


def _text(line: bytes, place: tuple[int, int]) -> str:
    found = line[place[0] : place[1]]
    if found.startswith(b'"'):
        found = found[1:-1].replace(b'""', b'"')
    try:
        return found.decode()
    except UnicodeDecodeError as error:
        raise RowFault("unparseable", "a cell is not UTF-8") from error
