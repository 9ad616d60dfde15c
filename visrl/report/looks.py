"""How often a model looked, and how often it was right then: of evaluations in which it says so itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from visrl.report.measures import Score
from visrl.report.shapes import JsonObject
from visrl.statistics import interval


@dataclass(frozen=True, slots=True)
class LooksLine:
    """The questions that were answered after as many looks: how many, their share, and how many of them right."""

    looks: int
    n: int
    share: float
    right: Score


def looks_lines(rows: Iterable[JsonObject]) -> list[LooksLine]:
    """A line for every number of looks that occurs; none where a model did not say how often it looks."""
    right: dict[int, list[float]] = {}
    for row in rows:
        if "looks" in row:
            right.setdefault(len(row["looks"]), []).append(float(bool(row["correct"])))
    total = sum(map(len, right.values()))
    return [
        LooksLine(count, len(own), len(own) / total, Score(**interval(own))) for count, own in sorted(right.items())
    ]


def counted_ends(rows: Iterable[JsonObject]) -> dict[str, int]:
    """How many episodes ended in which way, the commonest first."""
    return dict(Counter(str(row["end"]) for row in rows if "looks" in row and row.get("end")).most_common())
