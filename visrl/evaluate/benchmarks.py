"""The questions of a benchmark: every one of them, a bad ground truth included. Reads metadata, opens no picture.

What is missing, data sets or pictures, is told at once and in full, before any model is loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from visrl.box import BoxError
from visrl.data.check import ALL_PICTURES, ORIGINS
from visrl.data.rows import RowFault, four_numbers, get_size, get_text, read_rows
from visrl.data.sizes import Sizes
from visrl.data.sources import read_samples
from visrl.data.viscot import parse_viscot
from visrl.evaluate.published import REFCOCO_SPLITS, VISCOT_QUESTIONS
from visrl.images import image_path, names_file
from visrl.prompts import IMAGE, judged_question
from visrl.records import RecordError, Sample
from visrl.rewards.detection import truth_box

Benchmark = Literal["samples", "viscot", "viscot-detection", "refcoco"]
Corners = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class BenchmarkQuestion:
    """A question, and where boxes are what is scored, its ground truth in pixels as published, be it a box or not.

    Within a data set `sample.id` is what names a question in prediction files too: its number (answers), or its line.
    """

    sample: Sample
    truth: Corners | None = None


def read_benchmark(
    benchmark: Benchmark,
    data: str,
    *,
    dataset_dir: str = "data",
    datasets: Sequence[str] | None = None,
    boxes: str | None = None,
    image_root: str | None = None,
    limit: int | None = None,
) -> list[BenchmarkQuestion]:
    """The questions, data set after data set, at most `limit` of each.

    `data` is the folder of the benchmark's files, or for "samples" what `data.sources.read_samples` takes, which looks
    for named data sets in `dataset_dir`. `datasets` are those wanted (all that were published, if left out). `boxes`
    is the folder of Visual-CoT's detection files, which hold sizes and untruncated boxes; without it the sizes are
    read from the pictures.

    Raises:
        RecordError: data sets that are not there, all named; a row that is no question.
    """
    if benchmark == "samples":
        samples = read_samples(data, with_box=True, dataset_dir=dataset_dir, image_root=image_root)
        return [BenchmarkQuestion(sample) for sample in samples[:limit]]
    suffix = ".json" if benchmark == "viscot" else ".jsonl"
    published = REFCOCO_SPLITS if benchmark == "refcoco" else tuple(VISCOT_QUESTIONS)
    names = tuple(datasets or published)
    files = _files(data, names, suffix)
    box_files = _files(boxes, names, ".jsonl") if benchmark == "viscot" and boxes else {}
    questions = []
    for name, path in files.items():
        sizes = Sizes([str(box_files[name])] if name in box_files else None, image_root)
        own = _viscot(path, name, sizes) if benchmark == "viscot" else _boxed(path, name)
        questions += [question for _, question in zip(range(limit), own, strict=False)] if limit else list(own)
    _check_names(questions)
    return questions


def incomplete(benchmark: Benchmark, questions: Sequence[BenchmarkQuestion]) -> dict[str, tuple[int, int]]:
    """Of the data sets of the Visual-CoT benchmark that are not asked in full: how many there are, of how many."""
    if benchmark in ("samples", "refcoco"):
        return {}
    counts = Counter(question.sample.source for question in questions)
    return {name: (count, VISCOT_QUESTIONS[name]) for name, count in counts.items()
            if count != VISCOT_QUESTIONS.get(name, count)}  # fmt: skip


def missing_pictures(questions: Iterable[BenchmarkQuestion], image_root: str | None) -> dict[str, list[str]]:
    """The pictures that are not under `image_root`, each once, by data set."""
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


def _files(folder: str, names: Sequence[str], suffix: str) -> dict[str, Path]:
    files = {name: Path(folder, name + suffix) for name in names}
    missing = [path.name for path in files.values() if not path.is_file()]
    if missing:
        there = sorted(path.stem for path in Path(folder).glob(f"*{suffix}"))
        remedy = f"; to evaluate what is there: datasets=[{', '.join(there)}]" if there else ""
        raise RecordError(f"{folder} lacks {len(missing)} data sets: {', '.join(missing)}{remedy}")
    return files


def _viscot(path: Path, name: str, sizes: Sizes) -> Iterator[BenchmarkQuestion]:
    """Rows of benchmark JSON. A row whose box is bad is asked all the same, and holds no true box."""

    def parse(raw: Any, number: int) -> tuple[Sample]:
        try:
            (sample,) = parse_viscot(raw, number, sizes)
        except (RowFault, BoxError):
            (sample,) = parse_viscot(raw, number, sizes, boxes=False)
        question = judged_question(raw["conversations"][0]["value"]).removeprefix(f"{IMAGE}\n")
        own = raw.get("question_id")
        return (replace(sample, id=str(number if own is None else own), source=name, question=question, raw=None),)

    return _questions(path, parse)


def _boxed(path: Path, name: str) -> Iterator[BenchmarkQuestion]:
    """Rows of detection or RefCOCO JSONL: an expression and four pixels, be they a box or not."""

    def parse(raw: Any, number: int) -> tuple[Sample]:
        ref, expression, size = get_text(raw, "img_path"), get_text(raw, "expression"), get_size(raw)
        truth = four_numbers(raw.get("bbox"), "bbox")
        return (Sample(str(number), ref, expression, "", truth_box(truth, size), name, truth, size),)

    return (BenchmarkQuestion(replace(one.sample, raw=None), one.sample.raw) for one in _questions(path, parse))


def _questions(path: Path, parse: Any) -> Iterator[BenchmarkQuestion]:
    for row in read_rows(path, parse):
        if row.fault:
            raise RecordError(f"{path}, row {row.number}: {row.reason}; a benchmark must be whole: mend or replace it")
        (sample,) = row.records
        assert isinstance(sample, Sample)
        yield BenchmarkQuestion(sample)


def _check_names(questions: Iterable[BenchmarkQuestion]) -> None:
    counts = Counter((question.sample.source, question.sample.id) for question in questions)
    twice = next((name for name, count in counts.items() if count > 1), None)
    if twice is not None:
        raise RecordError(f"question {twice[1]} of {twice[0]} is there twice; one file must hold each once")
