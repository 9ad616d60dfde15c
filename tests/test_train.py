"""Training end to end on tiny random models: what moves, what resumes, what merges, what is refused."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from visrl.config import ConfigError, build_config
from visrl.manifest import ManifestError, read_manifest
from visrl.models.load import CheckpointError, load_model
from visrl.train.config import TrainConfig
from visrl.train.export import ExportConfig, export
from visrl.train.run import train

PHASES = [{"steps": 4, "tasks": ["read"], "max_tags": 2, "close_up": [0.0, 0.5]}, {"steps": 4, "grid": 10}]


def config(model: Path, out: Path, **more) -> TrainConfig:
    values = {
        "model_name_or_path": str(model),
        "output_dir": str(out),
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
        **more,
    }
    return build_config(TrainConfig, values, where="the test")


def warm_up(model: Path, out: Path, **more) -> TrainConfig:
    return config(
        model,
        out,
        finetuning_type="full",
        freeze_vision_tower=False,
        freeze_multi_modal_projector=False,
        curriculum=PHASES,
        **more,
    )


def preferences(model: Path, out: Path, stage: int, **more) -> TrainConfig:
    return config(model, out, stage="dpo", rl_stage=stage, dataset=f"demo_rl_data_stage{stage}", max_samples=6, **more)


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_full_warm_up_moves_every_weight_and_says_what_made_it(tiny, tmp_path):
    out = train(warm_up(tiny, tmp_path / "out"))
    before, after = load_model(tiny).state_dict(), load_model(out).state_dict()
    still = [name for name in before if before[name].equal(after[name])]
    assert not still
    manifest = read_manifest(out)
    assert manifest["steps"] == 8
    assert manifest["config"]["curriculum"][1]["grid"] == 10
    assert manifest["versions"]["torch"]
    assert not list(out.glob("*.bin")), "no pickles"
    assert {"nll/answer", "nll/box"} <= set().union(*log(out))


def test_a_frozen_vision_tower_stays(tiny, tmp_path):
    out = train(
        warm_up(tiny, tmp_path / "out").model_copy(
            update={"freeze_vision_tower": True, "freeze_multi_modal_projector": True}
        )
    )
    before, after = load_model(tiny).state_dict(), load_model(out).state_dict()
    moved = [name for name in before if not before[name].equal(after[name])]
    assert moved
    assert not [name for name in moved if ".visual." in name]


def test_killed_and_resumed_training_ends_with_the_same_weights(tiny, tmp_path):
    whole = train(warm_up(tiny, tmp_path / "whole", save_strategy="steps", save_steps=2))
    again = tmp_path / "again"
    command = (
        "import sys, json; from visrl.train.run import train; from visrl.train.config import TrainConfig; "
        "from visrl.config import build_config; train(build_config(TrainConfig, json.loads(sys.argv[1]), where='x'))"
    )
    values = json.loads(warm_up(tiny, again, save_strategy="steps", save_steps=2).model_dump_json())
    process = subprocess.Popen([sys.executable, "-c", command, json.dumps(values)])
    while not (again / "checkpoint-4").is_dir() and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert read_manifest(again) is None, "killed before the end"
    train(warm_up(tiny, again, save_strategy="steps", save_steps=2))
    one, other = load_file(whole / "model.safetensors"), load_file(again / "model.safetensors")
    assert all(one[name].equal(other[name]) for name in one)
    assert [row["step"] for row in log(again)] == [row["step"] for row in log(whole)]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_stage_starts_at_its_reference_and_learns(tiny, tmp_path, stage):
    out = train(preferences(tiny, tmp_path / "out", stage, num_train_epochs=8, learning_rate=5e-3))
    rows = [row for row in log(out) if "loss" in row]
    # log σ(0) for every row: weight 1 in stage 1, λ_B + λ_R = 1 in stage 2
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert rows[-1]["loss"] < 0.6
    assert rows[-1]["rewards/accuracies/box"] == 1.0
    assert ("rewards/margins/answer" in rows[0]) == (stage == 2)


def test_merging_keeps_what_the_adapter_says(tiny, tmp_path):
    adapter = train(preferences(tiny, tmp_path / "adapter", 2, num_train_epochs=4, learning_rate=5e-3))
    given = {"model_name_or_path": str(tiny), "adapter_name_or_path": str(adapter)}
    merged = export(ExportConfig(**given, export_dir=tmp_path / "merged", export_dtype="float32"))
    assert read_manifest(merged)["max_logp_deviation"] < 1e-4
    assert not any("lora" in name for name in load_model(merged).state_dict())
    with pytest.raises(CheckpointError, match="holds an adapter without its base model"):
        load_model(adapter)
    with pytest.raises(CheckpointError, match="holds no adapter"):
        export(ExportConfig(model_name_or_path=str(tiny), adapter_name_or_path=str(tiny), export_dir=tmp_path / "x"))


def test_an_output_folder_of_other_work_is_refused(tiny, tmp_path):
    train(preferences(tiny, tmp_path / "out", 1))
    with pytest.raises(ManifestError, match=r"holds other work \(.*rl_stage.* differ\)"):
        train(preferences(tiny, tmp_path / "out", 2))
    train(preferences(tiny, tmp_path / "out", 1))  # the same again is complete, and says so


def test_what_does_not_go_together_is_one_sentence(tiny, tmp_path):
    with pytest.raises(ConfigError, match="no layer is called nonsense"):
        train(preferences(tiny, tmp_path / "a", 1, lora_target="q_proj,nonsense"))
    with pytest.raises(ConfigError, match="name the data"):
        train(config(tiny, tmp_path / "b", finetuning_type="full"))
    with pytest.raises(CheckpointError, match="no such folder"):
        train(preferences(tmp_path / "none", tmp_path / "c", 1))
