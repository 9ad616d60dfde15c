"""Rollouts as pictures: rows of `rollouts.jsonl` → cards with boxes, crops, answers, rewards and advantages, and the
page of a step. Draws and crops; imports no torch, so that a report can show the same.

A row has `boxes`, each with its answers; or, where the model looks several times, `turns`, each with those after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
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
class EndCard:
    """One way to an answer: the crops that were looked at, in their order, each with the number of its look in the
    image and as a data URI; and what came of it."""

    crops: list[tuple[str, str]]
    answer: AnswerCard
    end: str


@dataclass(frozen=True, slots=True)
class StartCard:
    """A first turn with all ends after it, and how it compares with the other first turns."""

    number: int
    reward: float | None
    advantage: float | None
    standing: str
    ends: list[EndCard]


@dataclass(frozen=True, slots=True)
class RolloutCard:
    """The rollouts of one question: its image with all boxes drawn, as a data URI, or why there is none. `starts` are
    first turns, where the model looks several times, in the place of `boxes`."""

    id: str
    step: int
    question: str
    answer: str
    picture: str
    alt: str
    problem: str
    boxes: list[BoxCard]
    starts: list[StartCard] = field(default_factory=list)

    @property
    def flat(self) -> bool:
        """Whether no box, or first turn, is better than another."""
        standings = [box.standing for box in self.boxes] + [start.standing for start in self.starts]
        return all(standing == "same" for standing in standings)


def rollout_cards(rows: Sequence[Row], rule: CropRule, root: str | Path | None = None) -> list[RolloutCard]:
    """A card for every row; `root` is the folder that images are named from."""
    return [_card(row, rule, root) for row in rows]


def draw_rollouts(row: Row, image: Image.Image) -> Image.Image:
    """The image of a question with the true boxes, where they are known, and every sampled one drawn: blue where it has
    a positive advantage, amber where it has a negative one, grey otherwise. Equal boxes share an outline. Of several
    looks 2.1 is the first that was sampled after the second first turn."""
    truths = row.get("true_looks") or ([row["true_box"]] if row.get("true_box") else [])
    names = ["true"] if len(truths) == 1 else [f"true {place + 1}" for place in range(len(truths))]
    marks: list[Mark] = [(Box(*one), TRUE_COLOUR, name) for one, name in zip(truths, names, strict=True)]
    found: dict[tuple[float, ...], list[tuple[str, float | None]]] = {}
    for corners, name, advantage in _drawn(row):
        found.setdefault(tuple(corners), []).append((name, advantage))
    for corners, own in found.items():
        marks.append((Box(*corners), COLOURS[standing_of(own[0][1])], ", ".join(name for name, _ in own)))
    return annotate(shrink(image, LONGEST_SIDE), marks)


def _drawn(row: Row) -> Iterator[tuple[Sequence[float], str, float | None]]:
    """Every box of a row with its number and its advantage."""
    for place, box in enumerate(row.get("boxes", ())):
        if box["box"]:
            yield box["box"], str(place + 1), box["advantage"]
    yield from _drawn_turns(row.get("turns", ()))


def _drawn_turns(turns: Sequence[Row], before: str = "") -> Iterator[tuple[Sequence[float], str, float | None]]:
    for place, turn in enumerate(turns):
        number_of_turn = f"{before}{place + 1}"
        yield from ((corners, number_of_turn, turn["advantage"]) for corners in turn["looks"])
        yield from _drawn_turns(turn.get("turns", ()), f"{number_of_turn}.")


def episodes_of(
    turns: Sequence[Row], before: tuple[tuple[str, Row], ...] = ()
) -> Iterator[tuple[tuple[str, Row], ...]]:
    """The turns of a row up to every end, each with its number as it is drawn."""
    for place, turn in enumerate(turns):
        name = ".".join(filter(None, (before[-1][0] if before else "", str(place + 1))))
        episode = (*before, (name, turn))
        if "turns" in turn:
            yield from episodes_of(turn["turns"], episode)
        else:
            yield episode


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
    boxes = [_box_card(row, place, image, rule) for place in range(len(row.get("boxes", ())))]
    starts = list(_start_cards(row, image, rule))
    rewards = [(f"box {one.number}", one.reward) for one in boxes]
    rewards += [(f"first turn {one.number}", one.reward) for one in starts]
    said = "; ".join(f"{name}: reward {number(reward)}" for name, reward in rewards)
    return RolloutCard(
        id=str(row["id"]),
        step=row["step"],
        question=row["question"],
        answer=row["answer"],
        picture=data_uri(draw_rollouts(row, image), PICTURE_LIMIT) if image else "",
        alt=f"Picture of the question “{row['question']}” with the boxes drawn: {said}",
        problem=problem,
        boxes=boxes,
        starts=starts,
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


def _start_cards(row: Row, image: Image.Image | None, rule: CropRule) -> Iterator[StartCard]:
    """A card for every first turn of a row."""
    for name, own in groupby(episodes_of(row.get("turns", ())), key=lambda episode: episode[0][0]):
        episodes = list(own)
        turn = episodes[0][0][1]
        ends = [_end_card(episode, image, rule) for episode in episodes]
        yield StartCard(int(name), turn["value"], turn["advantage"], standing_of(turn["advantage"]), ends)


def _end_card(episode: Sequence[tuple[str, Row]], image: Image.Image | None, rule: CropRule) -> EndCard:
    looks = [(name, Box(*corners)) for name, turn in episode for corners in turn["looks"]]
    crops = [
        (name, data_uri(shrink(crop(image, box, rule), LONGEST_CROP), CROP_LIMIT) if image else "")
        for name, box in looks
    ]
    end = episode[-1][1]
    answer = AnswerCard(end["answer"] or "(no answer)", _is_right(end), end["reward"], end["advantage"])
    return EndCard(crops, answer, end.get("error") or end["end"])


def _is_right(end: Row) -> bool | None:
    label = _answer_part(end["parts"])
    score = end["parts"][label] if label else None
    return None if score is None else bool(score >= RIGHT)


def _right(tried: Row) -> list[bool | None]:
    """Whether each answer of a box is right, by the first part of the reward that compares answers."""
    named = _answer_part(tried["parts"])
    scores = tried["parts"][named] if named else [None] * len(tried["rewards"])
    return [None if score is None else score >= RIGHT for score in scores]


def _answer_part(parts: Mapping[str, Any]) -> str | None:
    return next((label for label in parts if label == "answer" or label.startswith("answer_")), None)
