"""Prediction files of lmms-eval (`--log_samples`) and VLMEvalKit, row by row: what was asked, what the model replied,
and what the toolkit itself made of it. Scores nothing.

lmms-eval 0.7 logs no columns of its data sets but the target: the options are read from the logged input, the part of
the benchmark from what the task's metric logs. Older releases log the row itself as `doc`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visrl.data.rows import RowFault
from visrl.evaluate.choices import MAX_OPTIONS, ChoiceQuestion, letter_of
from visrl.evaluate.documents import reference_answers
from visrl.evaluate.questions import BenchmarkQuestion
from visrl.evaluate.row_files import Row, cell, optional_cell, require_columns, table_rows
from visrl.evaluate.spreadsheets import read_xlsx
from visrl.records import RecordError, Sample
from visrl.rewards.choices import options_of, split_options
from visrl.rewards.reply_scores import is_score

# Of each toolkit's data sets that we know: our benchmark, and its reading that is the toolkit's.
LMMS_TASKS = {
    "vstar_bench": ("vstar", "lmms-eval"),
    "vstar_bench_direct_attributes": ("vstar", "lmms-eval"),
    "vstar_bench_relative_position": ("vstar", "lmms-eval"),
    "hrbench4k": ("hrbench4k", "lmms-eval"),
    "hrbench8k": ("hrbench8k", "lmms-eval"),
    "mmerealworld": ("mme-realworld", "lmms-eval"),
    "mmerealworld_cn": ("mme-realworld", "lmms-eval"),
    "mmerealworld_lite": ("mme-realworld-lite", "lmms-eval"),
    "docvqa_val": ("docvqa", "lmms-eval"),
    "infovqa_val": ("infovqa", "lmms-eval"),
    "textvqa_val": ("textvqa", "lmms-eval"),
    "chartqa": ("chartqa", "lmms-eval"),
}
VLMEVALKIT_SETS = {
    "VStarBench": ("vstar", "vlmevalkit"),
    "HRBench4K": ("hrbench4k", "published"),
    "HRBench8K": ("hrbench8k", "published"),
    "MME-RealWorld": ("mme-realworld", "vlmevalkit"),
    "MME-RealWorld-CN": ("mme-realworld", "vlmevalkit"),
    "MME-RealWorld-Lite": ("mme-realworld-lite", "vlmevalkit"),
    "TreeBench": ("treebench", "vlmevalkit"),
    "DocVQA_VAL": ("docvqa", "vlmevalkit"),
    "InfoVQA_VAL": ("infovqa", "vlmevalkit"),
    "TextVQA_VAL": ("textvqa", "vlmevalkit"),
    "ChartQA_TEST": ("chartqa", "vlmevalkit"),
}
LMMS_FAILED = ("[LMMS_EVAL_REQUEST_FAILED", "[LMMS_EVAL_BUDGET_EXCEEDED]")
VLMEVALKIT_FAILED = "Failed to obtain answer via API"
VLMEVALKIT_ENDINGS = (".xlsx", ".tsv", ".json")
_SAMPLES = re.compile(r"(?:^|_)samples_(.+)$")
_LETTER = re.compile(r"\(?([A-Z])\)?\.?")


@dataclass(frozen=True, slots=True)
class ToolkitReply:
    """A reply to a question, or why none came, and the toolkit's own scores of it by their names."""

    question: BenchmarkQuestion
    reply: str | None
    error: str | None
    logged: Mapping[str, float]


def lmms_task(path: Path) -> str:
    """The task that a file of samples is of, by its name: `…_samples_TASK.jsonl`. "" where it does not say."""
    found = _SAMPLES.search(path.stem)
    return found[1] if found else ""


def vlmevalkit_set(path: Path) -> str:
    """The data set that a file is of, by its name: `MODEL_DATASET.xlsx`, or the same with a judge's name after it. ""
    where it names none that we know."""
    named = f"_{path.stem}_"
    return max((name for name in VLMEVALKIT_SETS if f"_{name}_" in named), key=len, default="")


def read_lmms(path: Path) -> Iterator[list[ToolkitReply]]:
    """What each row of a file of samples holds: a reply, or several where the task repeats its questions.

    Raises:
        RecordError: no such file, or a row that is no sample with a reply.
    """
    if path.suffix != ".jsonl":
        raise RecordError(f"{path}: samples of lmms-eval are a .jsonl file; run it with --log_samples --output_path")
    for number, row in table_rows(path):
        try:
            if isinstance(row, RowFault):
                raise row
            yield _lmms_row(row)
        except RowFault as fault:
            raise RecordError(f"{path}, row {number}: {fault}") from fault


def read_vlmevalkit(path: Path) -> Iterator[list[ToolkitReply]]:
    """What each row of a prediction or result file holds: one reply.

    Raises:
        RecordError: no such file, a form that is none of theirs, or a row without what it needs.
    """
    if path.suffix not in VLMEVALKIT_ENDINGS:
        raise RecordError(f"{path}: files of VLMEvalKit end in {', '.join(VLMEVALKIT_ENDINGS)}")
    rows = read_xlsx(path) if path.suffix == ".xlsx" else table_rows(path, pictures=())
    for number, row in rows:
        try:
            if isinstance(row, RowFault):
                raise row
            yield [_vlmevalkit_row(row)]
        except RowFault as fault:
            raise RecordError(f"{path}, row {number}: {fault}") from fault


# --- lmms-eval --------------------------------------------------------------------------------------------------------


def _lmms_row(row: Row) -> list[ToolkitReply]:
    if "doc_id" not in row or "target" not in row or not {"resps", "filtered_resps"} & set(row):
        raise RowFault("unparseable", "no doc_id, target and filtered_resps; this is no sample of lmms-eval")
    doc = row["doc"] if isinstance(row.get("doc"), dict) else {}
    entries = {name: value for name, value in row.items() if isinstance(value, dict) and name != "doc"}
    part, category, turn = _lmms_part(entries, doc)
    name = next((str(one["question_id"]) for one in entries.values() if one.get("question_id") is not None), None)
    asked = _question(
        name or cell(row, "doc_id"),
        _lmms_input(row, doc),
        row["target"] if isinstance(row["target"], list) else cell(row, "target"),
        _doc_options(doc),
        part,
        turn or category,
        in_orders=bool(turn),
    )
    return [_replied(asked, one, LMMS_FAILED, _lmms_logged(row, entries)) for one in _texts(row)]


def _lmms_input(row: Row, doc: Mapping[str, Any]) -> str:
    """The text that was asked: `input`, the first of `arguments`, or the row's own question."""
    given = row.get("input") or row.get("arguments")
    while isinstance(given, (list, dict)) and given:
        given = next(iter(given.values() if isinstance(given, dict) else given))
    return given if isinstance(given, str) else str(doc.get("question") or "")


def _lmms_part(entries: Mapping[str, Any], doc: Mapping[str, Any]) -> tuple[str, str, str]:
    """The part of the benchmark, its category and the turn of its options, as the metrics of V*, HR-Bench and
    MME-RealWorld log them."""
    for name, entry in entries.items():
        turn = str(entry.get("cycle_category") or "")
        if "sub_category" in entry:
            return f"{entry.get('category')}/{entry['sub_category']}", str(entry.get("task_category") or ""), turn
        if "category" in entry:
            return str(entry["category"]), str(entry.get("detail") or ""), turn
        if turn and name != "average":
            return name, "", turn
    return str(doc.get("category") or ""), "", str(doc.get("cycle_category") or "")


def _lmms_logged(row: Row, entries: Mapping[str, Any]) -> dict[str, float]:
    found = {name: value for name, value in row.items() if name != "doc_id" and is_score(value)}
    for name, entry in entries.items():
        value = next((entry[key] for key in ("score", "gpt_score") if is_score(entry.get(key))), None)
        if value is None and isinstance(entry.get("pred_answer"), str) and isinstance(entry.get("answer"), str):
            value = entry["answer"].lower() in entry["pred_answer"].lower()  # as lmms-eval counts MME-RealWorld
        if value is not None:
            found[name] = value
    return {name: float(value) for name, value in found.items()}


def _texts(row: Row) -> list[str]:
    """The replies of a sample, however deep in lists they stand."""
    said = row.get("filtered_resps", row.get("resps"))
    while isinstance(said, list) and len(said) == 1:
        said = said[0]
    texts = [text for text in (said if isinstance(said, list) else [said]) if isinstance(text, str)]
    if not texts or (isinstance(said, list) and len(texts) < len(said)):
        raise RowFault("unparseable", "its responses are no texts: only tasks of output_type generate_until are scored")
    return texts


def _doc_options(doc: Mapping[str, Any]) -> list[str]:
    listed = doc.get("multi-choice options")
    if isinstance(listed, list):
        return [str(one) for one in listed]
    return _lettered(dict(doc)) if "A" in doc else []


# --- VLMEvalKit -------------------------------------------------------------------------------------------------------


def _vlmevalkit_row(row: Row) -> ToolkitReply:
    require_columns(row, ("index", "question", "answer", "prediction"))
    turn = optional_cell(row, "cycle_category")
    asked = _question(
        cell(row, "index"),
        cell(row, "question"),
        cell(row, "answer"),
        _lettered(row),
        optional_cell(row, "category") or optional_cell(row, "split") or "",
        turn or optional_cell(row, "l2-category") or "",
        in_orders=turn is not None,
    )
    logged = {"hit": float(row["hit"])} if str(row.get("hit")) in ("0", "1", "0.0", "1.0") else {}
    return _replied(asked, optional_cell(row, "prediction") or "", (VLMEVALKIT_FAILED,), logged)


def _lettered(row: Row) -> list[str]:
    """The options in the columns A, B and so on, up to the first that is empty."""
    found = [optional_cell(row, letter_of(number)) for number in range(MAX_OPTIONS)]
    count = found.index(None) if None in found else MAX_OPTIONS
    return [str(option) for option in found[:count]]


# --- Both -------------------------------------------------------------------------------------------------------------


def _question(
    name: str, text: str, answer: str | list[Any], listed: list[str], part: str, category: str, in_orders: bool
) -> BenchmarkQuestion:
    """A question of choice where options are listed or stand in the text and the answer is one's letter, else an open
    one. Where a file has its questions `in_orders`, those with the same text and the same options are one `group`."""
    stem, inside = split_options(text)
    options = options_of(text, {"options": listed}) if len(listed) > 1 else inside
    letter = _LETTER.fullmatch(answer.strip()) if isinstance(answer, str) else None
    if letter and letter[1] in options:
        choice = ChoiceQuestion(stem, tuple(options.values()), ord(letter[1]) - 65, is_fixed=True)
        group = "\x1f".join([stem, *sorted(choice.options)]) if in_orders else ""
        sample = Sample(name, "", text, letter[1], None, part)
        return BenchmarkQuestion(sample, choice=choice, category=category, group=group)
    answers = reference_answers(answer)
    sample = Sample(name, "", text, next(filter(None, answers)), None, part)
    return BenchmarkQuestion(sample, references=answers, category=category)


def _replied(asked: BenchmarkQuestion, text: str, failed: tuple[str, ...], logged: Mapping[str, float]) -> ToolkitReply:
    is_failed = text.startswith(failed)
    return ToolkitReply(asked, None if is_failed else text, text[:300] if is_failed else None, logged)
