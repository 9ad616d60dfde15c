"""Pictures that lie in a row of a table: base64 in a cell of a TSV file, or bytes in a column of a parquet file.

A table of high-resolution pictures has gigabytes. Such a picture is named by where it lies, and read when it is opened:
`tsv:FILE#START+LENGTH` (bytes of the file) and `parquet:FILE#ROW/COLUMN` (rows from 0).
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from visrl.data_url import MAX_BYTES
from visrl.image_files import ImageError

_KINDS = ("tsv:", "parquet:")
_PLACE = re.compile(r"(?P<start>\d{1,15})(?:\+(?P<length>\d{1,15})|/(?P<column>.+))")


def tsv_ref(path: str | os.PathLike[str], start: int, length: int) -> str:
    """The name of a picture in base64 at these bytes of a file."""
    return f"tsv:{path}#{start}+{length}"


def parquet_ref(path: str | os.PathLike[str], row: int, column: str) -> str:
    """The name of a picture in a row (from 0) and column of a parquet file."""
    return f"parquet:{path}#{row}/{column}"


def is_row_ref(ref: str) -> bool:
    """Whether `ref` names a picture in a row of a table."""
    return ref.startswith(_KINDS)


def read_row_image(ref: str) -> bytes:
    """The bytes of the picture file that `ref` names.

    Raises:
        ImageError: no such file or row, or no picture there.
    """
    kind, _, rest = ref.partition(":")
    path, _, place = rest.rpartition("#")
    found = _PLACE.fullmatch(place)
    if found is None or (found["column"] is None) != (kind == "tsv"):
        raise ImageError(f"{ref[:200]} names no row of a table: it is tsv:FILE#START+LENGTH or parquet:FILE#ROW/COLUMN")
    start = int(found["start"])
    try:
        if kind == "tsv":
            return decoded(_bytes_at(path, start, int(found["length"])))
        return picture_bytes(_parquet_cell(path, start, found["column"]))
    except OSError as error:
        raise ImageError(f"no picture at {ref[:200]} ({error.strerror or error})") from error
    except ValueError as error:
        raise ImageError(f"the picture at {ref[:200]} {error}") from error


def picture_bytes(value: Any) -> bytes:
    """A picture file from a cell of a table: its bytes, its base64, or the record of both that `datasets` writes.

    Raises:
        ValueError: it holds none; the message opens with a verb.
    """
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, list) and len(value) == 1:
        return picture_bytes(value[0])
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if isinstance(value, str):
        return decoded(value.encode())
    raise ValueError("is not there: the cell holds no bytes and no base64")


def decoded(text: bytes) -> bytes:
    """The bytes that base64 stands for.

    Raises:
        ValueError: it is no base64, or too much; the message opens with a verb.
    """
    if len(text) > MAX_BYTES * 4 // 3 + 4:
        raise ValueError(f"has more than {MAX_BYTES:,} bytes")
    try:
        found = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"is no base64: {error}") from error
    if not found:
        raise ValueError("is empty")
    return found


def _bytes_at(path: str, start: int, length: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        found = file.read(min(length, MAX_BYTES * 2))
    if len(found) != length:
        raise ValueError("is not there: the file has changed since it was read")
    return found


class _ParquetImages:
    """One column of a parquet file, a row at a time: forward without reading again, back from the row group's start."""

    def __init__(self, path: str, column: str) -> None:
        import pyarrow.parquet as pq

        self._file = pq.ParquetFile(path, memory_map=True)
        self._column = column
        groups = range(self._file.num_row_groups)
        sizes = [self._file.metadata.row_group(group).num_rows for group in groups]
        self._starts = [sum(sizes[:group]) for group in groups]
        self._rows: Iterator[Any] = iter(())
        self._group, self._next, self._last = -1, 0, (-1, None)

    def at(self, row: int) -> Any:
        if row == self._last[0]:
            return self._last[1]
        group = max((number for number, start in enumerate(self._starts) if start <= row), default=0)
        if group != self._group or self._next > row:
            self._rows, self._group, self._next = self._read(group), group, self._starts[group]
        for value in self._rows:
            self._next += 1
            if self._next == row + 1:
                self._last = (row, value)
                return value
        raise ValueError("is not there: the file has fewer rows")

    def _read(self, group: int) -> Iterator[Any]:
        if self._column not in self._file.schema_arrow.names:
            raise ValueError(f"is not there: the file has no column {self._column!r}")
        for batch in self._file.iter_batches(batch_size=1, row_groups=[group], columns=[self._column]):
            yield from batch.column(0).to_pylist()


def _parquet_cell(path: str, row: int, column: str) -> Any:
    import pyarrow

    try:
        return _parquet_images(path, column, os.stat(path).st_mtime_ns).at(row)
    except pyarrow.ArrowException as error:
        raise ValueError(f"cannot be read: {' '.join(str(error).split())[:200]}") from error


@lru_cache(maxsize=4)
def _parquet_images(path: str, column: str, changed: int) -> _ParquetImages:
    """The open column of a file; `changed` is its time stamp, so that a file written anew is opened anew."""
    return _ParquetImages(path, column)
