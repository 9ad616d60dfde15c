"""Advantages: how much better a response is than the others it is compared with. Pure arithmetic on rewards.

Credit is given at every fork: a turn is compared with those that were sampled beside it, by the mean reward of what
came after it. Of one look that is two levels: a box is compared with the other boxes of its question, by the mean
reward of its answers, and an answer with the other answers from its crop. A reward of None could not be told (an unread
judge, say): it is in no mean, and its response has no advantage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Reward = float | None
Rewards = Sequence[Reward]
Scale = Literal["group", "batch", "none"]

EPSILON = 1e-4  # added to a deviation before it divides, as TRL does
FLAT = 1e-8  # a deviation up to this is rounding: `torch.isclose` to 0, by which TRL counts such groups


@dataclass(frozen=True, slots=True)
class GroupAdvantages:
    """The advantage of every member of a group, None for one whose reward is None. `flat` says that its rewards are all
    equal, so that there is nothing to prefer."""

    values: tuple[float | None, ...]
    flat: bool


# An estimator: the groups of a batch in, the advantages of each out.
Estimator = Callable[[Sequence[Rewards]], list[GroupAdvantages]]


def grpo(groups: Sequence[Rewards], *, scale: Scale = "group") -> list[GroupAdvantages]:
    """GRPO (Shao et al. 2024, section 4.1): A = (r − mean of the group) / (deviation + 1e-4).

    The deviation (unbiased) is that of the group, of the whole batch ("batch"), or is left out ("none", Dr. GRPO: Liu
    et al. 2025). A group of one has nothing to be compared with: 0.
    """
    of_batch = deviation([reward for group in groups for reward in group])
    found = []
    for group in groups:
        spread = deviation(group)
        divisor = {"group": spread + EPSILON, "batch": of_batch + EPSILON, "none": 1.0}[scale]
        found.append(_minus(group, [mean(group)] * len(group), divisor, flat=spread <= FLAT))
    return found


def rloo(groups: Sequence[Rewards], *, normalize: bool = False) -> list[GroupAdvantages]:
    """REINFORCE leave-one-out (Ahmadian et al. 2024, eq. 6): A = r − mean of the others of the group.

    With `normalize` the advantages of a batch get mean 0 and deviation 1. A group of one has no others: 0.
    """
    found = []
    for group in groups:
        known = [reward for reward in group if reward is not None]
        total, others = sum(known), len(known) - 1
        baselines = [0.0 if reward is None else (total - reward) / others if others else reward for reward in group]
        found.append(_minus(group, baselines, flat=deviation(group) <= FLAT))
    return _normalised(found) if normalize else found


def reinforce(groups: Sequence[Rewards]) -> list[GroupAdvantages]:
    """REINFORCE++ (Hu et al. 2025, eq. 5): A = (r − mean of the batch) / (deviation of the batch + 1e-4).

    Every response is compared with those of all groups, so that a group of equal rewards has advantages, too: `flat`
    is a batch of equal ones.
    """
    rewards = [reward for group in groups for reward in group]
    middle, spread = mean(rewards), deviation(rewards)
    return [_minus(group, [middle] * len(group), spread + EPSILON, flat=spread <= FLAT) for group in groups]


def best_of(groups: Sequence[Rewards]) -> list[GroupAdvantages]:
    """RAFT (Dong et al. 2023, algorithm 1), rejection sampling: 1 for the best of a group, the first of several, and 0
    for the others, so that a step is supervised fine-tuning on the best. A group of equal rewards has no best one: 0.
    """
    found = []
    for group in groups:
        flat = deviation(group) <= FLAT
        best = None if flat else max((r for r in group if r is not None), default=None)
        first = None if best is None else list(group).index(best)
        values = (None if reward is None else float(n == first) for n, reward in enumerate(group))
        found.append(GroupAdvantages(tuple(values), flat))
    return found


def rewards_alone(groups: Sequence[Rewards]) -> list[GroupAdvantages]:
    """The rewards as they are, for PPO: what a token is compared with is its value, and `gae` says how much better."""
    return [GroupAdvantages(tuple(group), deviation(group) <= FLAT) for group in groups]


# --- The tokens of a response -----------------------------------------------------------------------------------------


def gae(
    rewards: Sequence[float], values: Sequence[float], *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[list[float], list[float]]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16): advantages and returns of a response's tokens.

    δ_t = r_t + γ V_{t+1} − V_t, where V is 0 behind the last token, and A_t = δ_t + γ λ A_{t+1}. A_t + V_t is the
    return, which V_t is fitted to. Values 0.5 and 1 and a reward of 2 at the second of two tokens, with γ = 1 and
    λ = 0.5: δ = 0.5 and 1, A = 1 and 1, returns 1.5 and 2.
    """
    advantages: list[float] = []
    ahead = following = 0.0  # value and advantage of the next token
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        following = reward + gamma * ahead - value + gamma * lam * following
        ahead = value
        advantages.append(following)
    advantages.reverse()
    return advantages, [advantage + value for advantage, value in zip(advantages, values, strict=True)]


def whiten(values: Sequence[float], *, shift_mean: bool = True) -> list[float]:
    """(x − mean) / √(variance + 1e-8), as TRL whitens; without `shift_mean` the mean is added again."""
    middle, spread = mean(values), math.sqrt(deviation(values) ** 2 + 1e-8)
    return [(value - middle) / spread + (0.0 if shift_mean else middle) for value in values]


# --- Forks ------------------------------------------------------------------------------------------------------------

Outcome = Reward | tuple["Outcome", ...]
"""What came of a turn: the reward where it was the last one, else the outcomes of the turns sampled after it."""


@dataclass(frozen=True, slots=True)
class Fork:
    """The advantages of turns that were sampled side by side, and for each the fork after it, None at an end."""

    group: GroupAdvantages
    after: tuple[Fork | None, ...]


def value_of(outcome: Outcome) -> Reward:
    """What a turn is worth: its reward, or the mean of what the turns after it are worth; None where none is known.

    The mean is taken fork by fork, so that it is what can be expected after the turn: an end under a fork that was
    sampled more often weighs no more than one that was reached at once.
    """
    return box_reward([value_of(one) for one in outcome]) if isinstance(outcome, tuple) else outcome


def credit_at_forks(
    questions: Sequence[tuple[Outcome, ...]], estimate: Estimator, *, lone_inherits: bool = True
) -> list[Fork]:
    """The advantages of all turns at some questions: each within its fork, by what it is worth (see `value_of`).

    A turn that was sampled alone has nothing to be compared with, and goes on with the advantage of the turn before it
    (`lone_inherits`). Statistics of a batch are those of one depth: of all first turns, of all second ones.

    Boxes of which both answers, one, and none are right, ((1, 1), (1, 0), (0, 0)), are worth 1, 0.5 and 0: against
    their mean +0.5, 0 and −0.5. The right answer of the second is +0.5 against its crop's mean, the wrong one −0.5; the
    others 0, for what all answers from a crop have in common is the box's merit or fault. With a second look in the
    place of one of the answers, (1, (1, 0)) is worth ¾: +¼ for the answer, −¼ for the look, ±½ for what came of that.
    """
    return _credit([(question, None) for question in questions], estimate, lone_inherits)


Origin = GroupAdvantages | None  # the advantage of the turn before a fork, a group of one; None before a first turn


def _credit(
    forks: Sequence[tuple[tuple[Outcome, ...], Origin]], estimate: Estimator, lone_inherits: bool
) -> list[Fork]:
    """The forks of one depth and all below them."""
    goes_on = [lone_inherits and before is not None and len(turns) == 1 for turns, before in forks]
    compared = [list(map(value_of, turns)) for (turns, _), known in zip(forks, goes_on, strict=True) if not known]
    estimated = iter(estimate(compared) if compared else ())
    groups = [
        before if known and before is not None else next(estimated)
        for (_, before), known in zip(forks, goes_on, strict=True)
    ]
    further = [
        (turn, GroupAdvantages((advantage,), True))
        for (turns, _), group in zip(forks, groups, strict=True)
        for turn, advantage in zip(turns, group.values, strict=True)
        if isinstance(turn, tuple)
    ]
    below = iter(_credit(further, estimate, lone_inherits) if further else ())
    return [
        Fork(group, tuple(next(below) if isinstance(turn, tuple) else None for turn in turns))
        for (turns, _), group in zip(forks, groups, strict=True)
    ]


def box_reward(answers: Rewards) -> Reward:
    """What a box is worth: the mean reward of its answers; None where none is known."""
    return mean(answers) if any(reward is not None for reward in answers) else None


def with_price(reward: Reward, looks: int, price: float) -> Reward:
    """The reward of an answer after so many looks, each of which takes the share `price` off what is left of it, like
    the discount of a step: looking is learned where it pays.

    A wrong answer has nothing that could be taken off: were the price subtracted from it, too, a question that nobody
    gets right would differ by nothing else, and estimators that divide by a group's deviation would make of that the
    same push as of right and wrong.
    """
    return reward if reward is None or reward <= 0 else reward * (1 - price) ** looks


# --- Arithmetic -------------------------------------------------------------------------------------------------------


def mean(rewards: Rewards) -> float:
    """The mean of the rewards that are known; 0 where none is."""
    known = [reward for reward in rewards if reward is not None]
    return math.fsum(known) / len(known) if known else 0.0


def deviation(rewards: Rewards) -> float:
    """The unbiased standard deviation of the rewards that are known; 0 for fewer than two."""
    known = [reward for reward in rewards if reward is not None]
    if len(known) < 2:
        return 0.0
    middle = math.fsum(known) / len(known)
    return math.sqrt(math.fsum((reward - middle) ** 2 for reward in known) / (len(known) - 1))


def _minus(rewards: Rewards, baselines: Sequence[float], divisor: float = 1.0, *, flat: bool) -> GroupAdvantages:
    """(reward − baseline) / divisor; exactly 0 throughout where the group is flat."""
    values = (
        None if reward is None else 0.0 if flat else (reward - baseline) / divisor
        for reward, baseline in zip(rewards, baselines, strict=True)
    )
    return GroupAdvantages(tuple(values), flat)


def _normalised(groups: Sequence[GroupAdvantages]) -> list[GroupAdvantages]:
    values = [value for group in groups for value in group.values]
    middle, spread = mean(values), deviation(values)
    return [_minus(group.values, [middle] * len(group.values), spread + EPSILON, flat=group.flat) for group in groups]
