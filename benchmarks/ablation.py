"""What each part of self-evolution does: pairs kept, their boxes against the true ones, their cost, final accuracy.

    python benchmarks/ablation.py [--questions 1000] [--seed 0] [--out runs/ablation] [--json ablation.json]

One iteration of the demo's loop on drawn scenes from the same start, in several ways: the paper's method whole, without
the box critic, without the diversity controller, and with the released code's rule and settings (3 rounds, trigger
0.05, its filter; the temperature stays the demo's, see docs/EVOLVE.md); and with boxes that are scored by the answers
sampled from their crops, under the paper's rule, with random losers, and with the policy's own boxes as losers.
Finished variants are used again; another start, seed or number of questions needs another `--out`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from visrl.evolve.config import DemoConfig, EvolveConfig
from visrl.evolve.filter import KINDS, PAPER_TABLE
from visrl.evolve.loop import run_evolve
from visrl.manifest import read_manifest
from visrl.records import read_jsonl
from visrl.rollout.diversity import TRIGGER
from visrl.statistics import interval, paired

# The paper's method, whatever the demo uses.
PAPERS: dict[str, Any] = {
    **{"critic": "auto", "grader": None, "answers": 1, "losers": "paper", "min_difference": None},
    **{"rule": "paper", "t_max": 0.8, "t_min": 0.2, "use_box_critic": True},
    **{"rounds": 5, "diversity": True, "trigger": TRIGGER, "chosen_only": False, "compare_paper": False},
}
BY_ANSWERS = {"critic": "outcome", "answers": 8}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "without box critic": {"use_box_critic": False},
    "without diversity controller": {"diversity": False},
    "released rule": {"rule": "released", "rounds": 3, "trigger": 0.05},
    "outcome critic": BY_ANSWERS,
    "outcome critic, random losers": {**BY_ANSWERS, "losers": "random"},
    "outcome critic, own losers": {**BY_ANSWERS, "losers": "own", "diversity": False},
}
# WP-LN of the paper's ablation in percent, and its thousands of pairs.
PAPER = {"full": (64.64, 30), "without box critic": (31.02, 86), "without diversity controller": (52.02, 19)}


def variant_config(name: str, demo: DemoConfig, out: Path) -> EvolveConfig:
    """The demo's first iteration by one variant."""
    folder = out / name.replace(",", "").replace(" ", "-")
    values = {**demo.evolution().model_dump(), **PAPERS, **VARIANTS[name], "controls": False, "output_dir": folder}
    return EvolveConfig(**values)


def run_variant(name: str, demo: DemoConfig, out: Path) -> dict[str, Any]:
    """Pairs and scores of one variant, running what is not there yet."""
    config = variant_config(name, demo, out)
    run_evolve(config)
    filtered = read_manifest(config.output_dir / "iter0" / "filter")
    assert filtered is not None
    counts = filtered["counts"]
    boxes = counts["boxes"]
    total = sum(boxes.values())
    rows = {file.stem: list(read_jsonl(file)) for file in sorted((config.output_dir / "eval").glob("*.jsonl"))}
    before, after = ([float(row["correct"]) for row in rows[checkpoint]] for checkpoint in ("sft", "iter0-stage2"))
    return {
        "questions": counts["questions"],
        "kept": counts["kept"],
        "dropped_by_reason": counts["dropped_by_reason"],
        "boxes": boxes,
        "shares": {kind: round(100 * boxes[kind] / total, 2) for kind in KINDS} if total else {},
        "answer_pairs": counts["answer_pairs"],
        "sampled_tokens_per_pair": counts["sampled_tokens_per_pair"],
        "accuracy_start": sum(before) / len(before),
        "accuracy": interval(after),
        "difference": paired(before, after),
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """The variants one under another."""
    kinds = "".join(f"{kind:>8}" for kind in KINDS)
    lines = [f"{'':30}{'pairs':>7}{'tokens/pair':>12}  {kinds}   answers right, from the start's, difference"]
    for name, result in found.items():
        shares = "".join(f"{result['shares'][kind]:8.2f}" if result["shares"] else f"{'–':>8}" for kind in KINDS)
        start, reached, change = result["accuracy_start"], result["accuracy"], result["difference"]
        cost = "–" if result["sampled_tokens_per_pair"] is None else f"{result['sampled_tokens_per_pair']:.0f}"
        lines.append(
            f"{name:30}{result['kept']:7}{cost:>12}  {shares}   "
            f"{reached['mean']:.3f} [{reached['low']:.3f}, {reached['high']:.3f}], from {start:.3f}, "
            f"{change['difference']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"
        )
    told = [f"{name} {share} % of {thousands}k" for name, (share, thousands) in PAPER.items()]
    lines.append(f"WP-LN in the paper, with real data: {', '.join(told)}; its full table {PAPER_TABLE}")
    return "\n".join(lines)


def main() -> None:
    """Parse, run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--test-questions", type=int, default=1000)
    parser.add_argument("--model", default="", help="the start; the embedded model by default")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    demo = DemoConfig(
        model_name_or_path=given.model, iterations=1, questions=given.questions,
        test_questions=given.test_questions, seed=given.seed,
    )  # fmt: skip
    found = {name: run_variant(name, demo, given.out) for name in given.variants}
    print(table(found))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
