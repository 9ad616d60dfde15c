"""Parts of an online reward that ask a model: the judge, the critic, what is kept of their replies, and what fails."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from http_server import Handler, serving
from online_runs import online_config, read_lines
from safetensors.torch import load_file
from test_reward_parts import HALF, QUARTER, SAMPLE, UNREADABLE, attempt, parts, scored

from visrl.data.sources import read_samples
from visrl.engines.openai_server import EndpointError
from visrl.failures import FailedRun
from visrl.manifest import read_manifest
from visrl.models.encode import Encoder
from visrl.models.load import load_encoder
from visrl.models.settings import ModelSettings
from visrl.models.tiny import CHECKPOINT
from visrl.records import RecordError, Sample
from visrl.rewards.asked_parts import RewardConfig, RewardSetting
from visrl.rewards.critic import SceneOracle
from visrl.rewards.open_parts import opened_parts
from visrl.rewards.parts import score_attempts
from visrl.train import online
from visrl.train.run import train

REPLIES = {"7": "score: 1", "8": "well", "9": None, "6": "Score: 0.25"}  # by answer; None: the server fails


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder(str(CHECKPOINT), ModelSettings.load(str(CHECKPOINT)))


def setting(folder: Path, encoder: Encoder, samples: Sequence[Sample] = (), **keys: Any) -> RewardSetting:
    keys = {"model_name_or_path": str(CHECKPOINT), "request_attempts": 1, **keys}
    return RewardSetting(RewardConfig(**keys), samples, encoder, "exact", None, seed=0, device="cpu", folder=folder)


@contextmanager
def judge(replies: dict[str, str | None]) -> Iterator[Any]:
    """A server that judges by the answer that it is shown; `asked` counts the answers."""
    asked: Counter[str] = Counter()

    def script(handler: Handler, body: dict[str, Any]) -> None:
        said = body["messages"][-1]["content"]
        answer = next((one for one in replies if f"model's answer: {one}" in said), "")
        asked[answer] += 1
        reply = replies.get(answer, "score: 0")
        handler.send(500, b"boom") if reply is None else handler.text(reply)

    with serving(script) as server:
        server.asked = asked
        yield server


def judged_by(server: Any, **more: Any) -> dict[str, Any]:
    return {"judge_model_name_or_path": "m", "judge_url": server.url, **more}


def test_a_judge_is_asked_once_a_step_about_each_answer_and_never_again(tmp_path: Path, encoder: Encoder) -> None:
    """7 is right, 6 by a quarter; 8 was not read and 9 failed: None, and out of the group. A run that is resumed reads
    the first three from the file, the unread one too, and asks about the last one alone."""
    tried = attempt("7", "8", "9", "7"), attempt("6", "7", box=HALF), UNREADABLE
    wanted = [[1, None, None, 1], [0.25, 1], [0]]
    with judge(REPLIES) as server:
        one = setting(tmp_path, encoder, **judged_by(server, max_failed=0.5))
        given = parts("judge")
        with opened_parts(given, one) as scorers:
            assert not list(tmp_path.iterdir()), "nothing is written before the folder is claimed"
            first, again = (score_attempts(given, scorers, [tried])[0].rewards for _ in range(2))
        assert first == again == wanted
        assert server.asked == {"7": 1, "8": 1, "6": 1, "9": 2}
        assert scored(given, *tried, setting=one).rewards == wanted
        assert server.asked == {"7": 1, "8": 1, "6": 1, "9": 3}
    kept = read_lines(tmp_path / "judgements.jsonl")
    assert {(row["reply"], row["score"], row["error"]) for row in kept} == {
        ("score: 1", 1.0, None), ("well", None, None), ("Score: 0.25", 0.25, None)
    }  # fmt: skip
    assert len(kept) == 3


def test_a_second_process_keeps_a_file_of_its_own(tmp_path: Path, encoder: Encoder) -> None:
    with judge(REPLIES) as server:
        one = replace(setting(tmp_path, encoder, **judged_by(server)), process=1)
        scored(parts("judge"), attempt("7"), setting=one)
    assert [path.name for path in tmp_path.iterdir()] == ["judgements.1.jsonl"]


def test_what_the_judge_did_not_say_is_not_made_up_by_the_other_parts(tmp_path: Path, encoder: Encoder) -> None:
    """All judgements of a question unread: its reward is not the format alone. Without a true answer it is."""
    with judge(REPLIES) as server:
        one = setting(tmp_path, encoder, **judged_by(server))
        given = parts("judge", "format", {"name": "area", "when": "judge"})
        assert scored(given, attempt("8", "8"), setting=one).rewards == [[None, None]]
        assert scored(given, attempt("7", "8"), setting=one).rewards == [[1 + 1 + 0.75, None]]
        unasked = Sample("q", "a.png", "Which?", "")
        assert scored(parts("judge", "format"), attempt("7", sample=unasked), setting=one).rewards == [[1]]
        assert server.asked == {"7": 1, "8": 1}


def test_a_judge_that_is_not_there_or_gone_is_a_sentence(tmp_path: Path, encoder: Encoder) -> None:
    with serving(lambda handler, body: handler.send(401, b"{}"), models=(401, b"{}")) as server:
        closed = server.url
        with pytest.raises(EndpointError, match="refuses the key"):
            scored(parts("judge"), attempt("7"), setting=setting(tmp_path, encoder, **judged_by(server)))
    one = setting(tmp_path, encoder, judge_model_name_or_path="m", judge_url=closed)
    with pytest.raises(EndpointError, match=closed.removeprefix("http://").removesuffix("/v1")):
        scored(parts("judge"), attempt("7"), setting=one)
    with judge(REPLIES) as server:
        one = setting(tmp_path, encoder, **judged_by(server, max_failed=0.2))
        with pytest.raises(FailedRun, match=r"1 of 2 judgements failed.*answered 500.*\n.*judgements.jsonl"):
            scored(parts("judge"), attempt("7", "9"), setting=one)
    (tmp_path / "judgements.jsonl").write_text("{}\n")
    with judge(REPLIES) as server, pytest.raises(RecordError, match="row 1: not a judgement"):
        scored(parts("judge"), attempt("7"), setting=setting(tmp_path, encoder, **judged_by(server)))


# --- The critic


GRADER = """
calls = []

def grade(samples, trajectories):
    calls.append([one.answer for one in trajectories])
    return [(0.5 if one.box.x1 < 1 else None, 1.0 if one.answer == samples[0].answer else 0.0) for one in trajectories]
"""


def test_parts_of_one_critic_share_its_verdicts(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter scores ½, a half is not told; 7 is right. The mean of both: ¾ and ¼. Asked once a step."""
    name = f"grader_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(GRADER, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    one = setting(tmp_path, encoder, [SAMPLE], critic=f"{name}:grade")
    given = parts("critic", {"name": "critic_box", "weight": 0}, {"name": "critic_answer", "weight": 0})
    with opened_parts(given, one) as scorers:
        for _ in range(2):
            tried = [attempt("7", "8"), attempt("8", "7", box=HALF), UNREADABLE]
            (found,) = score_attempts(given, scorers, [tried])
    assert found.parts == {
        "critic": [[0.75, 0.25], [None, None], [0]],
        "critic_box": [[0.5, 0.5], [None, None], [0]],
        "critic_answer": [[1, 0], [0, 1], [0]],
    }
    assert found.rewards == found.parts["critic"]
    assert __import__(name).calls == [["7", "8", "8", "7"]] * 2
    answers = setting(tmp_path, encoder, [SAMPLE], critic=f"{name}:grade", use_box_critic=False)
    assert scored(parts("critic"), attempt("7", "8"), setting=answers).rewards == [[1, 0]]
    assert not list(tmp_path.glob("verdicts*")), "a critic that is no model is asked again"


def test_the_critic_of_drawn_scenes_is_the_oracle(tmp_path: Path, encoder: Encoder) -> None:
    sample = read_samples("scenes:preference/0+1", with_box=True)[0]
    assert sample.box is not None
    tried = attempt(sample.answer, "no such", box=sample.box, sample=sample)
    found = scored(parts("critic_box", "critic_answer"), tried, setting=setting(tmp_path, encoder, [sample]))
    oracle = SceneOracle(lambda size: encoder.processed_size(size, is_crop=True))
    box = oracle.box_score(sample, sample.box)
    assert box > 0.5
    assert found.parts == {"critic_box": [[box, box]], "critic_answer": [[1, 0]]}


def test_verdicts_of_a_model_are_kept(tmp_path: Path, encoder: Encoder) -> None:
    sample = read_samples("scenes:preference/0+1", with_box=True)[0]
    tried = attempt("1", "2", box=QUARTER, sample=sample)
    keys = {"critic": "model", "critic_served_name": "m", "critic_attempts": 1}
    with serving(lambda handler, body: handler.text("score: 0.5")) as server:
        one = setting(tmp_path, encoder, [sample], critic_url=server.url, **keys)
        for _ in range(2):
            assert scored(parts("critic", "critic_box"), tried, setting=one).parts["critic"] == [[0.5, 0.5]]
            assert len(server.bodies) == 3, "one box and two answers, once"
    (row,) = read_lines(tmp_path / "verdicts.jsonl")
    assert (row["box"], row["answers"]) == (0.5, [0.5, 0.5])
    assert json.loads(row["raw"])["box"]["replies"] == ["score: 0.5"]


# --- Training


def test_a_run_that_is_resumed_reads_the_judge_s_replies_and_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after step 2 was judged, before it was learned from; the judge then says 0 to whatever it is asked."""
    says = ["score: {}"]

    def script(handler: Handler, body: dict[str, Any]) -> None:
        handler.text(says[-1].format(sum(body["messages"][-1]["content"].encode()) % 5 / 4))

    with serving(script) as server:
        given = {
            **judged_by(server), "rewards": ["judge", {"name": "format", "weight": 0.1}], "finetuning_type": "full",
            "save_strategy": "steps", "save_steps": 1, "max_steps": 2, "learning_rate": 1e-5,
        }  # fmt: skip
        whole = train(online_config(tmp_path / "whole", **given))
        score, calls = online.score_rollouts, []

        def score_and_stop(*args: Any) -> Any:
            found = score(*args)
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("stopped")
            return found

        monkeypatch.setattr(online, "score_rollouts", score_and_stop)
        with pytest.raises(RuntimeError, match="stopped"):
            train(online_config(tmp_path / "again", **given))
        says.append("score: 0")
        again = train(online_config(tmp_path / "again", **given))
    one, other = load_file(whole / "model.safetensors"), load_file(again / "model.safetensors")
    assert all(one[name].equal(other[name]) for name in one)
    journal = read_lines(whole / "rollouts.jsonl")
    assert read_lines(again / "rollouts.jsonl") == journal
    assert any(score for box in journal[-1]["boxes"] for score in box["parts"]["judge"]), "the last step was judged"
    rows = [row for row in read_lines(whole / "log.jsonl") if "loss" in row]
    assert all(row["left_out/judge"] == row["left_out/format"] == 0 for row in rows)
    manifest = read_manifest(whole)
    assert manifest is not None
    assert manifest["config"]["judge_model_name_or_path"] == "m"
    assert not {"judge_url", "critic", "max_failed"} & manifest["config"].keys()


def test_a_judge_that_does_not_answer_is_said_before_the_folder_is_claimed(tmp_path: Path) -> None:
    keys = {"rewards": "judge", "judge_model_name_or_path": "m", "judge_url": "http://127.0.0.1:9/v1"}
    with pytest.raises(EndpointError):
        train(online_config(tmp_path / "out", **keys))
    assert not (tmp_path / "out" / "started.json").exists()


@pytest.mark.parametrize(("keys", "said"), [
    ({"rewards": "judge"}, "judge_model_name_or_path: rewards ask a judge"),
    ({"judge_model_name_or_path": "m"}, "no part of rewards asks a judge"),
    ({"critic": "oracle"}, "no part of rewards asks a critic"),
    ({"max_failed": 0.5}, "no part of rewards asks a model"),
    ({"rewards": "critic", "concurrency": 2}, "no server is asked"),
    ({"rewards": "critic_box", "use_box_critic": False}, "rewards ask critic_box"),
    ({"stage": "sft", "num_generations": 8, "num_answers": 4, "judge_model_name_or_path": "m"}, "samples nothing"),
])  # fmt: skip
def test_keys_that_no_part_reads_are_refused(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        online_config(tmp_path / "out", **keys)
