"""The page of evaluations: answers to look at, what failed counted, and no talk of a run that they are not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_report import page_of

from visrl.box import Box
from visrl.manifest import write_manifest
from visrl.records import RecordError, Sample, write_records
from visrl.report.gallery import comparable, draw_lot
from visrl.report.run import load_run
from visrl.report.shapes import ReportError
from visrl.rewards.results import Result, summarise

TRUE = Box(0.1, 0.1, 0.4, 0.4)
ODD = {
    "html": "<script>alert('x')</script> & <b>",
    "right to left": "ما هو الرقم على البطاقة الحمراء؟ \u202e42",
    "one long word": "x" * 5_000,
    "half a surrogate": "red \ud83d tag",
    "controls": "a\0b\x07c\x1b[31m\x85",
    "emoji": "🏷️ 👩🏽\u200d🔬 7️⃣",
    "braces": "{{ 7 * 7 }} {% raw %} ${x} `y`",
    "empty": "",
}


def write_evaluation(folder: Path, rows: list[dict], mode: str = "own") -> Path:
    """A finished evaluation as `visrl eval` leaves it."""
    write_records(folder / "results.jsonl", rows)
    facts = {"benchmark": "samples", "model": "tiny", "mode": mode, **summarise(rows)}
    (folder / "scores.json").write_text(json.dumps(facts))
    write_manifest(folder, verb="eval", config={"mode": mode}, parents={})
    return folder


def rows_of(count: int, box: Box | None = TRUE, prediction: str | None = "7", error: str | None = None) -> list[dict]:
    samples = [Sample(f"{n}", f"scene:test@1/{n}", "Which number?", "7", TRUE, source="scenes") for n in range(count)]
    return [
        Result(one, prediction=prediction, box=box, box_text=str(box) if box else "", error=error).eval_row()
        for one in samples
    ]


def test_two_evaluations_are_compared_question_by_question(tmp_path):
    """One of the folders is called `eval`, as the embedded configs have it: that makes no unfinished run of it."""
    write_evaluation(tmp_path / "eval", rows_of(5, Box(0.5, 0.5, 0.9, 0.9), "8"))
    write_evaluation(tmp_path / "eval-truth", rows_of(5), "truth")
    page = page_of(tmp_path)
    assert "not finished" not in page.text
    assert "not there yet" not in page.text
    assert [attrs["id"] for attrs in page.all("section")] == ["results", "gallery", "notes", "making"]
    assert len([one for one in page.all("img") if one.get("class") == "picture"]) == 5
    assert page.text.count("✗ 8") >= 5
    assert page.text.count("✓ 7") >= 5
    assert "from eval to eval-truth" in page.text
    assert "wrong → right 5" in page.text


def test_one_evaluation_shows_its_answers_and_counts_what_failed(tmp_path):
    rows = rows_of(6) + rows_of(9, None, None, "engine: it was away")[6:]
    rows[4]["image"] = "nowhere/4.png"
    page = page_of(write_evaluation(tmp_path, rows))
    assert "3 questions ended in an error and count as wrong" in page.text
    assert page.text.count("✗ engine: it was away") >= 3
    assert "no picture at nowhere/4.png" in page.text
    assert "9 of 9 test questions" in page.text
    everything = rows_of(3, None, None, "engine: it was away")
    page = page_of(write_evaluation(tmp_path / "all", everything))
    assert "✓ engine" not in page.text
    assert "✗ engine" in page.text


def looked_rows() -> list[dict]:
    """Questions that were answered after no look, after one, after three, and one that came to no answer."""
    boxes = [Box(0.5, 0.5, 0.9, 0.9), Box(0.05, 0.6, 0.3, 0.9), TRUE]
    rows = []
    for row, count in zip(rows_of(4), (0, 1, 3, 2), strict=True):
        own = [box.as_list() for box in boxes[3 - count :]]
        rows.append(row | {"looks": own, "end": "answered", "box": own[-1] if own else None, "iou": 1.0 * bool(own)})
    rows[3] |= {"end": "turns", "prediction": "", "exact": 0}
    return rows


def test_several_looks_are_shown_in_their_order_and_counted(tmp_path):
    page = page_of(write_evaluation(tmp_path, looked_rows()))
    crops = [one["alt"] for one in page.all("img") if "Look " in one.get("alt", "")]
    name = tmp_path.name
    assert sorted(crops) == sorted(f"Look {n} of {name}" for n in (1, 1, 2, 3, 1, 2))
    places = [crops.index(f"Look {n} of {name}") for n in (1, 2, 3)]
    assert places == sorted(places)
    for told in ("did not look", "1 look, IoU", "3 looks, the last: IoU", "2 looks, the last: IoU 1.000 · ended: turns",
                 "✗ no answer", "0 1 25.0", "How the episodes ended: answered 3, turns 1."):  # fmt: skip
        assert told in page.text.replace("\u00a0", " "), told
    other = write_evaluation(tmp_path / "both" / "second", looked_rows())
    write_evaluation(tmp_path / "both" / "first", rows_of(4))
    text = page_of(other.parent).text
    assert "the last of second's 3 boxes has IoU 1.00" in " ".join(
        one.get("alt", "") for one in page_of(other.parent).all("img")
    )
    assert text.count("How often it looked") == 2  # a section and its link


def test_controls_without_boxes_and_questions_without_a_true_one_are_shown(tmp_path):
    samples = [Sample(str(n), f"scene:test@1/{n}", "Which number?", "7", source="scenes") for n in range(3)]
    write_evaluation(tmp_path / "a", [Result(one, prediction="7").eval_row() for one in samples], "no_box")
    boxed = [Result(one, prediction="7", box=TRUE, box_text="[]").eval_row() for one in samples]
    write_evaluation(tmp_path / "b", boxed)
    text = page_of(tmp_path).text
    assert "no box" in text
    assert "no IoU" in text
    assert "3 questions had no true box to compare with" in text


def test_what_crops_gain_is_told_of_two_modes_of_one_model(tmp_path):
    write_evaluation(tmp_path / "a", [{**row, "exact": float(n > 6)} for n, row in enumerate(rows_of(8))], "no_crop")
    write_evaluation(tmp_path / "b", [{**row, "exact": float(n < 7)} for n, row in enumerate(rows_of(8))])
    assert "b over a 7 87.5 % 1 12.5 % +75.0 points" in page_of(tmp_path).text


def test_evaluations_of_other_questions_are_not_compared(tmp_path):
    first = write_evaluation(tmp_path / "a", rows_of(2))
    other = write_evaluation(tmp_path / "b", [row | {"id": f"other-{row['id']}"} for row in rows_of(2)])
    evaluations = load_run(tmp_path).evaluations
    assert [one.title for one in comparable(evaluations)] == ["a"]
    assert "2 of 2 test questions" in page_of(tmp_path).text
    shutil.rmtree(other)
    (first / "results.jsonl").unlink()  # scores alone are still worth a table
    assert [attrs["id"] for attrs in page_of(tmp_path).all("section")] == ["results", "notes", "making"]


@pytest.mark.parametrize("kind", ODD)
def test_odd_texts_are_shown_as_text(kind, tmp_path):
    text = ODD[kind]
    sample = Sample(f"id {text}", "scene:test@1/0", text, text or "x", TRUE, source=text)
    row = Result(sample, prediction=text, box=TRUE, box_text=text).eval_row()
    page = page_of(write_evaluation(tmp_path, [row, row | {"id": "2", "error": text or "?", "prediction": None}]))
    assert not page.open
    assert len(page.all("script")) == 1  # the page's own
    shown = {"half a surrogate": "red \\ud83d tag", "empty": "(an empty reply)", "controls": "a\0b\x07c"}.get(
        kind, text
    )
    assert " ".join(shown.split()) in page.text


def test_the_lot_takes_names_that_no_file_could_hold():
    assert sorted(draw_lot(["a\ud800", "b"])) == ["a\ud800", "b"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"box": [0, 0, 1]}, "box is .* four fractions"),
        ({"box": ["a", 0, 1, 1]}, "box is"),
        ({"true_box": [0, 0, 5, 5]}, "true_box is"),
        ({"exact": "yes"}, "exact is 'yes'"),
        ({"looks": [[0, 0, 1, 1], [0, 0, 1]]}, r"looks\[1\] is .* four fractions"),
        ({"repeat": [1]}, r"repeat is \[1\]"),
    ],
)
def test_damaged_results_are_named(change, message, tmp_path):
    write_evaluation(tmp_path, rows_of(2))
    write_records(tmp_path / "results.jsonl", [rows_of(1)[0] | change])
    with pytest.raises((ReportError, RecordError), match=rf"results\.jsonl, row 1: {message}"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scores.json", {"columns": None}, "columns: "),
        ("scores.json", {"n": "many"}, "n: "),
        (
            "scores.json",
            {"columns": {"exact": {"counted": {"mean": 1.0, "low": None, "high": 1.0}}}},
            "exact.counted.low",
        ),
        ("scores.json", [1], "no JSON object"),
        ("manifest.json", {"config": None}, "config: "),
        ("summary.json", {"stages": [{"name": "sft"}]}, "no 'stages.0.answer_accuracy'"),
        ("summary.json", {"seconds_by_step": []}, "seconds_by_step: "),
        ("log.jsonl", {"step": {}}, "row 1: step: "),
    ],
)
def test_damaged_files_of_a_run_are_named_with_the_key(name, value, message, tmp_path):
    write_evaluation(tmp_path, rows_of(2))
    (tmp_path / name).write_text(json.dumps(value) + "\n")
    with pytest.raises(ReportError) as caught:
        load_run(tmp_path)
    assert f"{tmp_path / name}" in str(caught.value)
    assert message in str(caught.value)


def test_what_went_wrong_in_a_training_is_counted_and_the_rest_drawn(tmp_path):
    losses = [1.0, float("nan"), float("inf"), 0.5]
    write_records(tmp_path / "log.jsonl", [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)])
    page = page_of(tmp_path)
    assert "2 values in the log of training are not finite, and not drawn" in page.text
    assert len(page.all("svg")) == 1


def test_a_finished_training_is_no_unfinished_run(tmp_path):
    write_records(tmp_path / "log.jsonl", [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}])
    assert "the end of the training is not there yet" in page_of(tmp_path).text
    write_manifest(tmp_path, verb="train", config={}, parents={})
    assert "not there yet" not in page_of(tmp_path).text
