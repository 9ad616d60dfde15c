"""Every field of `transformers.TrainingArguments` is honoured or refused by name, before a folder is claimed."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from visrl.cli import main
from visrl.config import ConfigError, read_config
from visrl.models.tiny import CHECKPOINT
from visrl.train.config import TrainConfig
from visrl.train.fields import TrainerFields

OURS = {"output_dir", "do_train"}
GIVEN = ["model_name_or_path=m", "output_dir=o"]


def test_the_table_holds_every_field_of_the_installed_release_and_no_other() -> None:
    from transformers import TrainingArguments

    fields = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    assert fields - set(TrainerFields.model_fields) == OURS
    later = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # names of 5.24 and on
    assert set(TrainerFields.model_fields) - fields <= later


@pytest.mark.parametrize(
    ("said", "value"),
    [
        ("learning_rate=1e-4", 1e-4),
        ("learning_rate='5e-6'", 5e-6),
        ("weight_decay=1E-2", 1e-2),
        ("lr_scheduler_kwargs={min_lr: 1e-6}", {"min_lr": 1e-6}),
        ("eval_strategy=no", "no"),
        ("bf16=yes", True),
        ("report_to=[tensorboard, wandb]", ["tensorboard", "wandb"]),
        ("gradient_checkpointing_kwargs={use_reentrant: false}", {"use_reentrant": False}),
        ("label_smoothing_factor=0.0", 0.0),
    ],
)
def test_a_value_has_the_type_of_its_field(said: str, value: object) -> None:
    key = said.partition("=")[0]
    assert read_config(TrainConfig, None, [*GIVEN, said]).training_arguments() == {key: value}


@pytest.mark.parametrize(
    "said",
    [
        "learning_rate=fast", "learning_rate=0", "learning_rate=.nan", "learning_rate=true", "learning_rate=1e999",
        "num_train_epochs=0", "max_steps=0", "max_steps=-2", "max_steps=1.5", "per_device_train_batch_size=true",
        "adam_beta1=1", "seed=-1", "seed=99999999999999999999", "save_total_limit=0", "eval_strategy=sometimes",
        "bf16=maybe", "lr_scheduler_kwargs=[1]", "ddp_timeout=0", "dataloader_num_workers=-1", "max_samples=-1",
        "val_size=1.5",
    ],
)  # fmt: skip
def test_a_value_out_of_type_or_range_is_refused_by_its_key(said: str) -> None:
    with pytest.raises(ConfigError, match=rf"command line: {said.partition('=')[0]}: .*\(got "):
        read_config(TrainConfig, None, [*GIVEN, said])


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("label_smoothing_factor=0.1", "dpo_label_smoothing"),
        ("torch_compile=true", "leave the key out"),
        ("neftune_noise_alpha=5", "packed"),
        ("group_by_length=true", "decided by pictures"),
        ("train_sampling_strategy=group_by_length", "decided by pictures"),
        ("push_to_hub=true", "hf upload"),
        ("remove_unused_columns=true", "leave the key out, or false"),
        ("save_only_model=true", "go on from"),
        ("data_seed=3", "seed alone"),
        ("auto_find_batch_size=true", "--dry-run"),
        ("use_liger_kernel=true", "Liger"),
        ("enable_liger_kernel=true", "Liger"),
        ("hub_token=hf_secret", "hf upload"),
    ],
)
def test_what_is_not_honoured_is_refused_with_what_to_write(said: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as refused:
        read_config(TrainConfig, None, [*GIVEN, said])
    assert "hf_secret" not in str(refused.value)


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """The words of a training that runs: four drawn scenes, one step."""
    row = (
        '{{"id": "{0}", "image": "scene:preference/{0}", "question": "Which?", "answer": "1", "box": [0, 0, 0.5, 0.5]}}'
    )
    (tmp_path / "rows.jsonl").write_text("\n".join(row.format(number) for number in range(4)))
    return [
        "train", f"model_name_or_path={CHECKPOINT}", f"dataset={tmp_path / 'rows.jsonl'}", "processes=1", "max_steps=1",
        f"output_dir={tmp_path / 'out'}", "disable_tqdm=true", "save_strategy=no",
    ]  # fmt: skip


def ended(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        main(words)
    return int(end.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (["report_to=wandb"], "wandb"),
        (["optim=galore_adamw", "optim_target_modules=[q_proj]"], "galore"),
        (["optim=adamw_bnb_8bit"], "bitsandbytes"),
        (["optim=fast"], "fast"),
        (["optim_args=no_such_thing=1", "optim=lion_32bit"], "training arguments"),
        (["lr_scheduler_type=warmup_stable_decay"], "num_decay_steps"),
        (["lr_scheduler_kwargs={no_such: 1}"], "no_such"),
        (["eval_strategy=epoch"], "val_size"),
        (["load_best_model_at_end=true"], "val_size"),
        (["val_size=1", "eval_strategy=no"], "never be looked at"),
        (["val_size=1", "load_best_model_at_end=true", "metric_for_best_model=rollout/score"], "rollout_samples"),
        (["fsdp=full_shard"], "istributed"),
        (["deepspeed=no/such.json"], "there is no file"),
        (["fp16=true", "bf16=true"], "both"),
        (["resume_from_checkpoint=true"], "no checkpoint to go on from"),
        (["resume_from_checkpoint=no/such"], "is no checkpoint of a training"),
        (["per_device_train_batch_size=8", "dataloader_drop_last=true"], "nothing would be trained"),
        (["dataloader_prefetch_factor=2"], "dataloader_num_workers"),
        (["gradient_checkpointing=true", "gradient_checkpointing_kwargs={reentrant: false}"], "use_reentrant"),
        (["finetuning_type=full", "freeze_language_model=true"], "frozen"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_training_that_cannot_start_says_why_and_claims_nothing(
    said: list[str], told: str, data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text = ended([*data, *said], capsys)
    assert status == 1
    assert told in text.splitlines()[-1], text
    assert not (tmp_path / "out").exists()
    assert not any(name.startswith("ACCELERATE_USE") for name in os.environ)  # the next training would obey it


def test_once_corrected_the_same_command_runs(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended([*data, "report_to=wandb"], capsys)[0] == 1
    assert ended([*data, "remove_unused_columns=false"], capsys)[0] == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["steps"] == 1


def test_a_loss_that_is_no_number_ends_the_training_and_completes_nothing(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text = ended([*data, "max_steps=3", "learning_rate=1e30", "max_grad_norm=0"], capsys)
    assert status == 1
    assert "no number" in text
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_checkpoint_of_another_folder_is_gone_on_from(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    steps = ["max_steps=2", "save_strategy=steps", "save_steps=1", "logging_steps=1", "dataloader_num_workers=0"]
    words = [*data[:-1], *steps]
    with monkeypatch.context() as patch:  # what a kill would leave
        patch.setattr(shutil, "rmtree", lambda path: None)
        assert ended([*words, f"output_dir={tmp_path / 'first'}"], capsys)[0] == 0
    start = tmp_path / "first" / "checkpoint-1"
    assert ended([*words, f"resume_from_checkpoint={start}"], capsys)[0] == 0
    first, second = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("first", "out")
    )
    assert [row["loss"] for row in second if row["step"] == 2 and "loss" in row] == [
        row["loss"] for row in first if row["step"] == 2 and "loss" in row
    ]
    assert not any(row["step"] == 1 for row in second)
    end = tmp_path / "first" / "checkpoint-2"
    status, text = ended([*words, f"resume_from_checkpoint={end}", f"output_dir={tmp_path / 'third'}"], capsys)
    assert (status, "nothing was trained" in text) == (1, True)
