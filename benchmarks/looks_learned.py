"""Several looks, learned: two looks against one, looks that have a price, and more looks than were trained.

    OMP_NUM_THREADS=1 python benchmarks/looks_learned.py [--seeds 4] [--scenes 200] [--out runs/looks_learned]
        [--first-seed 0] [--only two one warm free priced] [--json FILE]

Of each seed there are four models, trained on scenes of its own and evaluated on held-out ones of its own. The first
two are short warm-ups about two tags, by configs/tiny/train_looks.yaml but for the questions and their number; the
others start from the shipped warm-up (warm), and are asked every kind of question:

two      a look at each tag
one      the same steps, questions and learning rate, with one look: at the smallest box around both tags
free     online reinforcement (configs/tiny/train_online_looks.yaml) for right answers alone
priced   the same with its `look_price`

Compared question by question over all seeds: "two" with "one", each with as many looks as it was taught; how many of
the questions that need no look "warm", "free" and "priced" answer without one; and each model with more looks than it
was trained with. Finished runs are reused, and a killed one goes on; another number of scenes needs another `--out`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from operations import flops

from visrl.config import read_config
from visrl.evaluate.config import EvalConfig
from visrl.evaluate.run import evaluate
from visrl.evolve.clock import StepClock
from visrl.manifest import read_manifest
from visrl.models.load import load_encoder
from visrl.models.tiny import LOOKS_CHECKPOINT
from visrl.packing.forward import token_logps
from visrl.records import read_jsonl
from visrl.rewards.results import dataset_name
from visrl.scenes import LOOK_KINDS
from visrl.statistics import interval, paired
from visrl.train.config import Phase, TrainConfig
from visrl.train.curriculum import Curriculum
from visrl.train.items import Collator
from visrl.train.model import prepare_model
from visrl.train.run import train

WARM_UP, ONLINE = Path("configs/tiny/train_looks.yaml"), Path("configs/tiny/train_online_looks.yaml")
BLOCK = 100_000  # scenes of a seed alone
TWO_TAGS = ("both", "compare", "sum")
MORE_LOOKS = 6
# Of each model: the kinds of its questions, how many of each held-out scene, and how often it may look when asked.
ASKED = {
    "two": (TWO_TAGS, 1, (2, MORE_LOOKS)),
    "one": (TWO_TAGS, 1, (1,)),
    "warm": (LOOK_KINDS, 2, (3, MORE_LOOKS)),
    "free": (LOOK_KINDS, 2, (3, MORE_LOOKS)),
    "priced": (LOOK_KINDS, 2, (3, MORE_LOOKS)),
}

Rows = list[dict[str, Any]]


def two_tags(start: int, max_looks: int | None) -> list[Phase]:
    """Where to look, then how to go on from there; with `max_looks` 1 the smallest box around both tags."""
    asked: dict[str, Any] = {
        "looks": True, "start": start, "kinds": list(TWO_TAGS), "per_scene": 2, "margin": 0.1, "max_looks": max_looks
    }  # fmt: skip
    return [Phase(steps=100, tasks=["locate"], **asked), Phase(steps=150, loose=0.15, **asked)]


def warm_up(name: str, seed: int, out: Path) -> TrainConfig:
    """The config of a short warm-up: "two" or "one"."""
    given = [
        f"output_dir={out / name}",
        f"seed={seed}",
        "lr_scheduler_kwargs={num_decay_steps: 60, min_lr_ratio: 0.05}",
    ]
    config = read_config(TrainConfig, WARM_UP, given)
    return config.model_copy(update={"curriculum": two_tags(seed * BLOCK, 1 if name == "one" else None)})


def warm_up_gflops(name: str) -> float:
    """Operations of a whole warm-up, from the first three steps of each of its phases."""
    config = warm_up(name, 0, Path("unused"))
    model, encoder = prepare_model(config), load_encoder(config.model_name_or_path)
    collator, size, counted = Collator(encoder), int(config.trainer_values()["per_device_train_batch_size"]), 0.0
    for phase in config.curriculum or ():
        curriculum = Curriculum(encoder, [phase], size)
        batches = [collator([curriculum[step * size + n] for n in range(size)])["batch"] for step in range(3)]
        work = [flops(lambda batch=batch: token_logps(model, batch.packed).sum().backward()) for batch in batches]
        counted += phase.steps * sum(work) / len(work)
    return counted / 1e9


def train_model(name: str, seed: int, out: Path) -> None:
    """Train one of the models, or what is left of it."""
    if name in ("free", "priced"):
        price = ["look_price=0.0"] if name == "free" else []
        config = read_config(TrainConfig, ONLINE, [f"output_dir={out / name}", f"seed={seed}", *price])
        kinds, _, count = str(config.dataset).partition("/")
        config = config.model_copy(update={"dataset": f"{kinds}/{seed * BLOCK}+{count.rpartition('+')[2]}"})
    else:
        config = warm_up(name, seed, out)
    train(config)


def rows_of(model: str, max_looks: int, seed: int, given: argparse.Namespace) -> Rows:
    """The result rows of a model on a seed's held-out questions, asked now where they were not."""
    kinds, each, _ = ASKED[model]
    out = given.out / f"seed{seed}"
    config = EvalConfig(
        model_name_or_path=str(LOOKS_CHECKPOINT if model == "warm" else out / model),
        dataset=f"scenes:test@looks:{','.join(kinds)}/{seed * BLOCK}+{given.scenes}*{each}",
        max_looks=max_looks,
        output_dir=out / f"{model}-{max_looks}",
    )
    evaluate(config)
    return list(read_jsonl(config.output_dir / "results.jsonl"))


def run_seed(seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """What is wanted of a seed: rows by model and looks, and what training took."""
    out = given.out / f"seed{seed}"
    clock = StepClock(out / "seconds.json")
    found: dict[str, Any] = {"rows": {}, "cpu_seconds": clock.cpu_seconds, "steps": {}}
    for name in given.only:
        if name != "warm" and not (out / name / "manifest.json").is_file():
            clock.time(name, lambda name=name: train_model(name, seed, out))  # type: ignore[misc]
        found["steps"][name] = (read_manifest(out / name) or {}).get("steps")
        for looks in ASKED[name][2]:
            found["rows"][f"{name}, {looks}"] = rows_of(name, looks, seed, given)
    return found


# --- What is compared -------------------------------------------------------------------------------------------------


def pooled(runs: Sequence[dict[str, Any]], which: str, value: Callable[[dict[str, Any]], float]) -> list[list[float]]:
    """A value of every question, seed by seed, in the order of the questions; nothing where a seed lacks these rows."""
    return [[value(row) for row in run["rows"][which]] for run in runs if which in run["rows"]]


def right(row: dict[str, Any]) -> float:
    return float(row["exact"] or 0)


def difference(runs: Sequence[dict[str, Any]], before: str, after: str) -> dict[str, Any] | None:
    """`after` less `before` in right answers, over all questions and by seed; None where one of them was not run."""
    a, b = pooled(runs, before, right), pooled(runs, after, right)
    if not a or not b:
        return None
    found: dict[str, Any] = paired(list(chain.from_iterable(a)), list(chain.from_iterable(b)))
    found["by_seed"] = [sum(y) / len(y) - sum(x) / len(x) for x, y in zip(a, b, strict=True)]
    means = {"before": interval(list(chain.from_iterable(a))), "after": interval(list(chain.from_iterable(b)))}
    return means | found


def by_kind(runs: Sequence[dict[str, Any]], which: str) -> dict[str, dict[str, Any]]:
    """Of each kind of question: how many, the share right, and how many looks were taken how often."""
    rows = [row for run in runs for row in run["rows"].get(which, [])]
    found: dict[str, dict[str, Any]] = {}
    for kind in sorted({dataset_name(row) for row in rows}):
        own = [row for row in rows if dataset_name(row) == kind]
        looks = Counter(len(row["looks"]) for row in own)
        found[kind.removeprefix("scenes-")] = {
            "n": len(own),
            "right": sum(map(right, own)) / len(own),
            "looks": dict(sorted(looks.items())),
        }
    return found


def without_look(runs: Sequence[dict[str, Any]], which: str) -> dict[str, Any] | None:
    """The share of questions about a large tag that are answered without a look, how many of these answers are right,
    and the share of all other questions that are looked at."""
    rows = [[row for row in run["rows"].get(which, [])] for run in runs]
    large = [[row for row in own if dataset_name(row) == "scenes-large"] for own in rows]
    if not any(large):
        return None
    others = [row for own in rows for row in own if dataset_name(row) != "scenes-large"]
    at_once = [float(not row["looks"]) for own in large for row in own]
    return {
        "at_once": interval(at_once),
        "by_seed": [sum(not row["looks"] for row in own) / len(own) for own in large if own],
        "right": sum(right(row) for own in large for row in own) / len(at_once),
        "others_looked_at": sum(bool(row["looks"]) for row in others) / len(others),
    }


def result(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = sorted({name for run in runs for name in run["rows"]})
    several = [name for name, (_, _, looks) in ASKED.items() if MORE_LOOKS in looks]
    return {
        "seeds": len(runs),
        "by_kind": {name: by_kind(runs, name) for name in names},
        "differences": {
            "two looks − one": difference(runs, "one, 1", "two, 2"),
            "priced − warm": difference(runs, "warm, 3", "priced, 3"),
            "priced − free": difference(runs, "free, 3", "priced, 3"),
            **{
                f"{name}, {MORE_LOOKS} looks − {least}": difference(runs, f"{name}, {least}", f"{name}, {MORE_LOOKS}")
                for name in several
                for least in ASKED[name][2][:1]
            },
        },
        "without a look": {name: without_look(runs, f"{name}, 3") for name in ("warm", "free", "priced")},
        "cpu_seconds": [run["cpu_seconds"] for run in runs],
        "steps": [run["steps"] for run in runs],
    }


def shown(found: dict[str, Any]) -> str:
    seeds = " ".join(f"{value:+.3f}" for value in found["by_seed"])
    means = f"{found['before']['mean']:.3f} → {found['after']['mean']:.3f}"
    return f"{means}   {found['difference']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]   by seed {seeds}"


def table(found: dict[str, Any]) -> str:
    lines = [f"{found['seeds']} seeds", ""]
    for name, kinds in found["by_kind"].items():
        lines.append(name)
        lines += [
            f"    {kind:9} n {own['n']:5}   right {own['right']:.3f}   looks {own['looks']}"
            for kind, own in kinds.items()
        ]
    lines.append("")
    lines += [f"{name:20} {shown(own)}" for name, own in found["differences"].items() if own]
    for name, own in found["without a look"].items():
        if own:
            share, others = own["at_once"], own["others_looked_at"]
            seeds = " ".join(f"{value:.3f}" for value in own["by_seed"])
            lines.append(
                f"{name:7} answers {share['mean']:.3f} [{share['low']:.3f}, {share['high']:.3f}] of what needs no look "
                f"without one (by seed {seeds}), {own['right']:.3f} right; looks at {others:.3f} of the others"
            )
    for seed, (seconds, steps) in enumerate(zip(found["cpu_seconds"], found["steps"], strict=True)):
        spent = ", ".join(f"{name} {steps.get(name)} steps in {taken:.0f} s" for name, taken in seconds.items())
        lines.append(f"processor time, seed {seed}: {spent}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=200, help="held-out ones of each seed")
    parser.add_argument(
        "--only", nargs="+", choices=list(ASKED), default=list(ASKED), help="models to train and evaluate"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/looks_learned"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    found = result([run_seed(seed, given) for seed in range(given.first_seed, given.first_seed + given.seeds)])
    found["gflops"] = {name: warm_up_gflops(name) for name in ("two", "one") if name in given.only}
    print(table(found))
    print(
        "operations of a warm-up: " + ", ".join(f"{name} {count:,.0f} GFLOP" for name, count in found["gflops"].items())
    )
    print(f"{time.monotonic() - started:.0f} s")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
