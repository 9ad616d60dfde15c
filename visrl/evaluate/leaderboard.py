"""The leaderboard: one self-contained page with our results among the published ones. Takes summaries, runs nothing.

Published figures keep a colour of their own, and the page says who judged what: scores of two judges are no ranking.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, StrictUndefined

from visrl.evaluate.published import JUDGE_NOTE, REFCOCO_SCORES, VISCOT_QUESTIONS, VISCOT_SCORES
from visrl.records import write_text


@dataclass(frozen=True, slots=True)
class Entry:
    """Results of one checkpoint: its name, `results.summarise` of its rows, and who judged them."""

    name: str
    summary: dict[str, Any]
    judge: str


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the page; `low` and `high` are None where the source gives no interval."""

    name: str
    method: str
    score: float
    low: float | None
    high: float | None
    judge: str
    published: bool
    note: str


def leaderboard_lines(entries: Sequence[Entry]) -> list[Line]:
    """Published scores and ours, best first. Ours is the judge's score as published (failures counted 0).

    An entry without a judge's score, or without all 11 data sets, is not ranked as if it had: see `unranked`.
    """
    lines = [Line(row.base, row.method, row.score, None, None, row.judge, True, row.source) for row in VISCOT_SCORES]
    for entry in entries:
        if unranked(entry) is None:
            score = entry.summary["columns"]["judge_published"]["counted"]
            left_out = entry.summary["columns"]["judge"]["left_out"]
            note = f"failures left out, our reading: {left_out['mean']:.3f}" if left_out else "no reply could be read"
            lines.append(
                Line(entry.name, "yours", score["mean"], score["low"], score["high"], entry.judge, False, note)
            )
    return sorted(lines, key=lambda line: -line.score)


def unranked(entry: Entry) -> str | None:
    """Why an entry cannot stand among the published averages, or None where it can."""
    if not entry.summary["columns"].get("judge_published", {}).get("counted"):
        return "no judge has scored it"
    missing = [name for name in VISCOT_QUESTIONS if name not in entry.summary["datasets"]]
    if missing:
        return f"{len(missing)} of the 11 data sets are missing: {', '.join(missing)}"
    short = [
        f"{name} has {entry.summary['datasets'][name]['n']} of {count}"
        for name, count in VISCOT_QUESTIONS.items()
        if entry.summary["datasets"][name]["n"] != count
    ]
    return f"not the whole benchmark: {'; '.join(short)}" if short else None


def write_leaderboard(path: str | os.PathLike[str], entries: Sequence[Entry]) -> None:
    """Write the page at `path`: no script, no external address."""
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    page = environment.from_string(_PAGE).render(
        lines=leaderboard_lines(entries),
        unranked=[(entry, reason) for entry in entries if (reason := unranked(entry))],
        judge_note=JUDGE_NOTE,
        source=VISCOT_SCORES[0].source,
        refcoco=REFCOCO_SCORES,
    )
    write_text(path, page)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>VisRL leaderboard</title>
<style>
* { box-sizing: border-box; }
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6675; --line: #dfe3e8; --page: #fbfbfa; --ours: #0b6e5f;
  --published: #8a5a12; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #a3adba; --line: #333a44; --page: #15181c;
  --ours: #5fd0bd; --published: #e0b26b; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0 auto;
  max-width: 64rem; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2.5rem 0 .5rem; }
p { color: var(--soft); max-width: 46rem; } .wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } td.number { text-align: right; } small { color: var(--soft); }
tr.published { --dot: var(--published); } tr.ours { --dot: var(--ours); font-weight: 700; }
.name { color: var(--dot); } td.bar { width: 100%; min-width: 8rem; white-space: normal; }
.track { position: relative; height: .7rem; background: var(--line); border-radius: 2px; }
.fill { height: 100%; background: var(--dot); opacity: .55; border-radius: 2px; } tr.ours .fill { opacity: 1; }
.whisker { position: absolute; top: -.2rem; bottom: -.2rem; border: solid var(--ink); border-width: 0 2px;
  background: linear-gradient(var(--ink), var(--ink)) center / 100% 2px no-repeat; }
.key { display: inline-block; margin-right: 1.2rem; } .key.ours { color: var(--ours); font-weight: 700; }
.key.published { color: var(--published); }
@media (max-width: 44rem) { td.bar, th.bar { display: none; } td, th { white-space: normal; padding: .35rem .3rem; } }
</style></head><body>
<h1>Visual-CoT benchmark</h1>
<p>Unweighted mean over 11 data sets, 8,281 questions, as published: a failed or unread judgement counts 0. Intervals
are 95 % bootstrap intervals over questions; published figures come without.</p>
<p><span class="key ours">● yours</span><span class="key published">○ published</span></p>
<p><strong>On the judge.</strong> {{ judge_note }}</p>
<div class="wide"><table><thead><tr><th scope="col">model</th><th scope="col">method</th>
<th scope="col">score</th><th scope="col" class="bar">0 to 1, with interval</th>
<th scope="col">judge</th></tr></thead><tbody>
{% for line in lines %}<tr class="{{ 'published' if line.published else 'ours' }}">
<td class="name">{{ '○' if line.published else '●' }} {{ line.name }}</td><td><small>{{ line.method }}</small></td>
<td class="number">{{ '%.3f'|format(line.score) }}</td>
<td class="bar"><div class="track"><div class="fill" style="width:{{ '%.2f'|format(100 * line.score) }}%"></div>
{%- if line.low is not none %}<div class="whisker" style="left:{{ '%.2f'|format(100 * line.low) }}%;
right:{{ '%.2f'|format(100 - 100 * line.high) }}%"></div>{% endif %}</div>
{%- if line.low is not none %}
<small>{{ '%.3f to %.3f'|format(line.low, line.high) }}; {{ line.note }}</small>{% endif %}
</td><td><small>{{ line.judge }}</small></td></tr>
{% endfor %}</tbody></table></div>
<p><small>Published figures: {{ source }}.</small></p>
{% if unranked %}<h2>Not ranked</h2><ul>
{% for entry, reason in unranked %}<li><strong>{{ entry.name }}</strong>: {{ reason }}.</li>{% endfor %}</ul>{% endif %}
<h2>RefCOCO, published</h2>
<p>LLaVA-1.5 trained with VisRL, accuracy at IoU above 0.5.</p>
<table><thead><tr><th scope="col">split</th><th scope="col">accuracy</th></tr></thead><tbody>
{% for split, accuracy in refcoco.items() %}<tr class="published"><td class="name">○ {{ split }}</td>
<td class="number">{{ '%.2f'|format(100 * accuracy) }} %</td></tr>{% endfor %}</tbody></table>
</body></html>
"""
