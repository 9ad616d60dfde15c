"""From verdicts to preferences: the filter of VisRL's Algorithm 1, the released code's, and others of losers.py.

A question gives a pair only if it has a winner and a loser; every question that gives none is counted with its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, zip_longest
from typing import Literal

from visrl.evolve.losers import MIN_DIFFERENCE, Contrast, Judged, Losers, answer_contrast, pick_apart
from visrl.prompts import answer_prompt, focus_prompt
from visrl.records import Picture, Place, Preference, RecordError, Sample, Trajectory, Verdict

Rule = Literal["paper", "released"]


@dataclass(frozen=True, slots=True)
class FilterSettings:
    """Thresholds of the filter. `use_box_critic=False` is the paper's ablation: the answer's score decides alone.

    `rule` and its thresholds are those of `losers="paper"`; the other losers need `min_difference` only. The last two
    are of several looks (see turns.py).
    """

    t_max: float = 0.8
    t_min: float = 0.2
    rule: Rule = "paper"
    use_box_critic: bool = True
    losers: Losers = "paper"
    min_difference: float = MIN_DIFFERENCE
    look_price: float = 0.0
    punish_unfinished: bool = False


@dataclass(frozen=True, slots=True)
class Pair:
    """A kept question with its winner and its loser, and the two answers that are compared (None: there are no two)."""

    sample: Sample
    winner: Judged
    loser: Judged
    answers: Contrast | None = None


@dataclass(frozen=True, slots=True)
class Miss:
    """A question that gave no pair, why, and the best and the worst of its tries, as far as it has any."""

    sample: Sample
    reason: str
    tries: tuple[Judged, ...]


@dataclass(slots=True)
class Filtered:
    """The preferences of the kept questions, and why the others gave none."""

    preferences: list[Preference] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    missed: list[Miss] = field(default_factory=list)

    @property
    def questions(self) -> int:
        return len(self.pairs) + len(self.missed)

    @property
    def kept(self) -> int:
        return len(self.pairs)

    @property
    def dropped(self) -> Counter[str]:
        """How many questions gave no pair, by reason."""
        return Counter(miss.reason for miss in self.missed)


def make_pairs(
    samples: Iterable[Sample],
    trajectories: Iterable[Trajectory],
    verdicts: Iterable[Verdict],
    settings: FilterSettings = FilterSettings(),
) -> Filtered:
    """Pick winner and loser of every question, and write its box and answer preference.

    Raises:
        RecordError: as `by_question`, or tries of several looks.
    """
    result = Filtered()
    for sample, judged in by_question(samples, trajectories, verdicts):
        if judged:
            _settle(result, sample, judged, settings)
        else:
            result.missed.append(Miss(sample, "not_generated", ()))
    return result


def by_question(
    samples: Iterable[Sample], trajectories: Iterable[Trajectory], verdicts: Iterable[Verdict]
) -> Iterator[tuple[Sample, list[Judged]]]:
    """The tries at every question with their verdicts; at the end the questions that have none.

    Trajectories and verdicts come in one order, those of a question together, as `visrl generate` writes them: files
    of any length are read through once.

    Raises:
        RecordError: a trajectory without its verdict, a question twice, or one that is not among the samples.
    """
    waiting = {sample.place: sample for sample in samples}
    for place, judged in groupby(_matched(trajectories, verdicts), key=lambda pair: pair[0].place):
        if place not in waiting:
            raise RecordError(
                f"question {place[0]!r} has trajectories in two places, or is not in the data set; give each shard "
                "once, and the dataset that was generated from"
            )
        yield waiting.pop(place), list(judged)
    yield from ((sample, []) for sample in waiting.values())


def _matched(trajectories: Iterable[Trajectory], verdicts: Iterable[Verdict]) -> Iterator[Judged]:
    for trajectory, verdict in zip_longest(trajectories, verdicts):
        if trajectory is None or verdict is None or _turn(trajectory) != _turn(verdict):
            one = trajectory or verdict
            raise RecordError(
                f"trajectories and verdicts differ from question {one.sample_id!r}, round {one.round}, branch "
                f"{one.branch} on; "
                "let `visrl generate` finish, and join both files of the shards in the same order"
            )
        yield trajectory, verdict


def _turn(record: Trajectory | Verdict) -> tuple[Place, int, int, tuple[int, ...]]:
    return record.place, record.round, record.branch, record.path


def _settle(result: Filtered, sample: Sample, judged: list[Judged], settings: FilterSettings) -> None:
    if any(trajectory.end is not None for trajectory, _ in judged):
        raise RecordError(
            f"question {sample.id!r} has tries of several looks among those of one; filter each generation by itself"
        )
    picked = pick(judged, settings)
    if isinstance(picked, str):
        read = [pair for pair in judged if _is_read(pair, settings)] or judged
        ends = (max(read, key=_sum), min(read, key=_sum))
        result.missed.append(Miss(sample, picked, ends if ends[0] is not ends[1] else ends[:1]))
        return
    winner, loser = picked
    if settings.losers == "paper":
        answers = _paper_answers(winner[0], loser[0])
    else:
        answers = answer_contrast(judged, winner, settings.min_difference)
    result.pairs.append(Pair(sample, winner, loser, answers))
    result.preferences += preferences_of(sample, winner[0], loser[0], answers)


def _sum(judged: Judged) -> float:
    return (judged[1].box_score or 0.0) + (judged[1].answer_score or 0.0)


def pick(judged: Sequence[Judged], settings: FilterSettings) -> tuple[Judged, Judged] | str:
    """Winner and loser among a question's trajectories, or why there are none."""
    if not judged:
        return "not_generated"
    if all(trajectory.error is not None for trajectory, _ in judged):
        return "every_try_failed"
    if settings.losers != "paper":
        return pick_apart(judged, settings.losers, settings.min_difference)
    read = [pair for pair in judged if _is_read(pair, settings)]
    if not read:
        return "nothing_readable"
    winner, loser = (_pick_released if settings.rule == "released" else _pick_paper)(read, settings)
    if winner is None and loser is None:
        return "no_winner_no_loser"
    if winner is None:
        return "no_winner"
    if loser is None:
        return "no_loser"
    if winner[0].box_text == loser[0].box_text:
        return "same_box"
    return winner, loser


def _pick_paper(read: Sequence[Judged], settings: FilterSettings) -> tuple[Judged | None, Judged | None]:
    """Arg-max of both scores among those that pass both, arg-min among those that fail both.

    The paper does not say how the two scores are combined; here: by their sum, then the answer's, then the first.
    """
    wins = [p for p in read if _box(p, settings, 1.0) >= settings.t_max and _answer(p) >= settings.t_max]
    losses = [p for p in read if _box(p, settings, 0.0) < settings.t_min and _answer(p) < settings.t_min]
    best = max(wins, key=lambda p: (_box(p, settings, 1.0) + _answer(p), _answer(p)), default=None)
    worst = min(losses, key=lambda p: (_box(p, settings, 0.0) + _answer(p), _answer(p)), default=None)
    return best, worst


def _pick_released(read: Sequence[Judged], settings: FilterSettings) -> tuple[Judged | None, Judged | None]:
    """The released code's order: the best and the worst answer first, and only then their boxes (≤ for losers)."""
    best, worst = max(read, key=_answer), min(read, key=_answer)
    wins = _answer(best) >= settings.t_max and _box(best, settings, 1.0) >= settings.t_max
    loses = _answer(worst) <= settings.t_min and _box(worst, settings, 0.0) <= settings.t_min
    return best if wins else None, worst if loses else None


def _is_read(judged: Judged, settings: FilterSettings) -> bool:
    """Whether every score that the filter looks at could be read."""
    trajectory, verdict = judged
    if trajectory.error is not None or verdict.answer_score is None:
        return False
    return verdict.box_score is not None or not settings.use_box_critic


def _box(judged: Judged, settings: FilterSettings, without: float) -> float:
    if not settings.use_box_critic:
        return without
    assert judged[1].box_score is not None
    return judged[1].box_score


def _answer(judged: Judged) -> float:
    assert judged[1].answer_score is not None
    return judged[1].answer_score


def _paper_answers(winner: Trajectory, loser: Trajectory) -> Contrast | None:
    """Both answers given the crop of the *chosen* box (the paper's x̂), where they differ."""
    assert winner.answer is not None
    assert loser.answer is not None
    return Contrast(winner, winner.answer, loser.answer) if winner.answer != loser.answer else None


def preferences_of(sample: Sample, winner: Trajectory, loser: Trajectory, answers: Contrast | None) -> list[Preference]:
    """The box preference, and the answer preference where there are two answers to compare."""
    whole = Picture(sample.image, size=sample.size)
    rows = [Preference(sample.id, "box", focus_prompt(sample.question), (whole,), winner.box_text, loser.box_text)]
    if answers is not None:
        pictures = (whole, Picture(sample.image, answers.tried.box, sample.size))
        prompt = answer_prompt(sample.question)
        rows.append(Preference(sample.id, "answer", prompt, pictures, answers.chosen, answers.rejected))
    return rows
