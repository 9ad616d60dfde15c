"""Rollouts as pictures: rows of `rollouts.jsonl` → cards with boxes, crops, answers, rewards and advantages, and the
page of a step. Draws and crops; imports no torch, so that a report can show the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from visrl.box import Box, CropRule, iou
from visrl.images import ImageError, crop, open_image
from visrl.pages.draw import FIRST_COLOUR, LAST_COLOUR, SAME_COLOUR, TRUE_COLOUR, Mark, annotate, data_uri, shrink
from visrl.pages.html import render_page
from visrl.pages.wording import number
from visrl.records import write_text

JOURNAL, PAGE = "rollouts.jsonl", "rollouts.html"  # in the output folder
LONGEST_SIDE, PICTURE_LIMIT = 448, 60_000  # px, and characters of its data URI
LONGEST_CROP, CROP_LIMIT = 160, 7_000
COLOURS = {"better": LAST_COLOUR, "worse": FIRST_COLOUR, "same": SAME_COLOUR}
RIGHT = 0.5  # of the part that says whether an answer is right

Row = Mapping[str, Any]  # of rollouts.jsonl


@dataclass(frozen=True, slots=True)
class AnswerCard:
    """One answer from a crop. `right` is None where no part of the reward says so."""

    text: str
    right: bool | None
    reward: float | None
    advantage: float | None


@dataclass(frozen=True, slots=True)
class BoxCard:
    """One box of a question: its crop as a data URI ("" without one), and why there is none.

    `standing` says how it compares with the other boxes of its question: "better", "worse" or "same".
    """

    number: int
    crop: str
    problem: str
    reward: float | None
    advantage: float | None
    standing: str
    iou: float | None
    answers: list[AnswerCard]


@dataclass(frozen=True, slots=True)
class RolloutCard:
    """The rollouts of one question: its image with all boxes drawn, as a data URI, or why there is none."""

    id: str
    step: int
    question: str
    answer: str
    picture: str
    alt: str
    problem: str
    boxes: list[BoxCard]

    @property
    def flat(self) -> bool:
        """Whether no box is better than another."""
        return all(box.standing == "same" for box in self.boxes)


def rollout_cards(rows: Sequence[Row], rule: CropRule, root: str | Path | None = None) -> list[RolloutCard]:
    """A card for every row; `root` is the folder that images are named from."""
    return [_card(row, rule, root) for row in rows]


def draw_rollouts(row: Row, image: Image.Image) -> Image.Image:
    """The image of a question with the true box, where it is known, and every sampled one drawn: blue where it has a
    positive advantage, amber where it has a negative one, grey otherwise. Equal boxes share an outline."""
    marks: list[Mark] = [(Box(*row["true_box"]), TRUE_COLOUR, "true")] if row.get("true_box") else []
    found: dict[tuple[float, ...], list[int]] = {}
    for place, box in enumerate(row["boxes"]):
        if box["box"]:
            found.setdefault(tuple(box["box"]), []).append(place)
    for corners, places in found.items():
        standing = standing_of(row["boxes"][places[0]]["advantage"])
        marks.append((Box(*corners), COLOURS[standing], ", ".join(str(place + 1) for place in places)))
    return annotate(shrink(image, LONGEST_SIDE), marks)


def standing_of(advantage: float | None) -> str:
    """How a box compares with the others of its question."""
    return "same" if not advantage else "better" if advantage > 0 else "worse"


def write_rollout_page(
    folder: Path, rows: Sequence[Row], *, total: int, title: str, rule: CropRule, root: str | Path | None
) -> Path:
    """Write `rollouts.html`: the rollouts of these questions, of the `total` of their step."""
    cards = rollout_cards(rows, rule, root)
    template = Path(__file__).with_name("rollouts.html")
    return write_text(folder / PAGE, render_page(template, cards=cards, total=total, title=title, colours=COLOURS,
                                                 true_colour=TRUE_COLOUR, rule=rule))  # fmt: skip


def _card(row: Row, rule: CropRule, root: str | Path | None) -> RolloutCard:
    image, problem = None, ""
    try:
        image = open_image(row["image"], root)
    except ImageError as error:
        problem = str(error)  # shown in the image's place: its rollouts are told all the same
    boxes = [_box_card(row, place, image, rule) for place in range(len(row["boxes"]))]
    said = "; ".join(f"box {one.number}: reward {number(one.reward)}" for one in boxes)
    return RolloutCard(
        id=str(row["id"]),
        step=row["step"],
        question=row["question"],
        answer=row["answer"],
        picture=data_uri(draw_rollouts(row, image), PICTURE_LIMIT) if image else "",
        alt=f"Picture of the question “{row['question']}” with the boxes drawn: {said}",
        problem=problem,
        boxes=boxes,
    )


def _box_card(row: Row, place: int, image: Image.Image | None, rule: CropRule) -> BoxCard:
    tried = row["boxes"][place]
    box = Box(*tried["box"]) if tried["box"] else None
    truth = Box(*row["true_box"]) if row.get("true_box") else None
    shown = data_uri(shrink(crop(image, box, rule), LONGEST_CROP), CROP_LIMIT) if image and box else ""
    right = _right(tried)
    return BoxCard(
        number=place + 1,
        crop=shown,
        problem="" if box else tried.get("error") or "no box",
        reward=tried["reward"],
        advantage=tried["advantage"],
        standing=standing_of(tried["advantage"]),
        iou=None if truth is None else iou(box, truth) if box else 0.0,
        answers=[
            AnswerCard(text if text else "(an empty reply)", right[n], tried["rewards"][n], tried["advantages"][n])
            for n, text in enumerate(tried["answers"])
        ],
    )


def _right(tried: Row) -> list[bool | None]:
    """Whether each answer of a box is right, by the first part of the reward that compares answers."""
    named = next((label for label in tried["parts"] if label == "answer" or label.startswith("answer_")), None)
    scores = tried["parts"][named] if named else [None] * len(tried["rewards"])
    return [None if score is None else score >= RIGHT for score in scores]
