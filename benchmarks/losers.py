"""Do losers teach? DPO on pairs of the policy's own boxes against fine-tuning on the chosen side of the same pairs.

    python benchmarks/losers.py [--seeds 4] [--rates 3e-4,1e-3,3e-3] [--dpo '{"pref_ftx": 1.0}'] [--json FILE]

One iteration of the demo's loop from the embedded model; losers are the worst of the policy's own boxes. Both ways
train on the same pairs for as many steps. The learning rate of each is the best of the sweep on a seed that is not
counted; then both run on `--seeds` others, each with preference questions and held-out questions of its own, and the
held-out answers are compared question by question.
Finished runs are used again; other questions or another start need another `--out`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

from visrl.evolve.config import DemoConfig, EvolveConfig
from visrl.evolve.loop import run_evolve
from visrl.manifest import read_manifest
from visrl.records import read_jsonl
from visrl.statistics import interval, paired

METHODS = ("dpo", "chosen side")
CHECKPOINTS = ("sft", "iter0-stage1", "iter0-stage2")
FINAL = CHECKPOINTS[-1]

Rows = list[dict[str, Any]]
Run = dict[str, Rows]  # the held-out rows of each checkpoint


def run_method(method: str, rate: float, seed: int, given: argparse.Namespace) -> Run:
    """One iteration by a method at a learning rate, or what is left of it; its held-out rows."""
    folder = given.out / f"seed{seed}"
    out = folder / f"{method.replace(' ', '-')}-{rate:g}"
    pairs = folder / "pairs"  # of whichever run came first; all others take them over
    if pairs.is_dir():
        for step in ("generate", "filter"):
            take_over(pairs / step, out / "iter0" / step)
        take_over(pairs / "sft.jsonl", out / "eval" / "sft.jsonl")
    demo = DemoConfig(
        model_name_or_path=given.model, iterations=1, questions=given.questions,
        test_questions=given.test_questions, seed=seed, controls=False,
    )  # fmt: skip
    more = {
        "compare_paper": False,
        "train": {**given.dpo, "learning_rate": rate},
        "chosen_only": method == "chosen side",
        "output_dir": out,
    }
    run_evolve(EvolveConfig(**demo.evolution().model_dump() | more))
    if not pairs.is_dir():
        part = pairs.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        for step in ("generate", "filter"):
            shutil.copytree(out / "iter0" / step, part / step)
        shutil.copy(out / "eval" / "sft.jsonl", part)
        os.replace(part, pairs)
    return {name: list(read_jsonl(out / "eval" / f"{name}.jsonl")) for name in CHECKPOINTS}


def take_over(source: Path, target: Path) -> None:
    """Copy a file or a folder to where it is not yet; whole, or not at all."""
    if target.exists():
        return
    part = target.with_name(f"{target.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(part, ignore_errors=True)
    copied = shutil.copytree(source, part) if source.is_dir() else shutil.copy(source, part)
    os.replace(copied, target)


def sweep(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What each method reaches at each rate on the seed that is not counted, and its best rate."""
    found = {}
    for method in METHODS:
        runs = {rate: run_method(method, rate, given.tuning_seed, given) for rate in given.rates}
        reached = {rate: score(run[FINAL], "correct") for rate, run in runs.items()}
        found[method] = {"accuracy": reached, "best": max(reached, key=lambda rate: reached[rate])}
    return found


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """The sweep, and both methods at their best rates on every seed."""
    swept = sweep(given)
    seeds = [seed for seed in range(given.seeds + 1) if seed != given.tuning_seed][: given.seeds]
    runs = {method: [run_method(method, swept[method]["best"], seed, given) for seed in seeds] for method in METHODS}
    differences = {
        name: {
            key: paired(pooled(runs["chosen side"], name, key), pooled(runs["dpo"], name, key))
            for key in ("correct", "iou")
        }
        for name in CHECKPOINTS[1:]
    }
    scores = {
        method: {
            name: {
                "answer_accuracy": interval(pooled(own, name, "correct")),
                "box_iou": interval(pooled(own, name, "iou")),
                "by_seed": [score(run[name], "correct") for run in own],
            }
            for name in CHECKPOINTS
        }
        for method, own in runs.items()
    }
    counts = [read_manifest(given.out / f"seed{seed}" / "pairs" / "filter") for seed in seeds]
    return {
        "questions": len(pooled(runs["dpo"], FINAL, "correct")),
        "pairs": [manifest["counts"] for manifest in counts if manifest is not None],
        "dpo_keys": given.dpo,
        "sweep": {"seed": given.tuning_seed, **swept},
        "scores": scores,
        "dpo − chosen side": differences,
    }


def pooled(runs: list[Run], name: str, key: str) -> list[float]:
    """The values of one measure over all seeds, in a fixed order of questions."""
    return [float(row[key]) for run in runs for row in run[name]]


def score(rows: Rows, key: str) -> float:
    return sum(float(row[key]) for row in rows) / len(rows)


def table(found: dict[str, Any]) -> str:
    """The comparison as text."""
    kept = [one["kept"] for one in found["pairs"]]
    lines = [f"{found['questions']} held-out questions pooled; pairs by seed: {kept}; DPO with {found['dpo_keys']}"]
    lines.append(f"answers right by learning rate, on seed {found['sweep']['seed']}, which is not counted:")
    for method in METHODS:
        told = ", ".join(f"{rate:g} {value:.3f}" for rate, value in found["sweep"][method]["accuracy"].items())
        lines.append(f"  {method:12} {told}")
    for method, scores in found["scores"].items():
        for name in CHECKPOINTS:
            accuracy, overlap = scores[name]["answer_accuracy"], scores[name]["box_iou"]
            seeds = " ".join(f"{value:.3f}" for value in scores[name]["by_seed"])
            lines.append(
                f"{method:12} {name:13} answers {accuracy['mean']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}] "
                f"by seed {seeds}   IoU {overlap['mean']:.3f}"
            )
    for name, measures in found["dpo − chosen side"].items():
        told = "   ".join(
            f"{what} {measures[key]['difference']:+.3f} [{measures[key]['low']:+.3f}, {measures[key]['high']:+.3f}]"
            for what, key in (("answers", "correct"), ("IoU", "iou"))
        )
        lines.append(f"DPO − chosen side, {name:13} {told}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--tuning-seed", type=int, default=4, help="on which the learning rates are chosen")
    parser.add_argument("--rates", default="3e-4,1e-3,3e-3")
    parser.add_argument("--dpo", type=json.loads, default={"pref_ftx": 1.0}, help="keys of `visrl train`, as JSON")
    parser.add_argument("--questions", type=int, default=1000, help="that pairs are made of, of each seed")
    parser.add_argument("--test-questions", type=int, default=1000, help="held-out ones of each seed")
    parser.add_argument("--model", default="", help="the start; the embedded model by default")
    parser.add_argument("--out", type=Path, default=Path("runs/losers"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    given.rates = [float(rate) for rate in given.rates.split(",")]
    found = compare(given)
    print(table(found))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
