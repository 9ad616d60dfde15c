"""What tests of online trainings share: a short run of the embedded model, and what it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from visrl.config import build_config
from visrl.models.tiny import CHECKPOINT
from visrl.train.config import TrainConfig


def online_config(out: Path, **more: Any) -> TrainConfig:
    """Four steps of two questions each on the embedded model."""
    values = {
        "model_name_or_path": str(CHECKPOINT), "stage": "grpo", "num_generations": 3, "num_answers": 2,
        "dataset": "scenes:preference@1/0+8", "per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-3,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "seed": 3,
        "processes": 1, "output_dir": str(out), **more,
    }  # fmt: skip
    return build_config(TrainConfig, values, where="the test")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
