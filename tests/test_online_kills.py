"""An online training that is killed again and again ends as one that never was: weights to the bit, rollouts to the
byte."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from online_runs import online_config, read_lines

from visrl.config import build_config
from visrl.manifest import read_manifest
from visrl.train.config import TrainConfig
from visrl.train.run import train

KILLS = 20
GIVEN: dict[str, Any] = {
    "rewards": ["answer"], "num_iterations": 2, "epsilon": 0.1, "dynamic_sampling": True, "max_resample_times": 1,
    "num_generations": 2, "num_answers": 2, "max_steps": 12, "save_strategy": "steps", "save_steps": 2,
}  # fmt: skip


def train_in_a_process(given: str) -> None:
    train(build_config(TrainConfig, json.loads(given), where="the test"))


@contextmanager
def training(out: Path) -> Iterator[Any]:
    """A process that trains, from a server that has imported everything: that moment is the same every time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["visrl.train.run"])
    process = context.Process(target=train_in_a_process, args=(online_config(out, **GIVEN).model_dump_json(),))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def seconds_of_a_whole_run(out: Path) -> tuple[float, float]:
    """Until the first rollouts are there, and until the end."""
    started, first = time.monotonic(), 0.0
    with training(out) as process:
        while process.is_alive():
            if not first and (out / "rollouts.jsonl").exists():
                first = time.monotonic() - started
            process.join(0.01)
        assert process.exitcode == 0
    return first, time.monotonic() - started


def killed_at(out: Path, seconds: float) -> bool:
    """Whether the training was killed then, or had come to its end before."""
    with training(out) as process:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            return True
        assert process.exitcode == 0
    return False


@pytest.mark.slow
def test_killed_twenty_times_it_ends_with_the_same_weights_and_rollouts(tmp_path: Path) -> None:
    """Several updates from what is sampled once, questions sampled again, and kills at random moments."""
    whole, chance, kills, runs = tmp_path / "whole", random.Random(5), 0, 0
    first, end = seconds_of_a_whole_run(whole)
    assert any(row.get("resampled") for row in read_lines(whole / "log.jsonl"))
    steps = []  # lines of rollouts at each kill
    while kills < KILLS:
        runs += 1
        again = tmp_path / f"again {runs}"
        # As long as the start takes and a third of the rest: most lives reach a few steps.
        while killed_at(again, chance.uniform(0, first + (end - first) / 3) if kills < KILLS else 10 * end):
            if read_manifest(again) is None:  # else it was about to leave, its work done
                kills += 1
                journal = again / "rollouts.jsonl"
                steps.append(journal.read_bytes().count(b"\n") if journal.exists() else 0)
        for name in ("adapter_model.safetensors", "rollouts.jsonl"):
            assert (again / name).read_bytes() == (whole / name).read_bytes(), (name, runs, steps)
    assert len(set(steps)) > 4, steps  # they were different moments
    print(f"{kills} kills in {runs} trainings, at these many lines of rollouts: {steps}")
