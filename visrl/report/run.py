"""What lies in a run folder, finished or not: scores, controls, pairs, curves and manifests. Knows no page, no figure.

A part that is not there yet is left out and named in `Run.missing`; a part that is there and cannot be read is an
error. The last line of a file that something is still writing may be unfinished, and only that line is forgiven.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visrl.box import CropRule
from visrl.data.native import from_json
from visrl.evaluate.results import NAME as RESULTS
from visrl.evaluate.results import SCORES, dataset_of, read_results
from visrl.manifest import NAME as MANIFEST
from visrl.pages.figures import Curve
from visrl.records import Verdict, place_name, place_of
from visrl.report.shapes import (
    AnswerShape,
    EvaluationShape,
    LogShape,
    ManifestShape,
    PairShape,
    ReportError,
    Row,
    Shape,
    SummaryShape,
    TryShape,
    read_run_object,
    read_run_rows,
)
from visrl.rewards.critic import count_verdicts
from visrl.statistics import interval

MEASURES = {
    "answer_accuracy": "Answers right",
    "box_iou": "Mean IoU of the box",
    "box_accuracy_50": "Boxes with IoU > 0.5",
}
CONTROLS = {
    "no_crop": "No crop",
    "random": "Random box",
    "center": "Centre box",
    "own": "Own box",
    "truth": "True box",
}  # in the order in which they should bound each other

LOOP_MARKS = ("summary.json", "iter0")  # of `visrl demo` and `visrl evolve`, beside the files of `_STAGE_FILE` in eval/
LOG = "log.jsonl"  # at the top of what `visrl train` writes
REMEDY = "give the folder that `visrl demo`, `visrl evolve`, `visrl train` or `visrl eval` wrote to"
# What says of an answer that it is right, the surest first; at 0.5 a judge finds it more right than wrong.
RIGHT_BY = ("correct", "judge", "exact", "hit")
_STAGE_FILE = re.compile(r"(?:iter(\d+)-)?(sft|stage\d+)")


@dataclass(frozen=True, slots=True)
class Score:
    """A mean with its 95 % interval, all in [0, 1]."""

    mean: float
    low: float
    high: float


Scores = dict[str, Score]  # by measure; a measure that does not apply is absent


@dataclass(frozen=True, slots=True)
class Stage:
    """A checkpoint that was evaluated. `rows` are its answers by question, empty where the file is not there."""

    name: str
    iteration: int
    scores: Scores
    n: int
    by_kind: dict[str, Row]
    rows: dict[str, Row]

    @property
    def title(self) -> str:
        if self.name == "sft":
            return "SFT"
        return f"{self.name.replace('stage', 'Stage ')}, iteration {self.iteration}"

    @property
    def short(self) -> str:
        return "SFT" if self.name == "sft" else f"{self.name.replace('stage', 'stage ')}\niter. {self.iteration}"


@dataclass(frozen=True, slots=True)
class Pairs:
    """What became of one iteration's questions: tries made, and questions kept as pairs (None: not filtered yet)."""

    iteration: int
    questions: int
    kept: int | None
    dropped: dict[str, int]
    tries: int
    random_boxes: int
    unparsed: int
    unread: int  # scores that the critic was asked for and that could not be read


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `visrl eval` found: `facts` are its `scores.json`, `scores` its columns, failures counted 0.

    `rows` are its answers by data set and id, those about a picture; each has `correct`, by the column `right_by`.
    """

    name: str  # of its folder
    facts: Row
    scores: Scores
    rows: dict[str, Row]
    right_by: str

    @property
    def title(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder as it is now."""

    folder: Path
    summary: Row
    stages: list[Stage]
    controls: dict[str, dict[str, Scores]]  # by checkpoint ("first", "last"), then by control
    pairs: list[Pairs]
    curves: list[Curve]
    evaluations: list[Evaluation]
    manifests: dict[str, Row]  # by folder, relative to the run
    missing: list[str]

    @property
    def crop_rules(self) -> list[CropRule]:
        """The crop rules that the manifests name; more than one is worth a warning, none means "exact"."""
        places = [place for manifest in self.manifests.values() for place in (manifest, manifest.get("config", {}))]
        return sorted({place["crop_rule"] for place in places if isinstance(place.get("crop_rule"), str)}) or ["exact"]

    @property
    def image_root(self) -> str | None:
        """The folder that the run's pictures are named from, where its manifests name one."""
        roots = [manifest.get("config", {}).get("image_root") for manifest in self.manifests.values()]
        return next((root for root in roots if root), None)


def load_run(folder: Path) -> Run:
    """Everything a report shows of the run in `folder`.

    Raises:
        ReportError: no such folder, one that no run was written to, or a file in it that cannot be read.
        RecordError: an evaluation's results are none.
    """
    if not folder.is_dir():
        raise ReportError(f"no run at {folder}; {REMEDY}")
    evaluations = _evaluations(folder)
    is_loop = any((folder / mark).exists() for mark in LOOP_MARKS) or bool(_stage_files(folder))
    is_training = (folder / LOG).exists()
    if not is_loop and not is_training and not evaluations:
        raise ReportError(f"{folder} holds no {', '.join(LOOP_MARKS)}, {LOG} or {SCORES}; {REMEDY}")
    summary = read_run_object(folder / "summary.json", SummaryShape) if (folder / "summary.json").is_file() else {}
    stages = _stages(folder, summary)
    run = Run(
        folder=folder,
        summary=summary,
        stages=stages,
        controls=_controls(folder, summary, stages),
        pairs=_pairs(folder, summary),
        curves=_curves(folder),
        evaluations=evaluations,
        manifests={
            str(path.parent.relative_to(folder)): read_run_object(path, ManifestShape)
            for path in sorted(folder.rglob(MANIFEST))
        },
        missing=[],
    )
    parts = {"the summary": run.summary, "evaluations": run.stages, "controls": run.controls, "pairs": run.pairs,
             "training logs": run.curves}  # fmt: skip
    if is_loop:
        run.missing.extend(name for name, part in parts.items() if not part)
    elif is_training and not (folder / MANIFEST).is_file():
        run.missing.append("the end of the training")
    return run


def measure_rows(rows: Sequence[Row]) -> Scores:
    """The three measures of evaluation rows, with their intervals."""
    values = {
        "answer_accuracy": [float(row["correct"]) for row in rows],
        "box_iou": [float(row["iou"]) for row in rows if row.get("iou") is not None],
    }
    values["box_accuracy_50"] = [float(iou > 0.5) for iou in values["box_iou"]]
    return {name: Score(**interval(series)) for name, series in values.items() if series}


# --- Parts of a run -------------------------------------------------------------------------------------------------


def _stages(folder: Path, summary: Row) -> list[Stage]:
    """The evaluated checkpoints in the order of training, by the summary where it has them, else by their files."""
    told = {(entry["iteration"] if entry["name"] != "sft" else -1, entry["name"]): entry
            for entry in summary.get("stages", [])}  # fmt: skip
    files = _stage_files(folder)
    stages = []
    for iteration, name in sorted(told.keys() | files.keys()):
        file, entry = files.get((iteration, name)), told.get((iteration, name))
        rows = read_run_rows(file, AnswerShape) if file else []
        if entry is None and not rows:
            continue
        scores = _scores(entry) if entry else measure_rows(rows)
        by_kind = entry.get("by_kind", {}) if entry else _by_kind(rows)
        count = entry["n"] if entry else len(rows)
        stages.append(Stage(name, max(iteration, 0), scores, count, by_kind, {_name(row): row for row in rows}))
    return stages


def _stage_files(folder: Path) -> dict[tuple[int, str], Path]:
    """The answers of the evaluated checkpoints of a loop, by iteration (-1 before the first) and stage."""
    found = {path: _STAGE_FILE.fullmatch(path.stem) for path in folder.glob("eval/*.jsonl")}
    return {(int(match[1] or -1), match[2]): path for path, match in found.items() if match}


def _name(row: Row) -> str:
    """What tells a question from the others of its run: its id, and where several rows have that, which of them."""
    return place_name(place_of(str(row["id"]), row.get("repeat", 0)))


def _by_kind(rows: Sequence[Row]) -> dict[str, Row]:
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row.get("kind", ""), []).append(row)
    return {
        kind: {**{name: score.mean for name, score in measure_rows(group).items()}, "n": len(group)}
        for kind, group in sorted(kinds.items())
    }


def _scores(entry: Row, measures: Iterable[str] = MEASURES) -> Scores:
    return {name: Score(**{key: entry[name][key] for key in ("mean", "low", "high")})
            for name in measures if isinstance(entry.get(name), dict)}  # fmt: skip


def _controls(folder: Path, summary: Row, stages: Sequence[Stage]) -> dict[str, dict[str, Scores]]:
    """The controls of the first and of the last checkpoint, its own box among them, in bounding order."""
    found = {}
    for which, key, stage in (("first", "controls", stages[:1]), ("last", "controls_last", stages[1:][-1:])):
        told = {name: _scores(entry) for name, entry in summary.get(key, {}).items()}
        if stage and not told:
            file = "sft" if stage[0].name == "sft" else f"iter{stage[0].iteration}-{stage[0].name}"
            paths = {name: folder / "eval" / f"{file}.{name}.jsonl" for name in CONTROLS}
            told = {
                name: measure_rows(read_run_rows(path, AnswerShape)) for name, path in paths.items() if path.is_file()
            }
        if told and stage:
            told["own"] = stage[0].scores
            found[which] = {name: told[name] for name in CONTROLS if told.get(name)}
    return found


def _pairs(folder: Path, summary: Row) -> list[Pairs]:
    told = {entry["iteration"]: entry for entry in summary.get("pairs", [])}
    numbers = {int(path.name[4:]) for path in folder.glob("iter*") if path.name[4:].isdigit()}
    found = []
    for iteration in sorted(told.keys() | numbers):
        tally = _tally(folder / f"iter{iteration}")
        entry = told.get(iteration, {})
        if not entry and not tally["tries"]:
            continue
        found.append(
            Pairs(
                iteration,
                questions=entry.get("questions", tally["questions"]),
                kept=entry.get("kept", tally["kept"]),
                dropped=dict(sorted(entry.get("dropped_by_reason", {}).items(), key=lambda item: -item[1])),
                tries=entry.get("trajectories", tally["tries"]),
                random_boxes=tally["random_boxes"],
                unparsed=tally["unparsed"],
                unread=tally["unread"],
            )
        )
    return found


def _tally(folder: Path) -> dict[str, Any]:
    """Counts over the records of one iteration, for what the summary does not say."""
    files: dict[Path, type[Shape]] = {
        folder / "generate/trajectories.jsonl": TryShape,
        folder / "generate/verdicts.jsonl": Shape,  # the records' own reader looks at them
        folder / "filter/preferences.jsonl": PairShape,
    }
    tries, verdicts, preferences = (
        read_run_rows(path, shape) if path.is_file() else None for path, shape in files.items()
    )
    tries = tries or []
    judged = count_verdicts(from_json(Verdict, row) for row in verdicts or [])
    return {
        "questions": len({(row["sample_id"], row.get("repeat")) for row in tries}),
        "kept": None if preferences is None else len({row["id"] for row in preferences}),
        "tries": len(tries),
        "random_boxes": sum(row["origin"] == "random" for row in tries),
        "unparsed": sum((row["error"] or "").startswith("box:") for row in tries),
        "unread": sum(number for what, number in judged.items() if what.startswith(("unread", "failed"))),
    }


def _curves(folder: Path) -> list[Curve]:
    """The training logs of the run, in the order of training; a plain training folder has one, at its top."""
    found = []
    for path in sorted(folder.rglob("log.jsonl"), key=lambda path: _natural(str(path.relative_to(folder)))):
        rows = [row for row in read_run_rows(path, LogShape) if row.get("step") is not None]
        parts = [re.sub(r"^(iter|stage)(\d+)$", r"\1 \2", part) for part in path.relative_to(folder).parts[:-1]]
        if rows:
            found.append(Curve(", ".join(parts) or "training", rows))
    return found


def _evaluations(folder: Path) -> list[Evaluation]:
    """What `visrl eval` wrote to the folder, or to folders in it."""
    found = []
    for path in [folder / SCORES, *sorted(folder.glob(f"*/{SCORES}"))]:
        if path.is_file():
            facts = read_run_object(path, EvaluationShape)
            counted = {column: entry.get("counted") for column, entry in facts.get("columns", {}).items()}
            scores = _scores(counted, tuple(counted))
            found.append(Evaluation(path.parent.resolve().name, facts, scores, *_answers(path.parent / RESULTS)))
    return found


def _answers(path: Path) -> tuple[dict[str, Row], str]:
    """The rows of `results.jsonl` that can be looked at, each with `correct`, and the column that says so."""
    rows = [row for row in read_results(path) if row.get("image")] if path.is_file() else []
    present = [column for column in RIGHT_BY if any(column in row for row in rows)] or [RIGHT_BY[0]]
    right_by = next((column for column in present if any(row.get(column) is not None for row in rows)), present[0])
    named = {" ".join(part for part in (dataset_of(row), _name(row)) if part): row for row in rows}
    return {name: row | {"correct": _is_right(row, right_by)} for name, row in named.items()}, right_by


def _is_right(row: Row, column: str) -> bool:
    value = row.get(column)
    return row.get("error") is None and value is not None and value >= (0.5 if column == "judge" else 1)


def _natural(text: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]
