"""Visual-CoT's benchmark and RefCOCO: their questions, and what their published scorer makes of a box.

Sources: Visual-CoT (arXiv 2403.16999), and the RefCOCO files that its scripts read. Reads metadata, opens no image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from visrl.box import BoxError
from visrl.codecs import CODECS, Codec
from visrl.data.rows import RowFault, four_numbers, get_size, get_text
from visrl.data.sizes import Sizes
from visrl.data.viscot import parse_viscot
from visrl.evaluate.answers import with_averages
from visrl.evaluate.boxfiles import box_totals, folder_totals
from visrl.evaluate.questions import BenchmarkFiles, BenchmarkQuestion, named_files, read_whole
from visrl.prompts import IMAGE, judged_question
from visrl.records import Sample
from visrl.rewards.detection import published_hit, truth_box
from visrl.rewards.results import Result, Row, by_dataset


def questions_with_answers(files: BenchmarkFiles) -> dict[str, Iterator[BenchmarkQuestion]]:
    """The questions of `NAME.json`. `box_dir` holds the detection files, with sizes and untruncated boxes; without it
    the sizes are read from the images.

    Raises:
        RecordError: data sets that are not there, all named.
    """
    paths = named_files(files.dataset, files.names, ".json")
    boxes = named_files(files.box_dir, files.names, ".jsonl") if files.box_dir else {}
    sizes = {name: Sizes([str(boxes[name])] if name in boxes else None, files.image_root) for name in paths}
    return {name: _answers(path, name, sizes[name]) for name, path in paths.items()}


def _answers(path: Path, name: str, sizes: Sizes) -> Iterator[BenchmarkQuestion]:
    """A row whose box is bad is asked all the same, and holds no true box."""

    def parse(raw: Any, number: int) -> tuple[Sample]:
        try:
            (sample,) = parse_viscot(raw, number, sizes)
        except (RowFault, BoxError):
            (sample,) = parse_viscot(raw, number, sizes, boxes=False)
        question = judged_question(raw["conversations"][0]["value"]).removeprefix(f"{IMAGE}\n")
        own = raw.get("question_id")
        return (replace(sample, id=str(number if own is None else own), source=name, question=question, raw=None),)

    return map(BenchmarkQuestion, read_whole(path, parse))


def questions_with_boxes(files: BenchmarkFiles) -> dict[str, Iterator[BenchmarkQuestion]]:
    """The questions of `NAME.jsonl`, detection or RefCOCO: an expression and four pixels, be they a box or not.

    Raises:
        RecordError: data sets that are not there, all named.
    """
    return {name: _boxes(path, name) for name, path in named_files(files.dataset, files.names, ".jsonl").items()}


def _boxes(path: Path, name: str) -> Iterator[BenchmarkQuestion]:
    def parse(raw: Any, number: int) -> tuple[Sample]:
        ref, expression, size = get_text(raw, "img_path"), get_text(raw, "expression"), get_size(raw)
        truth = four_numbers(raw.get("bbox"), "bbox")
        return (Sample(str(number), ref, expression, "", truth_box(truth, size), name, truth, size),)

    return (BenchmarkQuestion(replace(sample, raw=None), sample.raw) for sample in read_whole(path, parse))


def score_box(question: BenchmarkQuestion, result: Result, codec: Codec) -> dict[str, float | None]:
    """The column `hit_published`: the published rule, on the text of a model that writes boxes as it reads them, and on
    the box put into that form of any other's."""
    size = question.sample.size
    assert question.truth is not None
    assert size is not None
    text = result.written if codec.name == "viscot" else None
    if codec.name != "viscot" and result.shown is not None:
        assert result.size is not None
        text = CODECS["viscot"].format(result.shown, result.size, result.size)
    return {"hit_published": int(published_hit(text, question.truth, size))}


def answer_figures(summary: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """The judge's average as published, and the data sets that are missing."""
    return with_averages(summary)


def box_figures(summary: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """The accuracies as published and as ours, per data set and averaged."""
    totals = {name: box_totals(own) for name, own in by_dataset(rows).items()}
    return {**summary, "totals": folder_totals(totals)}
