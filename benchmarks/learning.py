"""Does it learn? The whole demo under several seeds, pooled and compared question by question.

    python benchmarks/learning.py [--seeds 4] [--test-questions 1000] [--out runs/learning] [--json FILE]

Every seed has its own preference questions and its own held-out questions. Scores and differences are
of answers, IoU and boxes on the right object; of answers per kind of question, too; and of the crop over none. Finished
runs are reused; another number of questions needs another `--out`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from visrl.evolve.config import DemoConfig
from visrl.evolve.demo import run_demo
from visrl.records import read_jsonl
from visrl.rewards.crop_effects import gain_and_harm
from visrl.rewards.results import dataset_name
from visrl.statistics import interval, paired

CHECKPOINTS = ("sft", "iter0-stage1", "iter0-stage2", "iter1-stage1", "iter1-stage2")
COMPARED = (
    ("iter0-stage1", "sft"),
    ("iter0-stage2", "iter0-stage1"),
    ("iter0-stage2", "sft"),
    ("iter1-stage2", "iter0-stage2"),
    ("iter1-stage2", "sft"),
)
MODES = ("no_crop", "other_question", "random", "center", "own", "truth")
MEASURES = {"answer_accuracy": "correct", "box_iou": "iou", "right_object": "right_object"}  # and their columns

Rows = list[dict[str, Any]]


def run_seed(seed: int, test_questions: int, out: Path) -> dict[str, Rows]:
    """The result rows of one seed by checkpoint (and `checkpoint.control`), running what is not there yet."""
    demo = out / f"seed{seed}"
    run_demo(DemoConfig(output_dir=demo, seed=seed, test_questions=test_questions))
    return {file.stem: list(read_jsonl(file)) for file in sorted((demo / "eval").glob("*.jsonl"))}


def pooled(runs: list[dict[str, Rows]], name: str, key: str, kind: str | None = None) -> list[float]:
    """The values of one column over all seeds, of one kind or of all, in a fixed order of questions; without those to
    which the column, or the control, does not apply."""
    rows = [row for run in runs for row in run.get(name, []) if kind is None or dataset_name(row) == kind]
    return [float(row[key]) for row in rows if row.get(key) is not None]


def result(runs: list[dict[str, Rows]]) -> dict[str, Any]:
    kinds = sorted({dataset_name(row) for run in runs for row in run["sft"]})
    columns = {measure: key for measure, key in MEASURES.items() if pooled(runs, "sft", key)}
    scores: dict[str, Any] = {
        name: {
            **{measure: interval(pooled(runs, name, key)) for measure, key in columns.items()},
            "by_kind": {kind: interval(pooled(runs, name, "correct", kind)) for kind in kinds},
            "by_seed": [sum(row["correct"] for row in run[name]) / len(run[name]) for run in runs],
        }
        for name in CHECKPOINTS
    }
    differences = {
        f"{a} − {b}": {
            **{measure: paired(pooled(runs, b, key), pooled(runs, a, key)) for measure, key in columns.items()},
            "by_kind": {
                kind: paired(pooled(runs, b, "correct", kind), pooled(runs, a, "correct", kind)) for kind in kinds
            },
        }
        for a, b in COMPARED
    }
    controls = {
        name: {
            mode: interval(values)["mean"]
            for mode in MODES
            if (values := pooled(runs, name if mode == "own" else f"{name}.{mode}", "correct"))
        }
        for name in ("sft", CHECKPOINTS[-1])
    }
    crop = {name: _gain(runs, name) for name in controls}
    gap = controls["sft"]["truth"] - controls["sft"]["own"]
    closed = {
        name: (scores[name]["answer_accuracy"]["mean"] - controls["sft"]["own"]) / gap for name in CHECKPOINTS[1:]
    }
    questions = len(pooled(runs, "sft", "correct"))
    return {
        "questions": questions,
        "scores": scores,
        "differences": differences,
        "controls": controls,
        "crop": crop,
        "gap_closed": closed,
    }


def _gain(runs: list[dict[str, Rows]], name: str) -> dict[str, Any]:
    """What the crops of a checkpoint gain and harm over none, over all seeds; ids are told apart by the seed."""
    without, with_crop = (
        [{**row, "id": f"{seed}/{row['id']}"} for seed, run in enumerate(runs) for row in run[which]]
        for which in (f"{name}.no_crop", name)
    )
    return gain_and_harm(without, with_crop)


def table(found: dict[str, Any]) -> str:
    lines = [f"{found['questions']} held-out questions pooled", ""]
    for name, score in found["scores"].items():
        accuracy, overlap = score["answer_accuracy"], score["box_iou"]
        seeds = " ".join(f"{value:.3f}" for value in score["by_seed"])
        lines.append(
            f"{name:20} answers {accuracy['mean']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}] "
            f"by seed {seeds}   IoU {overlap['mean']:.3f} [{overlap['low']:.3f}, {overlap['high']:.3f}]"
            + (f"   right object {score['right_object']['mean']:.3f}" if "right_object" in score else "")
        )
        lines.append(f"{'':20} " + ", ".join(f"{kind} {own['mean']:.3f}" for kind, own in score["by_kind"].items()))
    lines.append("")
    for name, difference in found["differences"].items():
        accuracy, overlap = difference["answer_accuracy"], difference["box_iou"]
        lines.append(
            f"{name:36} answers {accuracy['difference']:+.3f} [{accuracy['low']:+.3f}, {accuracy['high']:+.3f}] "
            f"p = {accuracy['p_mcnemar']:.1e}   "
            f"IoU {overlap['difference']:+.3f} [{overlap['low']:+.3f}, {overlap['high']:+.3f}]"
        )
        own = difference["by_kind"].items()
        kinds = (f"{kind} {one['difference']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]" for kind, one in own)
        lines.append(f"{'':36} " + ", ".join(kinds))
    lines.append("")
    for name, modes in found["controls"].items():
        lines.append(f"controls of {name:14} " + ", ".join(f"{mode} {value:.3f}" for mode, value in modes.items()))
    for name, crop in found["crop"].items():
        lines.append(f"crop of {name:14} gain {crop['gain']}, harm {crop['harm']} of {crop['n']} questions")
    lines.append(
        "share of the gap to the true box closed: " + str({k: round(v, 2) for k, v in found["gap_closed"].items()})
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--test-questions", type=int, default=1000, help="held-out ones of each seed")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = result([run_seed(seed, given.test_questions, given.out) for seed in range(given.seeds)])
    print(table(found))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
