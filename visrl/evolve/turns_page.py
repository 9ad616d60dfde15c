"""The page of `visrl filter` after several looks: pairs of turns to look at, with every look of winner and loser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from visrl.evolve.pairs_page import LOSER_COLOUR, WINNER_COLOUR, picture_of
from visrl.pages import wording
from visrl.pages.draw import SAME_COLOUR, Mark
from visrl.pages.html import render_page
from visrl.records import place_name, write_text
from visrl.report.gallery import draw_lot

if TYPE_CHECKING:
    from visrl.evolve.losers import Judged
    from visrl.evolve.turns import FilteredTurns, TurnPair, TurnQuestion, TurnSide
    from visrl.records import TrajectoryLook


@dataclass(frozen=True, slots=True)
class ShownTurn:
    """One side of a pair, or a try, as the page tells it: what it did, what it says and is worth, and the try that is
    drawn of it."""

    label: str
    what: str
    text: str
    value: float | None
    sampled: int
    ended: str


@dataclass(frozen=True, slots=True)
class TurnCard:
    """A pair, or a question without one; `problem` says why there is no image, else ""."""

    question: str
    answer: str
    note: str
    picture: str
    problem: str
    turns: list[ShownTurn]


def write_turns_page(path: Path, result: FilteredTurns, count: int, root: str | None = None) -> None:
    """Write one self-contained page of `count` kept and `count` dropped questions, drawn by the hash of their ids; all
    pairs of a kept one."""
    asked = {place_name(one.sample.place): one for one in result.asked}
    kept = draw_lot({name: one for name, one in asked.items() if one.pairs}, count)
    dropped = draw_lot({name: one for name, one in asked.items() if not one.pairs}, count)
    page = render_page(
        Path(__file__).with_name("turns.html"),
        questions=result.questions,
        kept_count=result.kept,
        pair_count=len(result.preferences),
        kept=[_pair_card(asked[name], pair, root) for name in kept for pair in asked[name].pairs],
        dropped=[_dropped_card(asked[name], root) for name in dropped],
        reasons=result.dropped.most_common(),
        colours={"winner": WINNER_COLOUR, "loser": LOSER_COLOUR, "before": SAME_COLOUR},
    )
    write_text(path, page)


def _pair_card(asked: TurnQuestion, pair: TurnPair, root: str | None) -> TurnCard:
    before = len(pair.before)
    best = max(pair.chosen.tries, key=_score)
    worst = min(pair.rejected.tries, key=_score)
    marks = [
        *_marks(pair.before, SAME_COLOUR, "look", 0),
        *_marks(best[0].looks[before:], WINNER_COLOUR, "winner", before),
        *_marks(worst[0].looks[before:], LOSER_COLOUR, "loser", before),
    ]
    picture, problem = picture_of(asked.sample, marks, root)
    note = f"{pair.kind}, after {wording.count(before, 'look')}"
    turns = [_shown_side("winner", pair.chosen, best), _shown_side("loser", pair.rejected, worst)]
    return TurnCard(asked.sample.question, asked.sample.answer, note, picture, problem, turns)


def _dropped_card(asked: TurnQuestion, root: str | None) -> TurnCard:
    marks: list[Mark] = []
    turns = []
    for judged, label, colour in zip(asked.tries, ("best", "worst"), (WINNER_COLOUR, LOSER_COLOUR), strict=False):
        tried, verdict = judged
        marks += _marks(tried.looks, colour, label, 0)
        said = " · ".join(look.text for look in tried.looks) or tried.box_text
        turns.append(
            ShownTurn(label, wording.count(len(tried.looks), "look"), said, verdict.answer_score, 1, _ended(judged))
        )
    picture, problem = picture_of(asked.sample, marks, root)
    note = f"dropped: {asked.reason.replace('_', ' ')}"
    return TurnCard(asked.sample.question, asked.sample.answer, note, picture, problem, turns)


def _shown_side(label: str, side: TurnSide, drawn: Judged) -> ShownTurn:
    return ShownTurn(label, side.what, side.text, side.value, side.sampled, _ended(drawn))


def _marks(looks: Sequence[TrajectoryLook], colour: str, label: str, first: int) -> list[Mark]:
    return [(look.box, colour, f"{label} {number}") for number, look in enumerate(looks, start=first + 1)]


def _ended(judged: Judged) -> str:
    """How a try came to its end: its answer, or why it has none."""
    tried, _ = judged
    return tried.answer if tried.answer is not None else tried.error or f"no answer: {tried.end}"


def _score(judged: Judged) -> tuple[float, int]:
    return judged[1].answer_score or 0.0, -len(judged[0].looks)
