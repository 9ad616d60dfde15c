"""Prediction files through the command line: Visual-CoT's and lmms-eval's formats, refusals, judging, comparing."""

from __future__ import annotations

import json
import random

import pytest
from test_evaluate_detection import KINDS, oracle, synthetic
from test_evaluate_judge import Court, serving
from typer.testing import CliRunner

from visrl.cli.evaluate import app
from visrl.evaluate.published import VISCOT_QUESTIONS


def run(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result.stderr if code else result.stdout


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def boxes(count: int, seed: int = 1) -> list[dict]:
    rng = random.Random(seed)
    return [synthetic(KINDS[index % len(KINDS)], rng) for index in range(count)]


@pytest.mark.parametrize("protocol", ["detection", "refcoco"])
def test_a_box_file_prints_one_object_that_agrees_with_the_oracle(tmp_path, protocol):
    rows = boxes(5000)
    path = lines(tmp_path / "answers.jsonl", rows)
    found = json.loads(run("score", "--protocol", protocol, "--predictions", path, "--json"))
    correct, unparseable = oracle(rows)
    assert list(found) == ["n", "correct", "accuracy_published", "accuracy", "unparseable", "bad_truth"]
    assert (found["n"], found["correct"], found["unparseable"]) == (5000, correct, unparseable)
    assert found["accuracy_published"] == correct / 5000
    assert 500 <= found["bad_truth"] <= 600
    assert 0.2 < found["accuracy"] < 0.4


def test_truth_beside_the_predictions_gives_the_same(tmp_path):
    rows = boxes(200)
    whole = lines(tmp_path / "whole.jsonl", rows)
    texts = lines(tmp_path / "texts.jsonl", [{"text": row["text"]} for row in rows])
    truth = lines(tmp_path / "truth.jsonl", [{**row, "expression": "what?"} for row in rows])
    expected = run("score", "--protocol", "detection", "--predictions", whole, "--json")
    assert run("score", "--protocol", "detection", "--predictions", texts, "--truth", truth, "--json") == expected
    assert "give the data set's JSONL with --truth" in run(
        "score", "--protocol", "detection", "--predictions", texts, code=1
    )
    short = lines(tmp_path / "short.jsonl", [{"text": row["text"]} for row in rows[:-1]])
    said = run("score", "--protocol", "detection", "--predictions", short, "--truth", truth, code=1)
    assert "199 rows" in said
    assert "200" in said


def test_a_folder_gives_both_averages_and_names_what_is_missing(tmp_path):
    right = {"text": "[0.0, 0.0, 0.5, 0.5]", "bbox": [0, 0, 50, 50], "height": 100, "width": 100}
    wrong = {**right, "text": "[0.5, 0.5, 1.0, 1.0]"}
    lines(tmp_path / "p" / "gqa.jsonl", [right, wrong])
    lines(tmp_path / "p" / "vsr" / "checkpoint.jsonl", [wrong])
    found = json.loads(run("score", "--protocol", "detection", "--predictions", tmp_path / "p", "--json"))
    assert found["datasets"]["gqa"]["accuracy_published"] == 0.5
    assert (found["average_published"], found["average"]) == (0.5, 0.25)  # the zero falls out of the published one
    assert sorted(found["missing"]) == sorted(set(VISCOT_QUESTIONS) - {"gqa", "vsr"})


def test_lmms_eval_samples_are_scored_by_its_own_rule(tmp_path):
    def sample(index: int, text: str, pred: list[float]) -> dict:
        entry = {"answer": "a dish", "pred": pred, "ann_id": str(index), "bbox": [0.0, 0.0, 0.5, 0.5]}
        return {
            "doc_id": index,
            "target": "x",
            "filtered_resps": [text],
            "refcoco_IoU": entry,
            "refcoco_ACC@0.5": entry,
        }

    rows = [
        sample(0, "[0.0, 0.0, 0.5, 0.5]", [0.0, 0.0, 0.5, 0.5]),
        sample(1, "[0.0, 0.0, 0.25, 0.5]", [0.0, 0.0, 0.25, 0.5]),  # IoU 0.5 exactly: right for lmms-eval, not for us
        sample(2, "no idea", [0, 0, 0, 0]),
        sample(3, "[0.6, 0.6, 0.9, 0.9]", [0.6, 0.6, 0.9, 0.9]),
    ]
    path = lines(tmp_path / "samples.jsonl", rows)
    assert json.loads(run("score", "--protocol", "refcoco", "--predictions", path, "--json")) == {
        "n": 4, "correct": 2, "accuracy_published": 0.5, "accuracy": 0.25, "unparseable": 1, "bad_truth": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no rows"),
        ("not json\n", "line 1: not JSON"),
        ("[1, 2]", "row 1: not a JSON object"),
        ('{"bbox": [0, 0, 1, 1], "height": 2, "width": 2}\n', "row 1: no `text`"),
        ('{"text": 3, "bbox": [0, 0, 1, 1], "height": 2, "width": 2}\n', "must be a text or null"),
        ('{"text": "", "bbox": [0, 0, 1], "height": 2, "width": 2}\n', "bbox must be four numbers"),
        ('{"text": "", "bbox": [0, 0, 1, 1], "height": 0, "width": 2}\n', "whole pixels above 0"),
        ('{"text": "", "bbox": [0, 0, 1, 1], "height": 2}\n', "no width"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path, content, said):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    message = run("score", "--protocol", "detection", "--predictions", path, code=1)
    assert said in message
    assert "bad.jsonl" in message
    assert message.count("\n") == 1


def test_other_refusals_name_their_remedy(tmp_path):
    assert "no file at" in run("score", "--protocol", "refcoco", "--predictions", tmp_path / "no.jsonl", code=1)
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\x80\x81")
    assert "not UTF-8" in run("score", "--protocol", "refcoco", "--predictions", binary, code=1)
    path = lines(tmp_path / "a.jsonl", boxes(3))
    assert "there are visrl, viscot" in run(
        "score", "--protocol", "refcoco", "--predictions", path, "--codec", "x", code=1
    )


# --- Answers ----------------------------------------------------------------------------------------------------------


def benchmark(path, dataset: str, answers: dict[int, str]):
    box = "Please provide the bounding box coordinate of the region that can help you answer the question better."
    rows = [
        {
            "dataset": dataset,
            "question_id": name,
            "image": ["a.jpg", "a.jpg###[1, 2, 3, 4]"],
            "conversations": [
                {"from": "human", "value": f"<image>\nWhat is {name}? {box}"},
                {"from": "gpt", "value": "[0.1, 0.2, 0.3, 0.4]"},
                {"from": "human", "value": "<image>"},
                {"from": "gpt", "value": answer},
            ],
        }
        for name, answer in answers.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return path


def test_answers_are_scored_without_a_judge(tmp_path):
    truth = benchmark(tmp_path / "gqa.json", "gqa", {7: "window", 8: "100", 9: "broccoli", 10: "left"})
    path = lines(
        tmp_path / "answers.jsonl",
        [{"question_id": 7, "text": "Window."}, {"question_id": 8, "text": "104"}, {"question_id": 9, "text": None}],
    )
    out = tmp_path / "results.jsonl"
    found = json.loads(
        run("score", "--protocol", "answers", "--predictions", path, "--truth", truth, "--out", out, "--json")
    )
    assert (found["n"], found["missing"]) == (3, 1)
    gqa = found["datasets"]["gqa"]["columns"]
    assert gqa["exact"]["counted"]["mean"] == pytest.approx(1 / 3)
    assert gqa["exact"]["left_out"]["mean"] == pytest.approx(1 / 2)
    assert gqa["relaxed"]["left_out"]["mean"] == 1
    assert "judge" not in gqa
    assert (found["average_published"], len(found["missing_datasets"])) == (None, 10)
    row = json.loads(out.read_text().splitlines()[0])
    assert (row["id"], row["question"], row["answer"]) == ("7", "What is 7?", "window")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"question_id": 99, "text": "x"}], "question 99 is not in"),
        ([{"question_id": 7, "text": "x"}, {"question_id": 7, "text": "x"}], "row 2: question 7 is answered twice"),
        ([{"text": "x"}], "no question_id"),
    ],
)
def test_answers_to_other_questions_are_refused(tmp_path, rows, said):
    truth = benchmark(tmp_path / "gqa.json", "gqa", {7: "window"})
    path = lines(tmp_path / "answers.jsonl", rows)
    assert said in run("score", "--protocol", "answers", "--predictions", path, "--truth", truth, code=1)
    alone = lines(tmp_path / "alone.jsonl", [{"question_id": 7, "text": ""}])
    assert "with --truth" in run("score", "--protocol", "answers", "--predictions", alone, code=1)


def test_the_output_of_the_published_judge_script_is_read_too(tmp_path):
    path = tmp_path / "judged.json"
    row = {"question_text": "<image>\nQ?", "gt_answer_text": "dog", "pred_answer_text": "dog"}
    path.write_text(json.dumps([{**row, "question_id": 1, "score": 1}, {**row, "question_id": 2, "score": 0.5}]))
    found = json.loads(run("score", "--protocol", "answers", "--predictions", path, "--json"))
    assert found["columns"]["judge_published"]["counted"]["mean"] == 0.75
    assert found["columns"]["exact"]["counted"]["mean"] == 1


def test_judge_score_agree_compare_and_leaderboard_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    truth, names = tmp_path / "truth", list(VISCOT_QUESTIONS)
    kinds = {"a": ["good", "wrong", "mute"], "b": ["good", "good", "busy"]}
    for dataset in names:
        benchmark(truth / f"{dataset}.json", dataset, {0: "t", 1: "t", 2: "t"})
        for checkpoint, answers in kinds.items():
            rows = [{"question_id": i, "text": f"{kind} {checkpoint} {dataset}"} for i, kind in enumerate(answers)]
            lines(tmp_path / checkpoint / f"{dataset}.jsonl", rows)
    with serving(Court()) as url:
        for checkpoint in kinds:
            said = run(
                "judge", "--predictions", tmp_path / checkpoint, "--truth", truth, "--model", "court",
                "--base-url", url, "--out", tmp_path / f"{checkpoint}.judged.jsonl",
            )  # fmt: skip
            assert f"33 answers judged: 0 failed, {11 if checkpoint == 'a' else 0} replies" in said
    for checkpoint in kinds:
        said = run(
            "score", "--protocol", "answers", "--predictions", tmp_path / checkpoint, "--truth", truth,
            "--judgements", tmp_path / f"{checkpoint}.judged.jsonl", "--out", tmp_path / f"{checkpoint}.results.jsonl",
        )  # fmt: skip
        assert f"counted 0: {'0.267' if checkpoint == 'a' else '0.800'}" in said
    a, b = tmp_path / "a.results.jsonl", tmp_path / "b.results.jsonl"
    judged = json.loads(run("compare", a, b, "--json"))["columns"]["judge"]
    assert (judged["counted"]["a"], judged["counted"]["b"]) == (pytest.approx(0.8 / 3), pytest.approx(0.8))
    assert judged["left_out"]["difference"] == pytest.approx(0.4)
    table = run("compare", a, b)
    assert "+53.3" in table
    assert "failures left out" in table
    with_itself = json.loads(run("agree", tmp_path / "a.judged.jsonl", tmp_path / "a.judged.jsonl", "--json"))
    assert (with_itself["n"], with_itself["same"], with_itself["unread"]) == (22, 1.0, 11)

    swapped = run(
        "score", "--protocol", "answers", "--predictions", tmp_path / "b", "--truth", truth,
        "--judgements", tmp_path / "a.judged.jsonl", code=1,
    )  # fmt: skip
    assert "judge anew" in swapped

    page = tmp_path / "page.html"
    run("leaderboard", f"mine={a}", "--judge", "court", "--out", page)
    html = page.read_text()
    assert "http" not in html
    assert "<script" not in html
    assert "Qwen2.5-VL-7B" in html
    assert "gpt-3.5-turbo-1106" in html
    assert "mine</strong>, Visual-CoT: not the whole benchmark: docvqa has 3 of 888" in html
