"""Greedy rollouts scored at once: drawn scenes, and what a training run measures on held-out samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visrl.box import CropRule, iou
from visrl.engines.base import Policy
from visrl.records import Sample
from visrl.rewards.metrics import exact_match
from visrl.rollout.greedy import Mode, greedy_looks
from visrl.rollout.rollout import Refusal, failure
from visrl.rollout.steps import Look
from visrl.sequences import batched

BATCH = 64

EvalRow = dict[str, Any]


def evaluate_samples(
    policy: Policy,
    samples: Sequence[Sample],
    *,
    mode: Mode = "own",
    crop_rule: CropRule = "exact",
    root: str | Path | None = None,
    seed: int = 0,
) -> list[EvalRow]:
    """One row per sample: question, boxes, prediction, whether it is right, IoU, and the error where there was one."""
    rows: list[EvalRow] = []
    for part in batched(samples, BATCH):
        looks = greedy_looks(policy, part, mode=mode, root=root, crop_rule=crop_rule, seed=seed)
        rows += [eval_row(sample, look, mode) for sample, look in zip(part, looks, strict=True)]
    return rows


def eval_row(sample: Sample, look: Look | Refusal, mode: Mode) -> EvalRow:
    """The record of one question: a look without a box counts IoU 0 and a wrong answer, with its error kept."""
    found = look if isinstance(look, Look) else None
    box, answer = (found.box, found.answer) if found else (None, None)
    return {
        "id": sample.id,
        "kind": sample.source.removeprefix("scenes-"),
        "mode": mode,
        "question": sample.question,
        "answer": sample.answer,
        "image": sample.image,
        "true_box": sample.box.as_list() if sample.box else None,
        "box": box.as_list() if box else None,
        "box_text": found.text if found else "",
        "prediction": answer,
        "correct": answer is not None and exact_match(answer, [sample.answer]) == 1.0,
        "iou": iou(box, sample.box) if box and sample.box else (0.0 if sample.box else None),
        "error": look.error if isinstance(look, Look) else failure(look),
        **({"repeat": sample.repeat} if sample.repeat else {}),
    }


def measures(rows: Sequence[EvalRow]) -> dict[str, float]:
    """What a training run watches: accuracy, parse rate, mean IoU where boxes are known, and their mean as a score."""
    accuracy = float(np.mean([row["correct"] for row in rows]))
    found = {"accuracy": accuracy, "parse_rate": float(np.mean([row["box"] is not None for row in rows]))}
    known = [row["iou"] for row in rows if row["iou"] is not None]
    if known:
        found["iou"] = float(np.mean(known))
        found["iou_50"] = float(np.mean([value > 0.5 for value in known]))
    found["score"] = (accuracy + found.get("iou", accuracy)) / 2
    return found
