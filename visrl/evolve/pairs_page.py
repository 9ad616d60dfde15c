"""The page of `visrl filter`: kept and dropped questions to look at, drawn by lot, with boxes, answers and scores."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from visrl.box import Box, iou
from visrl.images import ImageError, open_image
from visrl.pages.draw import FIRST_COLOUR, LAST_COLOUR, TRUE_COLOUR, Mark, annotate, data_uri, shrink
from visrl.pages.html import render_page
from visrl.records import place_name, write_text
from visrl.report.gallery import LONGEST_SIDE, PICTURE_LIMIT, draw_lot

if TYPE_CHECKING:
    from visrl.evolve.losers import Judged
    from visrl.evolve.pairs import Filtered, Pair
    from visrl.records import Place, Sample

WINNER_COLOUR, LOSER_COLOUR = LAST_COLOUR, FIRST_COLOUR


@dataclass(frozen=True, slots=True)
class Try:
    """One trajectory as the page tells it; `iou` is with the true box, where that is known."""

    label: str
    answer: str
    box_score: float | None
    answer_score: float | None
    origin: str
    error: str | None
    iou: float | None


@dataclass(frozen=True, slots=True)
class QuestionCard:
    """One question of the page; `problem` says why there is no image, else ""."""

    question: str
    answer: str
    reason: str  # why it was dropped, "" where it was kept
    picture: str
    problem: str
    tries: list[Try]
    compared: str  # the answers that are compared over one crop, where a crop has several


def write_page(path: Path, result: Filtered, truth: dict[Place, Box], count: int, root: str | None = None) -> None:
    """Write one self-contained page of `count` kept and `count` dropped questions, drawn by the hash of their ids."""
    kept = {
        place_name(pair.sample.place): (
            pair.sample,
            "",
            (pair.winner, pair.loser),
            ("winner", "loser"),
            _compared(pair),
        )
        for pair in result.pairs
    }
    dropped = {
        place_name(miss.sample.place): (miss.sample, miss.reason, miss.tries, ("best", "worst"), "")
        for miss in result.missed
    }
    page = render_page(
        Path(__file__).with_name("pairs.html"),
        questions=result.questions,
        kept=[_card(*kept[name], truth.get(kept[name][0].place), root) for name in draw_lot(kept, count)],
        kept_count=result.kept,
        dropped=[_card(*dropped[name], truth.get(dropped[name][0].place), root) for name in draw_lot(dropped, count)],
        reasons=result.dropped.most_common(),
        colours={"winner": WINNER_COLOUR, "loser": LOSER_COLOUR, "true": TRUE_COLOUR},
        truth_known=bool(truth),
    )
    write_text(path, page)


def _card(
    sample: Sample,
    reason: str,
    tries: tuple[Judged, ...],
    labels: tuple[str, str],
    compared: str,
    true_box: Box | None,
    root: str | None,
) -> QuestionCard:
    marks: list[Mark] = [(true_box, TRUE_COLOUR, "true")] if true_box else []
    shown = []
    for (trajectory, verdict), label, colour in zip(tries, labels, (WINNER_COLOUR, LOSER_COLOUR), strict=False):
        if trajectory.box is not None:
            marks.append((trajectory.box, colour, label))
        shown.append(
            Try(
                label,
                " · ".join(trajectory.all_answers),
                verdict.box_score,
                verdict.answer_score,
                trajectory.origin,
                trajectory.error,
                iou(trajectory.box, true_box) if trajectory.box and true_box else None,
            )
        )
    picture, problem = picture_of(sample, marks, root)
    return QuestionCard(sample.question, sample.answer, reason, picture, problem, shown, compared)


def _compared(pair: Pair) -> str:
    if pair.answers is None or not pair.answers.tried.answers:
        return ""
    whose = "the winner's crop" if pair.answers.tried is pair.winner[0] else "the crop of another own box"
    return f"answers over {whose}: chosen {pair.answers.chosen}, rejected {pair.answers.rejected}"


def picture_of(sample: Sample, marks: Iterable[Mark], root: str | None) -> tuple[str, str]:
    """The image of a question with `marks` drawn on it, as a data URI ("" for none), and why there is none."""
    try:
        image = open_image(sample.image, root, sample.size)
    except ImageError as error:
        return "", str(error)
    return data_uri(annotate(shrink(image, LONGEST_SIDE), list(marks)), PICTURE_LIMIT), ""
