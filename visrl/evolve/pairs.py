"""From verdicts to preferences: the filter of VisRL's Algorithm 1, and the released code's, by name.

A question gives a pair only if it has a winner and a loser; every question that gives none is counted with its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from visrl.prompts import answer_prompt, focus_prompt
from visrl.records import Picture, Preference, Sample, Trajectory, Verdict

Rule = Literal["paper", "released"]
Judged = tuple[Trajectory, Verdict]


@dataclass(frozen=True, slots=True)
class FilterSettings:
    """Thresholds of the filter. `use_box_critic=False` is the paper's ablation: the answer's score decides alone."""

    t_max: float = 0.8
    t_min: float = 0.2
    rule: Rule = "paper"
    use_box_critic: bool = True


@dataclass(slots=True)
class Filtered:
    """The preferences kept, one winner and one loser per kept question, and why the others gave none."""

    preferences: list[Preference] = field(default_factory=list)
    pairs: list[tuple[Sample, Trajectory, Trajectory]] = field(default_factory=list)
    questions: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def kept(self) -> int:
        return len(self.pairs)


def make_pairs(
    samples: Iterable[Sample],
    trajectories: Iterable[Trajectory],
    verdicts: Iterable[Verdict],
    settings: FilterSettings = FilterSettings(),
) -> Filtered:
    """Pick winner and loser of every question, and write its box and answer preference."""
    scores = {(v.sample_id, v.round, v.branch): v for v in verdicts}
    by_sample: dict[str, list[Judged]] = {}
    for trajectory in trajectories:
        verdict = scores.get((trajectory.sample_id, trajectory.round, trajectory.branch))
        if verdict is not None:
            by_sample.setdefault(trajectory.sample_id, []).append((trajectory, verdict))
    result = Filtered()
    for sample in samples:
        result.questions += 1
        picked = pick(by_sample.get(sample.id, []), settings)
        if isinstance(picked, str):
            result.dropped[picked] += 1
            continue
        winner, loser = picked
        result.pairs.append((sample, winner, loser))
        result.preferences += preferences_of(sample, winner, loser)
    return result


def pick(judged: Sequence[Judged], settings: FilterSettings) -> tuple[Trajectory, Trajectory] | str:
    """Winner and loser among a question's trajectories, or why there are none."""
    read = [pair for pair in judged if pair[1].box_score is not None and pair[1].answer_score is not None]
    if not read:
        return "nothing_readable"
    winner, loser = (_pick_released if settings.rule == "released" else _pick_paper)(read, settings)
    if winner is None and loser is None:
        return "no_winner_no_loser"
    if winner is None:
        return "no_winner"
    if loser is None:
        return "no_loser"
    if winner.box_text == loser.box_text:
        return "same_box"
    return winner, loser


def _pick_paper(read: Sequence[Judged], settings: FilterSettings) -> tuple[Trajectory | None, Trajectory | None]:
    """Arg-max of both scores among those that pass both, arg-min among those that fail both.

    The paper does not say how the two scores are combined; here: by their sum, then the answer's, then the first.
    """
    wins = [p for p in read if _box(p, settings, 1.0) >= settings.t_max and _answer(p) >= settings.t_max]
    losses = [p for p in read if _box(p, settings, 0.0) < settings.t_min and _answer(p) < settings.t_min]
    best = max(wins, key=lambda p: (_box(p, settings, 1.0) + _answer(p), _answer(p)), default=None)
    worst = min(losses, key=lambda p: (_box(p, settings, 0.0) + _answer(p), _answer(p)), default=None)
    return best[0] if best else None, worst[0] if worst else None


def _pick_released(read: Sequence[Judged], settings: FilterSettings) -> tuple[Trajectory | None, Trajectory | None]:
    """The released code's order: the best and the worst answer first, and only then their boxes (≤ for losers)."""
    best, worst = max(read, key=_answer), min(read, key=_answer)
    wins = _answer(best) >= settings.t_max and _box(best, settings, 1.0) >= settings.t_max
    loses = _answer(worst) <= settings.t_min and _box(worst, settings, 0.0) <= settings.t_min
    return best[0] if wins else None, worst[0] if loses else None


def _box(judged: Judged, settings: FilterSettings, without: float) -> float:
    score = judged[1].box_score
    assert score is not None
    return score if settings.use_box_critic else without


def _answer(judged: Judged) -> float:
    assert judged[1].answer_score is not None
    return judged[1].answer_score


def preferences_of(sample: Sample, winner: Trajectory, loser: Trajectory) -> list[Preference]:
    """The box preference, and the answer preference where the answers differ.

    Both answers are given the crop of the *chosen* box (the paper's x̂).
    """
    whole = Picture(sample.image, size=sample.size)
    rows = [Preference(sample.id, "box", focus_prompt(sample.question), (whole,), winner.box_text, loser.box_text)]
    assert winner.answer is not None
    assert loser.answer is not None
    if winner.answer != loser.answer:
        pictures = (whole, Picture(sample.image, winner.box, sample.size))
        prompt = answer_prompt(sample.question)
        rows.append(Preference(sample.id, "answer", prompt, pictures, winner.answer, loser.answer))
    return rows
