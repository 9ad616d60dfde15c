"""A run of which too much failed is no success and not complete: the same command tries again what failed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from http_server import serving
from PIL import Image
from typer.testing import CliRunner

from visrl.cli import app
from visrl.data.native import read_records
from visrl.evaluate.config import EvalConfig
from visrl.evaluate.run import evaluate
from visrl.evolve.config import GenerateConfig
from visrl.evolve.generate import generate
from visrl.failures import FailedRun, Tally, is_failure
from visrl.manifest import ManifestError, read_manifest
from visrl.records import Trajectory, write_records

BOX = "[0.100, 0.100, 0.500, 0.500]"
WHOLE_PICTURES = 1  # a request of step 1 shows one picture, one of step 2 two


def pictures(body) -> int:
    return json.dumps(body["messages"]).count('"image_url":')


def sound(handler, body) -> None:
    handler.text(BOX if pictures(body) == WHOLE_PICTURES else "7")


def broken(handler, body) -> None:
    handler.send(400, b'{"error": {"message": "no such thing"}}')


def failing_for(word: str):
    """A script that refuses every request in which `word` stands."""
    return lambda handler, body: (broken if word in json.dumps(body["messages"]) else sound)(handler, body)


def questions(folder: Path, count: int = 10) -> Path:
    Image.new("RGB", (40, 40), "red").save(folder / "a.png")
    rows = [{"id": str(n), "image": "a.png", "question": f"Question {n}?", "answer": "7"} for n in range(count)]
    write_records(folder / "rows.jsonl", [row | {"box": [0.1, 0.1, 0.5, 0.5]} for row in rows])
    return folder / "rows.jsonl"


def eval_config(folder: Path, url: str, **given) -> EvalConfig:
    told = {"model_name_or_path": "m", "box_codec": "visrl", "policy_url": url, "dataset": str(questions(folder))}
    own = {"image_root": str(folder), "output_dir": folder / "run", "batch_size": 2, "request_attempts": 1}
    return EvalConfig(**told | own | given)


def test_the_share_and_what_counts_as_a_failure():
    tally = Tally("rows", 0.25)
    tally.count([None, "engine: lost", None, None])
    assert not tally.is_hopeless()
    assert tally.is_hopeless(3) is False  # more were seen than planned
    tally.count(["engine: gone"])
    assert tally.is_hopeless()
    assert not tally.is_hopeless(total=8)  # six sound ones are to come
    assert "2 of 5 rows failed (more than max_failed=0.25), the first with: engine: lost" in str(tally.refuse("kept"))
    everything = Tally("rows", 1.0)
    everything.count(["x"])
    assert everything.is_hopeless()  # all of it is never a success
    assert not Tally("rows", 0.0).is_hopeless()
    assert [is_failure(e) for e in (None, "box: none", "no_room", "control: no truth", "engine: x", "picture: y")] == [
        False, False, False, False, True, True,
    ]  # fmt: skip


def test_rows_that_the_model_cannot_be_shown_fail_a_run_only_where_they_are_all_of_it():
    tally = Tally("rows", 0.1)
    tally.count(["prompt: a control token", "prompt: too thin", None])
    assert (tally.failed, tally.is_hopeless()) == (2, False)
    tally.count(["engine: lost"])
    assert tally.is_hopeless()
    alone = Tally("rows", 0.1)
    alone.count(["prompt: a control token"])
    assert alone.is_hopeless()


def test_an_evaluation_that_failed_is_tried_again_where_it_failed(tmp_path):
    with serving(failing_for("Question 3")) as server:
        evaluate(eval_config(tmp_path, server.url))  # one of ten is not more than the default
        assert read_manifest(tmp_path / "run")["config"]["seed"] == 0
        for number in (3, 9):
            assert f"Question {number}" in json.dumps([body["messages"] for body in server.bodies])
    other = tmp_path / "other"
    other.mkdir()
    with serving(failing_for("Question 9")) as server, pytest.raises(FailedRun, match="1 of 10 questions failed"):
        evaluate(eval_config(other, server.url, max_failed=0.0))
    assert read_manifest(other / "run") is None
    assert not (other / "run" / "results.jsonl").exists()
    assert len((other / "run" / "failed.jsonl").read_text().splitlines()) == 1
    with serving(sound) as server:
        evaluate(eval_config(other, server.url, max_failed=0.0))
    asked = json.dumps([body["messages"] for body in server.bodies])
    assert "Question 9" in asked
    assert "Question 7" not in asked  # its answer was kept
    rows = [json.loads(line) for line in (other / "run" / "results.jsonl").read_text().splitlines()]
    assert [(row["id"], row["error"], row["exact"]) for row in rows] == [(str(n), None, 1) for n in range(10)]
    assert not (other / "run" / "failed.jsonl").exists()


def test_an_evaluation_that_cannot_become_a_success_stops_at_once_and_gives_the_folder_back(tmp_path):
    with serving(failing_for("Question")) as server, pytest.raises(FailedRun, match=r"4 of 4 questions failed \(all\)"):
        evaluate(eval_config(tmp_path, server.url))
    with serving(sound) as server:
        evaluate(eval_config(tmp_path, server.url, mode="center", request_attempts=2))  # another config
    assert read_manifest(tmp_path / "run") is not None


def test_the_command_ends_with_a_sentence_and_status_1(tmp_path):
    with serving(failing_for("Question")) as server:
        values = eval_config(tmp_path, server.url).model_dump(mode="json", exclude_defaults=True)
        given = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        done = CliRunner().invoke(app, ["eval", "run", *given])
    assert done.exit_code == 1
    assert "all), the first with: engine: http://127.0.0.1" in done.stderr
    assert "max_failed is the share" in done.stderr


def test_missing_pictures_that_were_allowed_are_no_failures(tmp_path):
    config = eval_config(tmp_path, "http://127.0.0.1:9/v1", allow_missing_pictures=True, mode="no_box")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    write_records(tmp_path / "rows.jsonl", [row | {"image": "b.png"} if int(row["id"]) % 2 else row for row in rows])
    with serving(lambda handler, _: handler.text("7")) as server:
        evaluate(config.model_copy(update={"policy_url": (server.url,)}))
    rows = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert sum(row["error"] is not None for row in rows) == 5


def generate_config(folder: Path, url: str, **given) -> GenerateConfig:
    told = {"model_name_or_path": "m", "box_codec": "visrl", "policy_url": url, "dataset": "scenes:preference/0+6"}
    own = {"rounds": 1, "batch_size": 2, "diversity": False, "request_attempts": 1, "output_dir": folder}
    return GenerateConfig(**told | own | given)


def test_a_generation_that_failed_makes_only_its_failed_batches_again(tmp_path):
    calls = 0

    def fails_late(handler, body):
        nonlocal calls
        calls += 1
        (broken if calls > 8 else sound)(handler, body)

    def numbered(handler, body):
        sound(handler, body) if pictures(body) == WHOLE_PICTURES else handler.text("again")

    with serving(fails_late) as server, pytest.raises(FailedRun, match="trajectories failed"):
        generate(generate_config(tmp_path / "g", server.url, concurrency=1))
    assert read_manifest(tmp_path / "g") is None
    with serving(numbered) as server:
        generate(generate_config(tmp_path / "g", server.url))
        again = len(server.bodies)
    answers = [one.answer for one in read_records(Trajectory, tmp_path / "g" / "trajectories.jsonl")]
    first = answers.count("7")
    assert first in (4, 8)  # whole batches were taken over
    assert answers == ["7"] * first + ["again"] * (12 - first)
    assert again >= 2 * (12 - first)
    assert not list((tmp_path / "g").glob("failed-*"))
    assert read_manifest(tmp_path / "g")["trajectories"] == 12


def test_a_critic_that_fails_fails_the_run_and_the_trajectories_are_kept(tmp_path):
    critic = {"critic": "model", "critic_served_name": "m"}
    with serving(sound) as policy:
        with serving(failing_for("Correct answer")) as judge, pytest.raises(FailedRun, match="verdicts failed"):
            generate(generate_config(tmp_path / "g", policy.url, critic_url=judge.url, **critic))
        drawn = len(policy.bodies)
        with serving(lambda handler, _: handler.text("score: 1")) as judge:
            generate(generate_config(tmp_path / "g", policy.url, critic_url=judge.url, **critic))
    # The first batch was whole; the run stopped there, for the critic had failed for more than the share of all.
    assert len(policy.bodies) - drawn <= 2 * 12 - 8 + 1
    assert read_manifest(tmp_path / "g")["counts"]["judged"] == 12


def test_a_generation_of_which_everything_failed_gives_its_folder_back(tmp_path):
    with serving(broken) as server, pytest.raises(FailedRun, match=r"\(all\)"):
        generate(generate_config(tmp_path / "g", server.url))
    with serving(sound) as server:
        generate(generate_config(tmp_path / "g", server.url, seed=3))
    assert read_manifest(tmp_path / "g")["trajectories"] == 12


def test_judgements_that_failed_are_no_success(tmp_path):
    rows = [{"question_id": n, "question_text": "?", "gt_answer_text": "7", "pred_answer_text": "7"} for n in range(4)]
    write_records(tmp_path / "p.jsonl", rows)
    told = ["eval", "judge", "--predictions", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "j.jsonl")]
    told += ["--model", "m", "--attempts", "1", "--base-url"]
    with serving(failing_for("standard answer")) as server:
        done = CliRunner().invoke(app, [*told, server.url])
    assert done.exit_code == 1
    assert "4 of 4 judgements failed (all), the first with: http://127.0.0.1" in done.stderr
    with serving(lambda handler, _: handler.text("score: 1")) as server:
        done = CliRunner().invoke(app, [*told, server.url])
    assert (done.exit_code, "4 answers judged: 0 failed" in done.stdout) == (0, True)


def test_another_config_still_does_not_get_a_folder_with_sound_rows(tmp_path):
    with serving(failing_for("Question 9")) as server, pytest.raises(FailedRun):
        evaluate(eval_config(tmp_path, server.url, max_failed=0.0))
    with serving(sound) as server, pytest.raises(ManifestError, match="seed differ"):
        evaluate(eval_config(tmp_path, server.url, seed=5))
