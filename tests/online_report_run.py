"""A made-up folder of an online training for the tests of the report, laid out as `visrl train` lays out its own."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from visrl.box import Box
from visrl.manifest import write_manifest
from visrl.records import Sample, write_records
from visrl.scenes import scene_samples

STEPS, QUESTIONS, BOXES, ANSWERS = 40, 4, 4, 2
CONFIG = {"stage": "grpo", "num_generations": BOXES, "num_answers": ANSWERS, "image_root": None}


def log_row(step: int, rng: random.Random) -> dict[str, Any]:
    """A step of a training that goes well."""
    grown = step / STEPS
    row = {
        "step": step, "loss": rng.gauss(0, 0.05), "grad_norm": 1.0, "reward": 0.3 + 0.4 * grown + rng.gauss(0, 0.03),
        "reward_std": 0.45, "rewards/answer/mean": 0.3 + 0.4 * grown, "rewards/answer/std": 0.45, "left_out": 0.0,
        "rewards/format/mean": 0.9 + 0.1 * grown, "rewards/format/std": 0.2, "frac_reward_zero_std": 0.1 + 0.2 * grown,
        "frac_reward_zero_std/answer": 0.5, "entropy": 0.8 - 0.4 * grown, "entropy/box": 0.9 - 0.4 * grown,
        "entropy/answer": 0.4 - 0.2 * grown, "kl": 0.02 * grown, "clip_ratio/low_mean": 0.01,
        "clip_ratio/high_mean": 0.02,
        "clip_ratio/region_mean": 0.03, "box/parsed": 0.95 + 0.05 * grown, "box/area": 0.1 - 0.03 * grown,
        "box/area_std": 0.05, "box/right_object": 0.4 + 0.4 * grown, "completions/mean_length/box": 14.0,
        "completions/mean_length/answer": 3.5, "completions/clipped_ratio/box": 0.0,
        "completions/clipped_ratio/answer": 0.01, "tokens/sampled": 1234.0, "tokens/prefilled": 2345.0,
        "tokens/update": 1500.0, "time/rollout": 1.5 + rng.random() / 5, "time/reward": 0.01, "time/update": 1.0,
        "step_time": 2.5, "samples_per_second": 6.4,
    }  # fmt: skip
    return row


def held_out_row(step: int) -> dict[str, Any]:
    row: dict[str, Any] = {"step": step, "eval_rollout/n": 64, "eval_rollout/parse_rate": 1.0}
    for name, start in (("accuracy", 0.3), ("iou", 0.4), ("right_object", 0.5)):
        value = start + 0.3 * step / STEPS
        row |= {f"eval_rollout/{name}": value, f"eval_rollout/{name}_low": value - 0.1,
                f"eval_rollout/{name}_high": value + 0.1}  # fmt: skip
    return row


def rollout_row(step: int, sample: Sample, rng: random.Random) -> dict[str, Any]:
    """A row of the journal: near the true box, and oftener right, the later the step; the last box cannot be read."""
    assert sample.box is not None
    boxes: list[dict[str, Any]] = []
    for number in range(BOXES):
        if number == BOXES - 1:
            boxes.append({"text": "[[", "box": None, "error": "box: no four numbers in '[['", "reward": 0.0,
                          "advantage": -1.2, "answers": [], "rewards": [0.0], "advantages": [],
                          "parts": {"answer": [0.0], "format": [0.0]}})  # fmt: skip
            continue
        x, y = (min(max(at + rng.gauss(0, 0.08), 0), 0.7) for at in (sample.box.x0, sample.box.y0))
        box = Box(x, y, x + 0.25, y + 0.2)
        right = [float(rng.random() < 0.3 + 0.6 * step / STEPS) for _ in range(ANSWERS)]
        reward = sum(right) / ANSWERS
        boxes.append({
            "text": str(box.as_list()), "box": box.as_list(), "right_object": True, "reward": reward,
            "advantage": reward - 0.4, "answers": [sample.answer if one else "17" for one in right], "rewards": right,
            "advantages": [one - reward for one in right], "parts": {"answer": right, "format": [1.0] * ANSWERS},
        })  # fmt: skip
    return {"step": step, "id": sample.id, "image": sample.image, "question": sample.question,
            "answer": sample.answer, "true_box": sample.box.as_list(), "boxes": boxes}  # fmt: skip


def write_online_run(run: Path, steps: int = STEPS, finished: bool = True) -> Path:
    """An online training of so many steps on drawn scenes, with made-up numbers."""
    rng = random.Random(5)
    run.mkdir(parents=True)
    log = [held_out_row(0)]
    for step in range(1, steps + 1):
        log += [log_row(step, rng), *([held_out_row(step)] if step % 10 == 0 else [])]
    write_records(run / "log.jsonl", log)
    samples = scene_samples("preference", 0, 24, with_box=True)
    rows = [
        rollout_row(step, samples[(QUESTIONS * (step - 1) + n) % len(samples)], rng)
        for step in range(1, steps + 1)
        for n in range(QUESTIONS)
    ]
    write_records(run / "rollouts.jsonl", rows)
    if finished:
        write_manifest(run, verb="train", config=CONFIG, parents={}, crop_rule="exact", steps=steps)
    return run
