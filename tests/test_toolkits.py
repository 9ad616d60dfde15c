"""Prediction files of lmms-eval and VLMEvalKit: scored as they do and as we do, and ours written as theirs."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from choice_replies import synthetic_replies
from typer.testing import CliRunner

from visrl.cli import app
from visrl.codecs import CODECS
from visrl.evaluate.benchmarks import BENCHMARKS
from visrl.evaluate.questions import BenchmarkQuestion
from visrl.evaluate.results import read_results
from visrl.evaluate.rules import RULES
from visrl.evaluate.toolkit_export import export_results
from visrl.evaluate.toolkits import score_toolkit
from visrl.records import RecordError, Sample, write_records
from visrl.rewards.results import Result

COLOURS = ("red", "blue", "green", "a dark grey")
VSTAR_INPUT = "What is the colour of the dog?\n{}\nAnswer with the option's letter from the given choices directly."


def replies_of(count: int) -> list[str]:
    """Replies of every form, to whatever question; none that says that it failed."""
    return [reply for reply, _, _ in synthetic_replies(2 * count) if "Failed" not in reply][:count]


def run(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["eval", *map(str, words)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def vstar_samples(replies: list[str]) -> list[dict[str, Any]]:
    """As lmms-eval 0.7.3 logs its V*: no options but in the input, no part but in the metrics."""
    text = VSTAR_INPUT.format("\n".join(f"{letter}. {one}" for letter, one in zip("ABCD", COLOURS, strict=True)))
    samples = []
    for number, reply in enumerate(replies):
        category = "direct_attributes" if number % 3 else "relative_position"
        score = RULES["lmms-eval-vstar"].score(reply, {}, "ABCD"[number % 4])
        entry = {"question_id": f"q{number}", "category": category, "score": score}
        samples.append(
            {
                "doc_id": number, "target": "ABCD"[number % 4], "filtered_resps": reply, "doc_hash": "0",
                "token_counts": [{"output_tokens": 3}], "input": text,
                f"vstar_{category}_acc": entry, "vstar_overall_acc": entry,
            }
        )  # fmt: skip
    return samples


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A TSV as VLMEvalKit writes it."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    return path


def hrbench_rows(replies: list[str]) -> list[dict[str, Any]]:
    """200 rows of 50 questions in four orders, as VLMEvalKit's HRBench4K has them."""
    rows = []
    for number, reply in enumerate(replies):
        turn = number % 4
        options = COLOURS[turn:] + COLOURS[:turn]
        rows.append(
            {
                "index": number, "question": f"What is the colour of dog {number // 4}?", "answer": "ADCB"[turn],
                "category": "single" if number < len(replies) // 2 else "cross", "cycle_category": str(turn),
                **dict(zip("ABCD", options, strict=True)), "prediction": reply,
            }
        )  # fmt: skip
    return rows


def test_samples_of_lmms_eval_get_its_own_scores_and_ours(tmp_path):
    replies = [*replies_of(400), "Because it is red", "", "[LMMS_EVAL_REQUEST_FAILED after 5 retries] gone"]
    samples = vstar_samples(replies)
    path = tmp_path / "20261126_samples_vstar_bench.jsonl"
    write_records(path, samples)
    scores = score_toolkit(path, "lmms-eval")
    assert len(scores.rows) == 403
    logged = [sample["vstar_overall_acc"]["score"] for sample in samples]
    assert [row["correct_published"] for row in scores.rows[:-1]] == logged[:-1]
    failed = scores.rows[-1]
    assert (failed["correct"], failed["correct_published"], failed["prediction"]) == (None, None, None)
    assert failed["error"].startswith("[LMMS_EVAL_REQUEST_FAILED")
    said = {row["prediction"]: row for row in scores.rows}
    assert (said["Because it is red"]["correct"], said[""]["correct"]) == (0, 0)
    summary = scores.summary()
    assert set(summary["datasets"]) == {"direct_attributes", "relative_position"}
    assert summary["logged"]["vstar_bench"]["vstar_overall_acc"]["n"] == 403
    assert summary["overall"]["correct"]["left_out"]["n"] == 402
    shown = run("score", "--protocol", "lmms-eval", "--predictions", tmp_path)
    assert "as the file of vstar_bench itself has it: " in shown
    assert "lmms-eval, tasks/vstar_bench/utils.py" in shown


@pytest.mark.parametrize("ending", [".tsv", ".json"])
def test_predictions_of_vlmevalkit_are_read_by_its_rule_and_by_ours(tmp_path, ending):
    rows = hrbench_rows([*replies_of(198), "Failed to obtain answer via API.", "red"])
    path = tmp_path / f"my-model_HRBench4K{ending}"
    if ending == ".json":
        path.write_text(json.dumps([{**row, "E": float("nan")} for row in rows], indent=4))
    else:
        table(path, [{**row, "E": ""} for row in rows])
    scores = score_toolkit(tmp_path, "vlmevalkit")
    assert [row["id"] for row in scores.rows] == [str(number) for number in range(200)]
    for row, given in zip(scores.rows[:-2], rows, strict=False):
        options = {letter: given[letter] for letter in "ABCD"}
        assert row["options"] == options
        assert row["correct_published"] == RULES["vlmevalkit"].score(given["prediction"], options, given["answer"])
        assert row["correct"] == RULES["strict"].score(given["prediction"], options, given["answer"])
    assert scores.rows[-2]["error"].startswith("Failed to obtain")
    assert (scores.rows[-1]["correct"], scores.rows[-1]["correct_published"]) == (1, 1)
    summary = scores.summary()
    assert summary["overall"]["correct"]["counted"]["n"] == 50  # a question in four orders is one
    assert set(summary["datasets"]) == {"single", "cross"}
    assert set(summary["categories"]) == {"0", "1", "2", "3"}


def test_open_questions_get_string_metrics_and_the_rule_of_the_toolkit(tmp_path):
    replies = ["7", "seven", "8"]
    asked = [{"index": n, "question": "How many?", "answer": "['7', 'VII']"} for n in range(3)]
    table(tmp_path / "m_DocVQA_VAL.tsv", [{**row, "prediction": r} for row, r in zip(asked, replies, strict=True)])
    rows = score_toolkit(tmp_path, "vlmevalkit").rows
    assert [(row["dataset"], row["anls"], row["correct_published"]) for row in rows] == [
        ("docvqa_val", 1, 1), ("docvqa_val", 0, 0), ("docvqa_val", 0, 0),
    ]  # fmt: skip
    own = [
        {"doc_id": n, "target": "7", "filtered_resps": [[reply, "7"]], "arguments": [["How many?"]], "exact_match": 1.0}
        for n, reply in enumerate(replies)
    ]
    write_records(tmp_path / "samples_mine.jsonl", own)
    scores = score_toolkit(tmp_path / "samples_mine.jsonl", "lmms-eval")
    assert [row["exact"] for row in scores.rows] == [1, 1, 0, 1, 0, 1]
    assert [row.get("repeat", 0) for row in scores.rows] == [0, 1] * 3
    assert scores.rules == {"mine": None}
    shown = run("score", "--protocol", "lmms-eval", "--predictions", tmp_path / "samples_mine.jsonl")
    assert "no published rule is known for mine: name one with --rule" in shown


def test_another_rule_can_be_named(tmp_path):
    write_records(tmp_path / "a_samples_vstar_bench.jsonl", vstar_samples(["Because", "A", "C", "D"]))
    rows = score_toolkit(tmp_path, "lmms-eval", rule="deepeyes").rows
    assert [row["correct_published"] for row in rows] == [None, 0, 1, 1]
    assert [row["correct_published"] for row in score_toolkit(tmp_path, "lmms-eval").rows] == [0, 0, 1, 1]


@pytest.mark.parametrize("toolkit", ["lmms-eval", "vlmevalkit"])
def test_what_is_exported_is_scored_alike_when_it_is_read_again(tmp_path, toolkit):
    source = tmp_path / "m_HRBench4K.tsv"
    table(source, hrbench_rows([*replies_of(199), "Failed to obtain answer via API."]))
    results = tmp_path / "results.jsonl"
    run("score", "--protocol", "vlmevalkit", "--predictions", source, "--out", results)
    first = read_results(results)
    endings = [".jsonl"] if toolkit == "lmms-eval" else [".tsv", ".json"]
    for ending in endings:
        out = tmp_path / f"theirs{ending}"
        assert run("export", results, out, "--to", toolkit) == f"200 rows: {out}\n"
        again = score_toolkit(out, toolkit, task="HRBench4K", rule="vlmevalkit").rows
        for name in (
            "id",
            "dataset",
            "category",
            "group",
            "question",
            "answer",
            "prediction",
            "correct",
            "correct_published",
        ):
            assert [row.get(name) for row in again] == [row.get(name) for row in first], (ending, name)


def test_several_answers_and_a_box_that_could_not_be_read_are_exported_as_what_they_were(tmp_path):
    benchmark = BENCHMARKS["textvqa"]
    asked = BenchmarkQuestion(Sample("1", "", "Which?", "7", None, "textvqa_val"), references=("7", "7", "?", "seven"))
    replied = [Result(asked.sample, prediction="7", mode="no_box"), Result(replace(asked.sample, id="2"), box_text="x")]
    first = [benchmark.row_of(asked, one, CODECS["visrl"], benchmark.reading(None)) for one in replied]
    assert [row.get("unparseable") for row in first] == [None, True]
    assert first[0]["vqa"] > 0.5 > first[1]["vqa"]
    for toolkit, name in (("lmms-eval", "s.jsonl"), ("vlmevalkit", "s.tsv"), ("vlmevalkit", "s.json")):
        export_results(first, tmp_path / name, toolkit)
        again = score_toolkit(tmp_path / name, toolkit, task="textvqa_val").rows
        for column in ("answer", "references", "exact", "vqa"):
            assert [row[column] for row in again] == [row[column] for row in first], (name, column)
        assert [row["error"] for row in again] == [None, None]


def test_what_cannot_be_scored_or_written_is_said_in_a_sentence(tmp_path):
    samples = vstar_samples(["A", "B"])
    path = tmp_path / "a_samples_vstar_bench.jsonl"
    faults: list[tuple[list[dict[str, Any]], str]] = [
        ([{**samples[0], "filtered_resps": [[-1.5, True], [-2.5, False]]}], "only tasks of output_type generate_until"),
        ([{"doc_id": 1, "text": "A"}], "row 1: no doc_id, target and filtered_resps"),
        ([samples[0], samples[0]], "row 2: question q0 is there twice"),
        ([{**samples[0], "input": "What?"}], "a benchmark of choice, and there are no options with the answer 'A'"),
    ]
    for rows, sentence in faults:
        write_records(path, rows)
        assert sentence in " ".join(run("score", "--protocol", "lmms-eval", "--predictions", path, code=1).split())
    write_records(path, samples)
    write_records(tmp_path / "b_samples_vstar_bench.jsonl", samples)
    for words, sentence in (
        (["--protocol", "lmms-eval", "--predictions", tmp_path], "several files of vstar_bench"),
        (["--protocol", "vlmevalkit", "--predictions", tmp_path], "holds no files MODEL_DATASET"),
        (["--protocol", "vlmevalkit", "--predictions", path], "files of VLMEvalKit end in .xlsx, .tsv, .json"),
        (["--protocol", "lmms-eval", "--predictions", path, "--rule", "mine"], "no rule 'mine'; there are strict"),
        (["--protocol", "answers", "--predictions", path, "--rule", "strict"], "--rule has no use for --protocol ans"),
        (["--protocol", "lmms-eval", "--predictions", path, "--truth", path], "--truth has no use for --protocol lmms"),
    ):
        assert sentence in " ".join(run("score", *words, code=1).split()), sentence
    results = tmp_path / "results.jsonl"
    write_records(results, [{"id": "1", "dataset": "", "iou": 0.5}])
    assert "only results of answers can be exported" in run("export", results, "x.jsonl", "--to", "lmms-eval", code=1)


def test_damaged_rows_are_scored_or_named(tmp_path):
    rng = random.Random(0)
    lines = [json.dumps(one) for one in vstar_samples(["A", "(B)", "C. green", "no"])]
    path = tmp_path / "a_samples_vstar_bench.jsonl"
    said: list[str] = []
    for _ in range(300):
        damaged = [bytearray(line.encode()) for line in lines]
        one = rng.choice(damaged)
        for _ in range(rng.randint(1, 3)):
            one[rng.randrange(len(one))] = rng.choice(b'{}[]",:0aA\n\xff')
        path.write_bytes(b"\n".join(damaged) + b"\n")
        try:
            rows = score_toolkit(path, "lmms-eval").rows
        except RecordError as error:
            said.append(str(error))
        else:
            assert all(row.get("correct") in (0, 1, None) for row in rows)
    assert 20 < len(said) < 290
    assert [sentence for sentence in said if path.name not in sentence] == []


def test_sheets_of_excel_are_read_and_written(tmp_path):
    path = tmp_path / "m_HRBench8K.xlsx"
    pytest.importorskip("openpyxl")
    source = table(tmp_path / "m_HRBench8K.tsv", hrbench_rows(["=A", "B", "", "(C)"]))
    results = tmp_path / "results.jsonl"
    run("score", "--protocol", "vlmevalkit", "--predictions", source, "--out", results)
    run("export", results, path, "--to", "vlmevalkit")
    again, first = score_toolkit(path, "vlmevalkit").rows, read_results(results)
    assert [(row["id"], row["prediction"], row["correct"], row["options"]) for row in again] == [
        (row["id"], row["prediction"], row["correct"], row["options"]) for row in first
    ]
    path.write_text("no sheet")
    with pytest.raises(RecordError, match="is no sheet of Excel"):
        score_toolkit(path, "vlmevalkit")


def test_without_openpyxl_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    (tmp_path / "m_HRBench4K.xlsx").write_bytes(b"PK")
    said = run("score", "--protocol", "vlmevalkit", "--predictions", tmp_path / "m_HRBench4K.xlsx", code=1)
    assert "pip install 'visrl[xlsx]', or let VLMEvalKit write PRED_FORMAT=tsv" in " ".join(said.split())
