"""A config's `transformers.TrainingArguments`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainingArguments

from visrl.config import ConfigError
from visrl.train.config import TrainConfig
from visrl.train.processes import launched


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """The `transformers.TrainingArguments` of a config, with defaults that suit a machine of any size.

    Creates the group of processes, where there are several.

    Raises:
        ConfigError: values that transformers refuses.
    """
    given = config.training_arguments()
    defaults: dict[str, Any] = {"report_to": "none", "save_total_limit": 2, "dataloader_pin_memory": False}
    if config.val_size:
        defaults["eval_strategy"] = "epoch"
    if given.get("gradient_checkpointing"):
        defaults["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    if config.rollout_samples and given.get("eval_strategy", "no") != "no":
        defaults |= {"metric_for_best_model": "eval_rollout/score", "greater_is_better": True}
    if launched():
        # Every step uses every weight that is trained: nothing to look for.
        defaults["ddp_find_unused_parameters"] = False
    if not torch.accelerator.is_available():
        defaults["use_cpu"] = True
    try:
        return TrainingArguments(
            output_dir=str(config.output_dir), **{**defaults, **given}, remove_unused_columns=False
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(f"training arguments: {error}") from error
