"""The one table of data formats: how each is read and written, which options it takes, what it is called elsewhere.

A format is one file of functions and one row of `FORMATS`. One of a user's own is a `DataFormat` of a module of theirs,
named as `module:NAME` wherever a format is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from visrl.box import Size
from visrl.codecs import BoxSpace
from visrl.data.hf import ParquetWriter, read_hf
from visrl.data.info import DatasetEntry, find_entry
from visrl.data.native import parse_own, pool_row, visrl_row
from visrl.data.refcoco import parse_refcoco, refcoco_row
from visrl.data.rows import DataRow, Parse, Parsed, Records, RowFault, Writer, parsed_row, read_rows
from visrl.data.sharegpt import parse_sharegpt, read_sharegpt
from visrl.data.sharegpt_write import ranking_row, sft1_row, sft2_row, sft_row
from visrl.data.sizes import Sizes
from visrl.data.viscot import detection_row, meta_row, parse_detection, parse_meta, parse_viscot, viscot_row
from visrl.plugins import is_plugin, load_plugin
from visrl.records import Preference, RecordError, Sample

# Faults of rows whose form is right.
_UNDERSTOOD = ("inverted", "outside", "empty", "disagree", "no_size")


@dataclass(frozen=True, slots=True)
class Reading:
    """How to read: image sizes, and the options of some formats."""

    sizes: Sizes = field(default_factory=Sizes)
    box_space: BoxSpace | None = None
    dataset: str | None = None  # the entry of dataset_info.json
    columns: Mapping[str, str] = field(default_factory=dict)  # ours → theirs
    split: str = "train"
    boxes: bool = True  # without: boxes are passed by, right or wrong, and sizes are not needed


@dataclass(frozen=True, slots=True)
class Writing:
    """How to write: sizes, and what three-decimal boxes are fractions of."""

    sizes: Sizes = field(default_factory=Sizes)
    box_space: BoxSpace = "image"

    def size_of(self, sample: Sample) -> Size:
        """The width and height of a sample's image.

        Raises:
            RowFault: "no_size", where nothing says them.
        """
        return sample.size or self.sizes.of(sample.image)

    def text_size(self, sample: Sample) -> Size | None:
        """The size that the text of a box needs: in the padded square that of the image, else what is annotated."""
        return self.size_of(sample) if self.box_space == "padded_square" else sample.size


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFormat:
    """One data format. It can be read where it has `parse` or `read`, and written where it has `write`.

    `parse(raw, number, reading)` gives the records of a row of a JSON list or JSONL file (rows are numbered from 1) and
    raises `RowFault` or `BoxError` for a bad row. `read(path, reading)` reads what is no such file. `write(sample,
    number, writing)` gives the row of a sample, and raises `RowFault` where it has none.
    """

    name: str
    about: str  # what it is, in a line
    parse: Callable[[Any, int, Reading], Records | Parsed] | None = None
    read: Callable[[str, Reading], Iterator[DataRow]] | None = None
    write: Callable[[Sample, int, Writing], Any] | None = None
    write_preferences: Callable[[Sequence[Preference]], Any] | None = None  # of one item; without: they are refused
    joins_steps: bool = False  # the preferences of an item are one row of it
    is_own: Callable[[dict[str, Any]], bool] | None = None  # whether a sample's raw row is of this format
    options: tuple[str, ...] = ()  # fields of `Reading` that mean something to it, beside sizes
    called: tuple[str, ...] = ()  # what it is called elsewhere
    writer: type[Writer] | type[ParquetWriter] = Writer
    holds_pictures: bool = False  # as bytes in its rows, which become files where it is converted
    needs_boxes: bool = True
    keeps_looks: bool = False  # its rows have room for the boxes of several looks, or for none being needed
    in_dataset_info: bool = False  # a written file is described in the dataset_info.json beside it

    @property
    def can_be_read(self) -> bool:
        return self.parse is not None or self.read is not None

    def rows(self, path: str, reading: Reading) -> Iterator[DataRow]:
        """The rows of a data set, good and bad.

        Raises:
            RecordError: it is not there, or damaged.
        """
        if self.read is not None:
            return self.read(path, reading)
        return read_rows(path, self.parser(reading))

    def parser(self, reading: Reading) -> Parse:
        """What makes records of one row."""
        parse = self.parse
        assert parse is not None
        return lambda raw, number: parse(raw, number, reading)


def read_entry(entry: DatasetEntry, reading: Reading) -> Iterator[DataRow]:
    """The rows of a data set that `dataset_info.json` describes, or of a file that may lie beside none.

    Raises:
        RecordError: the file is not there, damaged, or of a kind that is not read.
    """
    if is_plugin(entry.formatting):
        return find_format(entry.formatting).rows(str(entry.path), reading)
    return read_sharegpt(entry, reading.sizes, reading.box_space)


_NO_ENTRY = DatasetEntry("", Path(), columns={}, formatting="")
_TABLE = (
    DataFormat(
        name="viscot",
        about="Visual-CoT training and benchmark JSON",
        parse=lambda raw, number, reading: parse_viscot(raw, number, reading.sizes, reading.boxes),
        write=lambda sample, number, writing: viscot_row(sample, writing.size_of(sample), number),
        # LLaVA's own rows have the same keys, and one path.
        is_own=lambda raw: (
            {"image", "conversations"} <= raw.keys()
            and isinstance(raw["image"], list)
            and "###" in str(raw["image"][1:])
        ),
    ),
    DataFormat(
        name="viscot-meta",
        about="Visual-CoT metadata JSONL, one file per data set",
        parse=lambda raw, number, reading: parse_meta(raw, number, reading.boxes),
        write=lambda sample, number, writing: meta_row(sample, writing.size_of(sample), number),
        is_own=lambda raw: {"bboxs", "question"} <= raw.keys(),
    ),
    DataFormat(
        name="viscot-detection",
        about="Visual-CoT detection JSONL",
        parse=lambda raw, number, reading: parse_detection(raw, number),
        write=lambda sample, number, writing: detection_row(sample, writing.size_of(sample), number),
        is_own=lambda raw: {"img_path", "expression"} <= raw.keys() and "dataset_name" not in raw,
    ),
    DataFormat(
        name="refcoco",
        about="RefCOCO, RefCOCO+, RefCOCOg as JSONL",
        parse=lambda raw, number, reading: parse_refcoco(raw, number),
        write=lambda sample, number, writing: refcoco_row(sample, writing.size_of(sample), number),
        is_own=lambda raw: {"img_path", "expression", "dataset_name"} <= raw.keys(),
    ),
    DataFormat(
        name="sharegpt",
        about="rows of LLaMA-Factory, ms-swift and LLaVA, with or without `dataset_info.json`: SFT sets and rankings",
        parse=lambda raw, number, reading: parse_sharegpt(raw, number, _NO_ENTRY, reading.sizes, reading.box_space),
        read=lambda path, reading: read_entry(find_entry(path, reading.dataset), reading),
        write=lambda sample, number, writing: sft_row(sample, writing.box_space, writing.text_size(sample)),
        write_preferences=ranking_row,
        joins_steps=True,
        options=("dataset", "box_space"),
        called=("llava", "alpaca", "llama-factory", "llamafactory", "ms-swift", "swift", "openai"),
        in_dataset_info=True,
    ),
    DataFormat(
        name="visrl",
        about="our own JSONL: samples in the short form above, preferences of `visrl filter`",
        parse=lambda raw, number, reading: parse_own(raw, number, reading.sizes),
        write=lambda sample, number, writing: visrl_row(sample),
        write_preferences=lambda preferences: visrl_row(preferences[0]),
        called=("json", "jsonl"),
        keeps_looks=True,
    ),
    DataFormat(
        name="hf",
        about="parquet, a folder saved by `datasets`, or `owner/name` on the hub, streamed",
        read=lambda path, reading: read_hf(
            path, split=reading.split, columns=dict(reading.columns), sizes=reading.sizes
        ),
        write=lambda sample, number, writing: visrl_row(sample),
        options=("columns", "split"),
        called=("parquet", "arrow"),
        writer=ParquetWriter,
        holds_pictures=True,
    ),
    DataFormat(
        name="viscot-sft1",
        about="written only: warm-up, round 1 (where to look), as ShareGPT",
        write=lambda sample, number, writing: sft1_row(sample, writing.box_space, writing.text_size(sample)),
        in_dataset_info=True,
    ),
    DataFormat(
        name="viscot-sft2",
        about="written only: warm-up, round 2 (the answer from the crop), as ShareGPT",
        write=lambda sample, number, writing: sft2_row(sample, writing.text_size(sample)),
        in_dataset_info=True,
    ),
    DataFormat(
        name="rl-pool",
        about="written only: the pool of questions that preferences are made from, without boxes",
        write=lambda sample, number, writing: pool_row(sample),
        needs_boxes=False,
    ),
)
FORMATS = {each.name: each for each in _TABLE}
SOURCES = tuple(name for name, each in FORMATS.items() if each.can_be_read)
TARGETS = tuple(name for name, each in FORMATS.items() if each.write is not None)


def find_format(name: str, use: Literal["read", "write"] = "read") -> DataFormat:
    """The format of that name, or the user's own that `module:NAME` names.

    Raises:
        RecordError: there is none that can be read, or written.
        ConfigError: no such module, or nothing of that name in it.
    """
    found = load_plugin(name, "data format") if is_plugin(name) else FORMATS.get(name)
    if found is not None and not isinstance(found, DataFormat):
        raise RecordError(f"{name} is no data format: it must be a DataFormat of visrl.data.formats")
    if use == "write":
        if found is None or found.write is None:
            raise RecordError(f"no format {name!r} to write; there are {', '.join(TARGETS)}")
        return found
    if found is None or not found.can_be_read:
        ours = next((each.name for each in FORMATS.values() if name in each.called), None)
        near = f"; rows of {name} are read with --from {ours}" if ours else ""
        raise RecordError(f"no format {name!r}; the formats are {', '.join(SOURCES)}{near}")
    return found


def read_format(name: str, path: str, reading: Reading) -> Iterator[DataRow]:
    """The rows of a file in the format `name`.

    Raises:
        RecordError: the file is not there or damaged, or there is no such format.
    """
    return find_format(name).rows(path, reading)


def other_format(raw: Any, source: str, reading: Reading) -> str | None:
    """The format under which a row that cannot be read as `source` is understood: tried, not guessed by its keys."""
    for name, each in FORMATS.items():
        if each.parse is None or name == source:
            continue
        if parsed_row(raw, 1, each.parser(reading)).fault in ("", *_UNDERSTOOD):
            return name
    return None


def is_own_row(each: DataFormat, raw: Any) -> bool:
    """Whether a sample's raw row is of this format, so that it goes back as it stood."""
    return each.is_own is not None and isinstance(raw, dict) and each.is_own(raw)


def row_of(target: DataFormat, unit: Sequence[Sample | Preference], number: int, writing: Writing) -> Any:
    """The row of the target format for a sample, or for the preferences of one item.

    Raises:
        RowFault: the format has none for it.
    """
    first = unit[0]
    if isinstance(first, Sample):
        assert target.write is not None
        if is_own_row(target, first.raw):
            return first.raw
        if first.looks not in (None, (first.box,)) and not target.keeps_looks:
            room = (
                f"{target.name} has room for one box, and {first.id} says where to look {len(first.looks or ())} times"
            )
            raise RowFault("several_looks", f"{room}; write it as visrl")
        return target.write(first, number, writing)
    if target.write_preferences is None:
        able = " and ".join(name for name, each in FORMATS.items() if each.write_preferences is not None)
        raise RowFault("preference", f"{first.id} is a preference; they go to {able} only")
    return target.write_preferences([each for each in unit if isinstance(each, Preference)])
