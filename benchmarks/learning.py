"""Does it learn? The whole demo under several seeds, pooled and compared question by question.

    python benchmarks/learning.py [--seeds 4] [--test-questions 1000] [--out runs/learning] [--json FILE]
        [--raft-steps N] [--rewards-seeds N]

Every seed has its own preference questions and its own held-out questions. Scores and differences are of answers, IoU
and boxes on the right object; of answers per kind of question, too; and of the crop over none. Beside the two
iterations and online reinforcement of the demo stands RAFT (fine-tuning on the best of each group), the control of
reinforcement, for as many steps as take the same processor time; and, under the first seeds, online reinforcement with
other rewards than answers alone. Finished runs are reused; another number of questions needs another `--out`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from visrl.box import Box
from visrl.evolve.clock import StepClock
from visrl.evolve.config import DemoConfig
from visrl.evolve.demo import run_demo
from visrl.evolve.generate import read_questions
from visrl.evolve.scores import evaluate_all
from visrl.evolve.training import train_online
from visrl.records import read_jsonl
from visrl.rewards.crop_effects import gain_and_harm
from visrl.rewards.results import dataset_name
from visrl.statistics import interval, paired

LOOP = ("sft", "iter0-stage1", "iter0-stage2", "iter1-stage1", "iter1-stage2")
LAST = LOOP[-1]
CHECKPOINTS = (*LOOP, "online", "raft")
COMPARED = (
    ("iter0-stage1", "sft"),
    ("iter0-stage2", "iter0-stage1"),
    ("iter0-stage2", "sft"),
    ("iter1-stage2", "iter0-stage2"),
    ("iter1-stage2", "sft"),
    ("online", "sft"),
    ("online", "iter1-stage2"),
    ("online", "raft"),
)
RAFT_STEPS, RAFT_RATE = 165, 3e-4  # the rate is the best of a sweep on a seed that is not counted
REWARDS = {  # beside answers alone, which is the demo's
    "iou": ["answer", {"name": "iou", "weight": 0.5}],
    "crop_gain": ["crop_gain"],
    "area": ["answer", {"name": "area", "weight": 0.5}],
    "format": ["answer", {"name": "format", "weight": 0.5}],
}
MODES = ("no_crop", "other_question", "random", "center", "own", "truth")
MEASURES = {"answer_accuracy": "correct", "box_iou": "iou", "right_object": "right_object"}  # and their columns

Rows = list[dict[str, Any]]


def run_seed(seed: int, given: argparse.Namespace) -> dict[str, Rows]:
    """The result rows of one seed by checkpoint (and `checkpoint.control`), running what is not there yet."""
    demo = DemoConfig(output_dir=given.out / f"seed{seed}", seed=seed, test_questions=given.test_questions, threads=1)
    run_demo(demo)
    reinforce_otherwise(demo, "raft", given.raft_steps, {"stage": "raft", "learning_rate": given.raft_rate})
    for name, rewards in REWARDS.items():
        if seed < given.rewards_seeds:
            reinforce_otherwise(demo, name, demo.online_steps, {"rewards": rewards})
    files = sorted(given.out.glob(f"seed{seed}*/eval/*.jsonl"))
    return {file.stem: list(read_jsonl(file)) for file in files}


def reinforce_otherwise(demo: DemoConfig, name: str, steps: int, keys: dict[str, Any]) -> None:
    """Online reinforcement with other keys than the demo's, from the same start, on the same questions, evaluated on
    the same held-out ones; in a folder beside the demo's own."""
    evolution = demo.model_copy(update={"online_steps": steps, "train_online": keys}).evolution()
    out = demo.output_dir.with_name(f"{demo.output_dir.name}-{name}")
    config = evolution.model_copy(update={"output_dir": out})
    samples = read_questions(str(config.eval_dataset), limit=config.eval_samples, with_box=True)
    clock, trained = StepClock(out / "seconds.json"), dict[str, str]()
    clock.time(name, lambda: trained.update({name: train_online(config)}))
    evaluate_all(out, samples, trained, config, controls=False, clock=clock)


def cpu_seconds(out: Path, seeds: int) -> dict[str, float]:
    """Mean processor seconds that a seed spent on learning: of the loop, online, and of RAFT."""
    taken: dict[str, list[float]] = {"loop": [], "online": [], "raft": []}
    for seed in range(seeds):
        demo, raft = (
            json.loads((out / name / "cpu_seconds.json").read_text(encoding="utf-8"))
            for name in (f"seed{seed}", f"seed{seed}-raft")
        )
        learning = ("generate", "filter", "stage1", "stage2")
        taken["loop"].append(sum(demo[step] for step in demo if step.partition("/")[2] in learning))
        taken["online"].append(demo["online"])
        taken["raft"].append(raft["raft"])
    return {name: sum(values) / len(values) for name, values in taken.items()}


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
            "by_seed": [sum(row["correct"] for row in run[name]) / len(run[name]) for run in runs if name in run],
        }
        for name in (*CHECKPOINTS, *REWARDS)
        if name in runs[0]
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
        for name in ("sft", LAST)
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
        "rewards": {name: _against_answers(runs, name) for name in REWARDS if name in runs[0]},
    }


def _against_answers(runs: list[dict[str, Rows]], name: str) -> dict[str, Any]:
    """Another reward against that on answers alone, over the seeds that have both, with the size of its boxes."""
    both = [run for run in runs if name in run]
    found: dict[str, Any] = {
        measure: paired(pooled(both, "online", key), pooled(both, name, key)) for measure, key in MEASURES.items()
    }
    found["box_area"] = {which: mean_area(both, which) for which in ("sft", "online", name)}
    return found


def mean_area(runs: list[dict[str, Rows]], name: str) -> float:
    """The mean share of the image in a box that could be read."""
    areas = [Box(*row["box"]).area for run in runs for row in run[name] if row["box"] is not None]
    return sum(areas) / len(areas)


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
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in found["cpu_seconds"].items())
    lines.append(f"processor time of learning, a seed: {spent}")
    for name, other in found["rewards"].items():
        answers, overlap = other["answer_accuracy"], other["box_iou"]
        areas = ", ".join(f"{which} {area:.3f}" for which, area in other["box_area"].items())
        lines.append(
            f"reward {name:10} against answers alone: answers {answers['difference']:+.3f} "
            f"[{answers['low']:+.3f}, {answers['high']:+.3f}]   IoU {overlap['difference']:+.3f}   area {areas}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--test-questions", type=int, default=1000, help="held-out ones of each seed")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--raft-steps", type=int, default=RAFT_STEPS, help="as long as the demo's online steps")
    parser.add_argument("--raft-rate", type=float, default=RAFT_RATE, help="learning rate of RAFT")
    parser.add_argument("--rewards-seeds", type=int, default=0, help="of which other rewards are tried, too")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = result([run_seed(seed, given) for seed in range(given.seeds)])
    found["cpu_seconds"] = cpu_seconds(given.out, given.seeds)
    print(table(found))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
