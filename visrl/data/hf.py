"""Hugging Face data sets: parquet files, folders that `datasets` saved, and data sets of the hub as a stream.

Columns are those of our own JSONL, or what they are commonly called; `columns` says which of theirs they are where that
does not find them. Images kept as bytes become data URLs, which `convert` writes as files.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from visrl.data.native import VOTED, one_answer, parse_visrl, with_size
from visrl.data.rows import DataRow, Parsed, RowFault, parsed_row
from visrl.data.sizes import Sizes
from visrl.records import RecordError, json_value

BATCH = 1000  # rows written at a time

_MAGIC = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp", b"II*": "tiff"}
_KEYS = (
    "id",
    "image",
    "question",
    "answer",
    "box",
    "bbox",
    "looks",
    "width",
    "height",
    "size",
    "source",
    "split",
    "raw",
)
# What the columns that a row cannot be without are commonly called, in the order they are looked for.
_CALLED = {
    "image": ("image", "images"),
    "question": ("question", "problem", "query"),
    "answer": ("answer", "answers", "response", "solution"),
}
_CONVERSATIONS = {"messages", "conversations", "conversation", "instruction"}


def is_hf(path: str | os.PathLike[str]) -> bool:
    """Whether a parquet file lies at `path`, or a folder of such files or one that `datasets` saved."""
    path = Path(path)
    if path.is_dir():
        saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
        return saved or next(path.rglob("*.parquet"), None) is not None
    return path.suffix == ".parquet" and path.is_file()


def read_hf(
    source: str | os.PathLike[str], *, split: str = "train", columns: dict[str, str] | None = None,
    sizes: Sizes | None = None,
) -> Iterator[DataRow]:  # fmt: skip
    """The rows of a data set: a parquet file, a folder, or `owner/name` on the hub, streamed.

    Raises:
        RecordError: nothing there, no such split, a named column that does not exist, or damaged data.
    """
    data = _open(source, split)
    theirs = _columns(source, data, columns or {})
    sizes = sizes or Sizes()

    def parse(values: Any, number: int) -> Parsed:
        raw, notes = _as_ours(values, theirs)
        return Parsed(parse_visrl(with_size(raw, sizes), number), notes)

    for number, values in enumerate(_rows(source, data), start=1):
        yield parsed_row(values, number, parse)


def raw_rows(source: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The rows of a data set as plain JSON values, under their own column names.

    Raises:
        RecordError: as `read_hf`.
    """
    return _rows(source, _open(source, "train"))


def _rows(source: str | os.PathLike[str], data: Any) -> Iterator[dict[str, Any]]:
    import pyarrow

    try:
        for values in data:
            yield {name: plain_value(value) for name, value in values.items()}
    except (OSError, ValueError, TypeError, pyarrow.ArrowException) as error:
        raise RecordError(f"{source} is damaged: {str(error)[:300]}") from error


def _columns(source: str | os.PathLike[str], data: Any, given: dict[str, str]) -> dict[str, str]:
    """Which of the data set's columns holds what of ours."""
    if unknown := sorted(set(given) - set(_KEYS)):
        raise RecordError(f"--columns has no {unknown[0]!r} of ours; there are {', '.join(_KEYS)}")
    have = data.column_names
    if have is None:
        return {key: key for key in _KEYS} | given
    theirs = {key: key for key in _KEYS if key in have}
    for key, names in _CALLED.items():
        found = next((name for name in names if name in have), None)
        if found is not None:
            theirs.setdefault(key, found)
    for ours, name in given.items():
        if name not in have:
            raise RecordError(f"{source} has no column {name!r}; it has {', '.join(have)}: name yours for {ours}")
    theirs |= given
    for key in ("image", "question"):
        if theirs.get(key, key) not in have:
            hint = "name yours: `visrl data convert --from hf --columns image=COLUMN …`"
            if key == "question" and (kind := sorted(_CONVERSATIONS & set(have))):
                hint = f"with {kind[0]!r} it holds conversations: read them with --from sharegpt"
            raise RecordError(f"{source} has no column {theirs.get(key, key)!r}; it has {', '.join(have)}: {hint}")
    return theirs


def _as_ours(values: dict[str, Any], theirs: dict[str, str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The row under our names; columns of its own are kept in `raw`, images aside.

    Raises:
        RowFault: no image or several where one is wanted, answers of another form, or a `raw` that is no JSON.
    """
    raw = {ours: values[name] for ours, name in theirs.items() if values.get(name) is not None}
    notes: list[str] = []
    image = raw.get("image")
    if isinstance(image, list):
        if len(image) != 1:
            what = f"holds {len(image)} pictures; a sample is about one" if image else "holds no picture"
            raise RowFault("several_pictures" if image else "no_picture", f"{theirs['image']!r} {what}")
        raw["image"] = image[0]
    own = {name: value for name, value in values.items() if name not in theirs.values() and value is not None}
    if isinstance(raw.get("answer"), (list, dict)):
        own[theirs["answer"]] = raw["answer"]
        raw["answer"], differ = one_answer(raw["answer"], theirs["answer"])
        notes += [VOTED] * differ
    pictures = [name for name, value in own.items() if "data:image/" in str(value)[:200]]
    notes += [f"the column {name!r} holds pictures of its own and is passed by" for name in pictures]
    kept = {name: value for name, value in own.items() if name not in pictures}
    if isinstance(raw.get("raw"), str):
        try:
            raw["raw"] = json_value(raw["raw"])
        except ValueError as error:
            raise RowFault("unparseable", f"{theirs['raw']!r} is not JSON: {error}") from error
    elif "raw" not in raw and kept:
        raw["raw"] = kept
    return raw, tuple(notes)


def _open(source: str | os.PathLike[str], split: str) -> Any:
    source = str(source)
    path = Path(source)
    if not path.exists() and (path.suffix or path.is_absolute() or len(path.parts) > 2 or source.startswith(".")):
        raise RecordError(f"no data at {source} (a data set of the hub is named owner/name)")
    import datasets

    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(source)
            if isinstance(saved, datasets.DatasetDict):
                if split not in saved:
                    has = ", ".join(saved)
                    raise RecordError(
                        f"{source} has no split {split!r}; it has {has}: `visrl data … --split` names one"
                    )
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
        if (undecoded := _undecoded(feature)) != feature:
            data = data.cast_column(name, undecoded)
    return data


def _undecoded(feature: Any) -> Any:
    """The feature with images, sounds and videos in it, however deep, left as their bytes."""
    import datasets

    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if isinstance(feature, list):
        return [_undecoded(inner) for inner in feature]
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        length = {"length": feature.length} if isinstance(feature, datasets.List) else {}
        return type(feature)(_undecoded(feature.feature), **length)
    kinds = tuple(getattr(datasets, name) for name in ("Image", "Audio", "Video", "Pdf") if hasattr(datasets, name))
    return type(feature)(decode=False) if isinstance(feature, kinds) else feature


def plain_value(value: Any) -> Any:
    """A column's value as JSON has it: images as references, dates and decimal numbers as their text."""
    if isinstance(value, dict):
        if set(value) == {"bytes", "path"}:
            return _data_url(value["bytes"]) if value["bytes"] is not None else value["path"]
        return {str(key): plain_value(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(inner) for inner in value]
    if isinstance(value, (bytes, bytearray)):
        return _data_url(bytes(value))
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (str, int, float, type(None))):
        return value
    return format(value, "f") if isinstance(value, decimal.Decimal) else str(value)


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
