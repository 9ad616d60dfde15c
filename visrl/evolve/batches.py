"""Batches with fixed members, the unit in which a generation is stopped, resumed, split into shards and tried again.

What too much of failed is set aside, and the next run takes over its sound batches.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

from visrl.data.native import read_records
from visrl.evolve.config import parse_shard
from visrl.records import Place, RecordError, Sample, Trajectory, Verdict

Kind = TypeVar("Kind", Trajectory, Verdict)
PREFIX = "failed-"  # of the files of a run that is to be tried again


def shard_of(parts: list[Sequence[Sample]], shard: str) -> list[Sequence[Sample]]:
    """The i-th of n runs of whole batches, as even as can be; one after another they are all of them."""
    number, of = parse_shard(shard)
    return parts[(number - 1) * len(parts) // of : number * len(parts) // of]


def keep_whole_batches(path: Path, sizes: Sequence[int]) -> int:
    """How many whole batches of records, of these sizes, `path` holds; what a kill left of an unfinished one is cut
    off.

    Raises:
        RecordError: more records than the batches have.
    """
    if not path.is_file():
        return 0
    with open(path, "rb+") as lines:
        whole = end = 0
        for size in sizes:
            ends = list(_line_ends(lines, size))
            if len(ends) < size:
                break
            whole, end = whole + 1, ends[-1]
        if whole == len(sizes) and lines.read(1):
            raise RecordError(f"{path} holds more than {sum(sizes)} records; remove it or give another output folder")
        lines.truncate(end)
    return whole


def _line_ends(lines: BinaryIO, count: int) -> Iterator[int]:
    """Where the next `count` whole lines of a file end."""
    for _ in range(count):
        if not lines.readline().endswith(b"\n"):
            return
        yield lines.tell()


class SetAside(Generic[Kind]):
    """The records of the earlier run in `file`, batch by batch; empty batches where there was none."""

    def __init__(self, kind: type[Kind], file: Path, is_failed: Callable[[Kind], bool]) -> None:
        path = file.with_name(PREFIX + file.name)
        self._records: Iterator[Kind] = read_records(kind, path) if path.is_file() else iter(())
        self._ahead: Kind | None = next(self._records, None)  # the first that has not been given
        self._is_failed: Callable[[Kind], bool] = is_failed

    def batch(self, part: Sequence[Sample]) -> list[Kind]:
        """The records of the next batch, which asks these questions, where there are any and all of them are sound,
        else none. Called once for every batch of the run."""
        records: list[Kind] = []
        for place in (sample.place for sample in part):
            of_question = list(self._of_question(place))
            if not of_question:
                return []
            records += of_question
        return [] if any(map(self._is_failed, records)) else records

    def _of_question(self, place: Place) -> Iterator[Kind]:
        """The next records, as long as they are of this question."""
        while self._ahead is not None and self._ahead.place == place:
            yield self._ahead
            self._ahead = next(self._records, None)


def set_aside(*files: Path) -> None:
    """Keep what a failed run wrote, for the next one to go on from."""
    for file in files:
        if file.is_file():
            os.replace(file, file.with_name(PREFIX + file.name))


def clear_aside(*files: Path) -> None:
    """Remove what was set aside, once the run is complete."""
    for file in files:
        file.with_name(PREFIX + file.name).unlink(missing_ok=True)
