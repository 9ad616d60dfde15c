"""Any format to any other: what `visrl data convert` does.

A file is read row by row. A bad row is listed beside the output with its reason, never dropped in silence; where source
and target are the same format every row, good or bad, is written back as it stood.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from visrl.codecs import BoxSpace
from visrl.data.embedded import EmbeddedImages
from visrl.data.formats import DataFormat, Reading, Writing, find_format, row_of
from visrl.data.hf import ParquetWriter, is_hf
from visrl.data.info import INFO, DatasetEntry, find_entry, read_values
from visrl.data.rows import DataRow, RowFault, Writer
from visrl.data.sharegpt_write import add_entry, copied_entry, entry_json
from visrl.manifest import hold
from visrl.records import Preference, RecordError, Sample, belongs_to

_AS_IT_STOOD = Sample("", "", "", "")  # stands for a bad row that is written back


@dataclass(frozen=True, slots=True)
class Selection:
    """Which rows of each data set: `skip` the first N, then `take` the next N; by name, or under "" for all others."""

    skip: Mapping[str, int] = field(default_factory=dict)
    take: Mapping[str, int] = field(default_factory=dict)

    def takes(self, dataset: str, place: int) -> bool:
        """Whether the row at `place` (from 0, in its data set) is wanted."""
        first = self.skip.get(dataset, self.skip.get("", 0))
        count = self.take.get(dataset, self.take.get(""))
        return place >= first and (count is None or place < first + count)


@dataclass(slots=True)
class Summary:
    """What became of the rows."""

    rows: int = 0
    written: dict[str, int] = field(default_factory=dict)
    left_out: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)  # what good rows hold and records have no place for
    pictures: int = 0  # written as files
    picture_folder: Path | None = None


def convert(
    source: str,
    target: str,
    inputs: Iterable[str],
    out: str,
    *,
    reading: Reading | None = None,
    selection: Selection | None = None,
    box_space: BoxSpace = "image",
    validation: float = 0.0,
    seed: int = 88,
    progress: Callable[[int], None] = lambda rows: None,
) -> Summary:
    """Write the rows of `inputs` to `out` in another format; bad rows go to `<out>.bad.jsonl`.

    `validation` is the share of images whose rows go to `<out stem>.val<suffix>`: chosen by a hash of `seed` and
    image, so that it is the same at every run and no image is on both sides.

    Raises:
        RecordError: an input is not there or damaged (nothing is written then), no such format, or the output is
            an input.
        HeldError: another process writes the output.
    """
    read, wanted = find_format(source), find_format(target, "write")
    reading = reading or Reading()
    if not wanted.needs_boxes:
        reading = replace(reading, boxes=False)
    writing = Writing(reading.sizes, box_space)
    inputs = list(inputs)
    _refuse_overwriting(Path(out), inputs)
    same = read is wanted and wanted.writer is Writer  # parquet has typed columns, which a bad row may not fit
    like = find_entry(inputs[0], reading.dataset) if same and wanted.in_dataset_info else None
    pictures = read.holds_pictures or any(map(is_hf, inputs))
    if wanted.in_dataset_info and (info := Path(out).parent / INFO).is_file():
        read_values(info)  # which gets the output's entry: that it cannot is said before anything is written
    files = _Files(Path(out), wanted, validation, seed, pictures)
    summary = Summary()
    with files:
        rows = _selected(read, inputs, reading, selection or Selection(), summary, progress)
        for path, row, unit in _units(rows, as_it_stood=same, grouped=wanted.joins_steps):
            if not unit:
                # A row that is written back as it stood needs no size.
                if not (same and row.fault == "no_size"):
                    files.list_bad(path, row, row.fault, row.reason, summary)
                continue
            try:
                files.write(row.raw if same else row_of(wanted, unit, row.number, writing), _image(row))
            except RowFault as error:
                files.list_bad(path, row, error.fault, str(error), summary)
    files.describe(box_space, like)
    summary.written = files.counts()
    if files.pictures is not None and files.pictures.count:
        summary.pictures, summary.picture_folder = files.pictures.count, files.pictures.folder
    return summary


def _refuse_overwriting(out: Path, inputs: Iterable[str]) -> None:
    for path in inputs:
        if out.exists() and Path(path).exists() and out.samefile(path):
            raise RecordError(f"{out} is an input: give the output another name")


def _selected(
    source: DataFormat, inputs: Iterable[str], reading: Reading, selection: Selection, summary: Summary,
    progress: Callable[[int], None],
) -> Iterator[tuple[str, DataRow]]:  # fmt: skip
    """The wanted rows of all files, counted."""
    places = Counter[str]()
    for path in inputs:
        for row in source.rows(path, reading):
            summary.rows += 1
            progress(summary.rows)
            dataset = dataset_of(row)
            places[dataset] += 1
            if selection.takes(dataset, places[dataset] - 1):
                summary.notes.update(row.notes)
                yield path, row
            else:
                summary.left_out += 1


def _units(
    rows: Iterable[tuple[str, DataRow]], as_it_stood: bool, grouped: bool
) -> Iterator[tuple[str, DataRow, tuple[Sample | Preference, ...]]]:
    """What becomes one row of the output each, with the row it came from; nothing for a bad row.

    Preferences of one item that follow each other are one unit where they are `grouped`, each its own otherwise.
    """
    group: tuple[Preference, ...] = ()
    last: tuple[str, DataRow] | None = None
    for path, row in rows:
        if as_it_stood or row.fault:
            if row.fault:
                yield path, row, ()
            if as_it_stood:
                yield path, row, row.records or (_AS_IT_STOOD,)
            continue
        for record in row.records:
            if not (grouped and isinstance(record, Preference)):
                yield path, row, (record,)
                continue
            alike = any(one.step == record.step for one in group)  # after other looks, which is another row
            if last and group and (alike or not belongs_to(group, record)):
                yield *last, group
                group = ()
            group, last = (*group, record), (path, row)
    if last and group:
        yield *last, group


def dataset_of(row: DataRow) -> str:
    """The data set a row belongs to, as far as a bad row says it."""
    if row.records and isinstance(row.records[0], Sample):
        return row.records[0].source
    value = row.raw.get("dataset", "") if isinstance(row.raw, dict) else ""
    return value if isinstance(value, str) else ""


def _image(row: DataRow) -> str:
    record = row.records[0] if row.records else None
    if isinstance(record, Sample):
        return record.image
    return record.images[0].ref if record else f"row-{row.number}"


class _Files:
    """The output, its validation part, and the list of bad rows."""

    def __init__(self, out: Path, target: DataFormat, validation: float, seed: int, pictures: bool) -> None:
        self.out, self.target, self.validation, self.seed = out, target, validation, seed
        self.bad_path = Path(f"{out}.bad.jsonl")
        self.outs = [out, out.with_name(f"{out.stem}.val{out.suffix}")] if validation else [out]
        self.reply_columns: set[str] = set()
        self.bad: Writer | None = None
        # Images in the rows of a parquet file become files; those in the data URLs of other rows stay as they stood.
        self.pictures = EmbeddedImages(out) if pictures else None

    def __enter__(self) -> _Files:
        self.writers: list[Writer | ParquetWriter] = []
        with ExitStack() as stack:
            for path in self.outs:
                stack.enter_context(hold(path))
                writer = self.target.writer(path)
                self.writers.append(writer)
                stack.push(writer)
            if self.pictures is not None:
                stack.enter_context(self.pictures)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if self.bad is None and kind is None:
            self.bad_path.unlink(missing_ok=True)  # of an earlier run
        self.stack.__exit__(kind, *rest)

    def write(self, raw: Any, image: str) -> None:
        if self.target.in_dataset_info and isinstance(raw, dict):
            self.reply_columns |= {"chosen", "rejected", "chosen_step", "rejected_step", "weight"} & set(raw)
        second = self.validation > 0 and share_of(self.seed, image) < self.validation
        self.writers[second].write(self._placed(raw))

    def _placed(self, raw: Any) -> Any:
        return raw if self.pictures is None else self.pictures.placed(raw)

    def list_bad(self, path: str, row: DataRow, fault: str, reason: str, summary: Summary) -> None:
        if self.bad is None:
            self.bad = self.stack.enter_context(Writer(self.bad_path))
        summary.bad[fault] += 1
        self.bad.write(
            {"file": path, "row": row.number, "fault": fault, "reason": reason, "raw": self._placed(row.raw)}
        )

    def describe(self, box_space: BoxSpace, like: DatasetEntry | None) -> None:
        """Name the files in `dataset_info.json`; a copy is described as its original is, or as little."""
        if not self.target.in_dataset_info or (like and not like.formatting):
            return
        for path in self.outs:
            described = entry_json(path.name, ranking=sorted(self.reply_columns), box_space=box_space)
            add_entry(path, copied_entry(like, path.name) if like else described)

    def counts(self) -> dict[str, int]:
        return {str(path): writer.count for path, writer in zip(self.outs, self.writers, strict=True)}


def share_of(seed: int, image: str) -> float:
    """A number in [0, 1) for an image, the same at every run with this seed."""
    digest = hashlib.blake2b(json.dumps([seed, image]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
