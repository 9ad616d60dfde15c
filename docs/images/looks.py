"""Draws looks.png, the picture that opens the README: one picture, two questions, and where a run's first and last
checkpoint looked for each.

    python docs/images/looks.py RUN [test/INDEX]     # RUN: a finished `visrl demo`

Without a scene's name it takes the first held-out one of three tags or more, both of whose questions the last
checkpoint answers right and the first one wrong: an example of what is learned, and no measure of it.
"""

from __future__ import annotations

import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from visrl.box import Box
from visrl.images import crop
from visrl.pages.draw import annotate
from visrl.records import read_jsonl
from visrl.scenes import draw_ref, parse_ref

COLOURS = ("#2563eb", "#e07b00")  # of the two questions
MUTED, GOOD, BAD = "#6b7280", "#15803d", "#b91c1c"
TITLES = ("after the warm-up", "after reinforcement")
OUT = Path(__file__).with_name("looks.png")

Row = dict[str, Any]


def looks_of(run: Path) -> dict[str, list[tuple[Row, Row]]]:
    """By picture, the rows of its questions at the first and at the last checkpoint."""
    stages = json.loads((run / "summary.json").read_text(encoding="utf-8"))["stages"]
    last = (
        stages[-1]["name"] if stages[-1]["name"] == "online" else f"iter{stages[-1]['iteration']}-{stages[-1]['name']}"
    )
    ends = [read_jsonl(run / "eval" / f"{name}.jsonl") for name in (stages[0]["name"], last)]
    pairs = list(zip(*ends, strict=True))
    return {image: list(rows) for image, rows in groupby(pairs, key=lambda pair: str(pair[0]["image"]))}


def choose(looks: dict[str, list[tuple[Row, Row]]]) -> str:
    """The first picture whose two questions tell the story."""
    return next(
        image
        for image, pairs in looks.items()
        if len(pairs) == 2
        and len(parse_ref(image).tags) > 2
        and all(last["correct"] and not first["correct"] and first["box"] for first, last in pairs)
        and len({last["answer"] for _, last in pairs}) == 2
    )


def draw(image: str, pairs: list[tuple[Row, Row]]) -> Figure:
    """The picture with both last boxes, and beside it each question with both crops and what was answered from them."""
    scene = draw_ref(image)
    with matplotlib.rc_context({"font.size": 11, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(10, 4.9), facecolor="white")
        grid = figure.add_gridspec(2, 3, width_ratios=(1.95, 1, 1), wspace=0.08, hspace=0.36,
                                   left=0.01, right=0.99, top=0.9, bottom=0.08)  # fmt: skip
        marks = [(Box(*last["box"]), colour, "") for (_, last), colour in zip(pairs, COLOURS, strict=True)]
        whole = figure.add_subplot(grid[:, 0])
        whole.set_anchor("W")
        _show(whole, annotate(scene, marks), "black", 1)
        for row, ((first, last), colour) in enumerate(zip(pairs, COLOURS, strict=True)):
            for column, (look, title) in enumerate(zip((first, last), TITLES, strict=True), start=1):
                axes = figure.add_subplot(grid[row, column])
                _show(axes, crop(scene, Box(*look["box"]), "exact"), colour, 3)
                right = bool(look["correct"])
                axes.set_xlabel(f"“{look['prediction']}”", color=GOOD if right else BAD, fontsize=12, labelpad=3)
                if row == 0:
                    axes.annotate(title, (0.5, 1), (0, 22), xycoords="axes fraction", textcoords="offset points",
                                  ha="center", color=MUTED)  # fmt: skip
                if column == 1:
                    axes.annotate(last["question"], (0, 1), (0, 5), xycoords="axes fraction",
                                  textcoords="offset points", color=colour, fontweight="bold")  # fmt: skip
        return figure


def _show(axes: Axes, image: Any, colour: str, line: int) -> None:
    axes.imshow(image)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(edgecolor=colour, linewidth=line)


def main(run: Path, name: str | None = None) -> None:
    """Choose, draw and write."""
    looks = looks_of(run)
    image = f"scene:{name}" if name else choose(looks)
    draw(image, looks[image]).savefig(OUT, dpi=110)
    print(image, *(f"{last['question']} {last['answer']}" for _, last in looks[image]), "→", OUT)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:3])
