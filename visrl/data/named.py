"""Data sets by their name in `dataset_info.json`, whole and ready for training. Knows no model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import replace

from visrl.data.rows import Row
from visrl.data.sharegpt import find_entry, read_info, read_sharegpt
from visrl.data.sizes import Sizes
from visrl.records import Preference, RecordError, Sample, VisrlWarning


def is_named(name: str, folder: str | os.PathLike[str]) -> bool:
    """Whether every part of `name` (several are given with commas) is named in the folder's `dataset_info.json`."""
    try:
        known = read_info(folder)
    except RecordError:
        return False
    return all(part.strip() in known for part in name.split(","))


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
) -> Iterable[Sample | Preference]:
    for part in name.split(","):
        entry = find_entry(folder, part.strip())
        good, bad, first = 0, 0, Row(0, None)
        for row in read_sharegpt(entry, Sizes(images=images)):
            good += not row.fault
            if row.fault:
                first = first if bad else row
                bad += 1
            yield from row.records
        if bad:
            what = f"{entry.path}: {bad:,} of {good + bad:,} rows cannot be read; row {first.number}: {first.reason}"
            if not good:
                raise RecordError(what)
            warnings.warn(f"{what} (`visrl data check --from sharegpt` lists them all)", VisrlWarning, stacklevel=2)
