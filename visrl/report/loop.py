"""What a loop left in its folder: evaluated checkpoints, controls, and what became of each iteration's pairs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visrl.data.native import from_json
from visrl.records import Verdict
from visrl.report.measures import Scores, measure_rows, question_name, read_scores
from visrl.report.shapes import AnswerShape, JsonObject, PairShape, Shape, TryShape, read_run_rows
from visrl.rewards.critic import count_verdicts
from visrl.rewards.crop_effects import gain_and_harm, quadrants
from visrl.rewards.results import summarise_kinds

CONTROLS = {
    "no_crop": "No crop",
    "other_question": "Other question's box",
    "random": "Random box",
    "center": "Centre box",
    "own": "Own box",
    "truth": "True box",
}  # in the order in which they are shown
BOUNDS = tuple(name for name in CONTROLS if name != "other_question")  # in the order in which they bound each other

ONLINE = "online"  # a checkpoint beside the loop, from the same start
ALONE = {"sft": "SFT", ONLINE: "Online"}  # what belongs to no iteration

_STAGE_FILE = re.compile(r"(?:iter(\d+)-)?(sft|online|stage\d+)")


@dataclass(frozen=True, slots=True)
class Stage:
    """A checkpoint that was evaluated. `rows` are its answers by question, empty where the file is not there.

    `quadrants` and `crop` are what rewards/crop_effects.py counts, empty where that is not known.
    """

    name: str
    iteration: int
    scores: Scores
    n: int
    by_kind: dict[str, JsonObject]
    rows: dict[str, JsonObject]
    quadrants: JsonObject = field(default_factory=dict)
    crop: JsonObject = field(default_factory=dict)

    @property
    def title(self) -> str:
        return ALONE.get(self.name, f"{self.name.replace('stage', 'Stage ')}, iteration {self.iteration}")

    @property
    def short(self) -> str:
        return ALONE.get(self.name, f"{self.name.replace('stage', 'stage ')}\niter. {self.iteration}")


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


def read_stages(folder: Path, summary: JsonObject) -> list[Stage]:
    """The evaluated checkpoints in the order of training, by the summary where it has them, else by their files."""
    known = {(entry["iteration"] if entry["name"] != "sft" else -1, entry["name"]): entry
            for entry in summary.get("stages", [])}  # fmt: skip
    files = stage_files(folder)
    stages = []
    for iteration, name in sorted(known.keys() | files.keys()):
        file, entry = files.get((iteration, name)), known.get((iteration, name))
        rows = read_run_rows(file, AnswerShape) if file else []
        if entry is None and not rows:
            continue
        scores = read_scores(entry) if entry else measure_rows(rows)
        by_kind = entry.get("by_kind", {}) if entry else summarise_kinds(rows)
        count = entry["n"] if entry else len(rows)
        stages.append(
            Stage(
                name,
                max(iteration, 0),
                scores,
                count,
                by_kind,
                rows={question_name(row): row for row in rows},
                quadrants=(entry or {}).get("quadrants") or quadrants(rows),
                crop=(entry or {}).get("crop") or _crop_effect(file, rows),
            )
        )
    return stages


def _crop_effect(file: Path | None, rows: Sequence[JsonObject]) -> JsonObject:
    """What crops gain and harm over the answers of the same checkpoint without one, where it gave any."""
    without = file.with_suffix(".no_crop.jsonl") if file else None
    return gain_and_harm(read_run_rows(without, AnswerShape), rows) if without and without.is_file() else {}


def stage_files(folder: Path) -> dict[tuple[int, str], Path]:
    """The answers of the evaluated checkpoints of a loop, by iteration (-1 before the first) and stage."""
    found = {path: _STAGE_FILE.fullmatch(path.stem) for path in folder.glob("eval/*.jsonl")}
    return {(int(match[1] or -1), match[2]): path for path, match in found.items() if match}


def read_controls(folder: Path, summary: JsonObject, stages: Sequence[Stage]) -> dict[str, dict[str, Scores]]:
    """The controls of the first and of the last checkpoint, its own box among them, in bounding order."""
    found = {}
    for which, key, stage in (("first", "controls", stages[:1]), ("last", "controls_last", stages[1:][-1:])):
        known = {name: read_scores(entry) for name, entry in summary.get(key, {}).items()}
        if stage and not known:
            file = "sft" if stage[0].name == "sft" else f"iter{stage[0].iteration}-{stage[0].name}"
            paths = {name: folder / "eval" / f"{file}.{name}.jsonl" for name in CONTROLS}
            known = {
                name: measure_rows(read_run_rows(path, AnswerShape)) for name, path in paths.items() if path.is_file()
            }
        if known and stage:
            known["own"] = stage[0].scores
            found[which] = {name: known[name] for name in CONTROLS if known.get(name)}
    return found


def read_pairs(folder: Path, summary: JsonObject) -> list[Pairs]:
    """What became of the pairs of every iteration, by the summary where it has them, else by the records."""
    known = {entry["iteration"]: entry for entry in summary.get("pairs", [])}
    numbers = {int(path.name[4:]) for path in folder.glob("iter*") if path.name[4:].isdigit()}
    found = []
    for iteration in sorted(known.keys() | numbers):
        tally = _tally(folder / f"iter{iteration}")
        entry = known.get(iteration, {})
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
