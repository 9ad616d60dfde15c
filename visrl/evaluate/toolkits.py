"""Scoring prediction files of lmms-eval and VLMEvalKit without a model, as the toolkit reads replies and as we do.

What the toolkit would ask its judge about is null in `correct_published`: nobody was asked. What a file itself says of
its replies is told beside that, and enters no column.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from visrl.codecs import CODECS
from visrl.evaluate.benchmarks import BENCHMARKS, Benchmark
from visrl.evaluate.choice_figures import choice_figures
from visrl.evaluate.predictions import Rows
from visrl.evaluate.readings import BenchmarkReading, by_rule
from visrl.evaluate.rules import RULES
from visrl.evaluate.toolkit_files import (
    LMMS_TASKS,
    VLMEVALKIT_ENDINGS,
    VLMEVALKIT_SETS,
    ToolkitReply,
    lmms_task,
    read_lmms,
    read_vlmevalkit,
    vlmevalkit_set,
)
from visrl.records import RecordError
from visrl.replies import spoken, whole_text
from visrl.rewards.results import Result, summarise

Toolkit = Literal["lmms-eval", "vlmevalkit"]


@dataclass(frozen=True, slots=True)
class ToolkitScores:
    """The result rows of a file or a folder, what the files themselves say (`{"n", "mean"}` by task and metric), and
    the source of the published rule of each task; None where none is known."""

    rows: Rows
    logged: Mapping[str, Mapping[str, Mapping[str, float]]]
    rules: Mapping[str, str | None]

    def summary(self) -> dict[str, Any]:
        """`rewards.results.summarise` with the means over all questions, `logged` and `rules`."""
        figures = choice_figures(summarise(self.rows), self.rows)
        return {**figures, "logged": self.logged, "rules": self.rules}


def score_toolkit(
    path: str | Path, toolkit: Toolkit, task: str | None = None, rule: str | None = None
) -> ToolkitScores:
    """Result rows of a file, or of a folder with one file of each task: columns `correct` of questions of choice, read
    strictly, string metrics of the others, and `correct_published` by the toolkit's rule of the task.

    `task` is the toolkit's name of it, where the file's name does not say it; `rule` names another of `rules.RULES`.
    Rows are of the data set that is their part of the benchmark, as those of `visrl eval` are; in a folder with several
    files with the task before it.

    Raises:
        RecordError: nothing to score there, two files of one task, no such rule, a row that is not the toolkit's, or a
            question twice.
    """
    if rule is not None and rule not in RULES:
        raise RecordError(f"no rule {rule!r}; there are {', '.join(RULES)}")
    files = _files(Path(path), toolkit, task)
    rows: Rows = []
    logged, rules = {}, {}
    for name, file in files.items():
        known, reading = _benchmark(name, toolkit, rule)
        own: Rows = []
        sums: dict[str, list[float]] = {}
        for one in _told_apart(file, toolkit):
            for metric, value in one.logged.items():
                sums.setdefault(metric, []).append(value)
            own.append(_row(one, known, reading, name, len(files) > 1, file))
        if not own:
            raise RecordError(f"{file} holds no rows")
        rows += own
        logged[name] = {metric: {"n": len(each), "mean": sum(each) / len(each)} for metric, each in sums.items()}
        rules[name] = reading.source if reading else None
    return ToolkitScores(rows, logged, rules)


def _files(path: Path, toolkit: Toolkit, task: str | None) -> dict[str, Path]:
    """The files by task."""
    if not path.is_dir():
        if not path.is_file():
            raise RecordError(f"no file at {path}")
        return {task or (lmms_task(path) if toolkit == "lmms-eval" else vlmevalkit_set(path)) or path.stem: path}
    if toolkit == "lmms-eval":
        named = [(lmms_task(file), file) for file in sorted(path.rglob("*_samples_*.jsonl"))]
        what = "files …_samples_TASK.jsonl; run lmms-eval with --log_samples --output_path"
    else:
        found = sorted(file for file in path.iterdir() if file.suffix in VLMEVALKIT_ENDINGS)
        named = [(vlmevalkit_set(file), file) for file in found if vlmevalkit_set(file)]
        what = f"files MODEL_DATASET of {', '.join(VLMEVALKIT_SETS)}; name a file of another one itself"
    files: dict[str, Path] = {}
    for name, file in named:
        if task is not None and name != task:
            continue
        if name in files:
            raise RecordError(f"{path} holds several files of {name}, {files[name].name} and {file.name}; name one")
        files[name] = file
    if not files:
        raise RecordError(f"{path} holds no {what}")
    return files


def _benchmark(name: str, toolkit: Toolkit, rule: str | None) -> tuple[Benchmark | None, BenchmarkReading | None]:
    """Our benchmark of a task, and the reading that is the toolkit's; with `rule` any task is one, of that reading."""
    benchmark, own = (LMMS_TASKS if toolkit == "lmms-eval" else VLMEVALKIT_SETS).get(name, (None, None))
    known = BENCHMARKS[benchmark] if benchmark else None
    if rule is None:
        return known, known.reading(own) if known else None
    named = BenchmarkReading(lambda question: question.sample.question, by_rule(rule), RULES[rule].source)
    return replace(known or BENCHMARKS["samples"], readings={rule: named}), named


def _told_apart(file: Path, toolkit: Toolkit) -> Iterator[ToolkitReply]:
    """The replies of a file; several to one question have a number each.

    Raises:
        RecordError: two rows are of one question.
    """
    seen: Counter[tuple[str, str]] = Counter()
    for number, replies in enumerate(read_lmms(file) if toolkit == "lmms-eval" else read_vlmevalkit(file), start=1):
        sample = replies[0].question.sample
        seen[sample.source, sample.id] += 1
        if seen[sample.source, sample.id] > 1:
            raise RecordError(f"{file}, row {number}: question {sample.id} is there twice; were two runs joined?")
        for attempt, one in enumerate(replies):
            again = replace(one.question, sample=replace(sample, repeat=attempt), attempt=attempt)
            yield replace(one, question=again)


def _row(
    one: ToolkitReply, known: Benchmark | None, reading: BenchmarkReading | None, task: str, is_one_of: bool, file: Path
) -> dict[str, Any]:
    question = one.question
    if known is not None and not known.metrics and question.choice is None:
        raise RecordError(
            f"{file}, question {question.sample.id}: {task} is a benchmark of choice, and there are no options with "
            f"the answer {question.sample.answer[:40]!r} among them"
        )
    part = question.sample.source or (next(iter(known.datasets)) if known and len(known.datasets) == 1 else task)
    sample = replace(question.sample, source=f"{task}/{part}" if is_one_of and part != task else part)
    prediction = None if one.reply is None else spoken(whole_text(one.reply))
    result = Result(sample, prediction=prediction, error=one.error, mode="no_box", reply=one.reply)
    asked = replace(question, sample=sample)
    row = (known or BENCHMARKS["samples"]).row_of(asked, result, CODECS["visrl"], reading)
    if question.choice is None:
        return row
    ours = BENCHMARKS["vstar"]  # of whatever benchmark: its strict reading is that of every one
    strict = ours.row_of(asked, result, CODECS["visrl"], ours.readings["ours"])
    return {**strict, **row} if reading else {name: value for name, value in strict.items() if name != "reading"}
