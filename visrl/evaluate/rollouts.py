"""Greedy rollouts over samples, scored by exact answers and true boxes: own box and the controls that bound it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from visrl.box import Box, CropRule, iou
from visrl.conversation import seed_of
from visrl.evaluate.metrics import exact_match
from visrl.evolve.rollout import Look, Policy, greedy_looks
from visrl.records import Sample

Mode = Literal["own", "no_crop", "random", "center", "truth"]
MODES: tuple[Mode, ...] = get_args(Mode)
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
    for start in range(0, len(samples), BATCH):
        part = samples[start : start + BATCH]
        boxes = None if mode == "own" else [control_box(sample, mode, seed) for sample in part]
        looks = greedy_looks(policy, part, boxes=boxes, root=root, crop_rule=crop_rule)
        rows += [eval_row(sample, look, mode) for sample, look in zip(part, looks, strict=True)]
    return rows


def control_box(sample: Sample, mode: Mode, seed: int = 0) -> Box:
    """The box that a control gives in place of the model's own.

    "truth" is the true box; "random" has its size at a random place, "center" its size in the middle of the picture;
    "no_crop" is the whole picture, shown again at the size of a crop.

    Raises:
        ValueError: the sample has no true box.
    """
    if mode == "no_crop":
        return Box(0, 0, 1, 1)
    if sample.box is None:
        raise ValueError(f"sample {sample.id} has no true box, which the control {mode!r} needs")
    if mode == "truth":
        return sample.box
    width, height = sample.box.width, sample.box.height
    if mode == "center":
        return Box(0.5 - width / 2, 0.5 - height / 2, 0.5 + width / 2, 0.5 + height / 2)
    rng = np.random.default_rng(seed_of(seed, sample.id, "control"))
    x, y = rng.random() * (1 - width), rng.random() * (1 - height)
    return Box(x, y, x + width, y + height)


def eval_row(sample: Sample, look: Look, mode: Mode) -> EvalRow:
    """The record of one question: a look without a box counts IoU 0 and a wrong answer, with its error kept."""
    correct = look.answer is not None and exact_match(look.answer, [sample.answer]) == 1.0
    overlap = iou(look.box, sample.box) if look.box and sample.box else (0.0 if sample.box else None)
    return {
        "id": sample.id,
        "kind": sample.source.removeprefix("scenes-"),
        "mode": mode,
        "question": sample.question,
        "answer": sample.answer,
        "image": sample.image,
        "true_box": sample.box.as_list() if sample.box else None,
        "box": look.box.as_list() if look.box else None,
        "box_text": look.text,
        "prediction": look.answer,
        "correct": correct,
        "iou": overlap,
        "error": look.error,
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
