"""The leaderboard: one self-contained page with our results among the published ones. Takes summaries, runs nothing.

Published figures keep a colour of their own, and the page says who judged what: scores of two judges are no ranking.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visrl.evaluate.published import JUDGE_NOTE, REFCOCO_SCORES, VISCOT_QUESTIONS, VISCOT_SCORES, missing_datasets
from visrl.pages.html import render_page
from visrl.records import write_text


@dataclass(frozen=True, slots=True)
class LeaderboardEntry:
    """Results of one checkpoint: its name, `results.summarise` of its rows, and who judged them."""

    name: str
    summary: dict[str, Any]
    judge: str


@dataclass(frozen=True, slots=True)
class LeaderboardLine:
    """One line of the page; `low` and `high` are None where the source gives no interval."""

    name: str
    method: str
    score: float
    low: float | None
    high: float | None
    judge: str
    published: bool
    note: str


def leaderboard_lines(entries: Sequence[LeaderboardEntry]) -> list[LeaderboardLine]:
    """Published scores and ours, best first. Ours is the judge's score as published (failures counted 0).

    An entry without a judge's score, or without all 11 data sets, is not ranked as if it had: see `unranked`.
    """
    lines = [
        LeaderboardLine(row.base, row.method, row.score, None, None, row.judge, True, row.source)
        for row in VISCOT_SCORES
    ]
    for entry in entries:
        if unranked(entry) is None:
            score = entry.summary["columns"]["judge_published"]["counted"]
            left_out = entry.summary["columns"]["judge"]["left_out"]
            note = f"failures left out, our reading: {left_out['mean']:.3f}" if left_out else "no reply could be read"
            lines.append(
                LeaderboardLine(
                    entry.name, "yours", score["mean"], score["low"], score["high"], entry.judge, False, note
                )
            )
    return sorted(lines, key=lambda line: -line.score)


def unranked(entry: LeaderboardEntry) -> str | None:
    """Why an entry cannot stand among the published averages, or None where it can."""
    if not entry.summary["columns"].get("judge_published", {}).get("counted"):
        return "no judge has scored it"
    missing = missing_datasets(entry.summary["datasets"])
    if missing:
        return f"{len(missing)} of the 11 data sets are missing: {', '.join(missing)}"
    short = [
        f"{name} has {entry.summary['datasets'][name]['n']} of {count}"
        for name, count in VISCOT_QUESTIONS.items()
        if entry.summary["datasets"][name]["n"] != count
    ]
    return f"not the whole benchmark: {'; '.join(short)}" if short else None


def write_leaderboard(path: str | os.PathLike[str], entries: Sequence[LeaderboardEntry]) -> None:
    """Write the page at `path`: no script, no external address."""
    page = render_page(
        Path(__file__).with_name("leaderboard.html"),
        lines=leaderboard_lines(entries),
        unranked=[(entry, reason) for entry in entries if (reason := unranked(entry))],
        judge_note=JUDGE_NOTE,
        source=VISCOT_SCORES[0].source,
        refcoco=REFCOCO_SCORES,
    )
    write_text(path, page)
