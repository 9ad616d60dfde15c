"""Test questions to look at: which ones by a rule that no answer can sway, and what each checkpoint made of them.

Draws and crops; knows nothing of the page.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from PIL import Image

from visrl.box import Box, CropRule, iou
from visrl.images import ImageError, crop, open_image
from visrl.pages.draw import FIRST_COLOUR, LAST_COLOUR, TRUE_COLOUR, annotate, data_uri, shrink
from visrl.records import utf8
from visrl.report.shapes import JsonObject
from visrl.zoom.episode import UNFINISHED

PICTURES = 36
LONGEST_SIDE, PICTURE_LIMIT = 448, 75_000  # px, and characters of its data URI
LONGEST_CROP, CROP_LIMIT = 240, 15_000  # with 36 images and two crops each the page stays below 5 MB
LONGEST_LABEL = 12  # characters of a name that is written on an image

OUTCOMES = ("wrong → right", "right → wrong", "right both times", "wrong both times")


class AnswerSet(Protocol):
    """What is compared: a checkpoint of a run, or an evaluation. `rows` are its answers by question."""

    @property
    def title(self) -> str: ...
    @property
    def rows(self) -> dict[str, JsonObject]: ...


@dataclass(frozen=True, slots=True)
class GalleryLook:
    """What one checkpoint did with a question: its crops as data URIs in the order of its looks, answer and IoU.

    `several` where it says itself how often it looks; `end` is then how it came to its end, "" where it answered.
    `iou` is None where there is no box to compare, or no true one; of several looks it is that of the last.
    """

    title: str
    crops: list[str]
    several: bool
    end: str
    answer: str
    correct: bool
    iou: float | None


@dataclass(frozen=True, slots=True)
class Exhibit:
    """One question of the gallery. `change` is last minus first IoU; `disagreement` is 1 − IoU of their two boxes."""

    id: str
    kind: str
    question: str
    answer: str
    picture: str
    alt: str
    problem: str  # why there is no image, else ""
    looks: list[GalleryLook]
    trail: list[tuple[str, bool, float | None]]  # every checkpoint: title, right or not, IoU
    outcome: str
    change: float
    disagreement: float
    number: int = 1  # of the shown questions about its image,
    of: int = 1  # of which there are so many


def draw_lot(ids: Iterable[str], count: int = PICTURES, images: Mapping[str, str] | None = None) -> list[str]:
    """`count` of the ids, drawn by the hash of the id alone: no box and no answer has a say. With their `images` the
    images are drawn, by the hash of their name, and the questions about one stay together."""

    def lot(name: str) -> tuple[bytes, bytes]:
        return _digest(images[name]) if images else b"", _digest(name)

    return sorted(ids, key=lot)[:count]


def _digest(name: str) -> bytes:
    return hashlib.blake2b(utf8(name), digest_size=8).digest()


def images_of(stages: Sequence[AnswerSet]) -> dict[str, str]:
    """The image of each question, by the answers of the first stage."""
    return {name: str(row["image"]) for name, row in stages[0].rows.items()}


def outcome(first: JsonObject, last: JsonObject) -> str:
    """Which of `OUTCOMES` a question is, by what the first and the last checkpoint answered."""
    before, after = bool(first["correct"]), bool(last["correct"])
    if before == after:
        return OUTCOMES[2] if after else OUTCOMES[3]
    return OUTCOMES[0] if after else OUTCOMES[1]


def count_outcomes(first: AnswerSet, last: AnswerSet, ids: Iterable[str]) -> dict[str, int]:
    """How many of the questions have each outcome, all of `OUTCOMES` named."""
    counts = Counter(outcome(first.rows[name], last.rows[name]) for name in ids)
    return {name: counts[name] for name in OUTCOMES}


def shared_ids(stages: Iterable[AnswerSet]) -> list[str]:
    """The questions that all of the stages answered, in the order of the first."""
    first, *rest = [stage.rows for stage in stages]
    return [name for name in first if all(name in rows for rows in rest)]


def comparable(stages: Sequence[AnswerSet]) -> list[AnswerSet]:
    """Those of `stages` that answered questions of the first one, so many that all have some in common."""
    chosen: list[AnswerSet] = []
    for stage in stages:
        if shared_ids([*chosen, stage]):
            chosen.append(stage)
    return chosen


def exhibits(
    stages: Sequence[AnswerSet], rule: CropRule, count: int = PICTURES, root: str | None = None
) -> list[Exhibit]:
    """The gallery over these evaluated checkpoints, first and last of them drawn, cropped as the run crops.

    `root` is the folder that images are named from. Questions about one image stand side by side.
    """
    images = images_of(stages)
    drawn = draw_lot(shared_ids(stages), count, images)
    of, seen = Counter(images[name] for name in drawn), Counter[str]()
    found = []
    for name in drawn:
        seen[images[name]] += 1
        shown = _exhibit(stages, rule, root, name)
        found.append(replace(shown, number=seen[images[name]], of=of[images[name]]))
    return found


def _exhibit(stages: Sequence[AnswerSet], rule: CropRule, root: str | None, name: str) -> Exhibit:
    ends = [(stages[0], FIRST_COLOUR)] + [(stage, LAST_COLOUR) for stage in stages[1:][-1:]]
    rows = [stage.rows[name] for stage, _ in ends]
    boxes = [Box(*row["box"]) if row.get("box") else None for row in rows]
    looked = [_looks_of(row) for row in rows]
    question = str(rows[0].get("question", ""))
    image, problem = _open(rows[0]["image"], root)
    marks = [(Box(*rows[0]["true_box"]), TRUE_COLOUR, "true")] if rows[0].get("true_box") else []
    labels = [stage.title if len(stage.title) <= LONGEST_LABEL else place
              for (stage, _), place in zip(ends, ("first", "last"), strict=False)]  # fmt: skip
    for own, (_, colour), label, row in zip(looked, ends, labels, rows, strict=False):
        marks += [(box, colour, name) for box, name in zip(own, _names(row, label, len(ends) > 1), strict=True)]
    looks = [
        GalleryLook(
            title=stage.title,
            crops=_crops(image, own, rule) if image else [],
            several="looks" in row,
            end="" if row.get("end") in (None, "answered") else str(row["end"]).replace("_", " "),
            answer=_said(row),
            correct=bool(row["correct"]),
            iou=row.get("iou"),
        )
        for (stage, _), row, own in zip(ends, rows, looked, strict=True)
    ]
    described = [_described(look, box, len(own)) for look, box, own in zip(looks, boxes, looked, strict=True)]
    return Exhibit(
        id=str(rows[0]["id"]),
        kind=rows[0].get("kind") or rows[0].get("dataset") or "",
        question=question,
        answer=str(rows[0].get("answer", "")),
        picture=data_uri(annotate(shrink(image, LONGEST_SIDE), marks), PICTURE_LIMIT) if image else "",
        alt=f"Picture of the question “{question}” with the boxes drawn: " + ", ".join(described),
        problem=problem,
        looks=looks,
        trail=[(stage.title, stage.rows[name]["correct"], stage.rows[name].get("iou")) for stage in stages],
        outcome=outcome(rows[0], rows[-1]),
        change=(looks[-1].iou or 0.0) - (looks[0].iou or 0.0),
        disagreement=1 - iou(boxes[0], boxes[-1]) if boxes[0] and boxes[-1] else 1.0,
    )


def _looks_of(row: JsonObject) -> list[Box]:
    """The boxes of a row in the order of its looks."""
    boxes = row["looks"] if "looks" in row else [row["box"]] if row.get("box") else []
    return [Box(*box) for box in boxes]


def _names(row: JsonObject, label: str, compared: bool) -> list[str]:
    """What is written beside the boxes of a row: their numbers where there may be several, and whose they are."""
    if "looks" not in row:
        return [label] if row.get("box") else []
    return [f"{label} {n}" if compared else str(n) for n in range(1, 1 + len(row["looks"]))]


def _crops(image: Image.Image, boxes: Sequence[Box], rule: CropRule) -> list[str]:
    """The crops of a row: together no longer than two of them, so that the page does not grow with the looks."""
    share = max(1, len(boxes))
    side = LONGEST_CROP if share == 1 else LONGEST_CROP // 2
    return [data_uri(shrink(crop(image, box, rule), side), CROP_LIMIT // share) for box in boxes]


def _said(row: JsonObject) -> str:
    """What stands for the answer of a row: its text, or why there is none."""
    if row.get("end") in UNFINISHED:
        return "no answer"
    if row.get("prediction") is None:
        return row.get("error") or ("no answer" if "prediction" in row else "a box only")
    return str(row["prediction"]) or "(an empty reply)"


def _described(look: GalleryLook, box: Box | None, count: int) -> str:
    if not count:
        return f"{look.title} {'did not look' if look.several else 'gave no box'}"
    whose = f"{look.title}'s box" if count == 1 else f"the last of {look.title}'s {count} boxes"
    return whose + ("" if look.iou is None or box is None else f" has IoU {look.iou:.2f}")


def _open(ref: str, root: str | None) -> tuple[Image.Image | None, str]:
    try:
        return open_image(ref, root), ""
    except ImageError as error:
        return None, str(error)  # shown in the image's place: a question does not leave the lot for it
