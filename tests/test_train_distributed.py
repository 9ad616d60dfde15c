"""Several processes, and several small batches, train to the weights of one process with one large batch."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import torch
import yaml
from safetensors.torch import load_file

from visrl.config import build_config
from visrl.manifest import read_manifest
from visrl.train.config import TrainConfig
from visrl.train.distributed import ProcessError
from visrl.train.run import train

ROOT = Path(__file__).parent.parent
EIGHT = {"per_device_train_batch_size": 8}
RECURRENT = 3e-4  # relative: Gated DeltaNet sums a run in another order than a sequence


def weights_of(model: Path, out: Path, **more: Any) -> dict[str, torch.Tensor]:
    """The adapter after two steps of eight items of stage 2, in the order of the file."""
    train(build_config(TrainConfig, stage_2(model, out, **more), where="the test"))
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest["steps"] == 2
    return load_file(out / "adapter_model.safetensors")


def stage_2(model: Path, out: Path, **more: Any) -> dict[str, Any]:
    """A config of two steps, where no option gives another batch than eight items. With plain SGD: Adam turns the
    rounding error of a gradient near 0 into a whole step, and how many there are depends on the machine."""
    return {
        "model_name_or_path": str(model), "output_dir": str(out), "stage": "dpo", "rl_stage": 2, "lambda_answer": 0.8,
        "dataset": "demo_rl_data_stage2", "max_samples": 16, "num_train_epochs": 1, "learning_rate": 0.1,
        "train_sampling_strategy": "sequential", "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
        "max_grad_norm": 0.0, "seed": 3, "optim": "sgd", **more,
    }  # fmt: skip


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], bound: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    start = torch.cat([weights.flatten() for weights in theirs.values()])
    assert start.abs().max() > 0
    for name, weights in theirs.items():
        assert (ours[name] - weights).norm() <= bound * weights.norm(), name


def logged(out: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, weights_of(tiny, out, **EIGHT)


def test_eight_batches_of_one_are_one_of_eight(tiny: Path, tmp_path: Path, whole: Any) -> None:
    out = tmp_path / "out"
    ours = weights_of(tiny, out, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    assert_equal(ours, whole[1])
    assert logged(out, "loss") == pytest.approx(logged(whole[0], "loss"), rel=1e-4)


@pytest.mark.slow
def test_two_processes_are_one(tiny: Path, tmp_path: Path, whole: Any) -> None:
    """gloo on the CPU: two processes with two accumulated batches of two items each."""
    out = tmp_path / "out"
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "processes": 2}
    assert_equal(weights_of(tiny, out, **split), whole[1])
    for name in ("loss", "rewards/margins/box", "logps/chosen/answer"):
        assert logged(out, name) == pytest.approx(logged(whole[0], name), rel=1e-3, abs=1e-4)
    stored, alone = (json.loads((folder / "reference.json").read_text())["logps"] for folder in (out, whole[0]))
    assert stored == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
def test_two_processes_in_the_plain_form_are_one_in_trees(tiny: Path, tmp_path: Path, whole: Any) -> None:
    out = tmp_path / "out"
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "processes": 2, "layout": "plain"}
    assert_equal(weights_of(tiny, out, **split), whole[1])
    assert logged(out, "loss") == pytest.approx(logged(whole[0], "loss"), rel=1e-3, abs=1e-4)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A random model of mostly recurrent layers, and its adapter after two steps in one process."""
    folder = tmp_path_factory.mktemp("hybrid")
    model, encoder = tiny_families.make("qwen3_5")
    model.save_pretrained(folder)
    encoder.processor.save_pretrained(folder)
    return folder, weights_of(folder, folder / "out", **EIGHT)


@pytest.mark.slow
def test_two_processes_with_recurrent_layers_are_one(hybrid: Any, tmp_path: Path) -> None:
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "processes": 2}
    assert_equal(weights_of(hybrid[0], tmp_path / "out", **split), hybrid[1], RECURRENT)


@pytest.mark.slow
def test_sharded_processes_are_one(tiny: Path, tmp_path: Path, whole: Any) -> None:
    """FSDP2 from the shipped config, on the CPU."""
    assert_equal(sharded(tiny, tmp_path), whole[1])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tree", "plain"])
def test_sharded_recurrent_layers_are_whole_ones(hybrid: Any, tmp_path: Path, layout: str) -> None:
    assert_equal(sharded(hybrid[0], tmp_path, layout=layout), hybrid[1], RECURRENT)


def sharded(model: Path, tmp_path: Path, **more: Any) -> dict[str, torch.Tensor]:
    """The adapter of two processes that hold a part of every weight each."""
    config = yaml.safe_load((ROOT / "configs" / "distributed" / "fsdp2.yaml").read_text())
    config |= {"num_processes": 2, "mixed_precision": "no", "use_cpu": True}
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(config))
    values = stage_2(model, tmp_path / "out", per_device_train_batch_size=4, use_cpu=True, **more)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values))
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file"]
    command += [str(tmp_path / "accelerate.yaml"), "-m", "visrl.cli", "train", str(tmp_path / "train.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(tmp_path / "out" / "adapter_model.safetensors")


@pytest.mark.slow
def test_a_failure_in_a_process_is_told_and_signals_mean_what_they_did(tiny: Path, tmp_path: Path) -> None:
    told = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = [signal.getsignal(number) for number in told]
    with pytest.raises(ProcessError, match=r"process [01] of 2: RecordError: no data 'nowhere'"):
        weights_of(tiny, tmp_path / "out", processes=2, dataset="nowhere")
    assert not (tmp_path / "out").exists()
    assert [signal.getsignal(number) for number in told] == before
