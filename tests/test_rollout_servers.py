"""Online steps whose rollouts servers sample: a real server process of ours, and what is refused of others."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from http_server import Handler
from http_server import serving as scripted
from safetensors.torch import load_file

from visrl.config import ConfigError, build_config, read_config
from visrl.engines.client import Client
from visrl.engines.openai_server import Endpoint, EndpointError
from visrl.engines.server_process import free_port, served
from visrl.manifest import read_manifest
from visrl.models.tiny import CHECKPOINT
from visrl.models.tiny.make import make_tiny
from visrl.train.checkpoints import TrainingError
from visrl.train.config import TrainConfig
from visrl.train.importance import importance_weights
from visrl.train.rollout_servers import FOLDER
from visrl.train.run import train

# --- what a token weighs ----------------------------------------------------------------------------------------------


def test_importance_weights_by_hand() -> None:
    """Two responses of two tokens each and one of one: π_old / π_sampling = 1, 2 | .5, .25 | 8."""
    old, branch = torch.tensor([1.0, 2.0, 0.5, 0.25, 8.0]).log(), torch.tensor([0, 0, 1, 1, 2])

    def weights(mode: Any, low: float | None = None, high: float | None = 3.0) -> tuple[list[float], list[bool]]:
        found, cut = importance_weights(old, torch.zeros(5), branch, 3, mode=mode, clip_min=low, clip_max=high)
        return [round(one, 5) for one in found.tolist()], cut.tolist()

    assert weights("token_truncate") == ([1, 2, 0.5, 0.25, 3], [False, False, False, False, True])
    assert weights("token_truncate", low=0.5)[0] == [1, 2, 0.5, 0.5, 3]
    assert weights("token_mask", low=0.5) == ([1, 2, 0.5, 0, 0], [False, False, False, True, True])
    assert weights("sequence_truncate")[0] == [2, 2, 0.125, 0.125, 3]
    assert weights("sequence_mask", low=0.2, high=None) == ([2, 2, 0, 0, 8], [False, False, True, True, False])


# --- a real server ----------------------------------------------------------------------------------------------------


def config(out: Path, **more: Any) -> TrainConfig:
    values = {
        "model_name_or_path": str(CHECKPOINT), "stage": "grpo", "num_generations": 3, "num_answers": 2,
        "dataset": "scenes:preference@1/0+8", "per_device_train_batch_size": 2, "learning_rate": 1.0, "optim": "sgd",
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "logging_steps": 1, "save_strategy": "no", "seed": 3,
        "train_sampling_strategy": "sequential", "rewards": ["iou", "answer"], "disable_tqdm": True, "processes": 1,
        "loss_type": "bnpo", "output_dir": str(out), **more,
    }  # fmt: skip
    return build_config(TrainConfig, values, where="the test")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def api(port: int, folder: Path) -> list[str]:
    """The command of a server of ours that takes adapters from below a folder."""
    keys = {"model_name_or_path": CHECKPOINT, "port": port, "runtime_lora_folder": folder, "served_model_name": "tiny"}
    return [sys.executable, "-m", "visrl.cli", "api", *(f"{key}={value}" for key, value in keys.items())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    port = free_port()
    with served(api(port, folder), port, "tiny", folder / "server.log") as url:
        yield url


def assert_same_weights(one: Path, other: Path) -> None:
    """The same adapters, as far as two processes compute the same: steps of SGD leave rounding errors what they are."""
    ours, theirs = (load_file(out / "adapter_model.safetensors") for out in (one, other))
    assert any(weights.abs().max() > 1e-3 for name, weights in ours.items() if "lora_B" in name)
    for name, weights in ours.items():
        torch.testing.assert_close(weights, theirs[name], rtol=1e-3, atol=1e-5)


def texts_of(out: Path) -> list[Any]:
    return [(row["step"], row["id"], [(b["text"], b["answers"]) for b in row["boxes"]]) for row in journal(out)]


def journal(out: Path) -> list[dict[str, Any]]:
    return read_lines(out / "rollouts.jsonl")


def test_steps_with_a_server_are_those_of_this_process(server: str, folder: Path) -> None:
    """Two steps, the second under an adapter that has learned: the same texts and weights, and nothing left behind."""
    here = train(config(folder / "here", max_steps=2))
    names = {"rollout_url": server, "rollout_served_name": "tiny"}
    there = train(config(folder / "there", max_steps=2, **names, vllm_importance_sampling_mode="token_truncate"))
    assert texts_of(there) == texts_of(here)
    assert len({text for _, _, boxes in texts_of(here) for text, _ in boxes}) > 3
    assert_same_weights(here, there)
    rows = [row for row in read_lines(there / "log.jsonl") if "loss" in row]
    for row in rows:
        assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3)
        assert row["sampling/importance_sampling_ratio/max"] == pytest.approx(1, abs=1e-2)
        assert row["sampling/importance_sampling_ratio/cut"] == 0
        assert row["time/sync"] > 0
        assert "tokens/prefilled" not in row
    assert not (there / FOLDER).exists()
    client = Client(Endpoint((server,), "tiny"))
    assert client.adapters() == set()
    client.close()
    identity = read_manifest(there)["config"]
    assert identity["sync_every"] == 1
    assert not {"rollout_url", "concurrency"} & identity.keys()
    assert "sync_every" not in read_manifest(here)["config"]


def test_several_looks_are_sampled_by_servers_as_here(server: str, folder: Path) -> None:
    """Turn by turn, with a crop more in each prompt; a server that takes fewer images is refused before the start."""
    given = {"max_looks": 2, "look_price": 0.1, "max_steps": 1}
    names = {"rollout_url": server, "rollout_served_name": "tiny"}
    here, there = train(config(folder / "looks", **given)), train(config(folder / "looks there", **given, **names))
    assert journal(there) == journal(here)
    assert any("turns" in turn for row in journal(here) for turn in row["turns"])
    assert_same_weights(here, there)
    with pytest.raises(EndpointError, match=r"a prompt of 9 images failed: .*max_images=9"):
        train(config(folder / "no", **names, max_looks=8))


def test_an_adapter_some_steps_old_is_weighed(server: str, folder: Path) -> None:
    """Given every second step: in between the policy has moved on from the one that samples."""
    names = {"rollout_url": [server], "rollout_served_name": "tiny", "sync_every": 2}
    out = train(config(folder / "seldom", max_steps=2, **names, vllm_importance_sampling_mode="token_truncate"))
    first, second = [row for row in read_lines(out / "log.jsonl") if "loss" in row]
    assert first["sampling/importance_sampling_ratio/max"] == pytest.approx(1, abs=1e-2)
    assert first["sampling/logp_difference"] < 1e-4
    assert second["sampling/logp_difference"] > 1e-3
    assert second["sampling/importance_sampling_ratio/max"] > 1.01


def test_a_server_of_another_model_or_key_is_refused_before_anything_is_claimed(server: str, folder: Path) -> None:
    with pytest.raises(EndpointError, match=r"does not serve '.*'; it serves tiny"):
        train(config(folder / "no", rollout_url=server))
    other = make_tiny(folder / "other")
    with pytest.raises(EndpointError, match=r"another prompt|does not hold the model that is trained"):
        train(
            config(folder / "no", model_name_or_path=str(other), rollout_url=server, rollout_served_name="tiny")
        )  # fmt: skip
    assert not (folder / "no" / "started.json").exists()


@pytest.mark.slow
def test_a_server_that_dies_stops_the_run_in_a_sentence_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed under step 3 with the training's adapter on it; the next one has never heard of that."""
    from visrl.train import online

    given = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "request_attempts": 2}
    here = train(config(tmp_path / "here", **{k: v for k, v in given.items() if k != "request_attempts"}))
    port, score, steps = free_port(), online.score_rollouts, []

    def score_and_kill(*args: Any) -> Any:
        steps.append(1)
        if len(steps) == 2:
            for process in psutil.Process().children(recursive=True):
                if "api" in process.cmdline() and "keeper.py" not in " ".join(process.cmdline()):
                    process.send_signal(signal.SIGKILL)
        return score(*args)

    names = {"rollout_url": f"http://127.0.0.1:{port}/v1", "rollout_served_name": "tiny"}
    there = config(tmp_path / "there", **given, **names)
    with served(api(port, tmp_path), port, "tiny", tmp_path / "server.log"):
        monkeypatch.setattr(online, "score_rollouts", score_and_kill)
        with pytest.raises((EndpointError, TrainingError), match="cannot be reached"):
            train(there)
        monkeypatch.setattr(online, "score_rollouts", score)
    assert read_manifest(there.output_dir) is None
    assert (there.output_dir / "checkpoint-2").is_dir()
    with pytest.raises(EndpointError, match="no server answers"):
        train(there)
    with served(api(port, tmp_path), port, "tiny", tmp_path / "server.log"):
        train(there)
    assert texts_of(there.output_dir) == texts_of(here)
    assert_same_weights(here, there.output_dir)


@pytest.mark.slow
def test_two_processes_ask_for_their_own_shares(server: str, folder: Path) -> None:
    names = {"rollout_url": server, "rollout_served_name": "tiny", "max_steps": 2}
    one = train(config(folder / "whole", **names, per_device_train_batch_size=4, loss_type="dapo"))
    two = train(config(folder / "parts", **names, processes=2, loss_type="dapo"))
    assert sorted(texts_of(one)) == sorted(texts_of(two))
    assert_same_weights(one, two)
    assert not (two / FOLDER).exists()


# --- servers that cannot be trained from ------------------------------------------------------------------------------


def says(**choice: Any) -> Any:
    """A script that unloads whatever it is told and answers every question alike."""

    def script(handler: Handler, body: dict[str, Any]) -> None:
        if "lora_name" in body:
            error = {"error": {"message": f"The lora adapter '{body['lora_name']}' cannot be found.", "code": 404}}
            handler.send(404, json.dumps(error).encode())
            return
        message = {"role": "assistant", "content": "1"}
        choices = [{"index": 0, "message": message, "finish_reason": "stop", **choice}]
        handler.send(200, json.dumps({"choices": choices, "usage": {"prompt_tokens": 0}}).encode())

    return script


def no_end_points(handler: Handler, body: dict[str, Any]) -> None:
    handler.send(404, b'{"detail": "Not Found"}')


LOGPROBS = {"content": [{"token": "1", "logprob": -0.1}, {"token": "2", "logprob": -8.0}]}


@pytest.mark.parametrize(("script", "told"), [
    (no_end_points, "loads no adapters at run time.*VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
    (says(), r"it tells no token ids \(return_token_ids\) and no logprobs"),
    (says(token_ids=[30, 31]), "it tells no logprobs"),
    (says(token_ids=[30, 31], logprobs=LOGPROBS), "does not hold the model that is trained"),
    (says(token_ids=[30], logprobs=LOGPROBS), "1 token_ids and 2 logprobs"),
    (says(token_ids=[30, -1], logprobs=LOGPROBS), "its token_ids are no tokens"),
    (says(token_ids=[30], logprobs={"content": [{"logprob": math.nan}]}), "its logprobs are no log-probabilities"),
])  # fmt: skip
def test_a_server_that_cannot_be_trained_from_is_refused_in_a_sentence(tmp_path: Path, script: Any, told: str) -> None:
    with scripted(script) as server, pytest.raises(EndpointError, match=told):
        train(config(tmp_path / "out", rollout_url=server.url, rollout_served_name="m", request_attempts=1))
    assert not (tmp_path / "out" / "started.json").exists()


@pytest.mark.parametrize(("said", "told"), [
    (["sync_every=2"], "sync_every: no server samples; set rollout_url"),
    (["vllm_importance_sampling_clip_max=2"], "vllm_importance_sampling_clip_max: no server samples"),
    (["rollout_url=http://h/v1", "finetuning_type=full"], "set finetuning_type: lora"),
    (["rollout_url=http://h/v1", "stage=ppo"], "stage: ppo trains a value head"),
    (["rollout_url=h:8000"], "does not say http"),
    (["rollout_url=http://h/v1", "sync_every=3", "num_iterations=2"], "a multiple of num_iterations=2"),
    (["rollout_url=http://h/v1", "sync_every=4", "save_steps=6"], "a multiple of sync_every=4"),
    (["rollout_url=http://h/v1", "sync_every=4", "save_strategy=epoch"], "a multiple of sync_every=4"),
    (["rollout_url=http://h/v1", "vllm_importance_sampling_correction=false",
      "vllm_importance_sampling_mode=token_mask"], "vllm_importance_sampling_correction is off"),
    (["rollout_url=http://h/v1", "vllm_importance_sampling_clip_min=3"], "is not below"),
])  # fmt: skip
def test_keys_that_do_not_go_together_are_refused(said: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_config(TrainConfig, None, ["model_name_or_path=m", "output_dir=o", "stage=grpo", *said])


def test_keys_of_trl_have_its_defaults() -> None:
    from trl import GRPOConfig

    theirs = {name: field.default for name, field in GRPOConfig.__dataclass_fields__.items()}
    ours = {name: field.default for name, field in TrainConfig.model_fields.items() if name.startswith("vllm_")}
    assert len(ours) == 4
    assert ours == {name: theirs[name] for name in ours}
