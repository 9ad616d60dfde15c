"""What people watch where a model looks several times: the measures of a step's turns, and their rows in the journal.

Shares and means of ends weigh each by how often the policy comes to it: an end under a fork of four turns counts a
quarter of one that was reached at once. Numbers in, numbers out: knows no trainer and no model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from visrl.rewards.advantages import Fork, Outcome, mean, value_of
from visrl.rollout.episodes import SampledTurn
from visrl.train.online_rollouts import QuestionRollouts
from visrl.train.online_turns import step_of
from visrl.zoom.episode import UNFINISHED


def turn_measures(rollouts: Sequence[QuestionRollouts], image_ids: Sequence[int]) -> Iterator[tuple[str, float]]:
    """What the turns of a step are like. `image_ids` are the tokens that stand for images.

    `rollout/no_look` is the share of answers without a look, `rollout/looks/2` the share of ends after two looks and
    `rollout/reward/2` their mean reward, price and all; `frac_reward_zero_std/1` is the share of forks after a first
    turn whose turns are all worth the same.
    """
    ends = [(weight, turn) for one in rollouts for weight, turn in weighted_ends(one.turns)]
    whole = sum(weight for weight, _ in ends)
    looks = [(weight / whole, len(turn.after.looks)) for weight, turn in ends]
    yield "rollout/looks_mean", sum(weight * count for weight, count in looks)
    at_once = [weight for weight, turn in ends if not turn.after.looks and step_of(turn) == "answer"]
    yield "rollout/no_look", sum(at_once) / whole
    yield "rollout/unfinished", sum(weight for weight, turn in ends if turn.after.end in UNFINISHED) / whole
    rewards = [reward for one in rollouts for own in one.scored.rewards for reward in own]
    for count in sorted({count for _, count in looks}):
        yield f"rollout/looks/{count}", sum(weight for weight, own in looks if own == count)
        known = [
            (weight, reward)
            for (weight, own), reward in zip(looks, rewards, strict=True)
            if own == count and reward is not None
        ]
        if known:
            total = sum(weight for weight, _ in known)
            yield f"rollout/reward/{count}", sum(weight * reward for weight, reward in known) / total
    yield from _forks(rollouts)
    turns = [turn for one in rollouts for turn in all_turns(one.turns)]
    asked = [turn for turn in turns if step_of(turn) == "box" and turn.completion.text is not None]
    areas = [look.box.area for turn in turns for look in new_looks(turn)]
    if asked:
        yield "box/parsed", mean([float(bool(new_looks(turn))) for turn in asked])
    if areas:
        yield "box/area", mean(areas)
    marks = set(image_ids)
    yield "left_out/image_tokens", mean([float(bool(marks.intersection(turn.completion.ids))) for turn in turns])


def weighted_ends(turns: Sequence[SampledTurn], weight: float = 1.0) -> Iterator[tuple[float, SampledTurn]]:
    """The last turn of every episode, with how often the policy comes to it: 1 in all."""
    for turn in turns:
        own = weight / len(turns)
        if turn.turns:
            yield from weighted_ends(turn.turns, own)
        else:
            yield own, turn


def all_turns(turns: Sequence[SampledTurn]) -> Iterator[SampledTurn]:
    """Every turn, before those that were sampled after it."""
    for turn in turns:
        yield turn
        yield from all_turns(turn.turns)


def new_looks(turn: SampledTurn) -> tuple[Any, ...]:
    """The looks that a turn added to its episode."""
    return turn.after.looks[len(turn.before.looks) :]


def _forks(rollouts: Sequence[QuestionRollouts]) -> Iterator[tuple[str, float]]:
    """The share of forks that have nothing to compare, by depth: of those with several turns, after the first one."""
    flat: dict[int, list[float]] = defaultdict(list)

    def note(fork: Fork, depth: int) -> None:
        if depth and len(fork.group.values) > 1:
            flat[depth].append(float(fork.group.flat))
        for after in fork.after:
            if after is not None:
                note(after, depth + 1)

    for one in rollouts:
        note(one.fork, 0)
    yield from ((f"frac_reward_zero_std/{depth}", mean(shares)) for depth, shares in sorted(flat.items()))


# --- The journal ------------------------------------------------------------------------------------------------------


def turn_rows(one: QuestionRollouts) -> list[dict[str, Any]]:
    """The turns of a question as a row of `rollouts.jsonl` holds them, those after a turn in its own `turns`: what was
    said and where was looked, what it is worth (its value) and its advantage; of an end how and with which answer, its
    reward and the scores of its parts."""
    ends = iter([
        {"answer": look.answer, "reward": reward, "parts": {label: rows[a][m] for label, rows in parts.items()},
         **({"error": look.error} if look.error else {})}
        for parts in [one.scored.parts]
        for a, attempt in enumerate(one.attempts)
        for m, (look, reward) in enumerate(zip(attempt.looks, one.scored.rewards[a], strict=True))
    ])  # fmt: skip
    return _rows(one.turns, one.outcomes, one.fork, ends)


def _rows(
    turns: Sequence[SampledTurn], outcomes: tuple[Outcome, ...], fork: Fork, ends: Iterator[dict[str, Any]]
) -> list[dict[str, Any]]:
    rows = []
    for turn, outcome, advantage, after in zip(turns, outcomes, fork.group.values, fork.after, strict=True):
        row = {
            "text": turn.completion.text or "",
            "looks": [look.box.as_list() for look in new_looks(turn)],
            "value": value_of(outcome),
            "advantage": advantage,
        }
        if after is not None and isinstance(outcome, tuple):
            row["turns"] = _rows(turn.turns, outcome, after, ends)
        else:
            row |= {"end": turn.after.end, **next(ends)}
        rows.append(row)
    return rows
