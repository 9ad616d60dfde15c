"""DocVQA, InfographicVQA, TextVQA and ChartQA in their distributed forms: VLMEvalKit's TSV, or the parquet of the hub.

Each has its metric: ANLS, VQA accuracy, relaxed accuracy. Ours are those of `rewards.metrics` as they were defined;
`correct_published` is a toolkit's, whose habits differ (vqa_rules.py). None has true boxes.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from visrl.data.rows import RowFault
from visrl.evaluate import wordings
from visrl.evaluate.questions import BenchmarkFiles, BenchmarkQuestion
from visrl.evaluate.readings import BenchmarkReading
from visrl.evaluate.row_files import Row, cell, optional_cell, read_shards, require_columns
from visrl.evaluate.vqa_rules import VQA_RULES
from visrl.records import Sample

_LMMS, _VLMEVALKIT = "lmms-eval at 75571cfe", "VLMEvalKit at e8e78f05"
_MAX_LITERAL = 100_000  # characters of a list of answers


@dataclass(frozen=True, slots=True)
class DocumentFiles:
    """The files of one of these sets: its TSV, the split of its parquet, its own metric and the names of its parts."""

    tsv: str
    split: str
    parts: Mapping[str, int | None]
    origin: str


DOCVQA = DocumentFiles(
    "DocVQA_VAL.tsv", "validation", {"docvqa_val": 5349}, "https://huggingface.co/datasets/lmms-lab/DocVQA"
)
INFOVQA = DocumentFiles(
    "InfoVQA_VAL.tsv", "validation", {"infovqa_val": 2801}, "https://huggingface.co/datasets/lmms-lab/DocVQA"
)
TEXTVQA = DocumentFiles(
    "TextVQA_VAL.tsv", "validation", {"textvqa_val": 5000}, "https://huggingface.co/datasets/lmms-lab/textvqa"
)
CHARTQA = DocumentFiles(
    "ChartQA_TEST.tsv", "test", {"human": 1250, "augmented": 1250}, "https://huggingface.co/datasets/lmms-lab/ChartQA"
)


def readings(lmms: Callable[[BenchmarkQuestion], str], metric: str, tokens: int = 32) -> dict[str, BenchmarkReading]:
    """The toolkits' readings and ours of a set with this metric: "anls", "vqa" or "relaxed"."""

    def scored(rule: str) -> Callable[[BenchmarkQuestion, str], Mapping[str, float | None]]:
        return lambda question, reply: {"correct_published": VQA_RULES[rule](reply, question.references)}

    rules = ("anls", "anls") if metric == "anls" else (f"lmms-eval-{metric}", f"vlmevalkit-{metric}")
    return {
        "lmms-eval": BenchmarkReading(lmms, scored(rules[0]), _LMMS, tokens=tokens),
        "vlmevalkit": BenchmarkReading(wordings.short_answer, scored(rules[1]), _VLMEVALKIT, tokens=tokens),
        "ours": BenchmarkReading(wordings.short_answer, lambda question, reply: {}, "visrl", tokens=tokens),
    }


def questions(kind: DocumentFiles) -> Callable[[BenchmarkFiles], Mapping[str, Iterator[BenchmarkQuestion]]]:
    """The reader of one of these sets."""

    def read(files: BenchmarkFiles) -> dict[str, Iterator[BenchmarkQuestion]]:
        table = Path(files.dataset, kind.tsv)
        paths = [table] if table.is_file() else files.shards(kind.split)
        return {"": read_shards(paths, lambda row, number: _question(row, number, kind))}

    return read


def _question(row: Row, number: int, kind: DocumentFiles) -> BenchmarkQuestion:
    text = "question" if "question" in row else "query"
    require_columns(row, ("image", text))
    answers = reference_answers(
        next((row[key] for key in ("answers", "answer", "label") if row.get(key) is not None), None)
    )
    ids = (optional_cell(row, key) for key in ("questionId", "question_id", "index"))
    name = next((found for found in ids if found is not None), str(number))
    part = next(iter(kind.parts)) if len(kind.parts) == 1 else _part(row)
    return BenchmarkQuestion(
        Sample(name, cell(row, "image"), cell(row, text), next(filter(None, answers)), None, part), references=answers
    )


def _part(row: Row) -> str:
    """ChartQA's part, as lmms-eval (`type`), VLMEvalKit (`split`) and the hub (`human_or_machine`) have it."""
    said = str(next((row[key] for key in ("type", "split", "human_or_machine") if row.get(key) is not None), ""))
    if said in ("0", "human") or said.endswith("human") or said.startswith("human"):
        return "human"
    if said in ("1", "machine") or "augmented" in said:
        return "augmented"
    raise RowFault("unparseable", f"neither human nor augmented: {said[:40]!r}")


def reference_answers(value: object) -> tuple[str, ...]:
    """The reference answers: a list, one as Python writes it in a cell, or a single text.

    Raises:
        RowFault: none, or what is no text.
    """
    if isinstance(value, str) and value[:1] == "[" and value[-1:] == "]":
        if len(value) > _MAX_LITERAL:
            raise RowFault("unparseable", f"the answers have more than {_MAX_LITERAL:,} characters")
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = [value]  # a single answer in brackets
    given = value if isinstance(value, list) else [value]
    answers = tuple("" if one == "" else cell({"answer": one}, "answer") for one in given)  # some said nothing
    if not any(answers):
        raise RowFault("unparseable", "there are no answers")
    return answers
