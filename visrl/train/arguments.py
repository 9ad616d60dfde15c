"""A config's `transformers.TrainingArguments`, and everything that they would stumble over later: nothing is claimed
and no reference is computed for a training that cannot start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler

from visrl.config import ConfigError, shown
from visrl.train.config import TrainConfig
from visrl.train.distributed import launched

CHECKPOINTING = ("use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop")


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """The `transformers.TrainingArguments` of a config, with defaults that suit a machine of any size.

    Creates the group of processes, where there are several.

    Raises:
        ConfigError: values that transformers refuses, or keys that do not go together.
    """
    given = _present_names(config.training_arguments())
    _check_together(config, given)
    defaults: dict[str, Any] = {"report_to": "none", "save_total_limit": 2, "dataloader_pin_memory": False}
    if config.val_size or config.rollout_samples:
        defaults["eval_strategy"] = "epoch"
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if given.get(name):
            defaults[f"{name}_kwargs"] = {"use_reentrant": False}
    if config.rollout_samples:
        defaults |= {"metric_for_best_model": "eval_rollout/score", "greater_is_better": True}
    if launched():
        # Every step uses every weight that is trained: nothing to look for.
        defaults["ddp_find_unused_parameters"] = False
    if not torch.accelerator.is_available():
        defaults["use_cpu"] = True
    with refusals():
        return TrainingArguments(
            output_dir=str(config.output_dir), **{**defaults, **given}, remove_unused_columns=False
        )


@contextmanager
def refusals() -> Iterator[None]:
    """What transformers, accelerate and torch say of arguments, as a sentence for the user.

    Raises:
        ConfigError: they refused some.
    """
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError, KeyError, ImportError, RuntimeError, NotImplementedError, OSError) as error:
        raise ConfigError(f"training arguments: {' '.join(str(error).split())[:500]}") from error


def check_start(trainer: Trainer, items: int) -> None:
    """Try what a training does in its first second: optimiser, schedule, batches.

    Raises:
        ConfigError: it would end there, or train nothing.
    """
    arguments = trainer.args
    batch = arguments.train_batch_size * arguments.world_size
    if arguments.dataloader_drop_last and items < batch:
        raise ConfigError(
            f"dataloader_drop_last: nothing would be trained, for {items} items fill no batch of {batch}; "
            "leave the key out, or lower per_device_train_batch_size"
        )
    model: Any = trainer.model
    schedule: Any = arguments.lr_scheduler_kwargs
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("nothing would be trained: every part of the model is frozen; unfreeze one, or use lora")
    with refusals():
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        if "optimizer_dict" not in options and not {"params", "model"} & options.keys():
            weight = torch.zeros(1, requires_grad=True)
            get_scheduler(
                arguments.lr_scheduler_type,
                optimizer=kind([weight], **options),
                num_warmup_steps=1,
                num_training_steps=10,
                scheduler_specific_kwargs=schedule,
            )


def _present_names(given: dict[str, Any]) -> dict[str, Any]:
    """`given` under the names of the installed release: 5.24 calls gradient checkpointing activation checkpointing."""
    known = {field.name for field in fields(TrainingArguments)}
    if "activation_checkpointing" not in known:
        return given
    return {name.replace("gradient_checkpointing", "activation_checkpointing"): given[name] for name in given}


def _check_together(config: TrainConfig, given: dict[str, Any]) -> None:
    """Refuse keys of which one would silently undo the other."""
    evaluates = given.get("eval_strategy", "no") != "no"
    held_out = bool(config.val_size or config.rollout_samples)
    wants = [key for key in ("eval_on_start", "do_eval", "load_best_model_at_end") if given.get(key)]
    if (evaluates or wants) and not held_out:
        key = "eval_strategy" if evaluates else wants[0]
        raise ConfigError(
            f"{key}: there is nothing to validate on; set val_size, or rollout_dataset and rollout_samples"
        )
    if given.get("eval_strategy") == "no" and held_out:
        key = "val_size" if config.val_size else "rollout_samples"
        raise ConfigError(f"eval_strategy=no: what {key} holds out would never be looked at; leave one of them out")
    for key in ("dataloader_persistent_workers", "dataloader_multiprocessing_context", "dataloader_prefetch_factor"):
        if given.get(key) and not given.get("dataloader_num_workers"):
            raise ConfigError(f"{key}: there are no workers that it could be for; set dataloader_num_workers")
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        value = given.get(name)
        if value is not None and not given.get(name.removesuffix("_kwargs")):
            raise ConfigError(f"{name}: {name.removesuffix('_kwargs')} is off; set it as well")
        if isinstance(value, str) and not value.startswith("{"):
            raise ConfigError(f"{name}: {shown(value)} is no mapping; write {{use_reentrant: false}}")
        if isinstance(value, dict) and (unknown := value.keys() - set(CHECKPOINTING)):
            raise ConfigError(f"{name}: {shown(sorted(map(str, unknown))[0])} is none of {', '.join(CHECKPOINTING)}")
    metric = given.get("metric_for_best_model")
    if metric is not None:
        name = metric.removeprefix("eval_")
        if not (config.rollout_samples if name.startswith("rollout/") else config.val_size):
            key = "rollout_samples" if name.startswith("rollout/") else "val_size"
            raise ConfigError(f"metric_for_best_model: {shown(metric)} is measured only with {key}")
    for key in ("fsdp_config", "deepspeed"):
        path = given.get(key)
        if isinstance(path, str) and not path.startswith("{") and not Path(path).is_file():
            raise ConfigError(f"{key}: there is no file {shown(path)}")
