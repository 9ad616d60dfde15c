"""Advantages: how much better a response is than the others it is compared with. Pure arithmetic on rewards.

Credit has two levels. A box is compared with the other boxes of its question, by the mean reward of its answers; an
answer is compared with the other answers from its crop. A reward of None could not be told (an unread judge, say): it
is in no mean, and its response has no advantage.
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


# --- The two levels ---------------------------------------------------------------------------------------------------


def box_reward(answers: Rewards) -> Reward:
    """What a box is worth: the mean reward of its answers; None where none is known."""
    return mean(answers) if any(reward is not None for reward in answers) else None


def two_levels(
    boxes: Sequence[Rewards], answers: Sequence[Sequence[Rewards]], estimate: Estimator
) -> tuple[list[GroupAdvantages], list[list[GroupAdvantages]]]:
    """The advantages of boxes within their question, and of answers within their crop.

    `boxes[q][b]` is the reward of a box (see `box_reward`), `answers[q][b]` those of the answers from its crop: none
    where the box cannot be read. Boxes of which both answers, one, and none are right are worth 1, 0.5 and 0: against
    their mean +0.5, 0 and −0.5. The right answer of the second is +0.5 against its crop's mean, the wrong one −0.5; the
    others 0, for what all answers from a crop have in common is the box's merit or fault.
    """
    of_answers = iter(estimate([crop for question in answers for crop in question]))
    return estimate(boxes), [[next(of_answers) for _ in question] for question in answers]


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
