"""The questions of a benchmark, and what reads them: every one, a bad ground truth included. Opens no image.

What is missing, data sets or images, is said at once and in full, before any model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visrl.box import Box, Corners
from visrl.data.check import ALL_PICTURES, ORIGINS
from visrl.data.rows import RowFault, read_rows
from visrl.evaluate.choices import ChoiceQuestion
from visrl.evaluate.published import VISCOT_QUESTIONS
from visrl.images import ImageError, image_path, image_size, names_file
from visrl.records import RecordError, Sample
from visrl.rewards.detection import truth_box


@dataclass(frozen=True, slots=True)
class BenchmarkQuestion:
    """A question, and where boxes are what is scored, its ground truth in pixels as published, be it a box or not.

    Within a data set `sample.id` is what names a question in prediction files too: its number (answers), or its line.
    `choice` holds the options of a question of choice as they are shown; `text` is its wording as it is distributed,
    where that is whole. `truths` are its true boxes in pixels as published, where there are several, `references` its
    answers, `category` its part of a data set. Questions of one `group` are one, with the options in several orders;
    `rotation` and `attempt` tell apart what is asked more than once.
    """

    sample: Sample
    truth: Corners | None = None
    choice: ChoiceQuestion | None = None
    text: str | None = None
    truths: tuple[Corners, ...] = ()
    references: tuple[str, ...] = ()
    category: str = ""
    group: str = ""
    rotation: int = 0
    attempt: int = 0

    @property
    def is_first(self) -> bool:
        """Whether it is the first of what is asked about its question."""
        return not self.rotation and not self.attempt


@dataclass(frozen=True, slots=True)
class BenchmarkFiles:
    """Where a benchmark is read from: the keys `dataset`, `dataset_dir`, `box_dir` and `image_root` of the config.

    `names` are the data sets that are wanted: those of `datasets`, or all that were published. `origin` says where the
    files come from.
    """

    dataset: str
    names: tuple[str, ...] = ()
    dataset_dir: str = "data"
    box_dir: str | None = None
    image_root: str | None = None
    origin: str = ""

    def find(self, *names: str) -> Path:
        """The file that `dataset` names, or the first of these names in the folder that it names.

        Raises:
            RecordError: there is none; where it comes from is said.
        """
        path = Path(self.dataset)
        if path.is_file():
            return path
        found = next((path / name for name in names if (path / name).is_file()), None)
        if found is None:
            whence = f"; it comes from {self.origin}" if self.origin else ""
            raise RecordError(f"{path} holds no {' and no '.join(names)}{whence}")
        return found

    def shards(self, split: str) -> list[Path]:
        """The file that `dataset` names, or the parquet files of a split in its folder or one level below.

        Raises:
            RecordError: there are none; where they come from is said.
        """
        path = Path(self.dataset)
        if path.is_file():
            return [path]
        found = sorted({*path.glob(f"*{split}*.parquet"), *path.glob(f"*/*{split}*.parquet")})
        if not found:
            raise RecordError(f"{path} holds no *{split}*.parquet; it comes from {self.origin}")
        return found

    def picture(self, folder: Path, name: str) -> str:
        """The reference of a picture that the file names from `folder`: under `image_root` where that is given.

        Raises:
            RowFault: the name is no path but another kind of reference.
        """
        if not names_file(name):
            raise RowFault("no_picture", f"{name[:60]!r} is no name of a picture's file")
        return name if self.image_root is not None else str(folder / name)


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


def boxes_in(truths: Sequence[Corners], ref: str, root: str | None) -> list[Box]:
    """Several true boxes in pixels as boxes of the picture; none where one is no box in it, or the picture, whose size
    is looked for, cannot be read (that it is missing is said for all at once)."""
    if not truths:
        return []
    try:
        size = image_size(ref, root)
    except ImageError:
        return []
    boxes = [truth_box(corners, size) for corners in truths]
    return [box for box in boxes if box is not None] if all(boxes) else []


def check_each_once(questions: Iterable[BenchmarkQuestion], where: str) -> None:
    """Refuse a question that is there twice: its answers could not be told apart. `where` is what they come from.

    Raises:
        RecordError: one is.
    """
    seen: dict[tuple[str, str, int], int] = {}
    for number, one in enumerate(questions, start=1):
        sample = one.sample
        first = seen.setdefault((sample.source, sample.id, sample.repeat), number)
        if first != number:
            raise RecordError(
                f"{where}: question {sample.id} of {sample.source or 'the file'} is there twice, as numbers {first:,} "
                f"and {number:,} of those read; give each an id of its own, or take one out"
            )


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


def format_missing(missing: dict[str, list[str]], image_root: str | None, origin: str = "") -> str:
    """What is missing, where it belongs and where it comes from, in lines; `origin` is that of the whole benchmark."""
    lines = [f"{sum(map(len, missing.values())):,} pictures are missing under {image_root or '.'}:"]
    for name, refs in missing.items():
        whence = origin or ORIGINS.get("refcoco" if name.startswith("REC_") else name, "the place its data came from")
        lines.append(f"  {name or 'pictures'}: {len(refs):,}, {refs[0]} the first; they come from {whence}")
    if any(name in VISCOT_QUESTIONS for name in missing):
        lines.append(f"  all of Visual-CoT's pictures in one place: {ALL_PICTURES}")
    return "\n".join(lines)
