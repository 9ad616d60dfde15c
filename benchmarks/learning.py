"""Does it learn? The whole demo under several seeds, pooled and compared question by question.

    python benchmarks/learning.py [--seeds 3] [--test-questions 1000] [--out runs/learning] [--json]

For every seed: the demo as shipped, and iteration 0 again with fine-tuning on the chosen side alone (same pairs, same
number of steps). Every seed has its own preference questions and its own held-out questions. Finished runs are reused;
another number of questions needs another `--out`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from visrl.evolve.config import DemoConfig
from visrl.evolve.demo import run_demo
from visrl.records import read_jsonl
from visrl.statistics import interval, paired

CHECKPOINTS = ("sft", "iter0-stage1", "iter0-stage2", "iter1-stage1", "iter1-stage2")
COMPARED = (
    ("iter0-stage1", "sft"),
    ("iter0-stage2", "iter0-stage1"),
    ("iter0-stage2", "sft"),
    ("iter1-stage2", "iter0-stage2"),
    ("iter1-stage2", "sft"),
    ("iter0-stage1", "chosen-only-stage1"),
    ("iter0-stage2", "chosen-only-stage2"),
)
MODES = ("no_crop", "random", "center", "own", "truth")

Rows = list[dict[str, Any]]


def run_seed(seed: int, test_questions: int, out: Path) -> dict[str, Rows]:
    """The result rows of one seed by checkpoint (and `checkpoint.control`), running what is not there yet."""
    demo, control = out / f"seed{seed}", out / f"seed{seed}-chosen-only"
    shipped = DemoConfig(output_dir=demo, seed=seed, test_questions=test_questions)
    run_demo(shipped)
    for step in ("generate", "filter"):
        if not (control / "iter0" / step).is_dir():
            shutil.copytree(demo / "iter0" / step, control / "iter0" / step)
    only = {"output_dir": control, "chosen_only": True, "iterations": 1, "controls": False}
    run_demo(shipped.model_copy(update=only))
    rows = {file.stem: list(read_jsonl(file)) for file in sorted((demo / "eval").glob("*.jsonl"))}
    for stage in (1, 2):
        rows[f"chosen-only-stage{stage}"] = list(read_jsonl(control / "eval" / f"iter0-stage{stage}.jsonl"))
    return rows


def pooled(runs: list[dict[str, Rows]], name: str, key: str) -> list[float]:
    """The values of one measure over all seeds, in a fixed order of questions."""
    return [float(row[key]) for run in runs for row in run[name]]


def result(runs: list[dict[str, Rows]]) -> dict[str, Any]:
    names = [*CHECKPOINTS, "chosen-only-stage1", "chosen-only-stage2"]
    scores = {
        name: {
            "answer_accuracy": interval(pooled(runs, name, "correct")),
            "box_iou": interval(pooled(runs, name, "iou")),
            "by_seed": [sum(row["correct"] for row in run[name]) / len(run[name]) for run in runs],
        }
        for name in names
    }
    differences = {
        f"{a} − {b}": {
            "answer_accuracy": paired(pooled(runs, b, "correct"), pooled(runs, a, "correct")),
            "box_iou": paired(pooled(runs, b, "iou"), pooled(runs, a, "iou")),
        }
        for a, b in COMPARED
    }
    controls = {
        name: {
            mode: interval(pooled(runs, name if mode == "own" else f"{name}.{mode}", "correct"))["mean"]
            for mode in MODES
        }
        for name in ("sft", CHECKPOINTS[-1])
    }
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
        "gap_closed": closed,
    }


def table(found: dict[str, Any]) -> str:
    lines = [f"{found['questions']} held-out questions pooled", ""]
    for name, score in found["scores"].items():
        accuracy, overlap = score["answer_accuracy"], score["box_iou"]
        seeds = " ".join(f"{value:.3f}" for value in score["by_seed"])
        lines.append(
            f"{name:20} answers {accuracy['mean']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}] "
            f"by seed {seeds}   IoU {overlap['mean']:.3f} [{overlap['low']:.3f}, {overlap['high']:.3f}]"
        )
    lines.append("")
    for name, difference in found["differences"].items():
        accuracy, overlap = difference["answer_accuracy"], difference["box_iou"]
        lines.append(
            f"{name:36} answers {accuracy['difference']:+.3f} [{accuracy['low']:+.3f}, {accuracy['high']:+.3f}] "
            f"p = {accuracy['p_mcnemar']:.1e}   "
            f"IoU {overlap['difference']:+.3f} [{overlap['low']:+.3f}, {overlap['high']:+.3f}]"
        )
    lines.append("")
    for name, modes in found["controls"].items():
        lines.append(f"controls of {name:14} " + ", ".join(f"{mode} {value:.3f}" for mode, value in modes.items()))
    lines.append(
        "share of the gap to the true box closed: " + str({k: round(v, 2) for k, v in found["gap_closed"].items()})
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test-questions", type=int, default=1000, help="held-out ones of each seed")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = result([run_seed(seed, given.test_questions, given.out) for seed in range(given.seeds)])
    print(json.dumps(found, indent=1) if given.json else table(found))


if __name__ == "__main__":
    main()
