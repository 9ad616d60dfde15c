"""Advantages by hand arithmetic, and against what TRL's trainers make of the same rewards."""

from __future__ import annotations

import random
from functools import partial
from math import sqrt

import pytest
import torch

from visrl.rewards.advantages import (
    Fork,
    GroupAdvantages,
    Reward,
    best_of,
    box_reward,
    credit_at_forks,
    deviation,
    grpo,
    mean,
    reinforce,
    rewards_alone,
    rloo,
    value_of,
    with_price,
)

GROUPS: list[list[Reward]] = [[1.0, 0.0, 0.0, 1.0], [0.5, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]]


def two_levels(boxes, answers, estimate):
    """One look: the advantages of boxes within their question, and of answers within their crop; an answer by itself is
    compared with nothing."""
    questions = zip(boxes, answers, strict=True)
    outcomes = [tuple(tuple(crop) or reward for reward, crop in zip(*one, strict=True)) for one in questions]
    forks, nothing = credit_at_forks(outcomes, estimate, lone_inherits=False), GroupAdvantages((), True)
    return [fork.group for fork in forks], [[one.group if one else nothing for one in fork.after] for fork in forks]


def values(groups) -> list[list[float | None]]:
    return [list(group.values) for group in groups]


def test_mean_and_deviation_by_hand() -> None:
    assert mean([1.0, None, 0.0, 0.5]) == 0.5
    assert deviation([1.0, None, 0.0, 0.5]) == pytest.approx(0.5)  # √((¼ + ¼ + 0) / 2)
    assert mean([None]) == deviation([None, 1.0]) == 0.0


def test_grpo_by_hand() -> None:
    """Group 1: mean ½, deviation √(4·¼ / 3) = 1/√3. Group 2: mean 3/8, squares (1 + 9 + 25 + 9)/64, over 3."""
    ours = grpo(GROUPS)
    first, second = 0.5 / (1 / sqrt(3) + 1e-4), sqrt(44 / 64 / 3) + 1e-4
    assert ours[0].values == pytest.approx([first, -first, -first, first])
    assert ours[1].values == pytest.approx([0.125 / second, -0.375 / second, 0.625 / second, -0.375 / second])
    assert ours[2].values == (0.0, 0.0, 0.0, 0.0)
    assert [group.flat for group in ours] == [False, False, True]


def test_grpo_scaled_by_the_batch_or_not_at_all() -> None:
    """All twelve: sum 7.5, mean 5/8; squares sum to 7.25, so the variance is (7.25 − 12·25/64) / 11."""
    spread = sqrt((7.25 - 12 * 25 / 64) / 11) + 1e-4
    assert grpo(GROUPS, scale="batch")[0].values == pytest.approx([v / spread for v in (0.5, -0.5, -0.5, 0.5)])
    assert grpo(GROUPS, scale="none")[1].values == (0.125, -0.375, 0.625, -0.375)


def test_rloo_by_hand() -> None:
    """Each against the mean of the other three: 1 − ⅓ and 0 − ⅔."""
    ours = rloo(GROUPS)
    assert ours[0].values == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    assert ours[1].values == pytest.approx([0.5 - 1 / 3, -0.5, 1 - 1 / 6, -0.5])
    assert ours[2].flat
    assert ours[2].values == (0.0, 0.0, 0.0, 0.0)
    known = [v for group in rloo(GROUPS, normalize=True) for v in group.values]
    assert mean(known) == pytest.approx(0)
    assert deviation(known) == pytest.approx(1, abs=1e-3)


def test_reinforce_compares_with_the_whole_batch() -> None:
    """An all-right group is better than the rest: (1 − ⅝) / deviation. Only a batch of equal rewards is flat."""
    spread = sqrt((7.25 - 12 * 25 / 64) / 11) + 1e-4
    ours = reinforce(GROUPS)
    assert ours[2].values == pytest.approx([0.375 / spread] * 4)
    assert not any(group.flat for group in ours)
    assert all(group.flat and set(group.values) == {0.0} for group in reinforce([[0.3, 0.3], [0.3]]))


def test_the_best_of_a_group_is_the_first_of_equals_and_none_of_a_flat_group() -> None:
    assert values(best_of(GROUPS)) == [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0] * 4]
    assert values(best_of([[None, 0.2, 0.3], [None], []])) == [[None, 0.0, 1.0], [None], []]


@pytest.mark.parametrize(
    "estimate", [grpo, rloo, reinforce, best_of, partial(grpo, scale="none"), partial(grpo, scale="batch")]
)
def test_a_reward_that_could_not_be_told_leaves_its_group(estimate) -> None:
    with_none = estimate([[1.0, None, 0.0, 0.5], [0.0, 1.0]])
    without = estimate([[1.0, 0.0, 0.5], [0.0, 1.0]])
    assert with_none[0].values[1] is None
    assert [v for v in with_none[0].values if v is not None] == list(without[0].values)
    assert with_none[1] == without[1]
    assert estimate([[None, None]])[0].values == (None, None)


def test_a_group_of_one_has_nothing_to_be_compared_with() -> None:
    assert values(grpo([[0.7]])) == values(rloo([[0.7]])) == [[0.0]]
    assert grpo([[0.7, None]])[0].flat


def test_the_two_levels_by_hand() -> None:
    """Three boxes of two answers each, a fourth without: what the answers of a crop share is the box's merit."""
    answers = [[[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], []]]
    boxes = [[box_reward(crop) for crop in answers[0][:3]] + [0.0]]
    assert boxes == [[1.0, 0.5, 0.0, 0.0]]
    of_boxes, of_answers = two_levels(boxes, answers, partial(grpo, scale="none"))
    assert of_boxes[0].values == (0.625, 0.125, -0.375, -0.375)
    assert [crop.values for crop in of_answers[0]] == [(0.0, 0.0), (0.5, -0.5), (0.0, 0.0), ()]
    assert [crop.flat for crop in of_answers[0]] == [True, False, True, True]


def test_a_box_is_worth_its_answers_that_are_known() -> None:
    assert box_reward([1.0, None, 0.0]) == 0.5
    assert box_reward([None, None]) is None
    assert box_reward([]) is None


# --- against TRL ------------------------------------------------------------------------------------------------------
# Its trainers compute advantages in the middle of a method that also generates; these are its lines for it, its own
# `nanstd` included (trl 1.16, grpo_trainer.py `_generate_and_score_completions`, rloo_trainer.py the same).


def trl_grpo(rewards: torch.Tensor, scale: str) -> torch.Tensor:
    from trl.trainer.utils import nanstd

    members = rewards.shape[1]
    flat = rewards.view(-1)
    middle = torch.nanmean(rewards, dim=1).repeat_interleave(members)
    if scale == "batch":
        spread = nanstd(flat).expand_as(flat)
    else:
        spread = nanstd(rewards, dim=1).repeat_interleave(members)
    advantages = flat - middle
    if scale != "none":
        advantages = advantages / (spread + 1e-4)
    return torch.nan_to_num(advantages, nan=0.0).view_as(rewards)


def trl_rloo(rewards: torch.Tensor, normalize: bool) -> torch.Tensor:
    from trl.trainer.utils import nanstd

    scorable = (~torch.isnan(rewards)).sum(dim=1, keepdim=True)
    total = torch.nansum(rewards, dim=1, keepdim=True)
    advantages = (rewards - (total - rewards) / (scorable - 1)).view(-1)
    if normalize:
        advantages = (advantages - torch.nanmean(advantages)) / (nanstd(advantages) + 1e-4)
    return torch.nan_to_num(advantages, nan=0.0).view_as(rewards)


def drawn_rewards() -> list[list[Reward]]:
    chance = random.Random(7)
    groups = [[chance.choice([0.0, 0.25, 0.5, 1.0, chance.random()]) for _ in range(6)] for _ in range(9)]
    groups[3] = [0.25] * 6
    return [[None if chance.random() < 0.1 else reward for reward in group] for group in groups]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (grpo, partial(trl_grpo, scale="group")),
        (partial(grpo, scale="batch"), partial(trl_grpo, scale="batch")),
        (partial(grpo, scale="none"), partial(trl_grpo, scale="none")),
        (rloo, partial(trl_rloo, normalize=False)),
        (partial(rloo, normalize=True), partial(trl_rloo, normalize=True)),
    ],
)
def test_equal_to_trl(ours, theirs) -> None:
    groups = drawn_rewards()
    nan = float("nan")
    tensor = torch.tensor([[nan if r is None else r for r in group] for group in groups], dtype=torch.float64)
    found = torch.tensor([[v or 0.0 for v in group.values] for group in ours(groups)], dtype=torch.float64)
    assert sum(r is None for group in groups for r in group) > 2
    torch.testing.assert_close(found, theirs(tensor), rtol=1e-6, atol=1e-9)


# --- credit at every fork ---------------------------------------------------------------------------------------------


def advantages(fork: Fork) -> list[object]:
    """The advantages of a fork, each with those after it where there are any."""
    return [
        value if after is None else (value, advantages(after))
        for value, after in zip(fork.group.values, fork.after, strict=True)
    ]


def test_three_levels_by_hand() -> None:
    """After the first of two turns come an answer worth 1 and a second look, whose answers are worth 1 and 0: ¾ in the
    mean over its forks. The second turn's one look is answered wrong: alone, it goes on with what its turn has."""
    (fork,) = credit_at_forks([((1.0, (1.0, 0.0)), ((0.0,),))], partial(grpo, scale="none"))
    assert advantages(fork) == [(0.375, [0.25, (-0.25, [0.5, -0.5])]), (-0.375, [(-0.375, [-0.375])])]
    second = rloo([[0.75, 0.0]])[0].values
    (fork,) = credit_at_forks([((1.0, (1.0, 0.0)), 0.0)], rloo)
    assert advantages(fork) == [(second[0], [0.5, (-0.5, [1.0, -1.0])]), second[1]]
    (fork,) = credit_at_forks([((1.0, (1.0, 0.0)), 0.0)], rewards_alone)  # what PPO is given
    assert advantages(fork) == [(0.75, [1.0, (0.5, [1.0, 0.0])]), 0.0]


def test_what_came_to_no_end_is_in_no_mean() -> None:
    """Of the first turn's two looks one has no reward: the turn is worth the other's. A turn of which nothing is known
    has no advantage, and neither has what came after it."""
    assert value_of((None, (1.0, None))) == 1
    assert value_of((None, (None, None))) is None
    (fork,) = credit_at_forks([((None, (1.0, None)), 0.0, (None,))], partial(grpo, scale="none"))
    assert advantages(fork) == [(0.5, [None, (0.0, [0.0, None])]), -0.5, (None, [None])]


@pytest.mark.parametrize(
    "estimate", [grpo, partial(grpo, scale="batch"), partial(rloo, normalize=True), reinforce, best_of, rewards_alone]
)
def test_one_look_is_the_case_of_two_levels_to_the_last_bit(estimate) -> None:
    """The advantages of boxes and answers, estimated apart as they were before there were more levels."""
    chance = random.Random(3)
    answers = [[[chance.random() for _ in range(chance.choice([0, 3]))] for _ in range(4)] for _ in range(5)]
    boxes = [[box_reward(crop) if crop else 0.0 for crop in question] for question in answers]
    found = two_levels(boxes, answers, estimate)
    assert found[0] == estimate(boxes)
    theirs = iter(estimate([crop for own in answers for crop in own if crop]))
    assert all(crop == next(theirs) for own in found[1] for crop in own if crop.values)
    trees = [tuple(tuple(crop) or 0.0 for crop in question) for question in answers]
    forks = credit_at_forks(trees, estimate)
    assert [fork.group for fork in forks] == found[0]
    assert [[one.group.values for one in fork.after if one] for fork in forks] == [
        [crop.values for crop in own if crop.values] for own in found[1]
    ]


def test_a_price_is_taken_off_for_every_look() -> None:
    assert with_price(1.0, 3, 0.25) == 0.75**3
    assert with_price(0.5, 0, 0.25) == 0.5
    assert with_price(0.5, 1, 0.5) == 0.25
    assert with_price(1.0, 12, 0.5) > 0, "a right answer is always worth more than a wrong one"
    assert with_price(0.0, 3, 0.25) == 0.0, "a wrong answer has nothing to lose"
    assert with_price(-1.0, 3, 0.25) == -1.0
    assert with_price(None, 2, 0.25) is None
