"""Rows are told apart by where they stand: an id is its user's, and may stand for several rows, everywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from visrl.data.convert import convert
from visrl.data.native import from_json, read_records
from visrl.data.sources import read_preferences, read_samples
from visrl.evaluate.answers import answer_to_judge, score_answers, with_judgements
from visrl.evaluate.compare import compare
from visrl.evaluate.config import EvalConfig
from visrl.evaluate.results import read_results
from visrl.evaluate.run import evaluate
from visrl.evolve.config import FilterConfig, GenerateConfig
from visrl.evolve.filter import filter_pairs
from visrl.evolve.generate import generate
from visrl.models.tiny import CHECKPOINT
from visrl.prompts import answer_prompt, focus_prompt
from visrl.records import (
    Preference,
    RecordError,
    Sample,
    Trajectory,
    Verdict,
    read_jsonl,
    to_json,
    write_records,
)
from visrl.rewards.critic import ModelCritic
from visrl.rewards.judge import Judgement, judgement_key
from visrl.rollout.controls import matched_control
from visrl.scenes import scene_samples
from visrl.train.config import TrainConfig
from visrl.train.data import Preferences
from visrl.train.items import Branch
from visrl.train.run import train
from visrl.train.trainer import reference_of

FILES = ("trajectories.jsonl", "verdicts.jsonl")


def questions(path: Path, ids: list[Any]) -> str:
    """Drawn questions under these ids, an oracle's ids aside."""
    drawn = scene_samples("preference", 0, len(ids), with_box=True)
    rows = [
        {"id": name, "image": one.image, "question": one.question, "answer": one.answer, "box": one.box.as_list()}
        for name, one in zip(ids, drawn, strict=True)
        if one.box is not None
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def generation(out: Path, dataset: str, **more: Any) -> GenerateConfig:
    model = str(CHECKPOINT)
    given = {"model_name_or_path": model, "critic_model_name_or_path": model, "critic_attempts": 1, "rounds": 1}
    return GenerateConfig(output_dir=out, dataset=dataset, batch_size=2, **given | more)


@pytest.fixture(scope="module")
def three_of_one_id(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("places")
    return generate(generation(folder / "out", questions(folder / "rows.jsonl", ["a", "a", "b", "a"])))


def test_generation_tries_every_row_of_an_id_and_draws_each_by_itself(three_of_one_id):
    tried = list(read_records(Trajectory, three_of_one_id / FILES[0]))
    assert [t.place for t in tried[::2]] == [("a",), ("a", 1), ("b",), ("a", 2)]
    assert len({t.seed for t in tried}) == len(tried)
    assert [v.place for v in read_records(Verdict, three_of_one_id / FILES[1])] == [t.place for t in tried]
    assert b"repeat" not in (three_of_one_id / FILES[0]).read_bytes().splitlines()[0]


def test_where_ids_are_unique_the_draws_are_those_of_the_id_alone(three_of_one_id, tmp_path):
    rows = questions(tmp_path / "rows.jsonl", ["a", "c", "b", "d"])
    tried = list(read_records(Trajectory, generate(generation(tmp_path / "out", rows)) / FILES[0]))
    same = list(read_records(Trajectory, three_of_one_id / FILES[0]))
    for number in (0, 1, 4, 5):  # the two tries of the first "a", and those of "b"
        assert to_json(tried[number]) == to_json(same[number])


def test_a_stopped_generation_over_rows_of_one_id_ends_as_an_uninterrupted_one(three_of_one_id, tmp_path):
    out = Path(shutil.copytree(three_of_one_id, tmp_path / "out"))
    (out / "manifest.json").unlink()
    for name in FILES:
        lines = (out / name).read_bytes().splitlines(keepends=True)
        (out / name).write_bytes(b"".join(lines[:5]))
    generate(generation(out, str(three_of_one_id.parent / "rows.jsonl")))
    assert [(out / name).read_bytes() for name in FILES] == [(three_of_one_id / name).read_bytes() for name in FILES]


def test_the_filter_gives_each_row_of_an_id_its_own_pair_and_box(three_of_one_id, tmp_path):
    tried = list(read_records(Trajectory, three_of_one_id / FILES[0]))
    folder = tmp_path / "generated"
    folder.mkdir()
    boxes = [[0.1, 0.1, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9]]
    written = [
        to_json(t) | {"box": boxes[t.branch], "box_text": f"[{n}]", "answer": f"{t.place} {t.branch}", "error": None}
        for n, t in enumerate(tried)
    ]
    write_records(folder / FILES[0], written)
    write_records(
        folder / FILES[1],
        [Verdict(t.sample_id, 0, t.branch, 1.0 - t.branch, 1.0 - t.branch, repeat=t.repeat) for t in tried],
    )
    rows = str(three_of_one_id.parent / "rows.jsonl")
    counts = filter_pairs(FilterConfig(input_dir=[folder], dataset=rows, output_dir=tmp_path / "pairs"))
    assert (counts["questions"], counts["kept"], sum(counts["boxes"].values())) == (4, 4, 4)
    made = read_preferences(str(tmp_path / "pairs" / "preferences.jsonl"))
    samples = read_samples(rows)
    assert [p.prompt for p in made if p.step == "box"] == [focus_prompt(sample.question) for sample in samples]
    assert [p.chosen for p in made if p.step == "answer"] == [f"{sample.place} 0" for sample in samples]
    assert (tmp_path / "pairs" / "pairs.html").read_text().count("<article") in (0, 4)


def test_a_critic_asked_about_two_rows_of_one_id_is_asked_twice():
    """The same box and the same answer to two questions of one id are two things to judge."""

    class Counting:
        name = "counting"
        asked = 0

        def complete(self, conversations, sampling, seeds):
            from visrl.engines.base import Completion

            self.asked += len(conversations)
            return [[Completion(f"score: {0.1 * n:.1f}")] for n in range(1, len(conversations) + 1)]

    first, second = scene_samples("train", 0, 2, with_box=True)[:2]
    samples = [
        Sample("a", one.image, one.question, one.answer, one.box, repeat=n) for n, one in enumerate((first, second))
    ]
    box = first.box
    tries = [Trajectory("a", 0, 0, "", box, "sampled", "7", "x", 0, repeat=n) for n in (0, 1)]
    engine = Counting()
    verdicts = ModelCritic(engine).judge(samples, tries)
    assert engine.asked == 4
    assert len({(v.box_score, v.answer_score) for v in verdicts}) == 2
    assert matched_control("random", samples[0]) != matched_control("random", samples[1])


# --- Training ---------------------------------------------------------------------------------------------------------


def preference(name: str, step: str, image: int, number: int) -> dict[str, Any]:
    whole = f"scene:preference/{image}"
    asked = f"What is on tag {number}?"
    shown: list[Any] = [whole] if step == "box" else [whole, {"ref": whole, "crop": [0.2, 0.2, 0.7, 0.7]}]
    said = [f"[0.{number}00, 0.100, 0.9{number}0, 0.900]", "[0.100, 0.200, 0.300, 0.400]"]
    replies = said if step == "box" else [str(number), str(number + 1)]
    return {
        "id": name, "step": step, "prompt": (focus_prompt if step == "box" else answer_prompt)(asked), "images": shown,
        "chosen": replies[0], "rejected": replies[1],
    }  # fmt: skip


ROWS = [
    preference("a", "box", 0, 1), preference("a", "answer", 0, 1),  # an item
    preference("a", "box", 0, 2), preference("a", "answer", 0, 2),  # another of the same id and picture
    preference("a", "box", 1, 3),  # and of another picture, whose answers were equal
    preference("b", "answer", 2, 4), preference("b", "box", 2, 4),
    preference("a", "box", 0, 5),
]  # fmt: skip


def test_preferences_that_follow_each_other_are_one_item_and_ids_may_repeat(tmp_path):
    write_records(tmp_path / "p.jsonl", ROWS)
    made = Preferences(None, read_preferences(str(tmp_path / "p.jsonl")), stage=2)  # type: ignore[arg-type]
    assert [(name, [one.step for one in item]) for name, item in made.groups] == [
        ("item 1, row a", ["box", "answer"]),
        ("item 2, row a", ["box", "answer"]),
        ("item 3, row a", ["box"]),
        ("item 4, row b", ["answer", "box"]),
        ("item 5, row a", ["box"]),
    ]
    boxes = Preferences(None, read_preferences(str(tmp_path / "p.jsonl")), stage=1)  # type: ignore[arg-type]
    assert [one.step for _, item in boxes.groups for one in item] == ["box"] * 5


def test_converting_to_rankings_keeps_every_item_of_an_id(tmp_path):
    write_records(tmp_path / "p.jsonl", ROWS)
    told = convert("visrl", "sharegpt", [str(tmp_path / "p.jsonl")], str(tmp_path / "out" / "rankings.json"))
    assert (sum(told.written.values()), told.bad.total()) == (5, 0)
    back = read_preferences("rankings", dataset_dir=str(tmp_path / "out"))
    again = Preferences(None, back, stage=2)  # type: ignore[arg-type]
    assert [len(item) for _, item in again.groups] == [2, 2, 1, 2, 1]


def trained(tiny: Path, out: Path, rows: Path, **more: Any) -> list[dict[str, Any]]:
    values: dict[str, Any] = {
        "model_name_or_path": str(tiny), "stage": "dpo", "rl_stage": 2, "dataset": str(rows), "output_dir": str(out),
        "max_steps": 2, "per_device_train_batch_size": 8, "logging_steps": 1, "learning_rate": 1e-3, "processes": 1,
        "save_strategy": "no", "disable_tqdm": True, **more,
    }  # fmt: skip
    train(TrainConfig.model_validate(values))
    return list(read_jsonl(out / "log.jsonl"))


def test_training_begins_at_the_reference_whatever_ids_say(tiny, tmp_path):
    """The policy is the reference at the first step: every margin is 0, the loss log 2 for each step's share."""
    write_records(tmp_path / "same.jsonl", [row | {"id": "a"} for row in ROWS])
    first = trained(tiny, tmp_path / "out", tmp_path / "same.jsonl")[0]
    assert first["rewards/margins/box"] == pytest.approx(0, abs=1e-4)
    assert first["rewards/margins/answer"] == pytest.approx(0, abs=1e-4)
    stored = json.loads((tmp_path / "out" / "reference.json").read_text())["logps"]
    assert len(stored) == 2 * len(ROWS)
    assert len(set(stored.values())) == len(stored)


def test_ids_change_nothing_of_what_is_learned(tiny, tmp_path):
    """The same items under ids of their own and under one id: the same losses, step by step."""
    own = [row | {"id": f"{row['id']} {number // 2}"} for number, row in enumerate(ROWS[:4])]
    write_records(tmp_path / "own.jsonl", own)
    write_records(tmp_path / "same.jsonl", [row | {"id": 7} for row in ROWS[:4]])
    logs = [trained(tiny, tmp_path / name, tmp_path / f"{name}.jsonl") for name in ("own", "same")]
    assert [row["loss"] for row in logs[0] if "loss" in row] == [row["loss"] for row in logs[1] if "loss" in row]


def test_a_missing_reference_log_probability_is_an_error_and_never_0():
    branch = Branch(0, "item 1, a/box", "box", "chosen", 1.0)
    known = {"item 1, a/box/rejected": -3.0}
    with pytest.raises(RecordError, match="no reference log-probability of item 1, a/box/chosen"):
        reference_of([branch], known)
    assert reference_of([branch], known | {"item 1, a/box/chosen": -2.0}) == [-2.0]
    assert reference_of([branch], None) == [0.0]  # a loss without a reference


# --- Evaluation -------------------------------------------------------------------------------------------------------


def test_an_evaluation_answers_every_row_of_an_id_and_resumes(tmp_path):
    rows = questions(tmp_path / "rows.jsonl", ["a", "a", 7, "7", "b"])
    given: dict[str, Any] = {
        "model_name_or_path": str(CHECKPOINT), "benchmark": "samples", "dataset": rows, "batch_size": 2, "mode": "own",
    }  # fmt: skip
    out = evaluate(EvalConfig(output_dir=tmp_path / "out", **given))
    results = read_results(out)
    asked = [sample.question for sample in read_samples(rows)]
    assert [row["question"] for row in results] == asked
    assert [(row["id"], row.get("repeat")) for row in results] == [
        ("a", None), ("a", 1), ("7", None), ("7", 1), ("b", None)
    ]  # fmt: skip
    whole = (out / "results.jsonl").read_bytes()
    (out / "manifest.json").unlink()
    (out / "results.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    evaluate(EvalConfig(output_dir=tmp_path / "out", **given))
    assert (out / "results.jsonl").read_bytes() == whole
    assert compare(results, read_results(out))["n"] == 5


def test_judgements_find_their_answers_among_rows_of_one_id():
    rows = [{"id": "a", "dataset": "d", "question": f"Q{n}", "answer": "x", "prediction": f"p{n}"} for n in range(2)]
    asked = [one for one in map(answer_to_judge, rows) if one is not None]
    said = [
        Judgement("a", "d", "court", "…", 0.25 + 0.5 * n, 0.0, None, judgement_key(one, "court"))
        for n, one in enumerate(asked)
    ]
    assert [row["judge"] for row in with_judgements(rows, said[::-1])] == [0.25, 0.75]
    with pytest.raises(RecordError, match="of another answer"):
        with_judgements([rows[0] | {"prediction": "else"}], said)


def test_a_truth_file_that_names_a_question_twice_is_refused(tmp_path):
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    (tmp_path / "truth.jsonl").write_text(json.dumps({"question_id": 1, "conversations": turns}) + "\n")
    (tmp_path / "said.jsonl").write_text('{"question_id": 1, "text": "x"}\n')
    assert len(score_answers(tmp_path / "said.jsonl", tmp_path / "truth.jsonl")[0]) == 1
    with open(tmp_path / "truth.jsonl", "a") as file:
        file.write(json.dumps({"question_id": 1, "conversations": [turns[0], turns[1] | {"value": "B"}]}) + "\n")
    with pytest.raises(RecordError, match="row 2: question 1 is there twice"):
        score_answers(tmp_path / "said.jsonl", tmp_path / "truth.jsonl")
    (tmp_path / "said.jsonl").write_text('{"question_id": [1], "text": "x"}\n')
    with pytest.raises(RecordError, match="question_id must be a text or a number"):
        score_answers(tmp_path / "said.jsonl")


def test_journals_of_before_are_read_as_they_were(tmp_path):
    row = {
        "sample_id": "a", "round": 0, "branch": 1, "box_text": "", "box": None, "origin": "sampled", "answer": None,
        "engine": "local", "seed": 3, "error": "box: none",
    }  # fmt: skip
    assert from_json(Trajectory, row).place == ("a",)
    assert to_json(from_json(Trajectory, row)) == row
    assert "repeat" not in to_json(Preference("a", "box", "<image>", (), "x", "y"))
