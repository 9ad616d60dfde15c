"""Both readings of results, and paired comparison, by hand on small tables."""

from __future__ import annotations

import json

import pytest

from visrl.box import Box
from visrl.evaluate.compare import compare
from visrl.evaluate.results import read_results
from visrl.records import RecordError, Sample
from visrl.rewards.results import Result, summarise
from visrl.rollout.controls import published_control

ROWS = [
    {"id": "1", "dataset": "gqa", "judge": 1.0, "hit": 1, "hit_published": 1, "iou": 0.8},
    {"id": "2", "dataset": "gqa", "judge": None, "hit": 0, "hit_published": 0, "iou": 0.2, "error": "time-out"},
    {"id": "3", "dataset": "gqa", "judge": 0.5, "hit": None, "hit_published": 0, "iou": None, "bad_truth": True},
    {"id": "4", "dataset": "gqa", "judge": 0.5, "hit": 0, "hit_published": 0, "iou": 0.0, "unparseable": True},
    {"id": "1", "dataset": "vsr", "judge": 1.0, "hit": 1, "iou": 1.0},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_both_readings_by_hand():
    result = summarise(ROWS)
    assert {name: result[name] for name in ("n", "failed", "unparseable", "bad_truth")} == {
        "n": 5, "failed": 1, "unparseable": 1, "bad_truth": 1,
    }  # fmt: skip
    gqa = result["datasets"]["gqa"]["columns"]
    assert gqa["judge"]["unread"] == 1
    assert gqa["judge"]["counted"]["mean"] == pytest.approx(2.0 / 4)
    assert gqa["judge"]["left_out"]["mean"] == pytest.approx(2.0 / 3)
    assert (gqa["hit"]["counted"]["n"], gqa["hit"]["counted"]["mean"]) == (4, 0.25)
    for column in ("hit", "hit_published"):  # a bad truth is left out even where the published rule called it wrong
        assert (gqa[column]["left_out"]["n"], gqa[column]["left_out"]["mean"]) == (3, pytest.approx(1 / 3))
    # Over data sets: the unweighted mean, not the mean over questions.
    assert result["columns"]["judge"]["counted"]["mean"] == pytest.approx((0.5 + 1.0) / 2)
    assert result["columns"]["judge"]["left_out"]["n"] == 4


def test_a_data_set_without_a_readable_row_gives_no_mean_instead_of_a_higher_one():
    result = summarise([*ROWS, {"id": "1", "dataset": "cub", "judge": None}])
    assert result["columns"]["judge"]["left_out"] is None
    assert result["columns"]["judge"]["counted"]["mean"] == pytest.approx(0.5)
    assert result["datasets"]["cub"]["columns"]["judge"]["left_out"] is None


def test_compare_pairs_by_data_set_and_id_under_both_readings():
    a = [{"id": str(i), "dataset": "x", "correct": i < 4} for i in range(10)]
    b = [{"id": str(i), "dataset": "x", "correct": None if i == 9 else i < 8} for i in reversed(range(12))]
    result = compare(a, b)
    assert (result["n"], result["only_a"], result["only_b"]) == (10, 0, 2)
    counted, left_out = (result["columns"]["correct"][reading] for reading in ("counted", "left_out"))
    assert (counted["n"], counted["a"], counted["b"]) == (10, 0.4, 0.8)
    assert counted["difference"] == pytest.approx(0.4)
    assert counted["p_mcnemar"] == pytest.approx(2 / 2**4)
    assert (left_out["n"], left_out["b"]) == (9, pytest.approx(8 / 9))
    assert result["datasets"]["x"]["correct"]["counted"] == counted


def test_compare_over_data_sets_weighs_them_equally():
    a = [{"id": str(i), "dataset": "large", "judge": 0.5} for i in range(9)] + [{"id": "0", "dataset": "s", "judge": 0}]
    b = [{"id": str(i), "dataset": "large", "judge": 0.5} for i in range(9)] + [{"id": "0", "dataset": "s", "judge": 1}]
    entry = compare(a, b)["columns"]["judge"]["counted"]
    assert entry["difference"] == 0.5
    assert "p_mcnemar" not in entry


def test_results_without_anything_in_common_are_refused():
    with pytest.raises(RecordError, match="no question in common"):
        compare([{"id": "1", "iou": 1}], [{"id": "2", "iou": 1}])
    with pytest.raises(RecordError, match="no column in common"):
        compare([{"id": "1", "iou": 1}], [{"id": "1", "judge": 1}])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"dataset": "x", "iou": 1}], "row 1: not a result: it needs an `id`"),
        ([{"id": "1"}], "row 1: not a result: it has none of the columns"),
        ([{"id": "1", "iou": 1}, {"id": "2", "iou": 1.5}], "row 2: iou is 1.5"),
        ([{"id": "1", "iou": "high"}], "row 1: iou is 'high'"),
        ([{"id": "1", "iou": float("nan")}], "row 1: iou is nan"),
        ([{"id": "1", "iou": 1}, {"id": "1", "iou": 1}], "row 2: the id '1' comes a second time"),
        ([], "holds no results"),
    ],
)
def test_bad_results_are_named_by_file_and_row(tmp_path, rows, said):
    path = write(tmp_path / "results.jsonl", rows)
    with pytest.raises(RecordError) as caught:
        read_results(path)
    assert said in str(caught.value)
    assert "results.jsonl" in str(caught.value)


def test_a_folder_stands_for_its_results_and_drawn_scenes_are_read_as_they_are(tmp_path):
    scene = {"id": "test/17-0", "kind": "digit", "question": "?", "prediction": "7", "correct": True, "iou": 0.7}
    write(tmp_path / "results.jsonl", [scene])
    assert summarise(read_results(tmp_path))["datasets"]["digit"]["columns"]["correct"]["counted"]["mean"] == 1
    with pytest.raises(RecordError, match="no results at"):
        read_results(tmp_path / "nowhere")


# --- Rows and controls of a run -------------------------------------------------------------------------------------

SAMPLE = Sample("gqa/val/7", "a.jpg", "What is it?", "window", Box(0.0, 0.0, 0.5, 0.5), "gqa")


def test_the_row_of_a_question_that_went_well():
    row = Result(SAMPLE, prediction="Window", box_text="[0, 0, 0.5, 0.25]", box=Box(0, 0, 0.5, 0.25)).eval_row()
    assert (row["exact"], row["iou"], row["hit"], row["unparseable"], row["error"]) == (1, 0.5, 0, False, None)


def test_an_unparseable_box_is_the_models_failure_and_a_lost_connection_is_not():
    lost = Result(SAMPLE, prediction=None, box_text="", error="connection lost").eval_row()
    vague = Result(SAMPLE, prediction=None, box_text="on the left", error="box: no box in the form …").eval_row()
    assert (lost["exact"], lost["iou"], lost["hit"], lost["error"]) == (None, None, None, "connection lost")
    assert (vague["exact"], vague["anls"], vague["iou"], vague["hit"], vague["error"]) == (0, 0, 0, 0, None)
    summary = summarise([{**lost, "id": "1"}, {**vague, "id": "2"}])
    assert (summary["failed"], summary["unparseable"]) == (1, 1)
    assert summary["columns"]["hit"]["left_out"]["n"] == 1


def test_rows_without_a_box_or_without_a_true_box():
    assert "iou" not in Result(SAMPLE, prediction="x").eval_row()
    no_truth = Sample("1", "a.jpg", "?", "window", None, "gqa")
    row = Result(no_truth, prediction="window", box_text="[0, 0, 1, 1]", box=Box(0, 0, 1, 1)).eval_row()
    assert (row["bad_truth"], row["iou"], row["hit"], row["exact"]) == (True, None, None, 1)
    boxes_only = Sample("1", "a.jpg", "?", "", Box(0, 0, 1, 1), "gqa")
    row = Result(boxes_only, prediction=None, box_text="[0, 0, 1, 1]", box=Box(0, 0, 1, 1)).eval_row()
    assert (row["iou"], "exact" in row) == (1, False)


def test_control_boxes_are_seeded_and_inside_the_picture():
    # The middle half of a square of 200 around a 200 × 100 picture: its rows 50 to 150, the picture's 0 to 100.
    assert published_control("center", (200, 100), "1").as_list() == pytest.approx([0.25, 0.0, 0.75, 1.0])
    drawn = [published_control("random", (900, 60), str(index)) for index in range(200)]
    assert drawn == [published_control("random", (900, 60), str(index)) for index in range(200)]
    assert drawn != [published_control("random", (900, 60), str(index), seed=1) for index in range(200)]
    assert len({box.x0 for box in drawn}) > 100
