"""The leaderboard: one self-contained page with our results among the published ones. Takes rows, runs nothing.

Figures are ranked within a group alone: of one benchmark, one reading, one judge and one limit on the size of images.
Each published table is a group, in a colour of its own; ours joins it where all its conditions are the same.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from visrl.evaluate.benchmarks import find_benchmark
from visrl.evaluate.published import NOT_SAID, REFCOCO_TABLE, VISCOT_TABLE, PublishedTable
from visrl.evaluate.published_zoom import PUBLISHED_TABLES
from visrl.evaluate.results import facts_of, read_results
from visrl.manifest import read_manifest
from visrl.pages.html import render_page
from visrl.records import write_text
from visrl.rewards.results import Row, by_dataset, columns_of, summarise

TABLES: tuple[PublishedTable, ...] = (*PUBLISHED_TABLES, VISCOT_TABLE, REFCOCO_TABLE)
TITLES = {
    "vstar": "V*Bench", "hrbench4k": "HR-Bench 4K", "hrbench8k": "HR-Bench 8K", "mme-realworld": "MME-RealWorld",
    "mme-realworld-lite": "MME-RealWorld-Lite", "treebench": "TreeBench", "zoombench": "ZoomBench",
    "visualprobe": "VisualProbe", "viscot": "Visual-CoT", "refcoco": "RefCOCO", "infovqa": "InfographicVQA",
    "chartqa": "ChartQA",
}  # fmt: skip
# What ranks results, by the column: the first of each line that a result holds.
_RANKING = {
    "viscot": ("judge_published",),
    "refcoco": ("hit_published",),
    "viscot-detection": ("hit_published",),
}
_CHOICE = ("correct_published", "correct")
_READINGS = {
    "judge_published": VISCOT_TABLE.reading,
    "hit_published": "IoU above 0.5 by the published rule",
    "correct": "ours: what cannot be read is wrong",
    "correct_published": "the published rule",
}


@dataclass(frozen=True, slots=True)
class LeaderboardEntry:
    """The result rows of one checkpoint and the conditions under which they came about."""

    name: str
    rows: Sequence[Row]
    judge: str = NOT_SAID
    benchmark: str = "viscot"
    reading: str = ""  # which published one, where there are several
    limit: str = NOT_SAID
    is_whole: bool = False  # of a run that says that it left no question out; of others questions are counted


@dataclass(frozen=True, slots=True)
class LeaderboardLine:
    """A line of a group, in percent; `low` and `high` are None where the source gives no interval. `place` is None
    where nothing is ranked."""

    name: str
    score: float
    low: float | None
    high: float | None
    published: bool
    parts: tuple[tuple[str, float], ...] = ()
    place: int | None = None


@dataclass(frozen=True, slots=True)
class LeaderboardGroup:
    """What may be ranked together, and what it has in common; `source` is "" where all lines are ours."""

    benchmark: str
    reading: str
    judge: str
    limit: str
    source: str = ""
    column: str = ""
    is_ranked: bool = True
    lines: list[LeaderboardLine] = field(default_factory=list)

    @property
    def has_ours(self) -> bool:
        return any(not line.published for line in self.lines)


def read_entry(
    name: str, path: str | os.PathLike[str], judge: str = NOT_SAID, benchmark: str = "viscot", limit: str = NOT_SAID
) -> LeaderboardEntry:
    """The entry of a result file, or of a folder of `visrl eval`, which says itself what it is of, how it was asked and
    how large images were shown.

    Raises:
        RecordError, ConfigError: no results there, or of no known benchmark.
    """
    rows = read_results(path)
    facts = facts_of(path)
    benchmark = str(facts.get("benchmark") or benchmark)
    find_benchmark(benchmark)
    if facts:
        pixels = ((read_manifest(path) or {}).get("config") or {}).get("image_max_pixels")
        limit = f"{pixels:,} px" if isinstance(pixels, int) else "the checkpoint's own"
        if facts.get("mode") not in (None, "own"):
            name = f"{name}, {facts['mode']}"
        if "looks" in facts:
            name = f"{name}, {_looked(facts)}"
    judge = judge if judge != NOT_SAID else str(facts.get("judge") or NOT_SAID)
    is_whole = bool(facts) and facts.get("limit", 0) is None
    return LeaderboardEntry(name, rows, judge, benchmark, str(facts.get("reading") or ""), limit, is_whole)


def _looked(facts: Mapping[str, Any]) -> str:
    """How often was looked, in the words of a line's name."""
    if facts.get("max_looks") is not None:
        return f"up to {facts['max_looks']} looks"
    return " with ".join([str(facts["protocol"]), *facts.get("protocol_faults", ())])


def leaderboard_groups(entries: Sequence[LeaderboardEntry]) -> list[LeaderboardGroup]:
    """Published tables and ours, what may be ranked together in one group, best first in each.

    Groups of one benchmark stand together, first those benchmarks that ours are of, and in each ours before others'. An
    entry that is not of the whole benchmark is in none: see `unranked`.
    """
    groups = [_published_group(table) for table in TABLES]
    for entry in entries:
        if unranked(entry) is None:
            for group, line in _own_lines(entry):
                same = next((one for one in groups if _may_join(one, group)), None)
                if same is None:
                    groups.append(same := group)
                same.lines.append(line)
    mine = {group.benchmark for group in groups if group.has_ours}
    order = [*TITLES, *sorted({group.benchmark for group in groups} - set(TITLES))]
    groups.sort(key=lambda group: (group.benchmark not in mine, order.index(group.benchmark), not group.has_ours))
    return [_in_order(group) for group in groups]


def unranked(entry: LeaderboardEntry) -> str | None:
    """Why an entry stands in no group, or None where it does."""
    if not set(columns_of(entry.rows)) & set(_ranking(entry.benchmark)):
        names = " or ".join(f"`{name}`" for name in _ranking(entry.benchmark))
        return "no judge has scored it" if entry.benchmark == "viscot" else f"it has no column {names}"
    known = find_benchmark(entry.benchmark)
    asked = by_dataset(entry.rows)
    missing = [name for name in known.datasets if name not in asked]
    if missing:
        return f"{len(missing)} of the {len(known.datasets)} data sets are missing: {', '.join(missing)}"
    wholes = {name: whole for name, whole in known.datasets.items() if whole is not None}
    groups = {name: asked[name] for name in wholes}
    if known.whole is not None:
        wholes, groups = {"it": known.whole}, {"it": list(entry.rows)}
    short = [
        f"{name} has {min(counts):,} of {wholes[name]:,}"
        for name, rows in groups.items()
        if wholes[name] not in (counts := _counts(rows))
    ]
    return f"not the whole benchmark: {'; '.join(short)}" if short and not entry.is_whole else None


def write_leaderboard(path: str | os.PathLike[str], entries: Sequence[LeaderboardEntry]) -> None:
    """Write the page at `path`: no script, no external address."""
    groups = leaderboard_groups(entries)
    sections = {group.benchmark: [one for one in groups if one.benchmark == group.benchmark] for group in groups}
    page = render_page(
        Path(__file__).with_name("leaderboard.html"),
        sections=[(name, TITLES.get(name, name), own) for name, own in sections.items()],
        unranked=[
            (entry, TITLES.get(entry.benchmark, entry.benchmark), reason)
            for entry in entries
            if (reason := unranked(entry))
        ],
    )
    write_text(path, page)


# --- Groups -----------------------------------------------------------------------------------------------------------


def _published_group(table: PublishedTable) -> LeaderboardGroup:
    first, *others = table.columns
    lines = [
        LeaderboardLine(
            name, figures[0], None, None, True,
            tuple((part, figure) for part, figure in zip(others, figures[1:], strict=False) if figure is not None),
        )
        for name, figures in table.scores.items()
        if figures[0] is not None
    ]  # fmt: skip
    return LeaderboardGroup(
        table.benchmark, table.reading, table.judge, table.limit, table.source, first, table.is_ranked, lines
    )


def _may_join(group: LeaderboardGroup, own: LeaderboardGroup) -> bool:
    """Whether our line may stand in a group: where all conditions are the same, and of a published one that is ranked,
    where its judge is told."""
    same = [(one.benchmark, one.reading, one.judge, one.limit) for one in (group, own)]
    return same[0] == same[1] and (not group.source or (group.is_ranked and group.judge != NOT_SAID))


def _own_lines(entry: LeaderboardEntry) -> list[tuple[LeaderboardGroup, LeaderboardLine]]:
    """A line for each reading that the rows hold, with an empty group of its conditions."""
    summary = summarise(entry.rows)
    figures = find_benchmark(entry.benchmark).figures
    whole = figures(summary, entry.rows) if figures else summary
    found = []
    for column in _ranking(entry.benchmark):
        figure = _figure(whole, column)
        if figure is None:
            continue
        whose = entry.reading if column == "correct_published" and entry.reading != "published" else ""
        reading = _READINGS[column] + (f", as {whose} has it" if whose else "")
        parts = [
            (name, 100 * own["columns"][column]["counted"]["mean"])
            for name, own in summary["datasets"].items()
            if column in own["columns"] and own["columns"][column]["counted"]
        ]
        score, low, high = (100 * figure[key] for key in ("mean", "low", "high"))
        line = LeaderboardLine(entry.name, score, low, high, False, tuple(parts) if len(parts) > 1 else ())
        judge = entry.judge if "judge" in column else "none"
        found.append((LeaderboardGroup(entry.benchmark, reading, judge, entry.limit), line))
    return found


def _in_order(group: LeaderboardGroup) -> LeaderboardGroup:
    group.lines.sort(key=lambda line: -line.score)
    if group.is_ranked and len(group.lines) > 1:
        scores = [line.score for line in group.lines]
        group.lines[:] = [replace(line, place=1 + scores.index(line.score)) for line in group.lines]
    return group


def _ranking(benchmark: str) -> tuple[str, ...]:
    return _RANKING.get(benchmark, _CHOICE)


def _figure(summary: Mapping[str, Any], column: str) -> Mapping[str, float] | None:
    """A column over all questions where the summary has that, else its mean over data sets; failures counted 0."""
    entry = summary.get("overall", {}).get(column) or summary["columns"].get(column)
    return entry["counted"] if entry else None


def _counts(rows: Sequence[Row]) -> set[int]:
    """How many questions rows are of: by their ids, and where a file has them in several orders, by its rows."""
    return {len({str(row["id"]) for row in rows}), sum(not row.get("attempt") for row in rows)}
