"""Hugging Face data sets: parquet files, folders that `datasets` saved, and data sets of the hub as a stream.

Columns are those of our own JSONL; `columns` says which of theirs they are. Pictures kept as bytes become data URLs.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from visrl.data.native import parse_visrl
from visrl.data.rows import Row, parsed_row
from visrl.records import RecordError

BATCH = 1000  # rows written at a time

_MAGIC = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp", b"II*": "tiff"}
_KEYS = ("id", "image", "question", "answer", "box", "bbox", "width", "height", "size", "source", "split", "raw")


def read_hf(source: str, *, split: str = "train", columns: dict[str, str] | None = None) -> Iterator[Row]:
    """The rows of a data set: a parquet file, a folder, or `owner/name` on the hub, streamed.

    Raises:
        RecordError: nothing there, no such split, or a named column that does not exist.
    """
    data = _open(source, split)
    theirs = {key: key for key in _KEYS} | (columns or {})
    absent = [theirs[key] for key in ("image", "question") if theirs[key] not in (data.column_names or [theirs[key]])]
    if absent:
        have = ", ".join(data.column_names)
        raise RecordError(f"{source} has no column {absent[0]!r}; it has {have}: name yours with --columns image=…")
    for number, values in enumerate(data, start=1):
        raw = {ours: _plain(values[name]) for ours, name in theirs.items() if values.get(name) is not None}
        if isinstance(raw.get("raw"), str):
            raw["raw"] = json.loads(raw["raw"])
        yield parsed_row(raw, number, parse_visrl)


def _open(source: str, split: str) -> Any:
    path = Path(source)
    if not path.exists() and (path.suffix or path.is_absolute() or len(path.parts) > 2 or source.startswith(".")):
        raise RecordError(f"no data at {source} (a data set of the hub is named owner/name)")
    import datasets

    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(source)
            if isinstance(saved, datasets.DatasetDict):
                if split not in saved:
                    raise RecordError(f"{source} has no split {split!r}; it has {', '.join(saved)}")
                saved = saved[split]
            data = saved.to_iterable_dataset()
        elif path.exists():
            files = sorted(map(str, path.rglob("*.parquet"))) if path.is_dir() else [source]
            if not files:
                raise RecordError(f"{source} holds no parquet files and no data set that `datasets` saved")
            data = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        else:
            data = datasets.load_dataset(source, split=split, streaming=True)
    except (OSError, ValueError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"{source} cannot be read as a data set: {error}") from error
    for name, feature in (data.features or {}).items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
    return data


def _plain(value: Any) -> Any:
    """A column's value as JSON: pictures as references, the first of several pictures."""
    if isinstance(value, dict) and set(value) == {"bytes", "path"}:
        return _data_url(value["bytes"]) if value["bytes"] is not None else value["path"]
    if isinstance(value, bytes):
        return _data_url(value)
    if isinstance(value, list) and value and isinstance(value[0], dict) and "bytes" in value[0]:
        return _plain(value[0])
    return value if isinstance(value, (str, int, float, bool, list, dict, type(None))) else str(value)


def _data_url(data: bytes) -> str:
    kind = next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), "octet-stream")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


class ParquetWriter:
    """A parquet file being written from rows of our own JSONL. Whole, or not there at all."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path, self.count = Path(path), 0
        self._part = Path(f"{self.path}.part")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        texts = [(name, pa.string()) for name in ("id", "image", "question", "answer", "source", "raw")]
        numbers = [("box", pa.list_(pa.float64())), ("size", pa.list_(pa.int32()))]
        self._schema = pa.schema(texts + numbers)
        self._file = pq.ParquetWriter(self._part, self._schema)
        self._rows: list[dict[str, Any]] = []

    def write(self, raw: dict[str, Any]) -> None:
        row = {name: raw.get(name) for name in self._schema.names}
        row["raw"] = json.dumps(raw["raw"]) if raw.get("raw") is not None else None
        self._rows.append(row)
        self.count += 1
        if len(self._rows) == BATCH:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        self._file.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows.clear()

    def __enter__(self) -> ParquetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None and self._rows:
            self._flush()
        self._file.close()
        if kind is None:
            os.replace(self._part, self.path)
        else:
            self._part.unlink()
