"""Greedy rollouts and their result rows at once: what a loop's checkpoints and a training run are measured by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visrl.box import CropRule
from visrl.engines.base import Policy
from visrl.records import Sample
from visrl.rewards.results import Result
from visrl.rollout.greedy import Mode, greedy_looks
from visrl.rollout.rollout import BATCH
from visrl.sequences import batched


def evaluate_samples(
    policy: Policy,
    samples: Sequence[Sample],
    *,
    mode: Mode = "own",
    crop_rule: CropRule = "exact",
    root: str | Path | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One row per sample, in order (see `Result.loop_row`); `root` is the folder that images are named from."""
    rows: list[dict[str, Any]] = []
    for part in batched(samples, BATCH):
        looks = greedy_looks(policy, part, mode=mode, root=root, crop_rule=crop_rule, seed=seed)
        rows += [Result.of(sample, look, mode).loop_row() for sample, look in zip(part, looks, strict=True)]
    return rows
