"""Which curves a training log is drawn as: one table of panels. A panel of which a log holds nothing is left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Series(NamedTuple):
    """One line: the key of the log, its label and ink. Its interval, where the log has one, is `KEY_low` to
    `KEY_high`."""

    key: str
    label: str
    ink: str
    dashed: bool = False


class Panel(NamedTuple):
    """A figure of a few lines on one axis; `unit` is "percent" for shares, else what its axis counts, or ""."""

    title: str
    series: list[Series]
    unit: str = ""
    or_nothing: bool = False  # left out where every value is 0: what could happen and did not


def _both(title: str, key: str, unit: str = "", or_nothing: bool = False) -> Panel:
    """A panel of a measure of box texts and of answers."""
    lines = [Series(f"{key}/box", "box", "box"), Series(f"{key}/answer", "answer", "answer")]
    return Panel(title, lines, unit, or_nothing)


PANELS = [
    Panel("Held-out greedy rollouts", [Series("eval_rollout/iou", "mean IoU", "box"),
                                       Series("eval_rollout/accuracy", "answers", "answer"),
                                       Series("eval_rollout/right_object", "right object", "truth"),
                                       Series("eval_rollout/parse_rate", "readable", "muted", True)], "percent"),
    _both("Reward accuracy", "rewards/accuracies", "percent"),
    _both("Reward margin", "rewards/margins"),
    Panel("Log-probability of the box text", [Series("logps/chosen/box", "chosen", "box"),
                                              Series("logps/rejected/box", "rejected", "box", True)]),
    Panel("Log-probability of the answer", [Series("logps/chosen/answer", "chosen", "answer"),
                                            Series("logps/rejected/answer", "rejected", "answer", True)]),
    # Online reinforcement
    Panel("Reward", [Series("reward", "mean", "last"), Series("reward_std", "spread", "muted", True)]),
    _both("Entropy", "entropy", "nats per token"),
    Panel("Groups with nothing to compare", [Series("frac_reward_zero_std", "boxes", "box"),
                                             Series("frac_reward_zero_std/answer", "answers", "answer")], "percent"),
    Panel("Sampled boxes", [Series("box/right_object", "right object", "truth"),
                            Series("box/parsed", "readable", "muted", True)], "percent"),
    Panel("Area of sampled boxes", [Series("box/area", "mean", "box"),
                                    Series("box/area_std", "spread", "muted", True)], "percent"),
    Panel("KL to the start", [Series("kl", "KL", "last")], "nats per token"),
    Panel("Tokens clipped", [Series("clip_ratio/high_mean", "above", "last"),
                             Series("clip_ratio/low_mean", "below", "first", True)], "percent", True),
    _both("Length of responses", "completions/mean_length", "tokens"),
    _both("Responses cut off", "completions/clipped_ratio", "percent", True),
    Panel("Seconds of a step", [Series("time/rollout", "rollout", "box"), Series("time/reward", "reward", "truth"),
                                Series("time/update", "update", "answer")], "seconds"),
    Panel("Loss", [Series("loss", "trained on", "ink"), Series("eval_loss", "held out", "muted", True)]),
]  # fmt: skip


def panels_of(rows: Iterable[Mapping[str, Any]]) -> list[Panel]:
    """The panels that these log rows may fill: those of the table, and after the reward one for each of its parts."""
    labels = sorted({key[len("rewards/") : -len("/mean")] for row in rows for key in row if _is_part(key)})
    parts = [
        Panel(f"Reward: {label}", [Series(f"rewards/{label}/mean", "mean", "last"),
                                   Series(f"rewards/{label}/std", "spread", "muted", True)])
        for label in labels
    ]  # fmt: skip
    after = 1 + next(n for n, panel in enumerate(PANELS) if panel.title == "Reward")
    return [*PANELS[:after], *parts, *PANELS[after:]]


def _is_part(key: str) -> bool:
    return key.startswith("rewards/") and key.endswith("/mean")
