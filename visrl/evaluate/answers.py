"""Scoring answer files that other programs wrote, and joining them with what a judge said. Asks no judge itself.

They are Visual-CoT's answer files, or what its judge script makes of them. The formats are in docs/EVALUATION.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visrl.evaluate.predictions import PathLike, Rows, files_by_dataset, predicted_text, read_predictions
from visrl.evaluate.published import VISCOT_QUESTIONS, average_published_answers, missing_datasets
from visrl.prompts import IMAGE, judged_question
from visrl.records import RecordError
from visrl.replies import spoken
from visrl.rewards.judge import AnswerToJudge, Judgement, judgement_key
from visrl.rewards.metrics import string_scores
from visrl.rewards.reply_scores import is_score


def score_answers(predictions: PathLike, truth: PathLike | None = None, dataset: str = "") -> tuple[Rows, list[str]]:
    """Result rows of an answer file with the string metrics, and the ids of questions that it leaves out.

    `truth` is the benchmark's file of the data set (JSON list or JSONL), matched by `question_id`. Without it the rows
    must hold `gt_answer_text`, as the output of Visual-CoT's judge script does; the `score` there is the published
    reading of its judge.

    Raises:
        RecordError: an unreadable file, a question that the truth does not hold or that is answered twice.
    """
    rows = read_predictions(predictions)
    known: dict[Any, dict[str, Any]] = {}
    for number, row in enumerate([] if truth is None else _benchmark_rows(truth), start=1):
        name = _number(row, f"{truth}, row {number}")
        if known.setdefault(name, row) is not row:
            raise RecordError(f"{truth}, row {number}: question {name} is there twice; give each its own number")
    results: Rows = []
    seen: set[Any] = set()
    for number, row in enumerate(rows, start=1):
        where = f"{predictions}, row {number}"
        name = _number(row, where)
        if name is None or name in seen:
            raise RecordError(f"{where}: {'no question_id' if name is None else f'question {name} is answered twice'}")
        seen.add(name)
        if truth is not None and name not in known:
            raise RecordError(f"{where}: question {name} is not in {truth}; name the file of the same data set")
        results.append(_answer_row(row, known.get(name), where, dataset))
    return results, [str(name) for name in known if name not in seen]


def score_answer_files(predictions: str | Path, truth: str | Path | None = None) -> tuple[Rows, list[str]]:
    """`score_answers` of a file, or of a folder of them by data set with the data sets' names before the ids; `truth`
    is then a folder of `NAME.json`.

    Raises:
        RecordError: whatever `score_answers` refuses, or a folder that holds no prediction files.
    """
    predictions, truth = Path(predictions), None if truth is None else Path(truth)
    if not predictions.is_dir():
        return score_answers(predictions, truth)
    rows, missing = [], []
    for name, path in files_by_dataset(predictions).items():
        own = truth / f"{name}.json" if truth is not None and truth.is_dir() else truth
        found, left = score_answers(path, own, name)
        rows += found
        missing += [f"{name}/{one}" for one in left]
    return rows, missing


def answer_to_judge(row: Mapping[str, Any]) -> AnswerToJudge | None:
    """What a judge is asked about a result row of answers; None where the model gave no answer."""
    if row.get("prediction") is None:
        return None
    question = f"{IMAGE}\n{row.get('question', '')}"
    return AnswerToJudge(str(row["id"]), question, str(row["answer"]), row["prediction"], str(row.get("dataset") or ""))


def with_judgements(rows: Sequence[Mapping[str, Any]], judgements: Sequence[Judgement]) -> Rows:
    """The rows with the columns `judge` (our reading) and `judge_published`.

    A question that the model itself left without an answer, for it wrote no box, scores 0 in both, as in every column.

    Raises:
        RecordError: a judgement is of another question, reference or answer than the row of its id.
    """
    said = {(one.dataset, one.id, one.key): one for one in judgements}  # an id may stand for several answers
    names = {(one.dataset, one.id) for one in judgements}
    judges = {(one.judge, one.max_tokens) for one in judgements}
    merged: Rows = []
    for row in rows:
        asked = answer_to_judge(row)
        keys = [(asked.dataset, asked.id, judgement_key(asked, *judge)) for judge in judges] if asked else []
        one = next((said[key] for key in keys if key in said), None)
        if asked and one is None and (asked.dataset, asked.id) in names:
            raise RecordError(f"the judgement of {asked.id} is of another answer than the predictions hold; judge anew")
        unanswered = 0.0 if asked is None and row.get("unparseable") else None
        ours, published = (one.score, one.published) if one else (unanswered, unanswered)
        merged.append({**row, "judge": ours, "judge_published": published})
    return merged


def with_averages(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The summary of answers with `average_published`, the judge's average as published over the 11 data sets (None
    without a judge or for other data sets), and `missing_datasets`, those of the 11 that hold no answer.
    """
    datasets = summary["datasets"]
    benchmark = set(datasets) <= set(VISCOT_QUESTIONS)
    scores = {
        name: dataset["columns"]["judge_published"]["counted"]["mean"]
        for name, dataset in datasets.items()
        if "judge_published" in dataset["columns"]
    }
    return {
        **summary,
        "average_published": average_published_answers(scores) if benchmark and scores else None,
        "missing_datasets": missing_datasets(datasets) if benchmark else [],
    }


def _answer_row(row: Mapping[str, Any], truth: Mapping[str, Any] | None, where: str, dataset: str) -> dict[str, Any]:
    if truth is not None:
        turns = truth["conversations"]
        question, answer = judged_question(turns[0]["value"]), turns[-1]["value"]
    elif "gt_answer_text" in row:
        question, answer = str(row.get("question_text", "")), row["gt_answer_text"]
    else:
        raise RecordError(f"{where}: no reference answer; give the benchmark's file of this data set with --truth")
    written = row["pred_answer_text"] if "pred_answer_text" in row else predicted_text(row, where)
    prediction = spoken(written) if isinstance(written, str) else written
    result = {
        "id": str(row["question_id"]),
        "dataset": dataset or str((truth or {}).get("dataset", "")),
        "question": question.removeprefix(f"{IMAGE}\n"),
        "answer": answer,
        "prediction": prediction,
        **string_scores(prediction, [str(answer)]),
    }
    if "score" in row:
        if row["score"] is not None and not is_score(row["score"]):
            raise RecordError(f"{where}: score is {str(row['score'])[:60]!r}; it must be null or lie between 0 and 1")
        result["judge_published"] = row["score"]
    return result


def _number(row: Mapping[str, Any], where: str) -> str | int | None:
    """The row's `question_id`, None where it has none."""
    name = row.get("question_id")
    if name is not None and not isinstance(name, (str, int)):
        raise RecordError(f"{where}: question_id must be a text or a number, not {json.dumps(name)[:60]}")
    return name


def _benchmark_rows(path: PathLike) -> Rows:
    rows = read_predictions(path)
    for number, row in enumerate(rows, start=1):
        turns = row.get("conversations")
        has_turns = isinstance(turns, list) and turns and all(_has_value(turn) for turn in turns)
        if "question_id" not in row or not has_turns:
            raise RecordError(f"{path}, row {number}: not a benchmark row: it needs question_id and conversations")
    return rows


def _has_value(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("value"), str)
