"""The report of a run: one HTML file that holds its own styles, figures and images and asks nothing of the network.

`page.html` is the page, `page.css` its look; the numbers come from `run`, the words from `story`.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import typer

from visrl.manifest import hold
from visrl.pages import draw
from visrl.pages.figures import SvgFigure, curve_figures
from visrl.pages.html import render_page
from visrl.records import write_text
from visrl.report.figures import control_figure, kind_figure, stage_figure
from visrl.report.gallery import AnswerSet, comparable, count_outcomes, draw_lot, exhibits, images_of, shared_ids
from visrl.report.looks import LooksLine, counted_ends, looks_lines
from visrl.report.loop import CONTROLS, Pairs
from visrl.report.measures import TITLES
from visrl.report.online import SHOWN, OnlineRun, measure_table, online_lede, paired_rows, time_shares
from visrl.report.online_rules import failures
from visrl.report.rules import critic_words, rule_lines
from visrl.report.run import Run, load_run
from visrl.report.several_looks import LOOKS, ONLINE, looks_by_kind
from visrl.report.shapes import JsonObject
from visrl.report.story import beside_the_loop, caveats, change, gap_closed, headlines, intention, lede
from visrl.rewards.crop_effects import BASELINES, gain_and_harm
from visrl.rewards.results import KIND_MEASURES
from visrl.train.rollout_cards import COLOURS, rollout_cards

NAME = "report.html"


def write_report(run: Path) -> Path:
    """Write the report of the run folder `run`, finished or not, to `report.html` in it; returns its path.

    Raises:
        ReportError: `run` is no folder of a run, or a file in it cannot be read.
    """
    return save(run, render(load_run(Path(run))))


def save(run: Path, page: str) -> Path:
    """Put `page` into the run folder at once: a reader sees the old page or the new one."""
    return write_text(Path(run) / NAME, page)


def render(run: Run) -> str:
    """The page of a run."""
    return render_page(
        Path(__file__).with_name("page.html"),
        run=run,
        lede=lede(run),
        beside=beside_the_loop(run),
        headlines=headlines(run),
        gap=gap_closed(run),
        stage_figures=_present(stage_figure(run.checkpoints, measure, _ceiling(run, measure)) for measure in TITLES),
        iterations=[_iteration(run, pairs) for pairs in run.pairs],
        curves=curve_figures(run.curves),
        stage_rows=_stage_rows(run),
        measures=TITLES,
        columns=list(dict.fromkeys(column for evaluation in run.evaluations for column in evaluation.scores)),
        control_names=CONTROLS,
        intention=intention(run),
        grounded=_grounded(run),
        crop_effects=_crop_effects(run),
        looked=_looked(run),
        control_figures=_present(control_figure(run.controls, measure) for measure in ("answer_accuracy", "box_iou")),
        **_kinds(run),
        **_gallery(run),
        online_runs=[_online(run, one) for one in run.online_runs],
        **_several_looks(run),
        notes=caveats(run),
    )


def _present(drawings: Any) -> list[SvgFigure]:
    return [drawing for drawing in drawings if drawing]


def _ceiling(run: Run, measure: str) -> float | None:
    """The first checkpoint's score with the true box, where that says something: its boxes are right by definition."""
    truth = run.controls.get("first", {}).get("truth", {})
    return truth[measure].mean if measure == "answer_accuracy" and measure in truth else None


def _iteration(run: Run, pairs: Pairs) -> JsonObject:
    """One turn of the loop: which checkpoint made the tries, what was kept, and what training on it reached."""
    before = [stage for stage in run.stages if stage.name == "sft" or stage.iteration < pairs.iteration]
    after = [stage for stage in run.stages if stage.name != "sft" and stage.iteration == pairs.iteration]
    dropped = pairs.dropped
    if not dropped and pairs.kept is not None and pairs.kept < pairs.questions:
        dropped = {"reason not recorded": pairs.questions - pairs.kept}
    return {
        "pairs": pairs,
        "policy": before[-1] if before else None,
        "stages": after,
        "dropped": dropped,
        "critic": critic_words(run.manifests.get(f"iter{pairs.iteration}/generate", {})),
        "rules": rule_lines(run.manifests, pairs.iteration),
    }


def _stage_rows(run: Run) -> list[JsonObject]:
    """The table of checkpoints, each against the one that it started from."""
    rows = []
    for number, stage in enumerate(run.checkpoints):
        earlier = run.stages[0 if stage is run.online else number - 1] if number and run.stages else None
        changes = {
            measure: change(earlier, stage, measure)
            for measure in TITLES
            if earlier and measure in stage.scores and measure in earlier.scores
        }
        rows.append({"stage": stage, "changes": changes})
    return rows


def _grounded(run: Run) -> list[tuple[str, JsonObject]]:
    """Grounded × right of every checkpoint and evaluation of which it is known."""
    known = [(stage.title, stage.quadrants) for stage in run.checkpoints]
    known += [(evaluation.title, evaluation.facts.get("quadrants") or {}) for evaluation in run.evaluations]
    return [(title, cells) for title, cells in known if cells.get("n")]


def _crop_effects(run: Run) -> list[tuple[str, JsonObject]]:
    """What crops gain and harm: of checkpoints over their control without one, and of evaluations over those of the
    same model and benchmark in a mode without one."""
    found = [(stage.title, stage.crop) for stage in run.checkpoints]
    for without, with_crop in product(run.evaluations, run.evaluations):
        same = all(without.facts.get(key) == with_crop.facts.get(key) for key in ("model", "benchmark", "reading"))
        if same and without.facts.get("mode") in BASELINES and with_crop.facts.get("mode") == "own":
            effect = gain_and_harm(without.rows.values(), with_crop.rows.values())
            found.append((f"{with_crop.title} over {without.title}", effect))
    return [(title, effect) for title, effect in found if effect]


def _looked(run: Run) -> list[tuple[str, list[LooksLine], dict[str, int]]]:
    """Of every checkpoint and evaluation that says itself how often it looks: answers by looks, and ends."""
    shown: list[AnswerSet] = [*run.checkpoints, *run.evaluations]
    found = [(one.title, looks_lines(one.rows.values()), counted_ends(one.rows.values())) for one in shown]
    return [one for one in found if one[1]]


def _kinds(run: Run) -> JsonObject:
    """The results by kind of question, first checkpoint against last."""
    if not run.stages or not run.stages[0].by_kind:
        return {"kind_figures": [], "kind_sides": [], "kinds": [], "kind_measures": {}}
    first, last = run.stages[0], run.stages[-1]
    sides = [first] if first is last else [first, last]
    shown = {
        measure: TITLES[measure] for measure in KIND_MEASURES if any(measure in own for own in first.by_kind.values())
    }
    drawings = [kind_figure(first, last, measure) for measure in shown if len(sides) > 1]
    return {
        "kind_measures": shown,
        "kind_figures": _present(drawings),
        "kind_sides": [side.title for side in sides],
        "kinds": [(kind, [side.by_kind.get(kind, {}) for side in sides]) for kind in first.by_kind],
    }


def _online(run: Run, one: OnlineRun) -> JsonObject:
    """An online training: its curves and numbers, known failures that they show, and rollouts to look at."""
    rule = one.config.get("crop_rule") or run.crop_rules[-1]
    root = one.config.get("image_root") or run.image_root
    first, last = (rollout_cards(rows[:SHOWN], rule, root) for rows in paired_rows(one))
    return {
        "title": one.title,
        "lede": online_lede(one),
        "failures": failures(one.rows),
        "figures": curve_figures([one.curve]),
        "table": measure_table(one.rows),
        "times": time_shares(one.rows),
        "sides": [cards for cards in (first, last) if cards],
    }


def _several_looks(run: Run) -> JsonObject:
    """What was learned of several looks beside the loop."""
    known = [one for _, one in run.lessons]
    reinforced = run.manifests.get(f"{LOOKS}/{ONLINE}", {}).get("config", {})
    return {
        "look_titles": [title for title, _ in run.lessons],
        "look_kinds": looks_by_kind(known),
        "most_looks": max((one.facts.get("max_looks") or 0 for one in known), default=0),
        "look_price": reinforced.get("look_price"),
    }


def _gallery(run: Run) -> JsonObject:
    """The questions to look at, and how their outcomes compare with those of all questions."""
    stages: list[AnswerSet] = [stage for stage in run.stages if stage.rows]
    if not run.stages:
        stages = comparable([evaluation for evaluation in run.evaluations if evaluation.rows])
    ids = shared_ids(stages) if stages else []
    outcomes = []
    if len(stages) > 1 and ids:
        everywhere = count_outcomes(stages[0], stages[-1], ids)
        shown = count_outcomes(stages[0], stages[-1], draw_lot(ids, images=images_of(stages)))
        outcomes = [(name, shown[name], everywhere[name]) for name in everywhere]
    return {
        "gallery": exhibits(stages, run.crop_rules[-1], root=run.image_root) if ids else [],
        "gallery_total": len(ids),
        "right_by": "" if run.stages else next((e.right_by for e in run.evaluations if e.rows), ""),
        "outcomes": outcomes,
        "colours": {"true": draw.TRUE_COLOUR, "first": draw.FIRST_COLOUR, "last": draw.LAST_COLOUR, **COLOURS},
    }


def report(run: str | Path) -> Path:
    """Write the report of a run folder, finished or not, and say what it was made from and what is not there yet.

    Returns:
        The path of the page, which holds its own styles, figures and images.

    Raises:
        ReportError: no report can be made of it.
        HeldError: another process writes its page.
    """
    run = Path(run)
    loaded = load_run(run)
    page = render(loaded)
    with hold(run / "report.html"):  # the page alone: a run may be reported on while it is written
        path = save(run, page)
    logs = len(loaded.curves) + len(loaded.online_runs)
    typer.echo(
        f"read {run}: {len(loaded.stages)} evaluated checkpoints, {len(loaded.pairs)} iterations of pairs, "
        f"{logs} training logs, {len(loaded.evaluations)} evaluations, {len(loaded.manifests)} manifests"
    )
    if loaded.missing:
        typer.echo(f"left out, not there yet: {', '.join(loaded.missing)}")
    typer.echo(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return path
