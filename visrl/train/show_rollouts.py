"""Shows the last step's rollouts while a training runs: `rollouts.html`, and with `log_completions` a table.

The table goes to the console, and to those trackers of `report_to` that take tables or images, as TRL does: wandb,
trackio and tensorboard. What a card shows is rollout_cards.py's matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from visrl.box import CropRule
from visrl.images import ImageError, open_image
from visrl.pages.wording import number, plus
from visrl.train.checkpoints import writing
from visrl.train.config import TrainConfig
from visrl.train.rollout_cards import Row, draw_rollouts, episodes_of, write_rollout_page

TRACKED_IMAGES = 4  # questions whose images a tracker gets at every log


class ShowRollouts(TrainerCallback):
    """Shows `rows`, the rows of `rollouts.jsonl` of the last step, which the trainer sets on the first process.

    `callbacks` are those of the trainer, of which tensorboard's holds the writer.
    """

    def __init__(self, config: TrainConfig, rule: CropRule, callbacks: Sequence[TrainerCallback]) -> None:
        self.config, self.rule, self.callbacks = config, rule, callbacks
        self.rows: Sequence[Row] = ()
        self._printed: Sequence[Row] = ()
        self._written: Sequence[Row] = ()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        is_new = bool(self.rows) and self._printed is not self.rows
        if self.config.log_completions and is_new and logs and "loss" in logs:
            self._printed = self.rows
            table = completion_rows(self.rows)
            print_completions(table, self.config.num_completions_to_print)
            self._track(table, args.report_to, state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write_page()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write_page()

    def _write_page(self) -> None:
        config, count = self.config, self.config.rollouts_in_page
        if not count or not self.rows or self._written is self.rows:
            return
        self._written = self.rows
        with writing(config.output_dir):
            write_rollout_page(
                config.output_dir, self.rows[:count], total=len(self.rows), rule=self.rule, root=config.image_root,
                title=f"{config.stage_name}, “{config.output_dir.resolve().name}”",
            )  # fmt: skip

    def _track(self, table: list[dict[str, Any]], report_to: Sequence[str], step: int) -> None:
        drawn = self._images() if {"wandb", "tensorboard"} & set(report_to) else []
        if "wandb" in report_to:
            import wandb

            if wandb.run is not None:
                cells = [list(row.values()) for row in table]
                wandb.log({
                    "completions": wandb.Table(columns=list(table[0]), data=cells),
                    "rollouts": [wandb.Image(image, caption=caption) for caption, image in drawn],
                    "train/global_step": step,
                })  # fmt: skip
        if "trackio" in report_to:
            import pandas
            import trackio

            trackio.log({"completions": trackio.Table(dataframe=pandas.DataFrame(table))})
        for callback in self.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_text("completions", markdown(table), step)
                for n, (_, image) in enumerate(drawn):
                    callback.tb_writer.add_image(f"rollouts/{n}", np.asarray(image), step, dataformats="HWC")

    def _images(self) -> list[tuple[str, Image.Image]]:
        """The first questions of the step with their boxes drawn; those whose image has gone are left to the table."""
        found = []
        for row in self.rows[:TRACKED_IMAGES]:
            try:
                found.append((row["question"], draw_rollouts(row, open_image(row["image"], self.config.image_root))))
            except ImageError:
                continue
        return found


def completion_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A row for every answer of these rollouts, and one for every box without any; columns have TRL's names. Of several
    looks the box is what was said before the answer, turn after turn."""
    return [one for row in rows for one in (_turn_rows(row) if "turns" in row else _box_rows(row))]


def _box_rows(row: Row) -> Iterator[dict[str, Any]]:
    for box in row["boxes"]:
        answered = zip(box["answers"], box["advantages"], strict=True) if box["answers"] else [(None, None)]
        for n, (answer, advantage) in enumerate(answered):
            yield {
                "step": row["step"],
                "prompt": row["question"],
                "box": box["text"],
                "completion": answer,
                **{label: scores[n] for label, scores in box["parts"].items()},
                "reward": box["rewards"][n],
                "box_advantage": box["advantage"],
                "advantage": advantage,
            }


def _turn_rows(row: Row) -> Iterator[dict[str, Any]]:
    for episode in episodes_of(row["turns"]):
        (_, first), (_, end) = episode[0], episode[-1]
        yield {
            "step": row["step"],
            "prompt": row["question"],
            "box": " → ".join(turn["text"] for _, turn in episode[:-1]),
            "completion": end["answer"],
            **end["parts"],
            "reward": end["reward"],
            "box_advantage": first["advantage"],
            "advantage": end["advantage"],
        }


def print_completions(table: Sequence[dict[str, Any]], count: int | None, console: Console | None = None) -> None:
    """Print a table of completions; of more than `count` so many, evenly spread, so that no chance is drawn upon."""
    shown = table if count is None or count >= len(table) else [table[n * len(table) // count] for n in range(count)]
    drawn = Table(expand=True, show_lines=True)
    names = [name for name in table[0] if name != "step"]
    numbers = names[names.index("completion") + 1 :]
    for name in names:
        drawn.add_column(Text(name.replace("_", " ")), justify="right" if name in numbers else "left")
    for row in shown:
        drawn.add_row(*(Text(_cell(name, row[name], name in numbers)) for name in names))
    (console or Console()).print(Panel(drawn, title=f"Step {table[0]['step']}", expand=False))


def markdown(table: Sequence[dict[str, Any]]) -> str:
    """A table of completions in Markdown."""
    names = list(table[0])
    numbers = names[names.index("completion") + 1 :]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"

    rows = [[_cell(name, row[name], name in numbers) for name in names] for row in table]
    return "\n".join([line(names), line(["---"] * len(names)), *map(line, rows)])


def _cell(name: str, value: Any, is_number: bool) -> str:
    if is_number:
        return plus(value) if name.endswith("advantage") else number(value)
    return "–" if value is None else str(value)
