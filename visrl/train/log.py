"""What a training writes while it runs: running means between two log lines, `log.jsonl`, and its curves."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from visrl.records import read_jsonl, write_records


class RunningMeans:
    """Running means between two log lines, over all ranks."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, float] = defaultdict(float)

    def add(self, name: str, value: torch.Tensor, count: float = 1) -> None:
        """Add a value that is the sum over `count` of what the mean is of: tokens, steps, or seconds for a rate."""
        self._sums[name] += float(value.detach())
        self._counts[name] += count

    def means(self) -> dict[str, float]:
        """The mean of every value added, called on all ranks alike."""
        parts = gather_object([(dict(self._sums), dict(self._counts))])
        names = sorted({name for sums, _ in parts for name in sums})
        return {
            name: sum(sums.get(name, 0.0) for sums, _ in parts) / sum(counts.get(name, 0) for _, counts in parts)
            for name in names
        }


class JsonLog(TrainerCallback):
    """Appends every log line to `log.jsonl` in the output folder, for curves."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "log.jsonl"

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as lines:
                lines.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def cut_log(path: Path, step: int) -> None:
    """Drop log lines after the checkpoint that training resumes from: they will be written again."""
    if path.is_file():
        write_records(path, (row for row in read_jsonl(path, unfinished="leave_out") if row["step"] <= step))


def plot_loss(out: Path) -> None:
    """Draw the curves of `log.jsonl`: `training_loss.svg`, and one file for each further measure."""
    from visrl.pages.figures import Curve, curve_figures

    for drawing in curve_figures([Curve(title=out.name, rows=list(read_jsonl(out / "log.jsonl")))]):
        name = re.sub(r"\W+", "_", drawing.title.lower())
        (out / f"training_{name}.svg").write_text(drawing.svg, encoding="utf-8")
