"""What people watch of an online training: its measures, held-out rollouts, pages of rollouts, tables."""

from __future__ import annotations

import contextlib
import html
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from visrl.config import ConfigError, build_config
from visrl.models.tiny import CHECKPOINT
from visrl.pages.wording import plus
from visrl.train.config import TrainConfig
from visrl.train.run import train

QUESTIONS = 4


def config(out: Path, **more: Any) -> TrainConfig:
    values = {
        "model_name_or_path": str(CHECKPOINT), "stage": "grpo", "num_generations": 3, "num_answers": 2,
        "dataset": "scenes:preference/0+8", "per_device_train_batch_size": QUESTIONS, "max_steps": 3,
        "learning_rate": 1e-3, "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no",
        "disable_tqdm": True, "seed": 3, "processes": 1, "lora_dropout": 0.1, "output_dir": str(out), **more,
    }  # fmt: skip
    return build_config(TrainConfig, values, where="the test")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps with held-out rollouts before the first and after each, a page, and tables on the console."""
    given = {"rollout_dataset": "scenes:validation/0+8", "rollout_samples": 6, "eval_strategy": "steps",
             "eval_steps": 1, "eval_on_start": True, "log_completions": True, "num_completions_to_print": 3,
             "rollouts_in_page": 2, "plot_loss": True, "rewards": ["answer", "iou"]}  # fmt: skip
    folder, console = tmp_path_factory.mktemp("watched"), io.StringIO()
    with contextlib.redirect_stdout(console):
        out = train(config(folder / "out", **given))
    (folder / "console.txt").write_text(console.getvalue(), encoding="utf-8")
    return out


def test_every_measure_of_a_step_is_logged(watched: Path) -> None:
    first = next(row for row in read_lines(watched / "log.jsonl") if "loss" in row)
    boxes = [box for row in read_lines(watched / "rollouts.jsonl") if row["step"] == 1 for box in row["boxes"]]
    for name in ("entropy/box", "entropy/answer", "box/area_std", "tokens/update", "tokens/prefilled"):
        assert first[name] > 0, name
    assert min(first["entropy/box"], first["entropy/answer"]) <= first["entropy"]
    assert first["entropy"] <= max(first["entropy/box"], first["entropy/answer"])
    assert len(boxes) == QUESTIONS * 3
    right = [box["right_object"] for box in boxes if "right_object" in box]  # a scene of one tag has no other object
    assert first["box/right_object"] == pytest.approx(sum(right) / len(right))
    seconds = sum(first[f"time/{part}"] for part in ("rollout", "reward", "update"))
    assert first["step_time"] == pytest.approx(seconds)
    assert first["samples_per_second"] == pytest.approx(QUESTIONS / seconds)


def test_the_journal_holds_the_true_box(watched: Path) -> None:
    for row in read_lines(watched / "rollouts.jsonl"):
        assert len(row["true_box"]) == 4
        assert len(row["boxes"]) == 3


def test_held_out_rollouts_are_logged_with_their_intervals_and_change_no_weight(watched: Path, tmp_path: Path) -> None:
    rows = [row for row in read_lines(watched / "log.jsonl") if "eval_rollout/n" in row]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        assert row["eval_rollout/n"] == 6
        for name in ("accuracy", "iou", "right_object"):
            low, value, high = (row[f"eval_rollout/{name}{end}"] for end in ("_low", "", "_high"))
            assert 0 <= low <= value <= high <= 1
            assert low < high
    alone = train(config(tmp_path / "out", rewards=["answer", "iou"]))
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (watched, alone))
    assert any(weights.abs().max() > 0 for name, weights in one.items() if "lora_B" in name)
    assert all(one[name].equal(other[name]) for name in one)
    assert read_lines(alone / "rollouts.jsonl") == read_lines(watched / "rollouts.jsonl")


def test_the_rollouts_of_the_last_step_are_a_page_that_loads_nothing(watched: Path) -> None:
    page = (watched / "rollouts.html").read_text(encoding="utf-8")
    rows = [row for row in read_lines(watched / "rollouts.jsonl") if row["step"] == 3]
    assert f"2 of the {QUESTIONS} questions of this step" in page.replace("\u00a0", " ")
    assert page.count('class="card rollout"') == 2
    assert page.count('class="try ') == 2 * 3
    for row in rows[:2]:
        assert html.escape(row["question"]) in page
        for box in row["boxes"]:
            assert f">{plus(box['advantage'])}</strong>" in page
    assert page.count("data:image/jpeg") == 2 + sum(box["box"] is not None for row in rows[:2] for box in row["boxes"])
    assert not re.search(r"https?:|@import|url\((?!#)|<script", page)


def test_completions_are_printed_at_every_log_so_many_as_are_asked_for(watched: Path) -> None:
    text = (watched.parent / "console.txt").read_text(encoding="utf-8")
    tables = re.findall(r"─ Step (\d) ─(.*?)╰─", text, flags=re.S)
    assert [step for step, _ in tables] == ["1", "2", "3"]
    for _, table in tables:
        assert table.count("├") == 2  # between three rows


def test_curves_of_the_log_are_drawn(watched: Path) -> None:
    names = {path.name for path in watched.glob("training_*.svg")}
    assert {"training_reward.svg", "training_reward_answer.svg", "training_entropy.svg", "training_sampled_boxes.svg",
            "training_held_out_greedy_rollouts.svg", "training_seconds_of_a_step.svg"} <= names  # fmt: skip


@pytest.mark.slow
def test_the_checkpoint_that_did_best_on_held_out_questions_is_kept(tmp_path: Path) -> None:
    given = {"rollout_dataset": "scenes:validation/0+8", "rollout_samples": 6, "eval_strategy": "steps",
             "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True,
             "metric_for_best_model": "rollout/iou", "max_steps": 2, "learning_rate": 0.03}  # fmt: skip
    out = train(config(tmp_path / "out", rewards=["area"], **given))
    scores = {row["step"]: row["eval_rollout/iou"] for row in read_lines(out / "log.jsonl") if "eval_rollout/n" in row}
    best = json.loads((out / "manifest.json").read_text())["best"]
    assert best == {"metric": max(scores.values()), "checkpoint": max(scores, key=lambda step: (scores[step], -step))}


def test_held_out_data_of_which_nothing_is_asked_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rollout_dataset: say by rollout_samples how many questions"):
        train(config(tmp_path / "out", rollout_dataset="scenes:validation/0+8"))
    assert not (tmp_path / "out").exists()
