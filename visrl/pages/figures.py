"""Figures as inline SVG that follow a page's theme, and the curves of training logs. Knows no files and no page.

Matplotlib lays a figure out with stand-in colours, which then become the page's CSS variables, so that one figure
serves light and dark. A figure's units are CSS pixels; each is narrow enough for a phone, and a page sets them abreast.
"""

from __future__ import annotations

import hashlib
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from visrl.pages.panels import Panel, Series, panels_of
from visrl.pages.wording import percent

# Stand-ins: colours that nothing else uses, each replaced by the page's variable of that name.
INKS = {name: f"#0a0b{number:02x}" for number, name in enumerate(
    ("ink", "muted", "hair", "band", "paper", "first", "last", "truth", "box", "answer"), start=16)}  # fmt: skip

RC: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it takes the page's font, and can be read aloud and searched
    "svg.hashsalt": "visrl",  # the same run gives the same file
    "font.size": 12.5,
    "axes.edgecolor": INKS["hair"],
    "axes.labelcolor": INKS["muted"],
    "text.color": INKS["ink"],
    "xtick.color": INKS["muted"],
    "ytick.color": INKS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": INKS["hair"],
    "grid.linewidth": 0.8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 12,
    "lines.solid_capstyle": "round",
}

MOST_POINTS = 160  # of one line: more cannot be seen at this size


@dataclass(frozen=True, slots=True)
class Curve:
    """The training log of one stage, one row a step."""

    title: str
    rows: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class SvgFigure:
    """A figure for the page: its title, its SVG, and what it shows in words."""

    title: str
    svg: str
    alt: str


def curve_figures(curves: Sequence[Curve]) -> list[SvgFigure]:
    """The training logs on one axis of steps, a band for each stage; panels without data are left out."""
    panels = panels_of(row for curve in curves for row in curve.rows)
    with matplotlib.rc_context(RC):
        return [found for panel in panels if (found := _panel(curves, panel))]


def is_drawn(value: Any) -> bool:
    """Whether a value of a training log is a number that a curve can go through."""
    return isinstance(value, (int, float)) and abs(value) < 1e300  # not NaN either


# --- What every figure is made with ----------------------------------------------------------------------------------


def _panel(curves: Sequence[Curve], panel: Panel) -> SvgFigure | None:
    rows = [row for curve in curves for row in curve.rows]
    series = [entry for entry in panel.series if any(entry.key in row for row in rows)]
    if not series or (panel.or_nothing and not any(row.get(entry.key) for row in rows for entry in series)):
        return None
    figure, axes = canvas(350, 260)
    words: dict[str, list[float]] = {}
    start = 0.0
    for number, curve in enumerate(curves):
        end = start + max(row["step"] for row in curve.rows)
        if number % 2 == 0:
            axes.axvspan(start, end, color=INKS["band"], linewidth=0)
        label = curve.title.replace(", ", "\n") if len(curves) <= 4 else re.sub(r"\D+", " ", curve.title).strip()
        if len(curves) > 1:
            axes.text((start + end) / 2, 1.02, label, transform=axes.get_xaxis_transform(), ha="center", va="bottom",
                      fontsize=10, color=INKS["muted"])  # fmt: skip
        for entry in series:
            points = [
                (start + row["step"], float(row[entry.key])) for row in curve.rows if is_drawn(row.get(entry.key))
            ]
            if points:
                _interval(axes, curve.rows, entry, start)
                _line(axes, np.array(points), entry.ink, entry.dashed, None if entry.label in words else entry.label)
                words.setdefault(entry.label, []).extend((points[0][1], points[-1][1]))
        start = end
    axes.set_xlim(0, start)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("training step")
    if panel.unit == "percent":
        percent_axis(axes.yaxis)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_ylabel(panel.unit)
    axes.grid(axis="y")
    if len(series) > 1:
        legend(axes, len(series) if len(series) < 4 else 2, below=0.2)
    unit = "" if panel.unit in ("", "percent") else f", in {panel.unit}"
    spoken = "; ".join(
        f"{name} starts at {values[0]:.2f} and ends at {values[-1]:.2f}" for name, values in words.items()
    )
    return svg_figure(figure, panel.title, f"{panel.title} over the training steps{unit}: {spoken}")


def _interval(axes: Axes, rows: Sequence[dict[str, Any]], entry: Series, start: float) -> None:
    """The interval of a series as a band, where the log has one."""
    ends = [f"{entry.key}_low", f"{entry.key}_high"]
    known = [(start + row["step"], *(row[end] for end in ends)) for row in rows
             if all(is_drawn(row.get(end)) for end in ends)]  # fmt: skip
    if len(known) > 1:
        steps, low, high = _thinned(np.array(known, dtype=float)).T
        axes.fill_between(steps, low, high, color=INKS[entry.ink], alpha=0.14, linewidth=0)


def _line(axes: Axes, points: np.ndarray[Any, Any], ink: str, dashed: bool, label: str | None) -> None:
    """A noisy series as a faint line under its running mean; a sparse one as dots on a line."""
    style = (0, (4, 2.5)) if dashed else "-"
    if len(points) < 25:
        axes.plot(points[:, 0], points[:, 1], color=INKS[ink], linewidth=2, linestyle=style, label=label, marker="o",
                  markersize=4)  # fmt: skip
        return
    faint = _thinned(points)
    axes.plot(faint[:, 0], faint[:, 1], color=INKS[ink], linewidth=0.8, alpha=0.35)
    width = max(3, len(points) // 12)
    kernel = np.ones(width)
    weight = np.convolve(np.ones(len(points)), kernel, mode="same")
    mean = np.column_stack([points[:, 0], np.convolve(points[:, 1], kernel, mode="same") / weight])
    mean = _thinned(mean)
    axes.plot(mean[:, 0], mean[:, 1], color=INKS[ink], linewidth=2, linestyle=style, label=label)


def _thinned(points: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return points[np.linspace(0, len(points) - 1, min(len(points), MOST_POINTS)).round().astype(int)]


def canvas(width: int, height: int) -> tuple[Figure, Axes]:
    """A figure of this size in CSS pixels (72 units an inch make a unit a pixel)."""
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    axes.set_axisbelow(True)
    return figure, axes


def legend(axes: Axes, columns: int, below: float) -> None:
    """A legend in so many columns under the axes, `below` as a fraction of their height."""
    axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -below), ncols=columns, handlelength=1.5, columnspacing=1.1,
                borderaxespad=0, labelcolor=INKS["ink"])  # fmt: skip


def percent_axis(axis: Any) -> None:
    """Round ticks on an axis of fractions, labelled as percentages."""
    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))

    def label(value: float, _: object) -> str:
        low, high = axis.get_view_interval()
        return percent(value, 0 if high - low > 0.05 else 1)

    axis.set_major_formatter(FuncFormatter(label))


def svg_figure(figure: Figure, title: str, alt: str) -> SvgFigure:
    """The figure as an SVG element: the page's colours, ids that cannot clash, no address of any kind."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    head, _, body = buffer.getvalue().partition("<svg ")[2].partition(">")
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL).replace("xlink:href", "href")
    prefix = hashlib.blake2b(body.encode(), digest_size=4).hexdigest()
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', body))
    body = re.sub(r'\sid="([^"]+)"', lambda found: f' id="f{prefix}-{found[1]}"' if found[1] in used else "", body)
    body = re.sub(r'(href="|url\()#', rf"\1#f{prefix}-", body)
    for name, stand_in in INKS.items():
        body = body.replace(stand_in, f"var(--{name})")
    view = re.findall(r'viewBox="[^"]*"', head)[0]
    return SvgFigure(title, f'<svg {view} role="img" aria-label="{html.escape(alt)}">{body.strip()}', alt)
