"""Data sets by their name in `dataset_info.json`, whole and ready for training. Knows no model."""

from __future__ import annotations

import os
import shlex
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from visrl.data.hf import read_hf
from visrl.data.info import INFO, find_entry, read_info
from visrl.data.rows import DataRow, format_notes
from visrl.data.sharegpt import read_sharegpt
from visrl.data.sizes import Sizes
from visrl.images import names_file, picture_path
from visrl.records import Preference, RecordError, Sample, VisrlWarning


def is_named(name: str, folder: str | os.PathLike[str]) -> bool:
    """Whether every part of `name` (several are given with commas) is named in the folder's `dataset_info.json`.

    Raises:
        RecordError: the `dataset_info.json` cannot be read, and `name` is no file.
    """
    if not (Path(folder) / INFO).is_file():
        return False
    try:
        known = read_info(folder)
    except RecordError:
        if Path(name).exists():
            return False
        raise
    return all(part.strip() in known for part in name.split(","))


def check_names(name: str, folder: str | os.PathLike[str]) -> None:
    """Refuse a list of data sets that knows some of its names and not others.

    Raises:
        RecordError: with the first name that there is not, and those there are.
    """
    known = read_info(folder) if (Path(folder) / INFO).is_file() else {}
    parts = [part.strip() for part in name.split(",")]
    if any(part in known for part in parts):
        for part in parts:
            find_entry(folder, part)


def named_samples(
    name: str, folder: str | os.PathLike[str], images: str | os.PathLike[str] | None = None
) -> list[Sample]:
    """The samples of SFT data sets. Round 1 and round 2 of one question become one sample with box and answer.

    Raises:
        RecordError: no such data set, or none of its rows can be read.
    Warns:
        VisrlWarning: some rows cannot be read; how many, and the first reason.
    """
    answered: list[Sample] = []
    boxes: dict[tuple[str, str], list[Sample]] = {}  # round 1: where to look, and no answer
    for record in _records(name, folder, images):
        if not isinstance(record, Sample):
            raise RecordError(f"{name} holds preferences; warm-up needs questions with boxes and answers")
        if record.answer:
            answered.append(record)
        else:
            boxes.setdefault((record.image, record.question), []).append(record)
    samples = []
    for record in answered:
        of_round_1 = boxes.get((record.image, record.question))
        samples.append(replace(record, box=record.box or of_round_1.pop(0).box) if of_round_1 else record)
        if of_round_1 and record.box:
            of_round_1.pop(0)
    return samples + [record for alike in boxes.values() for record in alike]


def named_preferences(
    name: str, folder: str | os.PathLike[str], images: str | os.PathLike[str] | None = None
) -> list[Preference]:
    """The preferences of `ranking: true` data sets, in the order of their rows.

    Raises, warns: as `named_samples`.
    """
    preferences = []
    for record in _records(name, folder, images):
        if not isinstance(record, Preference):
            raise RecordError(f'{name} holds no preferences: its entry needs "ranking": true')
        preferences.append(record)
    return preferences


def hf_samples(path: str | os.PathLike[str], images: str | os.PathLike[str] | None = None) -> list[Sample]:
    """The samples of a parquet file, or of a folder that `datasets` saved.

    Raises, warns: as `named_samples`.
    """
    folder = Path(path).parent
    rows = read_hf(path, sizes=Sizes(images=images or folder))
    records = _placed(_taken(rows, path, f"--from hf {shlex.quote(str(path))}"), folder, images)
    return [record for record in records if isinstance(record, Sample)]


def _records(
    name: str, folder: str | os.PathLike[str], images: str | os.PathLike[str] | None
) -> Iterator[Sample | Preference]:
    entries = [find_entry(folder, part.strip()) for part in name.split(",")]
    found = False
    for entry in entries:
        rows = read_sharegpt(entry, Sizes(images=images or folder))
        options = f"--from sharegpt --dataset {shlex.quote(entry.name)} {shlex.quote(str(entry.path.parent))}"
        beside = entry.name if len(entries) > 1 else ""
        for record in _placed(_taken(rows, entry.path, options, beside), folder, images):
            found = True
            yield record
    if not found:
        raise RecordError(f"{name}: no question about a picture is in it")


def _placed(
    records: Iterable[Sample | Preference], folder: str | os.PathLike[str], images: str | os.PathLike[str] | None
) -> Iterator[Sample | Preference]:
    """The records with their pictures looked for beside the data where no folder of pictures is given, and none lies at
    the path as it stands: other tools name pictures from the folder of the data set."""
    if images is not None:
        yield from records
        return

    @lru_cache(maxsize=10_000)
    def found(ref: str) -> str:
        beside = picture_path(ref, Path(folder)) if names_file(ref) and picture_path(ref) is None else None
        return ref if beside is None else str(beside)

    for record in records:
        if isinstance(record, Sample):
            yield replace(record, image=found(record.image))
        else:
            yield replace(record, images=tuple(replace(each, ref=found(each.ref)) for each in record.images))


def _taken(
    rows: Iterable[DataRow], path: str | os.PathLike[str], options: str, beside: str = ""
) -> Iterator[Sample | Preference]:
    """The records of good rows; what of the others and of columns is left out is said at the end, in warnings.

    `beside` is the name of a set that is used together with others: where it holds no picture at all it is left out.

    Raises:
        RecordError: no row can be read.
    """
    good, bad, first = 0, Counter[str](), DataRow(0, None)
    notes = Counter[str]()
    for row in rows:
        good += not row.fault
        notes.update(row.notes)
        if row.fault:
            first = first if bad else row
            bad[row.fault] += 1
        yield from row.records
    for line in format_notes(notes):
        warnings.warn(f"{path}: {line}", VisrlWarning, stacklevel=4)
    if beside and not good and set(bad) == {"no_picture"}:
        left_out = f"{beside} is left out: none of its {bad.total():,} rows has a picture"
        warnings.warn(left_out, VisrlWarning, stacklevel=4)
    elif bad:
        share = f"{bad.total():,} of {good + bad.total():,} rows cannot be read"
        what = f"{path}: {share}; row {first.number}: {first.reason}"
        if not good:
            raise RecordError(what)
        warnings.warn(f"{what} (`visrl data check {options}` counts them all)", VisrlWarning, stacklevel=4)
