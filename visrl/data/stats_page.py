"""The statistics of a data set as one HTML page with a histogram of every measure. Knows no data set."""

from __future__ import annotations

import html
import io
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from visrl.data.stats import Statistics, as_table
from visrl.pages.html import render_page

_LOG_RATIO = 20  # where the largest value is so many medians, bins are spaced by ratio


def write_stats_page(found: Statistics, title: str, path: str | Path) -> None:
    """Write the page; it needs nothing but itself."""
    figures = [_histogram(name, [float(value) for value in values]) for name, values in found.measures().items()]
    page = render_page(Path(__file__).with_name("stats.html"), title=title, table=as_table(found), figures=figures)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(page, encoding="utf-8")


def _histogram(name: str, values: list[float]) -> str:
    """An SVG of how many samples or images have which value."""
    low, high, middle = min(values), max(values), sorted(values)[len(values) // 2]
    by_ratio = low > 0 and high > _LOG_RATIO * middle
    count = min(40, max(1, len(set(values))))
    if by_ratio:
        bins = [low * (high / low) ** (step / count) for step in range(count + 1)]
    else:
        bins = [low + (high - low) * step / count for step in range(count + 1)]
    if all(value.is_integer() for value in values) and high - low < 40:
        bins = [low - 0.5 + step for step in range(int(high - low) + 2)]  # a bar on every whole number
    elif low == high:
        bins = [low - 0.5, high + 0.5]
    with matplotlib.rc_context({"svg.hashsalt": "visrl", "font.size": 11}):
        figure = Figure(figsize=(4.2, 2.6), layout="constrained")
        axes = figure.add_subplot()
        axes.hist(values, bins=bins, color="#4a6fa5")
        axes.set_xscale("log" if by_ratio else "linear")
        axes.set_title(name, loc="left", fontsize=12)
        axes.spines[["top", "right"]].set_visible(False)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = stream.getvalue()
    return svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{html.escape(name)}"', 1)
