"""The questions of a benchmark, and what reads them: every one, a bad ground truth included. Opens no image.

What is missing, data sets or images, is said at once and in full, before any model is loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visrl.box import Corners
from visrl.data.check import ALL_PICTURES, ORIGINS
from visrl.data.rows import read_rows
from visrl.evaluate.published import VISCOT_QUESTIONS
from visrl.images import image_path, names_file
from visrl.records import RecordError, Sample


@dataclass(frozen=True, slots=True)
class BenchmarkQuestion:
    """A question, and where boxes are what is scored, its ground truth in pixels as published, be it a box or not.

    Within a data set `sample.id` is what names a question in prediction files too: its number (answers), or its line.
    """

    sample: Sample
    truth: Corners | None = None


@dataclass(frozen=True, slots=True)
class BenchmarkFiles:
    """Where a benchmark is read from: the keys `dataset`, `dataset_dir`, `box_dir` and `image_root` of the config.

    `names` are the data sets that are wanted: those of `datasets`, or all that were published.
    """

    dataset: str
    names: tuple[str, ...] = ()
    dataset_dir: str = "data"
    box_dir: str | None = None
    image_root: str | None = None


def named_files(folder: str, names: Sequence[str], suffix: str) -> dict[str, Path]:
    """The files of these data sets, `folder/NAME` with `suffix`, by name.

    Raises:
        RecordError: some are not there; all of them are named.
    """
    files = {name: Path(folder, name + suffix) for name in names}
    missing = [path.name for path in files.values() if not path.is_file()]
    if missing:
        there = sorted(path.stem for path in Path(folder).glob(f"*{suffix}"))
        remedy = f"; to evaluate what is there: datasets=[{', '.join(there)}]" if there else ""
        raise RecordError(f"{folder} lacks {len(missing)} data sets: {', '.join(missing)}{remedy}")
    return files


def read_whole(path: Path, parse: Callable[[Any, int], tuple[Sample]]) -> Iterator[Sample]:
    """What `parse` makes of each row of a JSON list or JSONL file, given the row and its number from 1.

    Raises:
        RecordError: a row that is no question. A benchmark is read whole or not at all.
    """
    for row in read_rows(path, parse):
        if row.fault:
            raise RecordError(f"{path}, row {row.number}: {row.reason}; a benchmark must be whole: mend or replace it")
        (sample,) = row.records
        assert isinstance(sample, Sample)
        yield sample


def check_each_once(questions: Iterable[BenchmarkQuestion]) -> None:
    """Refuse a question that is there twice: its answers could not be told apart.

    Raises:
        RecordError: one is.
    """
    counts = Counter((one.sample.source, one.sample.id, one.sample.repeat) for one in questions)
    twice = next((name for name, count in counts.items() if count > 1), None)
    if twice is not None:
        raise RecordError(f"question {twice[1]} of {twice[0]} is there twice; one file must hold each once")


def missing_images(questions: Iterable[BenchmarkQuestion], image_root: str | None) -> dict[str, list[str]]:
    """The images that are not under `image_root`, each once, by data set."""
    missing: dict[str, list[str]] = {}
    seen: set[str] = set()
    for question in questions:
        ref = question.sample.image
        if ref in seen or not names_file(ref):
            continue
        seen.add(ref)
        if image_path(ref, image_root) is None:
            missing.setdefault(question.sample.source, []).append(ref)
    return missing


def format_missing(missing: dict[str, list[str]], image_root: str | None) -> str:
    """What is missing, where it belongs and where it comes from, in lines."""
    lines = [f"{sum(map(len, missing.values())):,} pictures are missing under {image_root or '.'}:"]
    for name, refs in missing.items():
        origin = ORIGINS.get("refcoco" if name.startswith("REC_") else name, "the place its data came from")
        lines.append(f"  {name or 'pictures'}: {len(refs):,}, {refs[0]} the first; they come from {origin}")
    if any(name in VISCOT_QUESTIONS for name in missing):
        lines.append(f"  all of Visual-CoT's pictures in one place: {ALL_PICTURES}")
    return "\n".join(lines)
