"""What the rows of a benchmark with readings add up to beside the means of its parts: the mean over all its questions,
by category, by chance, and how many replies named no option. Numbers only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from visrl.rewards.results import READINGS, Row, columns_of, group_of, key_of, means_of_groups, values_of
from visrl.statistics import interval


def choice_figures(summary: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """The summary with `overall` (each column over all questions, under both readings of failures), `categories` (the
    mean of the column that says what is right), `unreadable` (replies that name no option, which count as wrong) and
    `chance` (what a reply drawn by lot would get)."""
    columns = columns_of(rows)
    found: dict[str, Any] = {"overall": {column: _both(rows, column) for column in columns}}
    right = next((column for column in ("correct", "correct_published") if column in columns), None)
    categories: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("category"):
            categories.setdefault(str(row["category"]), []).append(row)
    if right and len(categories) > 1:
        found["categories"] = {name: _both(own, right)["counted"] for name, own in sorted(categories.items())}
    if any("choice" in row for row in rows):
        found["unreadable"] = sum("choice" in row and row["choice"] is None for row in rows)
    if chance := chance_of(rows):
        found["chance"] = chance
    return {**summary, **found}


def chance_of(rows: Sequence[Row]) -> float | None:
    """The share of questions that a letter drawn by lot gets right; None where not all are questions of choice."""
    shares = [(group_of(row) or key_of(row), 1 / len(row["options"])) for row in rows if row.get("options")]
    means = means_of_groups(shares)  # type: ignore[arg-type]
    return sum(means) / len(means) if len(shares) == len(rows) and means else None


def _both(rows: Sequence[Row], column: str) -> dict[str, Mapping[str, float] | None]:
    values = {reading: values_of(rows, column, reading) for reading in READINGS}
    return {name: {"n": len(own), **interval(own)} if own else None for name, own in values.items()}
