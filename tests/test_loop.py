"""`visrl evolve`: the plan, served policies, shards, the chain of manifests, and going on after a stop."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from visrl.config import ConfigError, read_config
from visrl.data.native import read_records
from visrl.engines.openai_server import EndpointError
from visrl.engines.server_process import free_port, served
from visrl.evolve.config import TINY_RL, EvolveConfig, GenerateConfig, ServerConfig
from visrl.evolve.loop import plan, run_evolve
from visrl.evolve.serving import server_command
from visrl.evolve.training import online_config, stage_config
from visrl.manifest import ManifestError, hash_checkpoint, hash_files, read_manifest
from visrl.models.tiny import CHECKPOINT
from visrl.records import Trajectory

OUR_SERVER = [
    sys.executable, "-m", "visrl.cli", "api", "model_name_or_path={model}", "served_model_name={name}", "port={port}",
]  # fmt: skip


def config_of(out: Path, **given: Any) -> EvolveConfig:
    values = {
        "model_name_or_path": str(CHECKPOINT),
        "dataset": "scenes:preference/0+32",
        "max_samples": 16,
        "rounds": 2,
        "t_max": 0.3,  # so that a few questions of a small model give pairs
        "t_min": 0.3,
        "train_config": TINY_RL,
        "train": {"max_steps": 1},
        "export_dtype": "float32",
        **given,
    }
    return EvolveConfig(output_dir=out, **values)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Two iterations of the loop with a step of training each."""
    out = tmp_path_factory.mktemp("evolve") / "run"
    run_evolve(config_of(out, iterations=2, eval_dataset="scenes:test/0+8", controls=False))
    return out


def test_every_step_was_made_from_the_step_before(run):
    policy = str(CHECKPOINT)
    for number in range(2):
        base = run / f"iter{number}"
        steps = {step: read_manifest(base / step) for step in ("generate", "filter", "stage1", "stage2-merged")}
        assert steps["generate"]["parents"]["model"] == hash_checkpoint(policy)
        assert steps["generate"]["config"]["skip_samples"] == 16 * number, "every iteration asks new questions"
        files = (base / "generate" / name for name in ("trajectories.jsonl", "verdicts.jsonl"))
        assert steps["filter"]["parents"]["input"] == hash_files(*files)
        assert steps["filter"]["counts"]["kept"] > 0
        assert steps["stage1"]["parents"]["dataset"] == hash_files(base / "filter" / "preferences.jsonl")
        assert steps["stage1"]["parents"]["model"] == hash_checkpoint(policy)
        assert steps["stage2-merged"]["parents"]["adapter"] == hash_files(base / "stage2" / "adapter_model.safetensors")
        assert steps["stage2-merged"]["parents"]["model"] == hash_checkpoint(base / "stage1-merged")
        policy = str(base / "stage2-merged")
    told = read_manifest(run)
    assert told["last"] == policy
    assert told["chain"]["iter1/generate"]["model"] == hash_checkpoint(run / "iter0" / "stage2-merged")
    summary = json.loads((run / "summary.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == ["sft", "stage1", "stage2", "stage1", "stage2"]


def test_the_same_command_changes_nothing_and_another_is_refused(run, capsys):
    given = {"iterations": 2, "eval_dataset": "scenes:test/0+8", "controls": False}
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    run_evolve(config_of(run, **given))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == before
    assert "(done: generate, filter, stage1, stage1-merged, stage2, stage2-merged)" in capsys.readouterr().out
    with pytest.raises(ManifestError, match=r"holds other work \(diversity differ\)"):
        run_evolve(config_of(run, **given, diversity=False))


def test_the_plan_comes_first_and_touches_nothing(tmp_path, capsys):
    run_evolve(config_of(tmp_path / "out", iterations=2), plan_only=True)
    told = capsys.readouterr().out
    assert "16 questions × 2 rounds × 2 = 64 tries" in told
    assert "critic oracle" in told
    assert "iteration 1: generate → filter" in told
    assert not (tmp_path / "out").exists()
    asked = plan(config_of(tmp_path, critic_url="http://127.0.0.1:1/v1", critic_served_name="judge"))
    assert "critic judge" in asked[0]
    assert "up to 128 questions to the critic" in asked[1]
    given = ["dataset=d", "model_name_or_path=m", "output_dir=o", "critic.box=false", "diversity=false"]
    switched = read_config(EvolveConfig, None, given)
    assert (switched.use_box_critic, switched.diversity) == (False, False)


def own_losers(out: Path, **given: Any) -> EvolveConfig:
    values = {"critic": "outcome", "answers": 2, "losers": "own", "diversity": False}
    return config_of(out, **values, t_max=0.8, t_min=0.2, **given)


def test_the_plan_says_how_boxes_are_scored_and_which_lose(tmp_path):
    start, each, *_ = plan(own_losers(tmp_path))
    assert "critic outcome:exact;" in start
    assert "2 answers from each crop; losers 'own', worse by 0.5, diversity controller off" in each
    assert "losers 'paper', rule 'paper', box critic on, diversity controller on" in plan(config_of(tmp_path))[1]
    judged = plan(own_losers(tmp_path, grader="judge", critic_url="http://127.0.0.1:1/v1", critic_served_name="j"))
    assert "critic outcome:j;" in judged[0]
    assert "up to 128 questions to the critic" in judged[1]
    both = own_losers(tmp_path).model_copy(update={"diversity": True})
    assert "diversity=false saves their cost" in plan(both)[2]


def test_an_iteration_learns_from_the_policys_own_losers(tmp_path):
    run_evolve(own_losers(tmp_path / "run"))
    base = tmp_path / "run" / "iter0"
    generated, filtered, trained = (read_manifest(base / step) for step in ("generate", "filter", "stage2"))
    assert generated["critic"] == "outcome:exact"
    counts = filtered["counts"]
    assert counts["kept"] >= counts["answer_pairs"] > 0
    assert counts["sampled_tokens_per_pair"] == round(sum(generated["sampled_tokens"].values()) / counts["kept"], 1)
    assert trained is not None


def test_a_stage_sees_what_its_trajectories_were_drawn_from(tmp_path):
    looks = {"image_max_pixels": 3136, "crop_max_pixels": 1568, "crop_rule": "margin", "image_root": "pictures"}
    config = config_of(tmp_path, **looks, box_codec="viscot", chosen_only=True, train={"learning_rate": 0.5})
    stage = stage_config(config, tmp_path / "iter0", 2, "policy")
    assert {key: getattr(stage, key) for key in looks} == looks
    assert (stage.box_codec, stage.rl_stage, stage.model_name_or_path) == ("viscot", 2, "policy")
    assert (stage.pref_loss, stage.pref_ftx, stage.training_arguments()["learning_rate"]) == ("sft", 0.0, 0.5)
    assert stage_config(config_of(tmp_path), tmp_path / "iter0", 1, "policy").crop_rule is None  # the policy's own


def test_online_reinforcement_starts_where_the_loop_starts(tmp_path):
    config = config_of(tmp_path, online_steps=3, train_online={"stage": "raft", "learning_rate": 0.5}, seed=4)
    online = online_config(config)
    assert (online.stage, online.training_arguments()["max_steps"], online.training_arguments()["seed"]) == (
        "raft",
        3,
        4,
    )
    assert (online.model_name_or_path, online.dataset) == (config.model_name_or_path, config.dataset[0])
    assert online.training_arguments()["learning_rate"] == 0.5
    assert "online, from the same start: raft, 3 steps" in plan(config)[-2:][0] + plan(config)[-1]


def test_what_cannot_be_run_is_refused_before_it_starts(tmp_path):
    with pytest.raises(ConfigError, match=r"online_config: .* is of stage dpo, which samples nothing"):
        run_evolve(config_of(tmp_path, online_steps=3, online_config=TINY_RL))
    with pytest.raises(ConfigError, match="2 data sets for 3 iterations"):
        plan(config_of(tmp_path, iterations=3, dataset=["a", "b"]))
    with pytest.raises(ConfigError, match="shards=1"):
        run_evolve(config_of(tmp_path), shard="1/2")
    with pytest.raises(ConfigError, match="merge it with"):
        run_evolve(config_of(tmp_path, adapter_name_or_path="adapter"))


def test_shards_of_several_machines_are_joined(run, tmp_path):
    given = {"iterations": 1, "shards": 2, "batch_size": 8, "dataset": "scenes:preference/0+16", "max_samples": None}
    config = config_of(tmp_path / "out", rounds=1, t_max=1.0, t_min=0.0, **given)
    run_evolve(config, shard="2/2")
    assert not (tmp_path / "out" / "iter0" / "generate").exists()
    assert read_manifest(tmp_path / "out" / "iter0" / "generate-2-of-2") is not None
    run_evolve(config)
    joined = list(read_records(Trajectory, tmp_path / "out" / "iter0" / "generate" / "trajectories.jsonl"))
    alone = list(read_records(Trajectory, run / "iter0" / "generate" / "trajectories.jsonl"))
    first = [t for t in alone if t.round == 0][:32]
    assert [(t.sample_id, t.branch, t.box_text) for t in joined] == [(t.sample_id, t.branch, t.box_text) for t in first]


@pytest.mark.slow
def test_a_server_is_started_for_each_policy_and_stopped(run, tmp_path):
    given = {"iterations": 1, "dataset": "scenes:preference/0+8", "max_samples": 8, "server": OUR_SERVER}
    out = tmp_path / "out"
    run_evolve(config_of(out, rounds=1, t_max=1.0, t_min=0.0, **given))  # no pair, so no training
    manifest = read_manifest(out / "iter0" / "generate")
    assert manifest["requests"]["policy"].get("ok", 0) >= 8, (manifest["requests"], manifest["counts"])
    assert manifest["config"]["policy"] == "endpoint"
    assert "Serving policy" in (out / "iter0" / "generate" / "server.log").read_text()
    port = free_port()
    log = tmp_path / "log"
    with (
        pytest.raises(EndpointError, match="ended with status 3 before it served"),
        served([sys.executable, "-c", "raise SystemExit(3)"], port, "policy", log, start_s=30),
    ):
        pass
    with (
        pytest.raises(EndpointError, match="there is no program 'no-such-server'"),
        served(["no-such-server"], port, "policy", log),
    ):
        pass


def test_a_server_that_ends_at_once_is_told_with_the_end_of_its_log(tmp_path):
    said = "import sys; print('x' * 9000); print('no GPU found, key sk-abcdefghijklmnop'); sys.exit(3)"
    start = time.monotonic()
    with (
        pytest.raises(EndpointError, match="ended with status 3 before it served") as raised,
        served([sys.executable, "-c", said], free_port(), "policy", tmp_path / "log", start_s=60),
    ):
        pass
    assert str(raised.value).endswith("  | no GPU found, key ***")
    assert len(str(raised.value)) < 5000
    assert time.monotonic() - start < 30


def test_a_server_that_did_not_start_may_be_mended_in_the_same_folder(tmp_path):
    given = {"iterations": 1, "dataset": "scenes:preference/0+8", "max_samples": 8}
    broken = config_of(tmp_path / "run", **given, server=["no-such-server"])
    with pytest.raises(EndpointError, match="there is no program 'no-such-server'"):
        run_evolve(broken)
    mended = config_of(tmp_path / "run", **given, server=["no-such-server"], server_args=["--other"])
    with pytest.raises(EndpointError, match="there is no program 'no-such-server'"):  # and not: holds other work
        run_evolve(mended)


def test_vllm_is_started_with_the_limits_of_the_checkpoint(tmp_path):
    asked = GenerateConfig(model_name_or_path=str(CHECKPOINT), dataset="d", output_dir=tmp_path)
    server = ServerConfig(server="vllm", server_args=["--max-model-len", "4096"])
    command = server_command(asked, server, 8123)
    assert command[:3] == ["vllm", "serve", str(CHECKPOINT)]
    assert command[command.index("--served-model-name") + 1] == "policy"
    told = json.loads(command[command.index("--mm-processor-kwargs") + 1])
    # Wholes of 112² pixels and crops of up to 126² both pass as they are sized here.
    assert (set(told), told["size"]["longest_edge"] >= 126 * 126) == ({"size"}, True)
    assert command[-2:] == ["--max-model-len", "4096"]


def test_a_server_of_ones_own_is_told_the_pixel_limits(tmp_path):
    asked = GenerateConfig(
        model_name_or_path=str(CHECKPOINT), dataset="d", output_dir=tmp_path, image_max_pixels=84 * 84
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"image_max_pixels is set, so the command must pass it on"):
        server_command(asked, ServerConfig(server=OUR_SERVER), 8123)
    limits = ["image_max_pixels={image_max_pixels}", "crop_max_pixels={crop_max_pixels}"]
    command = server_command(asked, ServerConfig(server=OUR_SERVER, server_args=limits), 8123)
    assert command[-3:] == ["port=8123", f"image_max_pixels={84 * 84}", f"crop_max_pixels={126 * 126}"]
    elsewhere = asked.model_copy(update={"model_name_or_path": str(tmp_path), "image_max_pixels": None})
    with pytest.raises(ConfigError, match="neither config nor checkpoint sets it"):
        server_command(elsewhere, ServerConfig(server=OUR_SERVER, server_args=limits), 8123)


def test_a_training_config_that_is_not_there_is_said_before_any_work(tmp_path):
    with pytest.raises(ConfigError, match=r"no-such\.yaml; configs/ is part of the source"):
        run_evolve(config_of(tmp_path / "run", train_config=tmp_path / "no-such.yaml"))
    assert not (tmp_path / "run").exists()
