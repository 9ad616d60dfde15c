"""Two checkpoints on the same questions: the difference, its interval and a test. Rows in, numbers and tables out.

Two modes of one checkpoint are compared alike: over a run without a crop, what B gains is what its crop gains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from visrl.records import RecordError
from visrl.rewards.crop_effects import gain_and_harm
from visrl.rewards.results import (
    READINGS,
    Group,
    Reading,
    Row,
    columns_of,
    dataset_name,
    group_of,
    key_of,
    means_of_groups,
    value_of,
)
from visrl.statistics import paired, paired_mean

Pair = tuple[Row, Row]


def compare(a: Sequence[Row], b: Sequence[Row], seed: int = 0) -> dict[str, Any]:
    """Question by question, b over a, on the questions that both hold: `only_a` and `only_b` count the others.

    `{"n", "skipped", "only_a", "only_b", "columns": {column: {reading: entry | None}}, "datasets": {name: {column: …}},
    "right": {…}}`, an entry being `{"n", "a", "b", "difference", "low", "high", "p_mcnemar"}`: the last for columns of
    0 and 1 only. Under `left_out` a question is left out where either side is; one that either side skipped, under both
    readings. With several data sets the first `columns` hold the unweighted mean over them (and the test over all
    questions). `right` says what b alone, and what a alone, has right (`rewards.crop_effects.gain_and_harm`).

    Raises:
        RecordError: the two have no question or no column in common, or were read in two ways.
    """
    readings = [sorted({str(row["reading"]) for row in side if row.get("reading")}) for side in (a, b)]
    if all(readings) and readings[0] != readings[1]:
        raise RecordError(
            f"A is read as {' and '.join(readings[0])}, B as {' and '.join(readings[1])}: scores of two readings are "
            "not compared; run one of them again with the other's `reading`"
        )
    right = {key_of(row): row for row in b}
    pairs = [(row, right[key_of(row)]) for row in a if key_of(row) in right]
    columns = [column for column in columns_of(a) if column in columns_of(b)]
    if not pairs or not columns:
        what = "question" if not pairs else "column"
        raise RecordError(f"the two results have no {what} in common; were they made on the same benchmark?")
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(dataset_name(pair[0]), []).append(pair)
    return {
        "n": len(pairs),
        "skipped": sum(bool(one.get("skipped") or other.get("skipped")) for one, other in pairs),
        "only_a": len(a) - len(pairs),
        "only_b": len(b) - len(pairs),
        "columns": {
            column: {reading: _over_datasets(groups, column, reading, seed) for reading in READINGS}
            for column in columns
        },
        "datasets": {
            name: {
                column: {reading: _entry(*_values(group, column, reading), seed) for reading in READINGS}
                for column in columns
            }
            for name, group in groups.items()
        },
        "right": gain_and_harm([one for one, _ in pairs], [other for _, other in pairs], seed),
    }


def _values(pairs: Sequence[Pair], column: str, reading: Reading) -> tuple[list[float], list[float]]:
    both: list[tuple[Group | None, float, float]] = []
    for row_a, row_b in pairs:
        a, b = value_of(row_a, column, reading), value_of(row_b, column, reading)
        if a is not None and b is not None:
            both.append((group_of(row_b), a, b))
    return means_of_groups((group, a) for group, a, _ in both), means_of_groups((group, b) for group, _, b in both)


def _entry(a: Sequence[float], b: Sequence[float], seed: int) -> dict[str, Any] | None:
    if not a:
        return None
    return {"n": len(a), "a": sum(a) / len(a), "b": sum(b) / len(b), **paired(a, b, seed)}


def _over_datasets(
    groups: Mapping[str, Sequence[Pair]], column: str, reading: Reading, seed: int
) -> dict[str, Any] | None:
    values = {name: _values(group, column, reading) for name, group in groups.items()}
    if not all(first for first, _ in values.values()):
        return None  # a mean over fewer data sets than there are is another figure
    a = {name: first for name, (first, _) in values.items()}
    b = {name: second for name, (_, second) in values.items()}
    all_a, all_b = (list(chain.from_iterable(side.values())) for side in (a, b))
    pooled = paired(all_a, all_b, seed)
    if len(groups) == 1:
        return {"n": len(all_a), "a": sum(all_a) / len(all_a), "b": sum(all_b) / len(all_b), **pooled}
    means = [sum(sum(values) / len(values) for values in side.values()) / len(side) for side in (a, b)]
    entry = {"n": len(all_a), "a": means[0], "b": means[1], **paired_mean(a, b, seed)}
    if "p_mcnemar" in pooled:
        entry["p_mcnemar"] = pooled["p_mcnemar"]
    return entry
