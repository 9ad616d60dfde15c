"""Controls and measures of intention: another question's box, the right object, grounded × right, what a crop gains."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import ClassVar

import pytest
from test_evaluate_rollouts import Listener

from visrl.box import Box
from visrl.config import ConfigError
from visrl.engines.base import Completion
from visrl.evaluate.compare import compare
from visrl.evaluate.config import EvalConfig
from visrl.evaluate.results import read_results
from visrl.evaluate.run import evaluate
from visrl.evaluate.tables import comparison_lines
from visrl.evolve.clock import StepClock
from visrl.evolve.scores import write_summary
from visrl.models.tiny import CHECKPOINT
from visrl.records import Sample, write_records
from visrl.rewards.crop_effects import QUADRANTS, gain_and_harm, quadrants
from visrl.rewards.grounding import evidence_of, is_grounded, is_on_right_object, other_objects
from visrl.rewards.results import NO_OTHER, Result, summarise, summarise_kinds, summarise_measures, training_measures
from visrl.rewards.scored import evaluate_samples, with_surroundings
from visrl.rollout.controls import other_questions
from visrl.scenes import find_question, scene_samples

LEFT, RIGHT, TOP = Box(0, 0.4, 0.3, 0.7), Box(0.6, 0.4, 0.9, 0.7), Box(0.3, 0, 0.6, 0.3)
SCENES = scene_samples("validation", 0, 12, with_box=True)


def one(name: str, question: str, box: Box | None = None, image: str = "a.png", **keys) -> Sample:
    return Sample(name, image, question, "7", box, "own", **keys)


# --- Another question of the same image -------------------------------------------------------------------------------


def test_the_other_question_of_a_scene_is_about_another_tag_and_of_the_same_kind_where_there_is_one():
    others = other_questions(SCENES)
    assert others == other_questions(SCENES)
    assert [other_questions([sample])[0] for sample in SCENES] == others  # whatever else is asked in the run
    assert others != other_questions(SCENES, seed=1)
    kinds = 0
    for sample, other in zip(SCENES, others, strict=True):
        assert other is not None
        (scene, asked), (same, told) = find_question(sample.id), find_question(other.id)
        assert same == scene
        assert told.target != asked.target
        assert (other.image, other.question, other.box != sample.box) == (sample.image, told.text, True)
        kinds += told.kind == asked.kind
    assert kinds > len(SCENES) / 2


def test_a_scene_of_one_tag_and_an_image_of_one_question_have_no_other():
    assert other_questions(scene_samples("validation", 0, 3, with_box=True, max_tags=1)) == [None] * 3
    assert other_questions([one("1", "What?", LEFT), one("2", "What?", LEFT, image="b.png")]) == [None, None]


def test_elsewhere_the_other_question_is_one_of_the_run_about_another_region():
    samples = [
        one("1", "Which number is left?", LEFT),
        one("2", "What does the left one say?", Box(0.01, 0.4, 0.31, 0.7)),  # the same region, drawn again
        one("3", "which  number is LEFT?", RIGHT),  # the same question again
        one("4", "Which number is right?", RIGHT),
        one("5", "Is it day?"),  # no box: another text is all that is known
    ]
    chosen = {other_questions(samples, seed)[0].id for seed in range(40)}
    assert chosen == {"4", "5"}


class Reader(Listener):
    """A policy that looks at another place for each question, and answers with the place that it was shown."""

    BOXES: ClassVar = {
        "left": "[0.000, 0.400, 0.300, 0.700]",
        "right": "[0.600, 0.400, 0.900, 0.700]",
        "blind": "nowhere",
    }

    def complete(self, conversations, sampling, seeds):
        self.heard += [(talk, sampling) for talk in conversations]
        said = []
        for talk in conversations:
            word = next(word for word in self.BOXES if word in talk.messages[-1].text)
            said.append([Completion(self.BOXES[word] if len(talk.views) == 1 else talk.views[1].key.split(":")[-1])])
        return said


def questions_about(image: str) -> list[Sample]:
    return [one(f"{image}-left", "left?", LEFT, image), one(f"{image}-right", "right?", RIGHT, image)]


def test_the_crop_of_the_other_questions_box_is_shown_in_place_of_the_own():
    samples = questions_about(SCENES[0].image)
    rows = evaluate_samples(Reader(), samples, mode="other_question")
    assert [row["box"] for row in rows] == [RIGHT.as_list(), LEFT.as_list()]
    assert [row["prediction"].split(",")[0] for row in rows] == ["0.600000", "0.000000"]
    assert [(row["iou"], row["right_object"], row["grounded"]) for row in rows] == [(0, False, False)] * 2
    own = evaluate_samples(Reader(), samples)
    assert [(row["iou"], row["right_object"], row["grounded"]) for row in own] == [(1, True, True)] * 2


def test_a_batch_need_not_hold_the_questions_of_an_image_together():
    samples = questions_about(SCENES[0].image) + questions_about(SCENES[1].image)
    apart = [samples[n] for n in (0, 2, 1, 3)]
    asked = with_surroundings(apart, "other_question")
    assert [one.other.id.split("-")[-1] for one in asked] == ["right", "right", "left", "left"]
    whole = evaluate_samples(Reader(), apart, mode="other_question")
    assert sorted(whole, key=lambda row: row["id"]) == sorted(
        evaluate_samples(Reader(), samples, mode="other_question"), key=lambda row: row["id"]
    )


def test_without_another_question_a_row_is_skipped_and_counted_and_an_unreadable_box_is_wrong():
    lonely = one("3", "left?", LEFT, SCENES[2].image)
    blind = [one("4", "left?", LEFT, SCENES[3].image), one("5", "blind?", RIGHT, SCENES[3].image)]
    rows = evaluate_samples(Reader(), [*questions_about(SCENES[0].image), lonely, *blind], mode="other_question")
    assert [row.get("skipped") for row in rows] == [None, None, NO_OTHER, None, None]
    assert [row["correct"] for row in rows] == [False, False, None, False, False]
    assert summarise_measures(rows)["answer_accuracy"]["mean"] == 0
    assert rows[3]["box"] is None  # "blind?" got no box, so "left?" got no crop
    skipped = Result(lonely, mode="other_question", skipped=NO_OTHER).eval_row()
    unread = Result(lonely, box_text="nowhere", error="box: no box", mode="other_question").eval_row()
    right = Result(lonely, "7", "[…]", LEFT, mode="other_question", size=(672, 672)).eval_row()
    summary = summarise([skipped, {**unread, "id": "4"}, {**right, "id": "5"}])
    assert (summary["n"], summary["skipped"], summary["unparseable"]) == (3, 1, 1)
    assert summary["columns"]["exact"] == {
        "unread": 0,
        **{r: summary["columns"]["exact"][r] for r in ("counted", "left_out")},
    }
    assert [summary["columns"]["exact"][reading]["mean"] for reading in ("counted", "left_out")] == [0.5, 0.5]


def test_an_evaluation_of_other_questions_resumes_with_the_same_files(tmp_path, capsys):
    samples = [*questions_about("scene:validation/1"), one("3", "left?", LEFT, "scene:validation/2")]
    write_records(tmp_path / "own.jsonl", samples)
    keys = {"dataset": str(tmp_path / "own.jsonl"), "model_name_or_path": str(CHECKPOINT), "mode": "other_question"}
    evaluate(EvalConfig(output_dir=tmp_path / "whole", batch_size=1, **keys))
    said = capsys.readouterr().out
    assert f"{NO_OTHER}: 1, left out of the figures" in said
    assert f"1 left out ({NO_OTHER})" in said
    rows = read_results(tmp_path / "whole")
    assert [row.get("skipped") for row in rows] == [None, None, NO_OTHER]
    out = evaluate(EvalConfig(output_dir=tmp_path / "again", batch_size=1, **keys))
    files = {name: (out / name).read_bytes() for name in ("results.jsonl", "scores.json")}
    (out / "results.jsonl").rename(out / "journal.jsonl")
    lines = (out / "journal.jsonl").read_text().splitlines(keepends=True)
    (out / "journal.jsonl").write_text(lines[0])
    (out / "scores.json").unlink()
    evaluate(EvalConfig(output_dir=out, batch_size=1, **keys))
    assert {name: (out / name).read_bytes() for name in files} == files
    write_records(tmp_path / "lonely.jsonl", samples[2:])
    with pytest.raises(ConfigError, match="needs a data set with several questions an image"):
        evaluate(EvalConfig(output_dir=tmp_path / "no", **keys | {"dataset": str(tmp_path / "lonely.jsonl")}))


# --- The right object, and the evidence -------------------------------------------------------------------------------


def test_the_right_object_is_the_one_that_the_box_overlaps_most():
    assert is_on_right_object(Box(0, 0.4, 0.2, 0.7), LEFT, [RIGHT, TOP])
    assert is_on_right_object(Box(0, 0.4, 0.5, 0.7), LEFT, [RIGHT, TOP])  # too wide, and still on the left one most
    assert not is_on_right_object(Box(0.2, 0.4, 0.9, 0.7), LEFT, [RIGHT, TOP])
    assert not is_on_right_object(Box(0.9, 0.9, 1, 1), LEFT, [RIGHT, TOP])  # on none
    assert not is_on_right_object(None, LEFT, [RIGHT, TOP])


def test_objects_are_the_tags_of_a_scene_and_elsewhere_the_true_boxes_of_the_questions_of_an_image():
    for sample, objects in zip(SCENES, other_objects(SCENES), strict=True):
        scene, _ = find_question(sample.id)
        assert len(objects) == len(scene.tags) - 1
        assert sample.box not in objects
    samples = [
        one("1", "left?", LEFT),
        one("2", "left again?", Box(0.01, 0.4, 0.31, 0.7)),
        one("3", "right?", RIGHT),
        one("4", "unknown?"),
        one("5", "alone?", TOP, image="b.png"),
    ]
    left, again, right, unknown, alone = other_objects(samples)
    assert left == again == (RIGHT,)
    assert set(right) == {LEFT, samples[1].box}
    assert unknown == alone == ()


def test_a_measure_that_does_not_apply_is_left_out_and_counted():
    seen = Result(one("1", "?", LEFT), "7", "[…]", LEFT, size=(100, 100), others=(RIGHT,))
    rows = [
        seen.eval_row(),
        replace(seen, sample=one("2", "?", LEFT), box=RIGHT).eval_row(),
        replace(seen, sample=one("3", "?", LEFT), others=()).eval_row(),
        Result(one("4", "?", LEFT), box_text="no", error="box: none", others=(RIGHT,)).eval_row(),
        Result(one("5", "?", LEFT), box_text="", error="engine: lost", others=(RIGHT,)).eval_row(),
    ]
    assert [row.get("right_object", "–") for row in rows] == [1, 0, "–", 0, None]
    column = summarise(rows)["columns"]["right_object"]
    assert (column["not_applicable"], column["unread"]) == (1, 1)
    assert [(column[reading]["n"], column[reading]["mean"]) for reading in ("counted", "left_out")] == [
        (4, 0.25),
        (3, pytest.approx(1 / 3)),
    ]
    loop = [
        replace(seen, sample=one("1", "?", LEFT)).loop_row(),
        replace(seen, error="box: none", box=None, others=()).loop_row(),
    ]
    assert summarise_measures(loop)["right_object"]["mean"] == 1
    assert training_measures(loop)["right_object"] == 1
    assert summarise_kinds(loop)["own"]["right_object"] == 1
    assert "right_object" not in summarise_measures(loop[1:])
    assert "right_object" not in training_measures(loop[1:])
    # The whole image in place of a crop is on no object, and a crop of nothing.
    assert not {"right_object", "grounded"} & replace(seen, mode="no_crop").loop_row().keys()


def test_a_crop_is_grounded_from_half_of_the_evidence_on():
    evidence = Box(0.4, 0.4, 0.6, 0.6)
    assert is_grounded(Box(0.4, 0.4, 0.5, 0.6), evidence, (1000, 1000), "exact")
    assert not is_grounded(Box(0.4, 0.4, 0.49, 0.6), evidence, (1000, 1000), "exact")
    # What is cropped decides, not what the box says: a square of at least 224 px holds more.
    assert is_grounded(Box(0.4, 0.4, 0.49, 0.6), evidence, (1000, 1000), "viscot_square")
    assert not is_grounded(None, evidence, (1000, 1000), "exact")
    drawn = evidence_of(SCENES[0])
    assert drawn is not None
    assert drawn.area < SCENES[0].box.area / 3  # the number on the tag, or its dots
    assert evidence_of(one("1", "?", LEFT)) == LEFT
    assert evidence_of(one("1", "?")) is None


# --- Four cells, gain and harm ----------------------------------------------------------------------------------------


def looked(name: int, right: bool, grounded: bool | None, **more) -> dict:
    return {"id": str(name), "kind": "own", "correct": right, "grounded": grounded, "error": None, **more}


def test_four_cells_sum_to_all_whose_evidence_is_known():
    rows = [looked(n, right, grounded) for n, (right, grounded) in enumerate(
        [(True, True)] * 5 + [(False, True)] * 2 + [(True, False)] * 3 + [(False, False)] + [(True, None)]
    )]  # fmt: skip
    cells = quadrants([*rows, looked(99, True, True, skipped=NO_OTHER)])
    assert [cells[name] for name in QUADRANTS] == [5, 2, 3, 1]
    assert (sum(cells[name] for name in QUADRANTS), cells["n"], cells["left_out"]) == (11, 11, 1)
    assert quadrants([looked(0, True, None)]) == {}


def test_gain_less_harm_is_the_difference_of_the_accuracies():
    with_crop = [looked(n, n % 10 < 7, True) for n in range(30)]
    without = [looked(n, n % 3 == 0, None) for n in reversed(range(31))]
    found = gain_and_harm(without, with_crop)
    assert found["n"] == 30 == found["both"] + found["gain"] + found["harm"] + found["neither"]
    right = [sum(row["correct"] for row in rows) for rows in (with_crop, [row for row in without if row["id"] != "30"])]
    assert found["gain"] - found["harm"] == right[0] - right[1] == 11
    assert found["difference"] == 11 / 30
    assert found["low"] < found["difference"] < found["high"]
    assert gain_and_harm(without, [looked(77, True, True)]) == {}
    result = compare(without, with_crop)
    assert result["right"] == found
    lines = comparison_lines(result, "a", "b", is_crop=True)
    assert "crop gain     14 (46.7%), right in B alone" in lines
    assert "crop harm      3 (10.0%), right in A alone" in lines
    assert any(line.startswith("gain − harm = +11 = +36.7 points") for line in lines)


def test_a_summary_has_the_measures_of_every_stage_and_kind(tmp_path):
    samples = scene_samples("test", 0, 10, with_box=True)
    for name in ("sft", "iter0-stage1", "iter0-stage2"):
        write_records(tmp_path / f"eval/{name}.jsonl", evaluate_samples(Listener(), samples))
    for mode in ("no_crop", "other_question"):
        write_records(tmp_path / f"eval/iter0-stage2.{mode}.jsonl", evaluate_samples(Listener(), samples, mode=mode))
    (tmp_path / "peak_rss.json").write_text('{"mb": 1}')
    clock = StepClock(tmp_path / "seconds.json")
    names = ["sft", "iter0-stage1", "iter0-stage2"]
    summary = write_summary(tmp_path, names, 0, seed=0, clock=clock, config={})
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    for stage in summary["stages"]:
        assert set(stage["right_object"]) == {"mean", "low", "high"}
        assert set(stage["by_kind"]) == {sample.source.removeprefix("scenes-") for sample in samples}
        assert all(set(own) == {"n", "answer_accuracy", "box_iou", "right_object"} for own in stage["by_kind"].values())
        assert sum(stage["quadrants"][name] for name in QUADRANTS) == 10
    assert "crop" not in summary["stages"][0]
    crop, without = summary["stages"][2]["crop"], summary["controls_last"]["no_crop"]["answer_accuracy"]["mean"]
    assert (crop["gain"] - crop["harm"]) / 10 == pytest.approx(
        summary["stages"][2]["answer_accuracy"]["mean"] - without
    )
    assert summary["controls_last"]["other_question"]["n"] == 10
