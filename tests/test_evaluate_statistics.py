"""Intervals and tests against hand arithmetic and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from visrl import statistics


def test_wilson_by_hand():
    # 8 of 10, z = 1.959964: centre (.8 + .19207) / 1.38415 = .71674, half .22654.
    result = statistics.interval([1] * 8 + [0] * 2)
    assert result["mean"] == 0.8
    assert result["low"] == pytest.approx(0.49016, abs=1e-5)
    assert result["high"] == pytest.approx(0.94332, abs=1e-5)


def test_wilson_has_width_where_all_are_right():
    result = statistics.interval([1.0] * 20)
    assert result["high"] == 1.0
    assert 0.8 < result["low"] < 0.9


def test_bootstrap_is_seeded_and_covers_the_normal_interval():
    values = np.random.default_rng(1).uniform(size=400)
    one, two = statistics.interval(values, seed=3), statistics.interval(values, seed=3)
    assert one == two
    assert one != statistics.interval(values, seed=4)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert one["low"] == pytest.approx(values.mean() - half, abs=0.005)
    assert one["high"] == pytest.approx(values.mean() + half, abs=0.005)


def test_mean_interval_weighs_data_sets_equally():
    result = statistics.mean_interval({"large": [0.0] * 99 + [1.0], "small": [1.0]})
    assert result["mean"] == pytest.approx((0.01 + 1) / 2)
    assert result["low"] >= 0.5


@pytest.mark.parametrize("counts", list(itertools.product(range(7), repeat=2)))
def test_mcnemar_equals_counting_all_outcomes(counts):
    only_a, only_b = counts
    n = only_a + only_b
    extreme = sum(abs(2 * sum(coins) - n) >= abs(only_a - only_b) for coins in itertools.product((0, 1), repeat=n))
    assert statistics.mcnemar(only_a, only_b) == pytest.approx(extreme / 2**n, abs=1e-12)


def test_mcnemar_of_many_questions_does_not_overflow():
    assert statistics.mcnemar(4000, 4000) == 1.0
    assert 0 < statistics.mcnemar(3900, 4100) < 0.03


def test_values_of_one_question_are_resampled_together_and_are_no_test():
    """Each question four times alike: the interval is that of the questions, not of four times as many."""
    a, b = [0, 1, 0, 0, 1, 0, 1, 0], [1, 1, 0, 1, 0, 1, 1, 1]
    once = statistics.paired(a, b)
    four = statistics.paired(a * 4, b * 4, groups=[*range(8)] * 4)
    assert four["difference"] == once["difference"] == 3 / 8
    assert (four["low"], four["high"]) == pytest.approx((once["low"], once["high"]), abs=0.13)
    apart = statistics.paired(a * 4, b * 4)
    assert four["high"] - four["low"] > 1.6 * (apart["high"] - apart["low"])
    assert ("p_mcnemar" in once, "p_mcnemar" in four) == (True, False)
    assert statistics.paired(a, b, groups="abcdefgh") == once


def test_paired_difference_is_of_b_over_a():
    a, b = [0, 0, 0, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 1, 1, 0]
    result = statistics.paired(a, b)
    assert result["difference"] == 0.5
    assert result["p_mcnemar"] == pytest.approx(2 * (1 + 6) / 64)
    assert result["low"] <= 0.5 <= result["high"]


def test_paired_without_a_test_where_scores_are_shares():
    assert "p_mcnemar" not in statistics.paired([0.2, 1.0], [0.4, 1.0])


def test_paired_mean_pairs_within_data_sets():
    a = {"x": [0.0, 1.0, 0.0], "y": [0.5]}
    b = {"x": [0.0, 1.0, 0.0], "y": [1.0]}
    assert statistics.paired_mean(a, b) == {"difference": 0.25, "low": 0.25, "high": 0.25}


def test_agreement_by_hand():
    result = statistics.agreement([1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.5, 1.0])
    assert result["same"] == 0.5
    assert result["mean_absolute"] == pytest.approx(0.375)
    # On ≥ .5: a 1010, b 1011; agreement .75, by chance .5 · .75 + .5 · .25 = .5.
    assert result["kappa"] == pytest.approx(0.5)
    constant = statistics.agreement([1.0, 1.0], [1.0, 1.0])
    assert constant["same"] == 1.0
    assert constant["kappa"] is None
    assert constant["pearson"] is None


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: statistics.interval([]), "at least one"),
        (lambda: statistics.interval([0.1, float("nan")]), "finite"),
        (lambda: statistics.interval([0.1], level=1.0), "level"),
        (lambda: statistics.paired([1], [1, 0]), "same questions"),
        (lambda: statistics.paired_mean({"x": [1]}, {"y": [1]}), "same data sets"),
        (lambda: statistics.paired_mean({"x": [1]}, {"x": [1, 0]}), "x: 1 questions against 2"),
        (lambda: statistics.agreement([1], []), "judged twice"),
        (lambda: statistics.mean_interval({}), "at least one data set"),
    ],
)
def test_what_has_no_score_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()
