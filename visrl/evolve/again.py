"""Generations of which too much failed: what they made is set aside, and the next run takes over its sound batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

from visrl.records import Trajectory, Verdict, read_records

Kind = TypeVar("Kind", Trajectory, Verdict)
PREFIX = "failed-"  # of the files of a run that is to be tried again


class SetAside(Generic[Kind]):
    """The records of the earlier run in `file`, batch by batch; empty batches where there was none."""

    def __init__(self, kind: type[Kind], file: Path, is_failed: Callable[[Kind], bool]) -> None:
        path = file.with_name(PREFIX + file.name)
        self._records: Iterator[Kind] = read_records(kind, path) if path.is_file() else iter(())
        self._is_failed: Callable[[Kind], bool] = is_failed

    def batch(self, size: int) -> list[Kind]:
        """The next `size` records where all of them are sound, else none. Called once for every batch of the run."""
        records = list(islice(self._records, size))
        sound = len(records) == size and not any(map(self._is_failed, records))
        return records if sound else []


def set_aside(*files: Path) -> None:
    """Keep what a failed run wrote, for the next one to go on from."""
    for file in files:
        if file.is_file():
            os.replace(file, file.with_name(PREFIX + file.name))


def clear_aside(*files: Path) -> None:
    """Remove what was set aside, once the run is complete."""
    for file in files:
        file.with_name(PREFIX + file.name).unlink(missing_ok=True)
