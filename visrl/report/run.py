"""What lies in a run folder, finished or not: scores, controls, pairs, curves and manifests. Knows no page, no figure.

A part that is not there yet is left out and named in `Run.missing`; a part that is there and cannot be read is an
error. The last line of a file that something is still writing may be unfinished, and only that line is forgiven.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from visrl.box import CropRule
from visrl.evaluate.results import SCORES
from visrl.manifest import NAME as MANIFEST
from visrl.pages.figures import Curve
from visrl.report.evaluations import Evaluation, read_evaluations
from visrl.report.loop import ONLINE, Pairs, Stage, read_controls, read_pairs, read_stages, stage_files
from visrl.report.measures import Scores
from visrl.report.online import OnlineRun, read_online
from visrl.report.several_looks import read_lessons
from visrl.report.shapes import (
    JsonObject,
    LogShape,
    ManifestShape,
    ReportError,
    SummaryShape,
    read_run_object,
    read_run_rows,
)

LOOP_MARKS = ("summary.json", "iter0")  # of `visrl demo` and `visrl evolve`, beside the files of `stage_files` in eval/
LOG = "log.jsonl"  # at the top of what `visrl train` writes
REMEDY = "give the folder that `visrl demo`, `visrl evolve`, `visrl train` or `visrl eval` wrote to"


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder as it is now."""

    folder: Path
    summary: JsonObject
    stages: list[Stage]  # of the loop, in the order of training
    online: Stage | None  # from the same start as the loop
    controls: dict[str, dict[str, Scores]]  # by checkpoint ("first", "last"), then by control
    pairs: list[Pairs]
    curves: list[Curve]  # of the trainings that are not online
    online_runs: list[OnlineRun]
    evaluations: list[Evaluation]
    lessons: list[tuple[str, Evaluation]]  # of several looks, beside the loop
    manifests: dict[str, JsonObject]  # by folder, relative to the run
    missing: list[str]

    @property
    def checkpoints(self) -> list[Stage]:
        """Everything that was evaluated, the loop's first."""
        return [*self.stages, *([self.online] if self.online else [])]

    @property
    def crop_rules(self) -> list[CropRule]:
        """The crop rules that the manifests name; more than one is worth a warning, none means "exact"."""
        places = [place for manifest in self.manifests.values() for place in (manifest, manifest.get("config", {}))]
        return sorted({place["crop_rule"] for place in places if isinstance(place.get("crop_rule"), str)}) or ["exact"]

    @property
    def image_root(self) -> str | None:
        """The folder that the run's images are named from, where its manifests name one."""
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
    evaluations = read_evaluations(folder)
    is_loop = any((folder / mark).exists() for mark in LOOP_MARKS) or bool(stage_files(folder))
    is_training = (folder / LOG).exists()
    if not is_loop and not is_training and not evaluations:
        raise ReportError(f"{folder} holds no {', '.join(LOOP_MARKS)}, {LOG} or {SCORES}; {REMEDY}")
    summary = read_run_object(folder / "summary.json", SummaryShape) if (folder / "summary.json").is_file() else {}
    known = read_stages(folder, summary)
    stages = [stage for stage in known if stage.name != ONLINE]
    curves = _curves(folder)
    online_runs = read_online(curves)
    run = Run(
        folder=folder,
        summary=summary,
        stages=stages,
        online=next((stage for stage in known if stage.name == ONLINE), None),
        controls=read_controls(folder, summary, stages),
        pairs=read_pairs(folder, summary),
        curves=[curve for where, curve in curves.items() if where not in {one.folder for one in online_runs}],
        online_runs=online_runs,
        evaluations=evaluations,
        lessons=read_lessons(folder),
        manifests={
            str(path.parent.relative_to(folder)): read_run_object(path, ManifestShape)
            for path in sorted(folder.rglob(MANIFEST))
        },
        missing=[],
    )
    parts = {"the summary": run.summary, "evaluations": run.stages, "controls": run.controls, "pairs": run.pairs,
             "training logs": run.curves or run.online_runs}  # fmt: skip
    if is_loop:
        run.missing.extend(name for name, part in parts.items() if not part)
    elif is_training and not (folder / MANIFEST).is_file():
        run.missing.append("the end of the training")
    return run


def _curves(folder: Path) -> dict[Path, Curve]:
    """The training logs of the run by their folders, in the order of training; a plain training folder has one, at its
    top."""
    found = {}
    for path in sorted(folder.rglob("log.jsonl"), key=lambda path: _natural(str(path.relative_to(folder)))):
        rows = [row for row in read_run_rows(path, LogShape) if row.get("step") is not None]
        parts = [re.sub(r"^(iter|stage)(\d+)$", r"\1 \2", part) for part in path.relative_to(folder).parts[:-1]]
        if rows:
            found[path.parent] = Curve(", ".join(parts) or "training", rows)
    return found


def _natural(text: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]
