"""TreeBench (Wang et al. 2025, arXiv 2507.07999): a TSV with pictures in base64, up to six options and up to eight
true boxes a question, in pixels of the file."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping

from visrl.box import Corners, enclosing
from visrl.data.rows import RowFault, four_numbers
from visrl.evaluate import wordings
from visrl.evaluate.choices import MAX_OPTIONS, ChoiceQuestion
from visrl.evaluate.questions import BenchmarkFiles, BenchmarkQuestion, boxes_in
from visrl.evaluate.readings import OUR_READING, BenchmarkReading, by_rule, ruled
from visrl.evaluate.row_files import Row, cell, lettered_choice, optional_cell, read_questions, require_columns
from visrl.evaluate.rules import RULES, treebench_iou
from visrl.records import Sample
from visrl.rewards.choices import split_options

ORIGIN = "https://huggingface.co/datasets/HaochenWang/TreeBench"
PARTS: dict[str, int | None] = {
    "Perception/Attributes": 29,
    "Perception/Material": 13,
    "Perception/Physical State": 23,
    "Perception/Object Retrieval": 16,
    "Perception/OCR": 68,
    "Reasoning/Perspective Transform": 85,
    "Reasoning/Ordering": 57,
    "Reasoning/Contact and Occlusion": 41,
    "Reasoning/Spatial Containment": 29,
    "Reasoning/Comparison": 44,
}


def _score(question: BenchmarkQuestion, reply: str) -> Mapping[str, float | None]:
    """The published rule on the letter, and the published IoU of the boxes in the reply."""
    right = by_rule("treebench")(question, reply)
    return {**right, "iou_published": treebench_iou(reply, question.truths)}


READINGS: dict[str, BenchmarkReading] = {
    "published": BenchmarkReading(
        wordings.treebench, _score, RULES["treebench"].source, wordings.TREEBENCH_SYSTEM, tokens=1024
    ),
    "vlmevalkit": ruled(wordings.vlmevalkit_treebench, "vlmevalkit-letter"),
    "ours": OUR_READING,
}
_MAX_LITERAL = 10_000  # characters of a list of boxes


def questions(files: BenchmarkFiles) -> Mapping[str, Iterator[BenchmarkQuestion]]:
    """The questions of `TreeBench.tsv`."""
    return {"": read_questions(files.find("TreeBench.tsv"), lambda row, number: _question(row, files))}


def _question(row: Row, files: BenchmarkFiles) -> BenchmarkQuestion:
    require_columns(row, ("index", "image", "question", "answer", "category", "target_instances"))
    text, ref = cell(row, "question"), cell(row, "image")
    truths = _corners(optional_cell(row, "target_instances") or "[]")
    boxes = boxes_in(truths, ref, None)
    choice = _choice(row, text)
    sample = Sample(
        cell(row, "index"), ref, text, choice.truth, enclosing(boxes) if boxes else None, cell(row, "category")
    )
    return BenchmarkQuestion(sample, choice=choice, text=optional_cell(row, "multi-choice options"), truths=truths)


def _choice(row: Row, text: str) -> ChoiceQuestion:
    """The options of the columns A, B and so on, of the one column, or of the question itself. A question that holds
    them has no stem to put them after in another order, unless they are lines of their own."""
    stem, inside = split_options(text)
    listed = optional_cell(row, "multi-choice options") or ""
    letters = row if optional_cell(row, "A") else (split_options(listed)[1] or inside)
    is_fixed = "OCR" in cell(row, "category") and not inside
    return lettered_choice(dict(letters), stem, cell(row, "answer"), is_fixed)


def _corners(text: str) -> tuple[Corners, ...]:
    """The boxes of a list as Python writes it."""
    if len(text) > _MAX_LITERAL:
        raise RowFault("unparseable", f"'target_instances' has more than {_MAX_LITERAL:,} characters")
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise RowFault("unparseable", f"'target_instances' is no list of boxes: {text[:60]!r}") from error
    if not isinstance(value, list) or len(value) > MAX_OPTIONS:
        raise RowFault("unparseable", f"'target_instances' is no list of boxes: {text[:60]!r}")
    return tuple(four_numbers(list(one) if isinstance(one, tuple) else one, "target_instances") for one in value)
