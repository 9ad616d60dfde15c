"""Pairs of several looks: which two turns at one state of a question become a preference.

What was sampled at a question is a tree of turns. A turn is worth what came after it (`rewards.advantages.value_of`),
each answer by its score, of which every look that was taken for it takes its share. Turns of one text lead to one
state, and are one turn that was sampled several times. At every state at which different turns were sampled, the best
of them is set against the worst, where they differ enough: one look more against the answer at once, a look against
another look, an answer against an answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from visrl.engines.base import seed_of
from visrl.evolve.losers import Judged
from visrl.evolve.pairs import FilterSettings, by_question
from visrl.prompts import looks_prompt
from visrl.records import Picture, Preference, RecordError, Sample, Step, Trajectory, TrajectoryLook, Verdict
from visrl.rewards.advantages import Outcome, Reward, box_reward, value_of, with_price
from visrl.zoom.episode import UNFINISHED

ROUNDING = 1e-9  # a price is no power of two: 1 − (1 − 0.1) is a little less than 0.1
Kind = Literal["look over look", "look over answer", "answer over look", "answer over answer"]
TURN_KINDS: tuple[Kind, ...] = ("look over look", "look over answer", "answer over look", "answer over answer")


@dataclass(slots=True)
class TriedTurn:
    """A turn of the tree: its text (None: it has none that could be chosen, for it failed or came to a limit), the look
    that it takes (None: it answers), the turns sampled next, the reward where it is the last one, and the tries that
    lead through it."""

    text: str | None
    look: TrajectoryLook | None
    turns: dict[Any, TriedTurn] = field(default_factory=dict)
    reward: Reward = None
    tries: list[Judged] = field(default_factory=list)

    @property
    def outcome(self) -> Outcome:
        """What came of it, as advantages are made of it."""
        return tuple(turn.outcome for turn in self.turns.values()) if self.turns else self.reward


@dataclass(frozen=True, slots=True)
class TurnSide:
    """One side of a pair: a text, the look that it takes (None: it answers), what it is worth, how often it was
    sampled, and the tries that lead through it."""

    text: str
    look: TrajectoryLook | None
    value: float
    sampled: int
    tries: tuple[Judged, ...]

    @property
    def what(self) -> str:
        return "look" if self.look else "answer"


@dataclass(frozen=True, slots=True)
class TurnPair:
    """Two turns at one state: after these looks, one is better than the other."""

    before: tuple[TrajectoryLook, ...]
    chosen: TurnSide
    rejected: TurnSide

    @property
    def kind(self) -> str:
        """Which of `TURN_KINDS` it is."""
        return f"{self.chosen.what} over {self.rejected.what}"


@dataclass(frozen=True, slots=True)
class TurnQuestion:
    """A question with its pairs, or why it has none, and its best and its worst try, as far as it has any."""

    sample: Sample
    pairs: tuple[TurnPair, ...]
    reason: str = ""
    tries: tuple[Judged, ...] = ()


@dataclass(slots=True)
class FilteredTurns:
    """The preferences of several looks, where they come from, and what became of all tries."""

    preferences: list[Preference] = field(default_factory=list)
    asked: list[TurnQuestion] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)

    @property
    def questions(self) -> int:
        return len(self.asked)

    @property
    def kept(self) -> int:
        return sum(bool(one.pairs) for one in self.asked)

    @property
    def dropped(self) -> Counter[str]:
        """How many questions gave no pair, by reason."""
        return Counter(one.reason for one in self.asked if one.reason)

    @property
    def pairs(self) -> list[TurnPair]:
        """Those of all questions."""
        return [pair for one in self.asked for pair in one.pairs]


def make_turn_pairs(
    samples: Iterable[Sample], trajectories: Iterable[Trajectory], verdicts: Iterable[Verdict], settings: FilterSettings
) -> FilteredTurns:
    """The pairs of every question after several looks, with their preferences.

    Raises:
        RecordError: as `pairs.by_question` and `tree_of`.
    """
    result = FilteredTurns()
    for sample, judged in by_question(samples, trajectories, verdicts):
        pairs = turn_pairs(sample, judged, settings)
        result.ends.update(count_ends(judged))
        if isinstance(pairs, str):
            ends = sorted(judged, key=lambda one: -(one[1].answer_score or 0.0))
            result.asked.append(TurnQuestion(sample, (), pairs, tuple(ends[:1] + ends[1:][-1:])))
        else:
            result.asked.append(TurnQuestion(sample, tuple(pairs)))
            result.preferences += [turn_preference(sample, pair) for pair in pairs]
    return result


def count_turns(result: FilteredTurns) -> dict[str, Any]:
    """Questions, kept ones and drops by reason; pairs by the looks before them and by kind; and the ends of all
    tries."""
    kinds, depths = Counter(pair.kind for pair in result.pairs), Counter(len(pair.before) for pair in result.pairs)
    return {
        "questions": result.questions,
        "kept": result.kept,
        "dropped_by_reason": dict(sorted(result.dropped.items())),
        "pairs": len(result.preferences),
        "pairs_by_kind": {kind: kinds[kind] for kind in TURN_KINDS},
        "pairs_by_looks_before": {str(depth): depths[depth] for depth in sorted(depths)},
        "answer_pairs": kinds["answer over answer"],
        "tries_by_end": dict(sorted(result.ends.items())),
    }


def turn_lines(counts: dict[str, Any], settings: FilterSettings) -> list[str]:
    """What came of a filter of several looks, as text."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts["pairs_by_kind"].items() if count) or "none"
    before = ", ".join(f"{count} after {depth}" for depth, count in counts["pairs_by_looks_before"].items())
    ends = ", ".join(f"{count} {end.replace('_', ' ')}" for end, count in counts["tries_by_end"].items())
    lines = [f"{kinds}" + (f"; looks before: {before}" if before else "")]
    lines.append(
        f"tries: {ends or 'none'}" + ("; those at a limit count as wrong" if settings.punish_unfinished else "")
    )
    if 0 < settings.look_price < settings.min_difference - ROUNDING:
        lines.append(
            f"min_difference={settings.min_difference:g} is more than look_price={settings.look_price:g}: of two turns "
            "that are right as often, no pair says that the one with a look less is better"
        )
    return lines


def tree_of(judged: Sequence[Judged], settings: FilterSettings) -> TriedTurn:
    """The turns of all tries at a question, under a turn that stands for the question.

    Raises:
        RecordError: two tries of one path, or of one look and of several.
    """
    root = TriedTurn(None, None)
    for tried, verdict in judged:
        where = f"question {tried.sample_id!r}, round {tried.round}, branch {tried.branch}"
        if tried.end is None:
            raise RecordError(f"{where}: a try of one look among tries of several; filter each generation by itself")
        turn = root
        for depth, place in enumerate([(tried.round, tried.branch), *tried.path]):
            look = tried.looks[depth] if depth < len(tried.looks) else None
            text = look.text if look else tried.answer
            turn = turn.turns.setdefault(place, TriedTurn(text, look))
            if (turn.text, turn.look) != (text, look) or (look is None and turn.tries):
                raise RecordError(f"{where}: two tries say different things of one turn, path {list(tried.path)}")
            turn.tries.append((tried, verdict))
        score = 0.0 if settings.punish_unfinished and tried.end in UNFINISHED else verdict.answer_score
        turn.reward = with_price(score, len(tried.looks), settings.look_price)
    return root


def turn_pairs(sample: Sample, judged: Sequence[Judged], settings: FilterSettings) -> list[TurnPair] | str:
    """The pairs of a question, a state before those that follow it; or why there is none.

    Raises:
        RecordError: as `tree_of`.
    """
    if not judged:
        return "not_generated"
    if all(tried.error is not None for tried, _ in judged):
        return "every_try_failed"
    root = tree_of(judged, settings)
    if value_of(root.outcome) is None:
        return "nothing_readable"
    compared = list(_compared(sample, (), list(root.turns.values())))
    if not compared:
        return "one_text"
    least = settings.min_difference - ROUNDING
    return [pair for pair in compared if pair.chosen.value - pair.rejected.value >= least] or "too_alike"


def _compared(sample: Sample, before: tuple[TrajectoryLook, ...], turns: Sequence[TriedTurn]) -> Iterator[TurnPair]:
    """The best and the worst turn of this state and of all that follow, where two texts of known worth were sampled."""
    alike: dict[str, list[TriedTurn]] = {}
    for turn in turns:
        if turn.text is not None:
            alike.setdefault(turn.text, []).append(turn)
    sides = [side for text, own in alike.items() if (side := _side(text, own)) is not None]

    def rank(side: TurnSide) -> tuple[float, int]:
        # Scores tie often; among equals the lot decides, so that no order and no length of a text has a say.
        return side.value, seed_of(0, *sample.place, *(look.text for look in before), side.text, "tie")

    if len(sides) > 1:
        yield TurnPair(before, max(sides, key=rank), min(sides, key=rank))
    for own in alike.values():
        if own[0].look is not None:
            yield from _compared(sample, (*before, own[0].look), [one for turn in own for one in turn.turns.values()])


def _side(text: str, turns: Sequence[TriedTurn]) -> TurnSide | None:
    value = box_reward([value_of(turn.outcome) for turn in turns])
    tries = tuple(one for turn in turns for one in turn.tries)
    return None if value is None else TurnSide(text, turns[0].look, value, len(turns), tries)


def turn_preference(sample: Sample, pair: TurnPair) -> Preference:
    """The preference of a pair: the question with the crops of the looks before, the chosen and the rejected turn."""
    pictures = (
        Picture(sample.image, size=sample.size),
        *(Picture(sample.image, look.box, sample.size) for look in pair.before),
    )
    step: Step = "box" if pair.chosen.look or pair.rejected.look else "answer"
    prompt = looks_prompt(sample.question, len(pair.before))
    return Preference(sample.id, step, prompt, pictures, pair.chosen.text, pair.rejected.text)


def count_ends(judged: Sequence[Judged]) -> Counter[str]:
    """How many tries have a score, and why the others have none: their end, or a critic that could not be read."""
    counts: Counter[str] = Counter()
    for tried, verdict in judged:
        unread = tried.end == "answered" and verdict.answer_score is None
        counts["unread score" if unread else "scored" if tried.end == "answered" else str(tried.end)] += 1
    return counts
