"""Data sets by their name in `dataset_info.json`, whole and ready for training. Knows no model."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from visrl.data.info import INFO, Entry, find_entry, read_info
from visrl.data.rows import Row, told_notes
from visrl.data.sharegpt import read_sharegpt
from visrl.data.sizes import Sizes
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
    boxes: dict[tuple[str, str], Sample] = {}  # round 1: where to look, and no answer
    for record in _records(name, folder, images):
        if not isinstance(record, Sample):
            raise RecordError(f"{name} holds preferences; warm-up needs questions with boxes and answers")
        if record.answer:
            answered.append(record)
        else:
            boxes.setdefault((record.image, record.question), record)
    samples = []
    for record in answered:
        of_round_1 = boxes.pop((record.image, record.question), None)
        samples.append(replace(record, box=record.box or of_round_1.box) if of_round_1 else record)
    return samples + list(boxes.values())


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


def _records(
    name: str, folder: str | os.PathLike[str], images: str | os.PathLike[str] | None
) -> Iterator[Sample | Preference]:
    parts = [part.strip() for part in name.split(",")]
    found = 0
    for entry in [find_entry(folder, part) for part in parts]:
        good, bad = 0, Counter[str]()
        first = Row(0, None)
        notes = Counter[str]()
        for row in read_sharegpt(entry, Sizes(images=images)):
            good += not row.fault
            notes.update(row.notes)
            if row.fault:
                first = first if bad else row
                bad[row.fault] += 1
            yield from row.records
        found += good
        _tell(entry, good, bad, first, notes, alone=len(parts) == 1)
    if not found:
        raise RecordError(f"{name}: none of these data sets holds a question about a picture")


def _tell(entry: Entry, good: int, bad: Counter[str], first: Row, notes: Counter[str], alone: bool) -> None:
    """Say what of a data set is left out, and why.

    Raises:
        RecordError: nothing of it can be read; but a set of texts alone, beside others, is left out with a warning.
    """
    for line in told_notes(notes):
        warnings.warn(f"{entry.path}: {line}", VisrlWarning, stacklevel=4)
    if not bad:
        return
    if not good and not alone and set(bad) == {"no_picture"}:
        what = f"{entry.name} is left out: none of its {bad.total():,} rows has a picture"
        warnings.warn(what, VisrlWarning, stacklevel=4)
        return
    share = f"{bad.total():,} of {good + bad.total():,} rows cannot be read"
    what = f"{entry.path}: {share}; row {first.number}: {first.reason}"
    if not good:
        raise RecordError(what)
    lists = f"`visrl data check --from sharegpt --dataset {entry.name} {entry.path.parent}` lists them all"
    warnings.warn(f"{what} ({lists})", VisrlWarning, stacklevel=4)
