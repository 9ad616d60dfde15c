"""A loss from outside the package, named as module:NAME: that of docs/TRAINING.md, through the command line."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from visrl.config import ConfigError, build_config
from visrl.manifest import read_manifest
from visrl.models.tiny import CHECKPOINT
from visrl.train.checkpoints import TrainingError
from visrl.train.config import TrainConfig
from visrl.train.identity import parents_of
from visrl.train.losses import LOSSES, Loss
from visrl.train.run import train

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "TRAINING.md").read_text(encoding="utf-8")
SECTION = GUIDE.partition("### A loss of your own")[2].partition("\n## ")[0]


def config(out: Path, loss: str, **more: Any) -> TrainConfig:
    values = {
        "model_name_or_path": str(CHECKPOINT), "output_dir": str(out), "stage": "dpo", "pref_loss": loss,
        "dataset": "demo_rl_data_stage1", "max_samples": 2, "max_steps": 1, "save_strategy": "no", "disable_tqdm": True,
        "dataset_dir": str(ROOT / "data"), "processes": 1, **more,
    }  # fmt: skip
    return build_config(TrainConfig, values, where="the test")


def test_the_documented_loss_trains_as_arithmetic_says(tmp_path: Path) -> None:
    """One item a step, so that each logged loss is that of one pair: (β · margin − target)²."""
    (module,), (line,) = (re.findall(rf"```{kind}\n(.*?)```", SECTION, flags=re.S) for kind in ("python", "bash"))
    (tmp_path / "my_losses.py").write_text(module, encoding="utf-8")
    for name in ("configs", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    setting, program, *words = shlex.split(line)
    assert (setting, program) == ("PYTHONPATH=.", "visrl")
    fewer = (
        f"model_name_or_path={CHECKPOINT} max_steps=2 max_samples=2 gradient_accumulation_steps=1 processes=1 "
        "per_device_train_batch_size=1 logging_steps=1 learning_rate=0.01 lr_scheduler_type=constant "
        "adapter_name_or_path=null finetuning_type=lora warmup_ratio=0"
    ).split()
    command = [sys.executable, "-m", "visrl.cli", *words, *fewer]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    out = tmp_path / "runs" / "squared"
    steps = [row for row in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in row]
    reference = json.loads((out / "reference.json").read_text())["logps"]
    differences = [
        reference[f"{key}/chosen"] - reference[f"{key}/rejected"]
        for key in dict.fromkeys(name.rpartition("/")[0] for name in reference)
    ]
    assert len(steps) == len(differences) == 2
    said = [row["logps/chosen/box"] - row["logps/rejected/box"] for row in steps]
    order = differences if abs(said[0] - differences[0]) < 1e-3 else differences[::-1]  # of the epoch
    margins = [policy - before for policy, before in zip(said, order, strict=True)]
    assert margins[0] == pytest.approx(0, abs=1e-3)
    assert abs(margins[1]) > 0.1
    for row, margin in zip(steps, margins, strict=True):
        assert row["loss"] == pytest.approx((0.1 * margin - 0.5) ** 2, abs=1e-4)  # pref_beta, simpo_gamma
    assert read_manifest(out)["parents"]["loss"]


def test_a_changed_loss_is_another_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "from visrl.train.losses import Loss, dpo\nOWN = Loss(dpo, 'as it was')\n"
    (tmp_path / "changing_losses.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    before = parents_of(config(tmp_path / "out", "changing_losses:OWN"), [])
    (tmp_path / "changing_losses.py").write_text(text.replace("was", "is now"))
    after = parents_of(config(tmp_path / "out", "changing_losses:OWN"), [])
    assert {name for name in after if after[name] != before[name]} == {"loss"}
    assert "loss" not in parents_of(config(tmp_path / "out", "sigmoid"), [])


def test_a_loss_that_is_none_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = """
from visrl.train.losses import Loss, dpo
STEEP = Loss(dpo, "steeper", beta=0.7)
SMOOTH = Loss(dpo, "with a key that there is not", parameters={"label_smoothing": "smoothness"})
NUMBER = 3
"""
    (tmp_path / "odd_losses.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert config(tmp_path / "out", "odd_losses:STEEP").pref_beta == 0.7
    assert config(tmp_path / "out", "odd_losses:STEEP", pref_beta=0.2).pref_beta == 0.2
    for name, said in (
        ("odd_losses:NUMBER", "is of type int; a loss of your own is a visrl.train.losses.Loss"),
        ("odd_losses:SMOOTH", "it reads the key 'smoothness', which `visrl train` does not have"),
        ("odd_losses:NOTHING", "has no 'NOTHING'"),
        ("no_losses:LOSS", "there is no module 'no_losses'"),
        ("sigmiod", "'kto' or 'sft', or one of your own as module:NAME"),
    ):
        with pytest.raises(ConfigError, match=f"pref_loss: .*{said}"):
            config(tmp_path / "out", name)
    with pytest.raises(ConfigError, match="reads 'pair' or 'response', not 'pairs'"):
        Loss(LOSSES["sigmoid"].function, "a slip", reads="pairs")  # type: ignore[arg-type]


def test_a_loss_that_is_one_number_for_all_rows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
from visrl.train.losses import Loss
MEAN = Loss(lambda chosen: -chosen.mean(), "one number", reads="response", reference=False, beta=None)
"""
    (tmp_path / "mean_losses.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TrainingError, match=r"mean_losses:MEAN gives a loss of shape \[\] for 2 rows"):
        train(config(tmp_path / "out", "mean_losses:MEAN", per_device_train_batch_size=2))


@pytest.mark.parametrize("name", LOSSES)
def test_every_row_of_the_table_says_what_its_function_reads(name: str) -> None:
    """Called by the table, each gives one finite loss per row, and moves nothing that it is said not to read."""
    loss = LOSSES[name]
    given = torch.tensor([[-1.5, -0.5], [-2.0, -1.0], [-1.0, -0.75], [-1.75, -2.0]], requires_grad=True)
    keywords = {keyword: TrainConfig.model_fields[key].default for keyword, key in loss.parameters.items()}
    keywords |= {"beta": torch.tensor([loss.beta] * 2)} if loss.beta else {}
    keywords |= {"kl": torch.zeros(2)} if loss.kl else {}
    per_row = loss.function(*loss.arguments((given[0], given[1]), (given[2], given[3])), **keywords)
    per_row.sum().backward()
    assert given.grad is not None
    moved = [bool(row.abs().sum() > 0) for row in given.grad]
    assert per_row.shape == (2,)
    assert moved == [True, loss.reads == "pair", loss.reference, loss.reference and loss.reads == "pair"]


def test_configs_are_checked_against_the_table_without_torch() -> None:
    program = "import sys, visrl.train.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
    assert isinstance(LOSSES["sigmoid"], Loss)
