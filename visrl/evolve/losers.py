"""Pairs whose loser is a box of the policy's own, or a random one: `losers: own` and `losers: random`.

The winner is the best of the boxes that the policy sampled, by box score, and the loser the worst of them, or of the
diversity controller's random boxes. Scores that count answers tie often; among equals the lot decides, drawn by the
question and the number of the try, so that neither the order of the tries nor the length of a text has a say. The
answer pair is a right and a wrong answer over the same crop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from visrl.engines.base import seed_of
from visrl.records import Trajectory, Verdict

Losers = Literal["paper", "own", "random"]
MIN_DIFFERENCE = 0.5  # our own choice: half of the answers
Judged = tuple[Trajectory, Verdict]


@dataclass(frozen=True, slots=True)
class Contrast:
    """Two answers to be compared over the crop of one trajectory, the chosen and the rejected one."""

    tried: Trajectory
    chosen: str
    rejected: str


def pick_apart(judged: Sequence[Judged], losers: Losers, min_difference: float) -> tuple[Judged, Judged] | str:
    """The best of a question's own boxes, and the worst of them or of the random ones; or why there is no such pair.

    Boxes are compared by their score alone. `no_winner` says that no box is good enough to be `min_difference` better
    than any, `no_loser` that none is so much worse than the best.
    """
    scored = [pair for pair in judged if pair[0].error is None and pair[1].box_score is not None]
    own = [pair for pair in scored if pair[0].origin == "sampled"]
    if not own:
        return "nothing_readable"
    others = own if losers == "own" else [pair for pair in scored if pair[0].origin == "random"]
    if not others:
        return "no_random_box"
    winner = max(own, key=lambda pair: (box_score(pair), _lot(pair)))
    if box_score(winner) < min_difference:
        return "no_winner"
    # Answers are sampled: the same box may be seen well and badly.
    apart = [pair for pair in others if pair[0].box_text != winner[0].box_text]
    if not apart:
        return "no_loser" if others == [winner] else "same_box"
    loser = min(apart, key=lambda pair: (box_score(pair), _lot(pair)))
    return (winner, loser) if box_score(winner) - box_score(loser) >= min_difference else "no_loser"


def answer_contrast(judged: Sequence[Judged], winner: Judged, min_difference: float) -> Contrast | None:
    """The best and the worst answer over the winner's crop, where they differ by `min_difference`; else over the crop
    of the own box with the next best score that has such two; None where there is none."""
    own = [pair for pair in judged if pair[0].error is None and pair[0].origin == "sampled" and pair is not winner]
    own.sort(key=lambda pair: (-box_score(pair), _lot(pair)))
    for tried, verdict in [winner, *own]:
        scores = [(score, number) for number, score in enumerate(verdict.all_scores) if score is not None]
        if not scores:
            continue
        # Of equal answers the first: their order is that of their seeds.
        best, worst = max(scores, key=lambda one: (one[0], -one[1])), min(scores)
        if best[0] - worst[0] >= min_difference:
            return Contrast(tried, tried.all_answers[best[1]], tried.all_answers[worst[1]])
    return None


def box_score(judged: Judged) -> float:
    """The score of a trajectory's box, 0 where it has none."""
    return judged[1].box_score or 0.0


def _lot(judged: Judged) -> int:
    tried, _ = judged
    return seed_of(0, *tried.place, tried.round, tried.branch, "tie")
