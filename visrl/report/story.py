"""What the report says in words and numbers: headline, steps that helped or did not, caveats. Knows no page.

Every sentence is made from the run's own numbers, and a step that did not help is said as plainly as one that did.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from typing import Literal

from visrl.pages.wording import NO_BREAK, count, measured, percent, signed
from visrl.report.gallery import shared_ids
from visrl.report.loop import BOUNDS, CONTROLS, ONLINE, Stage
from visrl.report.measures import TITLES, Score, measure_rows
from visrl.report.online import online_lede
from visrl.report.run import Run
from visrl.rewards.results import NO_OTHER, Measure, measure_of
from visrl.statistics import paired

ChangeVerdict = Literal["better", "worse", "no measurable difference", "not compared question by question"]


STEPS: dict[Measure, str] = {"answer_accuracy": "answers", "box_iou": "boxes"}  # what a training stage may help


@dataclass(frozen=True, slots=True)
class Change:
    """A later checkpoint against an earlier one in one measure; `text` holds the difference and its interval."""

    text: str
    verdict: ChangeVerdict


@dataclass(frozen=True, slots=True)
class Headline:
    """One measure at both ends of the run. `ceiling` is the first checkpoint's score with the true box."""

    measure: Measure
    title: str
    first: Score
    last: Score
    ceiling: Score | None
    change: Change | None


def change(earlier: Stage, later: Stage, measure: Measure) -> Change:
    """What `later` gained on `earlier`: question by question where both sets of rows are there."""
    ids = [name for name in shared_ids([earlier, later]) if _applies(earlier, later, name, measure)]
    if not ids:
        difference = later.scores[measure].mean - earlier.scores[measure].mean
        return Change(signed(difference, measure), "not compared question by question")
    result = paired(_values(earlier, ids, measure), _values(later, ids, measure))
    low, high = (signed(result[end], measure, "") for end in ("low", "high"))
    text = f"{signed(result['difference'], measure)} [{low},{NO_BREAK}{high}]"
    if result["low"] > 0:
        return Change(text, "better")
    return Change(text, "worse" if result["high"] < 0 else "no measurable difference")


def headlines(run: Run) -> list[Headline]:
    """The measures that both ends of the run have."""
    if not run.stages:
        return []
    first, last = run.stages[0], run.stages[-1]
    truth = run.controls.get("first", {}).get("truth", {})
    return [
        Headline(
            measure,
            title,
            first.scores[measure],
            last.scores[measure],
            truth.get(measure) if measure == "answer_accuracy" else None,
            change(first, last, measure) if first is not last else None,
        )
        for measure, title in TITLES.items()
        if measure in first.scores and measure in last.scores
    ]


def gap_closed(run: Run) -> float | None:
    """The share of the way from the first checkpoint's answers to its own true-box control that the last one went."""
    truth = run.controls.get("first", {}).get("truth", {}).get("answer_accuracy")
    if truth is None or len(run.stages) < 2:
        return None
    first, last = (run.stages[at].scores["answer_accuracy"].mean for at in (0, -1))
    return (last - first) / (truth.mean - first) if truth.mean > first else None


def lede(run: Run) -> str:
    """The run in a sentence or two."""
    if not run.stages and run.evaluations:
        models = sorted({str(evaluation.facts.get("model", "a model")) for evaluation in run.evaluations})
        return f"{count(len(run.evaluations), 'evaluation')} of {', '.join(models)}."
    if not run.stages and run.online_runs:
        return online_lede(run.online_runs[-1])
    if not run.stages:
        return "No checkpoint of this run has been evaluated yet."
    first, last = run.stages[0], run.stages[-1]
    answers = last.scores["answer_accuracy"]
    sentence = f"{last.title} answers {percent(answers.mean)} of {count(last.n, 'held-out question')} right"
    if first is last:
        return sentence + "; nothing later has been evaluated yet."
    gained = change(first, last, "answer_accuracy")
    before = percent(first.scores["answer_accuracy"].mean)
    worth = {"better": ", a gain on the same questions", "worse": ", a loss on the same questions"}.get(
        gained.verdict, f": {gained.verdict}"
    )
    return f"{sentence}; {first.title} alone had {before}. That is {gained.text}{worth}."


def beside_the_loop(run: Run) -> str:
    """What online reinforcement from the same start reached, beside the loop; "" where a run has none."""
    online = run.online
    if online is None or not run.stages:
        return ""
    first, last = run.stages[0], run.stages[-1]
    answers = percent(online.scores["answer_accuracy"].mean)
    gained = change(first, online, "answer_accuracy")
    said = f"Online reinforcement from the same {first.title} answers {answers} right ({gained.text} against it)"
    if last is not first:
        against = change(last, online, "answer_accuracy")
        said += f"; against {last.title} that is {against.text}: {against.verdict}"
    costs = run.summary.get("cpu_seconds_by_step", {})
    loop = sum(seconds for step, seconds in costs.items() if re.match(r"iter\d+/(generate|filter|stage\d+)$", step))
    spent = f" It took {costs[ONLINE]:,.0f} s of a processor, and the loop {loop:,.0f} s." if ONLINE in costs else ""
    return f"{said}.{spent}"


def caveats(run: Run) -> list[str]:
    """What a reader must know before believing the figures."""
    notes = []
    if run.missing:
        notes.append(f"Not in this run folder (yet): {', '.join(run.missing)}. What depends on them is left out.")
    notes += _file_notes(run) + _step_notes(run) + _order_notes(run) + _evaluation_notes(run)
    if len(run.crop_rules) > 1:
        notes.append(f"The parts of this run do not crop alike: {', '.join(run.crop_rules)}.")
    if run.stages:
        notes.append(
            "The intervals cover the draw of test questions only. This is one training run of one seed: how much "
            "another seed would differ, they do not say."
        )
        rows = run.stages[-1].rows.values()
        unparsed, failed = sum(row["box"] is None for row in rows), sum(row.get("error") is not None for row in rows)
        if rows:
            notes.append(
                f"{run.stages[-1].title}: {count(unparsed)} of {count(len(rows), 'box text')} could not be read and "
                f"count as IoU 0; {count(failed, 'question')} ended in an error and count as wrong."
            )
    unread = sum(pairs.unread for pairs in run.pairs)
    if unread:
        notes.append(
            f"{count(unread, 'score')} of the critic could not be read and count neither for nor against a try."
        )
    for curve in (*run.curves, *(one.curve for one in run.online_runs)):
        lost = sum(isinstance(value, float) and not isfinite(value) for row in curve.rows for value in row.values())
        if lost:
            notes.append(f"{count(lost, 'value')} in the log of {curve.title} are not finite, and not drawn.")
    if run.online_runs:
        notes.append(
            "What an online training logs of its rollouts is of questions that it learns from, sampled at its "
            "temperature. Held-out greedy rollouts are the curve to judge by; its band is the 95 % interval of the "
            "draw of questions, not of another seed."
        )
    if run.curves:
        notes.append(
            "Reward accuracy, margins and log-probabilities are of the pairs trained on, which can be memorised. "
            "Held-out rollouts are the curve to judge by."
        )
    return notes


def _evaluation_notes(run: Run) -> list[str]:
    """What of the evaluations failed or could not be read, and what their intervals are of."""
    notes = []
    for evaluation in run.evaluations:
        facts = evaluation.facts
        noted = [
            (facts.get("failed"), "ended in an error and {count} as wrong"),
            (facts.get("unparseable"), "had a box text that could not be read and {count} as IoU 0"),
            (facts.get("bad_truth"), "had no true box to compare with"),
            (facts.get("skipped"), f"could not be asked in this mode ({NO_OTHER}) and {{count}} nowhere"),
        ]
        said = [
            f"{count(number, 'question')} {what.format(count='counts' if number == 1 else 'count')}"
            for number, what in noted
            if number
        ]
        said += [
            f"{count(entry['unread'], 'answer')} had no readable score of the judge"
            for column, entry in facts.get("columns", {}).items()
            if column == "judge" and entry.get("unread")
        ]
        if said:
            notes.append(f"{evaluation.name}, of {count(facts.get('n', 0), 'question')}: {'; '.join(said)}.")
    if run.evaluations:
        notes.append("The intervals of evaluations cover the draw of questions only, and not another seed of training.")
    return notes


def _file_notes(run: Run) -> list[str]:
    """Where the files of the run do not agree with each other."""
    notes = []
    for stage in run.stages:
        counted = measure_rows(list(stage.rows.values())) if stage.rows else {}
        for name, title in TITLES.items():
            score = counted.get(name)
            if score and name in stage.scores and abs(score.mean - stage.scores[name].mean) > 1e-3:
                notes.append(
                    f"{stage.title}: the summary says {measured(stage.scores[name].mean, name)} for "
                    f"“{title.lower()}”, its answers give {measured(score.mean, name)}; evaluate again."
                )
    asked = {len(stage.rows) for stage in run.stages if stage.rows}
    if len(asked) > 1:
        notes.append(
            f"The checkpoints have answered between {count(min(asked))} and {count(max(asked), 'question')} so far; "
            "differences are over the questions that both have answered."
        )
    return notes


def _step_notes(run: Run) -> list[str]:
    """The training stages that did not help, by answers or by boxes."""
    notes = []
    for earlier, later in pairwise(run.stages):
        for name, what in STEPS.items():
            if name not in earlier.scores or name not in later.scores:
                continue
            step = change(earlier, later, name)
            if step.verdict == "worse":
                notes.append(f"{later.title} made the {what} worse than {earlier.title}: {step.text}.")
            elif step.verdict == "no measurable difference":
                notes.append(f"{later.title} made no measurable difference to the {what}: {step.text}.")
    return notes


def _order_notes(run: Run) -> list[str]:
    """Whether the controls bound each other as they should, by their answer accuracy."""
    notes = []
    for which, scores in run.controls.items():
        means = {name: scores[name]["answer_accuracy"].mean for name in BOUNDS
                 if "answer_accuracy" in scores.get(name, {})}  # fmt: skip
        broken = [
            f"{CONTROLS[low].lower()}, {percent(means[low])}, is above {CONTROLS[high].lower()}, {percent(means[high])}"
            for low, high in pairwise(means)
            if means[low] > means[high]
        ]
        if len(means) > 1:
            order = " ≤ ".join(CONTROLS[name].lower() for name in means)
            verdict = "does not hold: " + "; ".join(broken) if broken else "holds"
            notes.append(f"Controls of the {which} checkpoint, by answers: the order {order} {verdict}.")
    return notes


def intention(run: Run) -> list[str]:
    """Whether the question decides where a checkpoint looks: its answers from its box for another question."""
    said = []
    for which, scores in run.controls.items():
        if "answer_accuracy" not in scores.get("other_question", {}) or "answer_accuracy" not in scores.get("own", {}):
            continue
        other, own = (scores[name]["answer_accuracy"].mean for name in ("other_question", "own"))
        sentence = (
            f"Shown the crop of its box for another question about the same image, the {which} checkpoint answers "
            f"{percent(other)} right; with its box for the question itself {percent(own)}."
        )
        key = "controls" if which == "first" else "controls_last"
        skipped = run.summary.get(key, {}).get("other_question", {}).get("skipped", 0)
        left_out = f" {count(skipped, 'question')} without another question on the image left out." if skipped else ""
        said.append(sentence + left_out)
    return said


def _values(stage: Stage, ids: Sequence[str], measure: Measure) -> list[float]:
    return [value for name in ids if (value := measure_of(stage.rows[name], measure)) is not None]


def _applies(earlier: Stage, later: Stage, name: str, measure: Measure) -> bool:
    """Whether a question has this measure at both checkpoints: without a true box there is no IoU."""
    return all(measure_of(stage.rows[name], measure) is not None for stage in (earlier, later))
