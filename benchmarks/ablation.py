"""What each part of self-evolution does: pairs kept, their boxes against the true ones, and the final accuracy.

    python benchmarks/ablation.py [--questions 1000] [--out runs/ablation] [--json ablation.json]

One iteration of the demo's loop on drawn scenes, four times from the same start: the whole method, without the box
critic, without the diversity controller, and with the released code's rule and settings (3 rounds, trigger 0.05, its
filter; the temperature stays the demo's, see docs/EVOLVE.md).
Finished variants are used again; another start or number of questions needs another `--out`.
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
from visrl.statistics import paired

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "without box critic": {"use_box_critic": False},
    "without diversity controller": {"diversity": False},
    "released rule": {"rule": "released", "rounds": 3, "trigger": 0.05},
}
# WP-LN of the paper's ablation in percent, and its thousands of pairs.
PAPER = {"full": (64.64, 30), "without box critic": (31.02, 86), "without diversity controller": (52.02, 19)}


def variant_config(name: str, demo: DemoConfig, out: Path) -> EvolveConfig:
    """The demo's first iteration with one switch set otherwise."""
    return demo.evolution().model_copy(
        update={**VARIANTS[name], "controls": False, "output_dir": out / name.replace(" ", "-")}
    )


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
        "accuracy_start": sum(before) / len(before),
        "accuracy": sum(after) / len(after),
        "difference": paired(before, after),
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """The variants one under another."""
    lines = [f"{'':30}{'pairs':>7}  " + "".join(f"{kind:>8}" for kind in KINDS) + "   accuracy (start → end)"]
    for name, result in found.items():
        shares = "".join(f"{result['shares'][kind]:8.2f}" if result["shares"] else f"{'–':>8}" for kind in KINDS)
        change = result["difference"]
        lines.append(
            f"{name:30}{result['kept']:7}  {shares}   {result['accuracy_start']:.3f} → {result['accuracy']:.3f} "
            f"({change['difference']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}])"
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
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    demo = DemoConfig(
        model_name_or_path=given.model, iterations=1, questions=given.questions,
        test_questions=given.test_questions, seed=given.seed,
    )  # fmt: skip
    found = {name: run_variant(name, demo, given.out) for name in given.variants.split(",")}
    print(table(found))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
