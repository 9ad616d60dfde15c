"""The report's own figures: stages, controls and kinds of question. Knows scores, no files and no page."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from visrl.pages.figures import INKS, RC, SvgFigure, canvas, legend, percent_axis, svg_figure
from visrl.pages.wording import measured, percent
from visrl.report.loop import CONTROLS, ONLINE, Stage
from visrl.report.measures import TITLES, Score, Scores
from visrl.rewards.results import Measure


def stage_figure(stages: Sequence[Stage], measure: Measure, ceiling: float | None) -> SvgFigure | None:
    """One measure over the stages of training, with 95 % intervals; `ceiling` is the SFT true-box control's score."""
    shown = [stage for stage in stages if measure in stage.scores]
    if not shown:
        return None
    with matplotlib.rc_context(RC):
        figure, axes = canvas(360, 280)
        means = [stage.scores[measure].mean for stage in shown if stage.name != ONLINE]
        axes.plot(range(len(means)), means, color=INKS["hair"], linewidth=2, zorder=1)
        for x, stage in enumerate(shown):
            score, ink = stage.scores[measure], INKS[{"sft": "first", ONLINE: "answer"}.get(stage.name, "last")]
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
            percent_axis(axes.yaxis)
        axes.grid(axis="y")
        alt = f"{TITLES[measure]}: " + "; ".join(
            f"{stage.title} {_spelt(stage.scores[measure], measure)}" for stage in shown
        )
        return svg_figure(figure, TITLES[measure], alt)


def control_figure(controls: dict[str, dict[str, Scores]], measure: Measure) -> SvgFigure | None:
    """One measure under each control, worst bound at the top, for the first and the last checkpoint."""
    names = [name for name in CONTROLS if any(measure in scores.get(name, {}) for scores in controls.values())]
    if not names:
        return None
    with matplotlib.rc_context(RC):
        figure, axes = canvas(460, 60 + 44 * len(names))
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
        return svg_figure(figure, TITLES[measure], f"{TITLES[measure]} under each control: " + "; ".join(words))


def kind_figure(first: Stage, last: Stage, measure: Measure) -> SvgFigure | None:
    """One measure by kind of question: from the first checkpoint to the last."""
    kinds = [kind for kind in first.by_kind if measure in first.by_kind[kind] and kind in last.by_kind]
    if not kinds:
        return None
    kinds.sort(key=lambda kind: -float(first.by_kind[kind][measure]))
    with matplotlib.rc_context(RC):
        figure, axes = canvas(460, 60 + 38 * len(kinds))
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
        return svg_figure(figure, TITLES[measure], f"{TITLES[measure]} by kind: " + "; ".join(words))


def _reference(axes: Axes, value: float, ink: str, label: str) -> None:
    axes.axhline(value, color=INKS[ink], linewidth=1.4, linestyle=(0, (5, 4)), zorder=1)
    if label:
        axes.annotate(label, (0, value), xycoords=("axes fraction", "data"), xytext=(4, -5),
                      textcoords="offset points", ha="left", va="top", color=INKS[ink])  # fmt: skip


def _finish_rows(axes: Axes, rows: int, measure: Measure) -> None:
    """The axes of a figure whose rows are names and whose x is `measure`, from 0 to 1."""
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.tick_params(axis="y", labelcolor=INKS["ink"])
    axes.spines["bottom"].set_visible(False)
    if measure != "box_iou":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value, 0)))
    axes.grid(axis="x")
    legend(axes, 2, below=0.42 / rows + 0.02)


def _spelt(score: Score, measure: Measure) -> str:
    low, high = measured(score.low, measure), measured(score.high, measure)
    return f"{measured(score.mean, measure)} (95 % interval {low} to {high})"
