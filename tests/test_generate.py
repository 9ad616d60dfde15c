"""`visrl generate`: the same files whatever is killed, split, served elsewhere or failing; and the critics it asks."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from http_server import Handler, often_faulty
from http_server import serving as scripted
from serve_help import serving
from waiting import wait_until

from visrl.config import ConfigError, read_config
from visrl.data.native import read_records
from visrl.evolve.check import check_critic, check_lines, tell_apart
from visrl.evolve.config import GenerateConfig, parse_shard
from visrl.evolve.generate import generate, generation_questions
from visrl.evolve.serving import merge_shards
from visrl.models.tiny import CHECKPOINT
from visrl.prompts import critic_answer_prompt, critic_box_prompt
from visrl.records import RecordError, Trajectory, Verdict, read_jsonl
from visrl.rewards.open import critic_name, original_base
from visrl.serve.config import ServeConfig
from visrl.serve.metrics import Metrics
from visrl.serve.runner import make_backend

QUESTIONS = "scenes:preference/0+12"
FILES = ("trajectories.jsonl", "verdicts.jsonl")


def config_of(out: Path, **given: Any) -> GenerateConfig:
    values = {"model_name_or_path": str(CHECKPOINT), "dataset": QUESTIONS, "rounds": 1, "batch_size": 4, **given}
    return GenerateConfig(output_dir=out, **values)


def contents(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def trajectories(folder: Path) -> list[Trajectory]:
    return list(read_records(Trajectory, folder / FILES[0]))


def verdicts(folder: Path) -> list[Verdict]:
    return list(read_records(Verdict, folder / FILES[1]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted generation."""
    return generate(config_of(tmp_path_factory.mktemp("generate") / "whole"))


# --- Killed, cut, split


def test_a_generation_holds_every_try_once(whole):
    tried = trajectories(whole)
    names = [sample.id for sample in generation_questions(config_of(whole))]
    assert [(t.sample_id, t.round, t.branch) for t in tried] == [(name, 0, b) for name in names for b in (0, 1)]
    assert [(v.sample_id, v.round, v.branch) for v in verdicts(whole)] == [(t.sample_id, 0, t.branch) for t in tried]
    assert any(t.box is not None and t.answer is not None for t in tried)
    facts = manifest(whole)
    assert facts["trajectories"] == 24
    assert facts["counts"]["judged"] + facts["counts"].get("not judged", 0) == 24
    assert all(t.box is None for t in trajectories(whole) if t.error)


@pytest.mark.parametrize("cuts", [(0.0, 0.0), (0.5, 0.2), (1.0, 0.71)])
def test_what_a_kill_left_is_gone_on_from(whole, tmp_path, cuts):
    """A kill leaves a prefix of each file; the verdicts' is never the longer one."""
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(whole / "started.json", out)
    for name, cut in zip(FILES, cuts, strict=True):
        data = (whole / name).read_bytes()
        (out / name).write_bytes(data[: int(cut * len(data))])
    generate(config_of(out))
    assert contents(out) == contents(whole)
    assert manifest(out)["counts"] == manifest(whole)["counts"]


def test_a_killed_process_loses_nothing(whole, tmp_path):
    process = started(config_of(tmp_path / "out"))
    wait_until(lambda: (tmp_path / "out" / FILES[0]).is_file() and (tmp_path / "out" / FILES[0]).stat().st_size)
    kill(process)
    generate(config_of(tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.slow
def test_a_generation_killed_at_20_moments_equals_an_uninterrupted_one(tmp_path):
    given = {"dataset": "scenes:preference/0+500", "batch_size": 8}
    start = time.monotonic()
    whole = generate(config_of(tmp_path / "whole", **given))
    seconds = time.monotonic() - start
    rng, out = random.Random(0), tmp_path / "out"
    kills = 0
    for _ in range(20):
        process = started(config_of(out, **given))
        process.join(rng.uniform(0, seconds / 8))
        kills += process.is_alive()
        kill(process)
    assert kills >= 10, "most of the processes must have been in the middle of their work"
    generate(config_of(out, **given))
    assert contents(out) == contents(whole)
    assert len(trajectories(out)) == 1000


def started(config: GenerateConfig) -> Any:
    """A process of its own that generates, forked from this one, which has everything imported."""
    process = multiprocessing.get_context("fork").Process(target=in_child, args=(config,))
    process.start()
    return process


def in_child(config: GenerateConfig) -> None:
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    generate(config)


def kill(process: Any) -> None:
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_shards_one_after_another_are_the_whole(whole, tmp_path):
    shards = [generate(config_of(tmp_path / str(i), shard=f"{i}/2")) for i in (1, 2)]
    joined = [b"".join(parts) for parts in zip(*map(contents, shards), strict=True)]
    assert joined == contents(whole)
    assert [manifest(shard)["questions"] for shard in shards] == [4, 8]
    for shard, ended in zip(shards, ({"ok": 3}, {"ok": 4, "http 500": 1}), strict=True):
        told = manifest(shard) | {"requests": {"policy": ended}}
        (shard / "manifest.json").write_text(json.dumps(told), encoding="utf-8")
    merged = merge_shards(shards, tmp_path / "merged")
    assert contents(merged) == contents(whole)
    assert manifest(merged)["counts"] == manifest(whole)["counts"]
    assert manifest(merged)["requests"] == {"policy": {"ok": 7, "http 500": 1}}


def test_bad_shards_and_other_work_are_refused(whole, tmp_path):
    assert parse_shard("2/3") == (2, 3)
    with pytest.raises(ConfigError, match="a shard is i/n"):
        read_config(GenerateConfig, None, ["model_name_or_path=m", "dataset=d", "output_dir=o", "shard=3/2"])
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    rows = (tmp_path / "out" / FILES[0]).read_text().splitlines(keepends=True)
    (tmp_path / "out" / FILES[0]).write_text("".join([*rows[2:], *rows[:2]]))
    with pytest.raises(RecordError, match="trajectories of other questions"):
        generate(config_of(tmp_path / "out"))


# --- Behind servers


def test_a_served_policy_gives_the_files_of_a_local_one(tmp_path):
    greedy = {"temperature": 0.0, "dataset": "scenes:preference/0+6"}
    here = generate(config_of(tmp_path / "here", **greedy))
    served, metrics = ServeConfig(model_name_or_path=str(CHECKPOINT), served_model_name="tiny"), Metrics()
    with serving(make_backend(served, metrics), metrics, name="tiny") as url:
        asked = config_of(tmp_path / "there", **greedy, policy_url=f"{url}/v1", policy_served_name="tiny")
        there = generate(asked)
    assert [replace(t, engine="") for t in trajectories(there)] == [replace(t, engine="") for t in trajectories(here)]
    assert verdicts(there) == verdicts(here)
    looked = sum(t.box is not None for t in trajectories(here))
    assert manifest(there)["requests"] == {"policy": {"ok": 12 + looked}}, "a request for a box, one for an answer"


def texts_of(body: dict[str, Any]) -> tuple[str, int]:
    """The words of a request and how many pictures it shows."""
    parts = body["messages"][-1]["content"]
    return "".join(part.get("text", "") for part in parts), sum(part["type"] == "image_url" for part in parts)


def speak(body: dict[str, Any]) -> str:
    """A policy and a critic in one: boxes for one picture, answers for two, scores where it is asked for them."""
    said, pictures = texts_of(body)
    if '{"score"' in said:
        return '{"score": 1.0}' if "Their answer: 1" in said else '```json\n{"score": 0.0}\n```'
    return str(body["seed"] % 10) if pictures == 2 else f"[0.{body['seed'] % 5}00, 0.100, 0.700, 0.600]"


@pytest.mark.slow
def test_a_faulty_server_leads_to_a_whole_run_with_every_failure_counted(tmp_path):
    kinds = ("http 500", "time-out", "connection", "garbage")
    script, faults = often_faulty(lambda handler, body: handler.text(speak(body)), kinds)
    with scripted(script) as server:
        asked = config_of(
            tmp_path, rounds=2, policy_url=server.url, policy_served_name="m", critic_url=server.url,
            critic_served_name="m", request_timeout_s=6.0, request_attempts=2, concurrency=4, batch_size=24,
        )  # fmt: skip
        out = generate(asked)
    tried, said, facts = trajectories(out), verdicts(out), manifest(out)
    assert len(tried) == len(said) == 48
    assert min(faults[kind] for kind in kinds) > 0
    attempts: Counter[str] = Counter()
    for ended in facts["requests"].values():
        attempts.update(ended)
    given_up = attempts.pop("gave up")
    assert set(attempts) == {"ok", *kinds}
    # A client that is kept waiting for the processor may give up requests that no server has seen yet.
    assert sum(attempts.values()) >= sum(faults.values()), "every attempt is counted under how it ended"
    failed = [t for t in tried if t.error and t.error.startswith("engine:")]
    assert failed
    assert facts["counts"]["error: engine"] == len(failed)
    lost = sum(facts["counts"].get(f"failed {what} score", 0) for what in ("box", "answer"))
    assert lost > 0
    assert given_up <= len(failed) + lost, "nothing that was given up has vanished"
    for verdict in said:
        if verdict.box_score is None and verdict.answer_score is None:
            assert "error" in verdict.raw or verdict.raw.startswith("engine:")


# --- Critics


def critic_config(url: str, tmp_path: Path, **given: Any) -> GenerateConfig:
    return config_of(tmp_path, critic_url=url, critic_served_name="m", **given)


def test_an_unread_reply_is_asked_again_counted_and_never_0(tmp_path):
    replies: Counter[str] = Counter()

    def script(handler: Handler, body: dict[str, Any]) -> None:
        said, _ = texts_of(body)
        replies[said] += 1
        if "cut out of a larger one" in said:
            handler.text("I would say it is fine.")  # never read
        else:
            assert (body["temperature"] == 0) == (replies[said] == 1)
            handler.text("Hm." if replies[said] == 1 else "score: 0.5")

    with scripted(script) as server:
        out = generate(critic_config(server.url, tmp_path, dataset="scenes:preference/0+4", critic_attempts=3))
    judged = [v for v in verdicts(out) if v.answer_score is not None]
    assert judged
    assert all((v.box_score, v.answer_score) == (None, 0.5) for v in judged)
    counts = manifest(out)["counts"]
    assert counts["unread box score"] == len(judged)
    assert counts["asked again"] == 3 * len(judged)  # twice more for a box, once more for an answer
    assert "failed box score" not in counts


def test_the_critic_sees_crop_and_reference_and_is_asked_once_about_equal_things(tmp_path):
    with scripted(lambda handler, body: handler.text("1")) as server:
        out = generate(critic_config(server.url, tmp_path, dataset="scenes:preference/0+2", temperature=0.0))
        (sample, *_) = generation_questions(config_of(tmp_path, dataset="scenes:preference/0+2"))
    words = {texts_of(body)[0] for body in server.bodies}
    about = [t for t in trajectories(out) if t.answer is not None and t.sample_id == sample.id]
    if about:
        assert critic_box_prompt(sample.question, sample.answer).removeprefix("<image>") in words
        asked = critic_answer_prompt(sample.question, sample.answer, about[0].answer).removeprefix("<image>")
        assert asked in words
    assert all(texts_of(body)[1] == 1 for body in server.bodies)
    keys = {(t.sample_id, t.box) for t in trajectories(out) if t.answer is not None}
    keys |= {(t.sample_id, t.answer) for t in trajectories(out) if t.answer is not None}
    assert len(server.bodies) == len(keys)


def test_without_its_box_critic_a_model_is_asked_about_answers_alone(tmp_path):
    with scripted(lambda handler, body: handler.text("1")) as server:
        given = ["dataset=scenes:preference/0+2", "rounds=1", f"output_dir={tmp_path}", "critic.box=false"]
        given += [f"model_name_or_path={CHECKPOINT}", f"critic_url={server.url}", "critic_served_name=m"]
        out = generate(read_config(GenerateConfig, None, given))
    assert server.bodies
    assert all("Their answer" in texts_of(body)[0] for body in server.bodies)
    assert {v.box_score for v in verdicts(out)} == {None}


def test_a_check_passes_a_critic_that_reads_and_warns_of_one_that_agrees_with_all(tmp_path, capsys):
    def wise(handler: Handler, body: dict[str, Any]) -> None:
        said, _ = texts_of(body)
        right, told = (re.search(f"{words}: (.*)", said) for words in ("Correct answer", "Their answer"))
        handler.text(f'{{"score": {1.0 if told is None or told[1] == right[1] else 0.0}}}')

    with scripted(wise) as server:
        found = check_critic(critic_config(server.url, tmp_path), 12)
    assert (found["answers"]["auc"], found["answers"]["passed"], found["answers"]["failed"]) == (1.0, 1.0, 1.0)
    assert found["answers"]["right"] == 12
    assert found["boxes"]["auc"] == 0.5, "it says 1 to every crop"
    assert "hardly tells right boxes" in capsys.readouterr().out
    assert json.loads((tmp_path / "check.json").read_text()) == found
    with scripted(lambda handler, body: handler.text("yes")) as server:
        found = check_critic(critic_config(server.url, tmp_path, critic_attempts=1), 4)
    assert found["answers"]["unread"] == 8
    assert any("cannot be read" in line for line in check_lines(found))


def test_the_oracle_passes_the_check(tmp_path):
    found = check_critic(config_of(tmp_path), 12)
    assert found["answers"]["auc"] == found["boxes"]["auc"] == 1.0
    assert found["boxes"]["failed"] == 1.0


def test_auc_counts_ties_half():
    found = tell_apart([1.0, 0.5, None], [0.5, 0.0])
    assert (found.right, found.wrong, found.unread) == (2, 2, 1)
    assert found.auc == (1 + 1 + 0.5 + 1) / 4
    assert tell_apart([], [None]).auc is None


def test_the_default_critic_of_real_data_is_the_original_base(tmp_path):
    for name, base in (("merged", "adapter-run"), ("adapter-run", "base")):
        (tmp_path / name).mkdir()
        told = {"config": {"model_name_or_path": str(tmp_path / base)}}
        (tmp_path / name / "manifest.json").write_text(json.dumps(told))
    with pytest.raises(ConfigError, match="name a critic"):
        original_base(str(tmp_path / "merged"))
    (tmp_path / "base").mkdir()
    assert original_base(str(tmp_path / "merged")) == str(tmp_path / "base")
    samples = generation_questions(config_of(tmp_path))
    real = [replace(sample, image="a.png") for sample in samples]
    config = config_of(tmp_path, model_name_or_path=str(tmp_path / "merged"))
    assert critic_name(config, samples) == "oracle"
    assert critic_name(config, real) == str(tmp_path / "base")
    assert critic_name(config.model_copy(update={"critic": "oracle"}), real) == "oracle"


def test_a_local_model_can_be_the_critic(tmp_path, tiny):
    out = generate(config_of(tmp_path, critic_model_name_or_path=str(tiny), dataset="scenes:preference/0+2"))
    facts = manifest(out)
    assert facts["critic"] == f"model:{tiny}"
    judged = [row for row in read_jsonl(out / FILES[1]) if row["raw"].startswith('{"box"')]
    assert judged, "a random model's replies are kept word for word"
    assert all(len(json.loads(row["raw"])["answer"]["replies"]) in (1, 2, 3) for row in judged)
