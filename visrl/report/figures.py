"""The report's figures as inline SVG that follows the page's theme. Knows scores and logs, no files and no page.

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

from visrl.report.run import CONTROLS, MEASURES, Curve, Score, Scores, Stage
from visrl.report.wording import measured, percent

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

# Panel title, then its series: key of the log, label, ink, dashed.
PANELS: list[tuple[str, list[tuple[str, str, str, bool]]]] = [
    ("Held-out greedy rollouts", [("eval_rollout/iou", "mean IoU", "box", False),
                                  ("eval_rollout/accuracy", "answers", "answer", False),
                                  ("eval_rollout/parse_rate", "readable", "muted", True)]),
    ("Reward accuracy", [("rewards/accuracies/box", "box", "box", False),
                         ("rewards/accuracies/answer", "answer", "answer", False)]),
    ("Reward margin", [("rewards/margins/box", "box", "box", False),
                       ("rewards/margins/answer", "answer", "answer", False)]),
    ("Log-probability of the box text", [("logps/chosen/box", "chosen", "box", False),
                                         ("logps/rejected/box", "rejected", "box", True)]),
    ("Log-probability of the answer", [("logps/chosen/answer", "chosen", "answer", False),
                                       ("logps/rejected/answer", "rejected", "answer", True)]),
    ("Loss", [("loss", "trained on", "ink", False),
              ("eval_loss", "held out", "muted", True)]),
]  # fmt: skip
FRACTIONS = ("eval_rollout/", "rewards/accuracies/")
MOST_POINTS = 160  # of one line: more cannot be seen at this size


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure for the page: its title, its SVG, and what it shows in words."""

    title: str
    svg: str
    alt: str


def stage_figure(stages: Sequence[Stage], measure: str, ceiling: float | None) -> Drawing | None:
    """One measure over the stages of training, with 95 % intervals; `ceiling` is the SFT true-box control's score."""
    shown = [stage for stage in stages if measure in stage.scores]
    if not shown:
        return None
    with matplotlib.rc_context(RC):
        figure, axes = _canvas(360, 280)
        means = [stage.scores[measure].mean for stage in shown]
        axes.plot(range(len(shown)), means, color=INKS["hair"], linewidth=2, zorder=1)
        for x, stage in enumerate(shown):
            score, ink = stage.scores[measure], INKS["first" if stage.name == "sft" else "last"]
            axes.vlines(x, score.low, score.high, color=ink, linewidth=2.5, zorder=2)
            axes.plot(x, score.mean, "o", color=ink, markersize=9, markeredgecolor=INKS["paper"], zorder=3)
            axes.annotate(measured(score.mean, measure), (x, score.high), xytext=(0, 6), textcoords="offset points",
                          ha="center", fontweight="bold")  # fmt: skip
        axes.set_xticks(range(len(shown)), [stage.short for stage in shown])
        axes.set_xlim(-0.5, len(shown) - 0.5)
        floor, top = (
            min(stage.scores[measure].low for stage in shown),
            max(stage.scores[measure].high for stage in shown),
        )
        if ceiling is not None:
            top = max(top, ceiling)
            _reference(axes, ceiling, "truth", f"SFT, shown the true box: {percent(ceiling)}")
        if shown[0].name == "sft" and len(shown) > 1:
            _reference(axes, means[0], "first", "")
        spread = max(top - floor, 0.05)
        axes.set_ylim(max(0.0, floor - 0.12 * spread), min(1.04, top + 0.16 * spread))
        if measure == "box_iou":
            axes.yaxis.set_major_locator(MaxNLocator(5))
        else:
            _percent_axis(axes.yaxis)
        axes.grid(axis="y")
        alt = f"{MEASURES[measure]}: " + "; ".join(
            f"{stage.title} {_spelt(stage.scores[measure], measure)}" for stage in shown
        )
        return _drawing(figure, MEASURES[measure], alt)


def control_figure(controls: dict[str, dict[str, Scores]], measure: str) -> Drawing | None:
    """One measure under each control, worst bound at the top, for the first and the last checkpoint."""
    names = [name for name in CONTROLS if any(measure in scores.get(name, {}) for scores in controls.values())]
    if not names:
        return None
    with matplotlib.rc_context(RC):
        figure, axes = _canvas(460, 60 + 44 * len(names))
        words = []
        for which, shift, label in (("first", -0.14, "SFT"), ("last", 0.14, "last checkpoint")):
            rows = [(y, controls[which][name][measure]) for y, name in enumerate(names)
                    if measure in controls.get(which, {}).get(name, {})]  # fmt: skip
            if not rows:
                continue
            ys, scores = [y + shift for y, _ in rows], [score for _, score in rows]
            axes.hlines(ys, [s.low for s in scores], [s.high for s in scores], color=INKS[which], linewidth=2.5)
            axes.plot([s.mean for s in scores], ys, "o", color=INKS[which], markersize=8, label=label,
                      markeredgecolor=INKS["paper"])  # fmt: skip
            words += [f"{label}, {CONTROLS[names[y]].lower()} {measured(score.mean, measure)}" for y, score in rows]
        axes.set_yticks(range(len(names)), [CONTROLS[name] for name in names])
        _finish_rows(axes, len(names), measure)
        return _drawing(figure, MEASURES[measure], f"{MEASURES[measure]} under each control: " + "; ".join(words))


def kind_figure(first: Stage, last: Stage, measure: str) -> Drawing | None:
    """One measure by kind of question: from the first checkpoint to the last."""
    kinds = [kind for kind in first.by_kind if measure in first.by_kind[kind] and kind in last.by_kind]
    if not kinds:
        return None
    kinds.sort(key=lambda kind: -float(first.by_kind[kind][measure]))
    with matplotlib.rc_context(RC):
        figure, axes = _canvas(460, 60 + 38 * len(kinds))
        before = [float(first.by_kind[kind][measure]) for kind in kinds]
        after = [float(last.by_kind[kind][measure]) for kind in kinds]
        ys = range(len(kinds))
        axes.hlines(ys, before, after, color=INKS["hair"], linewidth=5, zorder=1)
        for values, ink, stage in ((before, "first", first), (after, "last", last)):
            axes.plot(values, ys, "o", color=INKS[ink], markersize=9, label=stage.title, markeredgecolor=INKS["paper"])
        axes.set_yticks(ys, kinds)
        _finish_rows(axes, len(kinds), measure)
        words = [f"{kind} from {measured(a, measure)} to {measured(b, measure)}"
                 for kind, a, b in zip(kinds, before, after, strict=True)]  # fmt: skip
        return _drawing(figure, MEASURES[measure], f"{MEASURES[measure]} by kind: " + "; ".join(words))


def curve_figures(curves: Sequence[Curve]) -> list[Drawing]:
    """The training logs on one axis of steps, a band for each stage; panels without data are left out."""
    with matplotlib.rc_context(RC):
        return [drawing for title, series in PANELS if (drawing := _panel(curves, title, series))]


def is_drawn(value: Any) -> bool:
    """Whether a value of a training log is a number that a curve can go through."""
    return isinstance(value, (int, float)) and abs(value) < 1e300  # not NaN either


# --- Pieces ---------------------------------------------------------------------------------------------------------


def _panel(curves: Sequence[Curve], title: str, series: list[tuple[str, str, str, bool]]) -> Drawing | None:
    series = [entry for entry in series if any(entry[0] in row for curve in curves for row in curve.rows)]
    if not series:
        return None
    figure, axes = _canvas(350, 260)
    words: dict[str, list[float]] = {}
    start = 0.0
    for number, curve in enumerate(curves):
        end = start + max(row["step"] for row in curve.rows)
        if number % 2 == 0:
            axes.axvspan(start, end, color=INKS["band"], linewidth=0)
        label = curve.title.replace(", ", "\n") if len(curves) <= 4 else re.sub(r"\D+", " ", curve.title).strip()
        axes.text((start + end) / 2, 1.02, label, transform=axes.get_xaxis_transform(), ha="center", va="bottom",
                  fontsize=10, color=INKS["muted"])  # fmt: skip
        for key, name, ink, dashed in series:
            points = [(start + row["step"], float(row[key])) for row in curve.rows if is_drawn(row.get(key))]
            if points:
                _line(axes, np.array(points), ink, dashed, None if name in words else name)
                words.setdefault(name, []).extend((points[0][1], points[-1][1]))
        start = end
    axes.set_xlim(0, start)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("training step")
    if all(key.startswith(FRACTIONS) for key, *_ in series):
        _percent_axis(axes.yaxis)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y")
    if len(series) > 1:
        _legend(axes, len(series), below=0.2)
    spoken = "; ".join(
        f"{name} starts at {values[0]:.2f} and ends at {values[-1]:.2f}" for name, values in words.items()
    )
    return _drawing(figure, title, f"{title} over the training steps: {spoken}")


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


def _canvas(width: int, height: int) -> tuple[Figure, Axes]:
    """A figure of this size in CSS pixels (72 units an inch make a unit a pixel)."""
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    axes.set_axisbelow(True)
    return figure, axes


def _reference(axes: Axes, value: float, ink: str, label: str) -> None:
    axes.axhline(value, color=INKS[ink], linewidth=1.4, linestyle=(0, (5, 4)), zorder=1)
    if label:
        axes.annotate(label, (0, value), xycoords=("axes fraction", "data"), xytext=(4, -5),
                      textcoords="offset points", ha="left", va="top", color=INKS[ink])  # fmt: skip


def _finish_rows(axes: Axes, rows: int, measure: str) -> None:
    """The axes of a figure whose rows are names and whose x is `measure`, from 0 to 1."""
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.tick_params(axis="y", labelcolor=INKS["ink"])
    axes.spines["bottom"].set_visible(False)
    if measure != "box_iou":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value, 0)))
    axes.grid(axis="x")
    _legend(axes, 2, below=0.42 / rows + 0.02)


def _legend(axes: Axes, columns: int, below: float) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -below), ncols=columns, handlelength=1.5, columnspacing=1.1,
                borderaxespad=0, labelcolor=INKS["ink"])  # fmt: skip


def _percent_axis(axis: Any) -> None:
    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: percent(value, 0)))


def _spelt(score: Score, measure: str) -> str:
    low, high = measured(score.low, measure), measured(score.high, measure)
    return f"{measured(score.mean, measure)} (95 % interval {low} to {high})"


def _drawing(figure: Figure, title: str, alt: str) -> Drawing:
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
    return Drawing(title, f'<svg {view} role="img" aria-label="{html.escape(alt)}">{body.strip()}', alt)
