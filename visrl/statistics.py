"""Uncertainty of scores: intervals, paired differences, agreement. Numbers in, numbers out; knows no files or models.

Every interval is a function of its values and a seed alone, so that a table printed twice is the same table.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Values = Sequence[float]

RESAMPLES = 2_000
_CHUNK = 2_000_000  # resampled values held at once, so that memory stays small for any number of questions


def interval(values: Values, seed: int = 0, level: float = 0.95) -> dict[str, float]:
    """The mean of `values` with its interval: `{"mean", "low", "high"}`.

    Wilson's score interval where all values are 0 or 1 (it holds near 0 and 1, where a bootstrap has no width), the
    percentile bootstrap otherwise.

    Raises:
        ValueError: no values, a value that is no finite number, or a level outside (0, 1).
    """
    data = _checked(values, level)
    mean = float(data.mean())
    if _all_binary(data):
        low, high = _wilson(mean, len(data), level)
    else:
        low, high = _percentiles(_resampled_means(data, np.random.default_rng(seed)), level)
    return {"mean": mean, "low": low, "high": high}


def mean_interval(groups: Mapping[str, Values], seed: int = 0, level: float = 0.95) -> dict[str, float]:
    """The unweighted mean of the groups' means, with a bootstrap interval that resamples within each group.

    Raises:
        ValueError: no groups, or a group that `interval` would refuse.
    """
    if not groups:
        raise ValueError("a mean over data sets needs at least one data set")
    rng = np.random.default_rng(seed)
    checked = [_checked(groups[name], level) for name in sorted(groups)]
    means = np.mean([_resampled_means(data, rng) for data in checked], axis=0)
    low, high = _percentiles(means, level)
    return {"mean": float(np.mean([data.mean() for data in checked])), "low": low, "high": high}


def paired(
    a: Values, b: Values, seed: int = 0, level: float = 0.95, groups: Sequence[Hashable] | None = None
) -> dict[str, float]:
    """What `b` is better than `a`, question by question: `{"difference", "low", "high"}`, b − a.

    The interval is the percentile bootstrap over questions. Where both hold 0 and 1 only, `p_mcnemar` is the exact
    two-sided McNemar test on the questions that one of them alone gets right. `groups` names the question of each value
    where one has several: whole questions are resampled then, and there is no test, for their values hang together.

    Raises:
        ValueError: the two differ in length, or `interval` would refuse one of them.
    """
    if len(a) != len(b):
        raise ValueError(f"a paired comparison needs the same questions on both sides, not {len(a)} and {len(b)}")
    first, second = _checked(a, level), _checked(b, level)
    differences = second - first
    rng = np.random.default_rng(seed)
    alone = groups is None or len(set(groups)) == len(differences)
    means = _resampled_means(differences, rng) if alone else _resampled_groups(differences, list(groups or ()), rng)
    low, high = _percentiles(means, level)
    result = {"difference": float(differences.mean()), "low": low, "high": high}
    if alone and _all_binary(first) and _all_binary(second):
        result["p_mcnemar"] = mcnemar(int((differences < 0).sum()), int((differences > 0).sum()))
    return result


def paired_mean(
    a: Mapping[str, Values], b: Mapping[str, Values], seed: int = 0, level: float = 0.95
) -> dict[str, float]:
    """The difference b − a of the unweighted means over data sets, with its bootstrap interval.

    Raises:
        ValueError: the two hold different data sets, or `paired` would refuse one.
    """
    if set(a) != set(b):
        raise ValueError(f"a paired comparison needs the same data sets on both sides: {sorted(a)} and {sorted(b)}")
    unequal = next((name for name in sorted(a) if len(a[name]) != len(b[name])), None)
    if unequal is not None:
        raise ValueError(f"{unequal}: {len(a[unequal])} questions against {len(b[unequal])}")
    differences = {name: (_checked(b[name], level) - _checked(a[name], level)).tolist() for name in sorted(a)}
    result = mean_interval(differences, seed, level)
    return {"difference": result["mean"], "low": result["low"], "high": result["high"]}


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p-value of McNemar's test: `only_a` questions right for a alone, `only_b` for b alone."""
    n = only_a + only_b
    term, tail = 1, 0
    for k in range(min(only_a, only_b) + 1):
        tail += term
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)


def agreement(a: Values, b: Values, threshold: float = 0.5) -> dict[str, float | int | None]:
    """How far two judges agree on the same answers, scores in [0, 1].

    `same` is the share of equal scores, `mean_absolute` the mean distance, `pearson` the linear correlation, `kappa`
    Cohen's kappa on score ≥ threshold. A correlation or kappa that does not exist (no spread) is None.

    Raises:
        ValueError: the two differ in length or are empty.
    """
    if len(a) != len(b):
        raise ValueError(f"agreement needs the same answers judged twice, not {len(a)} and {len(b)}")
    first, second = _checked(a), _checked(b)
    spread = first.std() > 0 and second.std() > 0
    return {
        "n": len(first),
        "same": float((first == second).mean()),
        "mean_absolute": float(np.abs(first - second).mean()),
        "mean_a": float(first.mean()),
        "mean_b": float(second.mean()),
        "pearson": float(np.corrcoef(first, second)[0, 1]) if spread else None,
        "kappa": _kappa(first >= threshold, second >= threshold),
    }


# --- Pieces ---------------------------------------------------------------------------------------------------------


def _checked(values: Values, level: float = 0.95) -> NDArray[np.float64]:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or len(data) == 0:
        raise ValueError("a score needs at least one value")
    if not np.isfinite(data).all():
        raise ValueError("a score needs finite numbers; leave out what could not be read")
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval lies between 0 and 1, not at {level}")
    return data


def _all_binary(data: NDArray[np.float64]) -> bool:
    return bool(((data == 0) | (data == 1)).all())


def _wilson(share: float, n: int, level: float) -> tuple[float, float]:
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def _resampled_means(data: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    means = np.empty(RESAMPLES)
    rows = max(1, _CHUNK // len(data))
    for start in range(0, RESAMPLES, rows):
        count = min(rows, RESAMPLES - start)
        means[start : start + count] = data[rng.integers(0, len(data), size=(count, len(data)))].mean(axis=1)
    return means


def _resampled_groups(
    data: NDArray[np.float64], groups: Sequence[Hashable], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Means over all values of as many groups as there are, drawn with replacement."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    places = np.array([numbers[name] for name in groups])
    sums, counts = np.bincount(places, data), np.bincount(places)
    means = np.empty(RESAMPLES)
    for draw in range(RESAMPLES):
        drawn = rng.integers(0, len(sums), size=len(sums))
        means[draw] = sums[drawn].sum() / counts[drawn].sum()
    return means


def _percentiles(means: NDArray[np.float64], level: float) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _kappa(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float | None:
    expected = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    if expected == 1:
        return None
    return float(((a == b).mean() - expected) / (1 - expected))
