"""Online steps: the packed tree against one row per rollout and against TRL's GRPOTrainer, on one random Qwen2-VL of
each shape of training.py, in fp32, all weights trained with AdamW.

A question has 8 boxes and 4 answers from the crop of each: 40 responses. One row per rollout computes every one of them
as a whole sequence, its pictures included, in padded batches of eight; the tree computes what they share once. All get
the same sampled ids, the same advantages and the same loss (DAPO).

    python benchmarks/online.py --shapes small,long --json online.json

TRL's trainer gets the rollouts through its `rollout_func`, each a row with a prompt of its own, and computes its own
batches, losses and steps; the advantages are handed to it. An update is forward pass, backward pass and optimiser;
making a batch of completions (prompts encoded, pictures processed, packed or padded) is timed apart, and no sampling is
in either. The trainers take turns, a step each; loss and gradient of the first are compared. On a machine where other
things run take the processor's seconds (`cpu_…`), and one thread.

FLOPs are counted with torch.utils.flop_counter over forward and backward pass. The floor is each distinct token forward
and backward once, every token attending to its ancestors only. `prefill_ratio` is how many prompt tokens a sampler
computes that shares nothing between calls, over those that the prefix KV cache computes. Memory is the peak of two
whole steps less the loaded weights, each layout in a process of its own. `run` is what the steps of a real training of
the embedded model consist of. `--shapes tiny --repeats 1` is a quick look.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # of `rollout_func`

import torch
from layouts import SHAPES, Shape, make_model
from online_layouts import ROWS, Ours, Rollouts, Rows, Trl
from operations import flops, token_flops, tower_flops
from training import resident
from transformers.utils import logging

from visrl.config import read_config
from visrl.engines.base import Sampling
from visrl.engines.local import LocalEngine
from visrl.models.load import load_encoder
from visrl.train.config import TrainConfig
from visrl.train.run import train

BOXES, ANSWERS = 8, 4  # of a question, and from each crop
RUN = Path(__file__).parent.parent / "configs" / "tiny" / "train_online.yaml"


# --- counts -----------------------------------------------------------------------------------------------------------


def counts(folder: Path, ours: Ours, rollouts: Rollouts) -> dict[str, Any]:
    """Tokens and operations of a step, ours and one row per rollout."""
    batch, rows = ours.batch(), Rows(folder, rollouts, size=1)
    step = flops(lambda: ours.loss(batch).backward())
    ours.model.zero_grad()
    # All boxes cost the same, and so do all answers.
    box, answer = (flops(lambda row=row: rows.backward(row)) for row in (rows.batches[0], rows.batches[-1]))
    of_question = rollouts.boxes * (box + rollouts.answers * answer)
    floor = 3 * token_flops(ours.model, batch.packed) + tower_flops(ours.model, batch.packed)[1]
    return {
        "tokens": batch.packed.tokens,
        "padding": batch.packed.padded_tokens - batch.packed.tokens,
        "separate_tokens": batch.packed.separate_tokens,
        "gflops": step / 1e9,
        "flops_ratio_rows": len(rollouts.questions) * of_question / step,
        "over_floor": step / floor,
    }


def prefill_ratio(ours: Ours, rollouts: Rollouts) -> float:
    """Prompt tokens of every call by itself, over those that the engine computes of both steps of all questions."""
    engine, one_token = LocalEngine(ours.model, ours.encoder), Sampling(1.0, 1.0, 1)
    told = []
    for talks, count in zip(rollouts.talks(), (rollouts.boxes, rollouts.answers), strict=True):
        told += engine.complete(talks, one_token, [list(range(count))] * len(talks))
    return sum(one.prompt_tokens for own in told for one in own) / engine.prefilled_tokens


# --- time -------------------------------------------------------------------------------------------------------------


def compare_trl(ours: Ours, trl: Trl, repeats: int) -> dict[str, Any]:
    """Medians over `repeats` steps in which the trainers take turns; of the first also how far ours is from TRL's loss
    and gradient, which are those of one row per rollout."""
    layouts = {"ours": ours, "trl": trl}
    for number in range(repeats):
        for layout in layouts.values():
            layout.trainer.train()
        if number == 0:
            facts = errors(ours, trl)
        taken = {name: layout.watch.updates[-1] for name, layout in layouts.items()}
        told = "  ".join(f"{name} {own.clock:.2f} s ({own.processor:.2f})" for name, own in taken.items())
        print(f"update {number + 1}, by the clock (of the processor): {told}", flush=True)
    facts["repeats"] = repeats
    for kind, which in (("time", "clock"), ("cpu", "processor")):
        updates = {name: [getattr(took, which) for took in own.watch.updates] for name, own in layouts.items()}
        wholes = {
            name: [getattr(a + b, which) for a, b in zip(own.watch.updates, own.watch.prepared, strict=True)]
            for name, own in layouts.items()
        }
        for label, seconds in (("", updates), ("prepared_", wholes)):
            median = {name: statistics.median(taken) for name, taken in seconds.items()}
            facts |= {f"{label}{'seconds' if kind == 'time' else kind}_{name}": value for name, value in median.items()}
            facts[f"{label}{kind}_ratio_trl"] = median["trl"] / median["ours"]
            pairs = zip(seconds["trl"], seconds["ours"], strict=True)
            facts[f"{label}{kind}_ratios_trl"] = [round(b / a, 2) for b, a in pairs]
    return facts


def errors(ours: Ours, trl: Trl) -> dict[str, Any]:
    """Relative errors of the loss and of the gradient over all weights, of the step that was the last of both."""
    mine, theirs = ours.watch, trl.watch
    return {
        "loss_rel_error": abs(mine.losses[-1] - theirs.losses[-1]) / abs(theirs.losses[-1]),
        "grad_rel_error": float((mine.gradient - theirs.gradient).norm() / theirs.gradient.norm()),
    }


def shares_of_a_run(steps: int) -> dict[str, Any]:
    """What steps of `visrl train` on the embedded model consist of, by the clock: means over all but the first."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name, "out")
        more = [f"output_dir={out}", f"max_steps={1 + steps}", "logging_steps=1", "save_strategy=no",
                "disable_tqdm=true"]  # fmt: skip
        config = read_config(TrainConfig, RUN, more)
        train(config)
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    taken = [row for row in rows if "time/update" in row][1:]
    seconds = {part: statistics.mean(row[f"time/{part}"] for row in taken) for part in ("rollout", "reward", "update")}
    whole = sum(seconds.values())
    return {
        "steps": len(taken), "questions": config.per_device_train_batch_size, "boxes": config.num_generations,
        "answers": config.num_answers, "seconds_of_a_step": whole,
        **{f"share_{part}": own / whole for part, own in seconds.items()},
    }  # fmt: skip


# --- memory, in processes of their own --------------------------------------------------------------------------------


def memory_of(layout: str, folder: Path, scratch: Path, shape: Shape) -> int:
    """Peak bytes of two whole steps less what was there when the model had been loaded.

    `rows` and `row` are one row per rollout, eight at a time and one at a time; a batch of answers, the longest rows,
    stands for all of a step, for each lets go of its memory before the next.
    """
    rollouts = Rollouts(load_encoder(folder), shape, BOXES, ANSWERS)
    if layout == "ours":
        built: Ours | Rows = Ours(folder, scratch, rollouts)
    else:
        built = Rows(folder, rollouts, size=1 if layout == "row" else ROWS)
    for weights in built.model.parameters():
        weights.sum()  # what has been loaded lies in memory only once it has been read
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    if isinstance(built, Ours):
        built.trainer.train()
    else:
        optimizer = torch.optim.AdamW(built.model.parameters(), lr=1e-6)
        for _ in range(2):
            built.backward(built.batches[-1])
            optimizer.step()
            optimizer.zero_grad()
    return resident("VmHWM") - before


def measured_memory(layout: str, folder: Path, shape: Shape) -> int:
    command = [sys.executable, __file__, "--measure-memory", layout, "--model", str(folder)]
    command += ["--shapes", shape.name, "--pictures", str(shape.pictures), "--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


# --- the whole --------------------------------------------------------------------------------------------------------


def measure(shape: Shape, repeats: int, *, trl: bool = True, memory: bool = True) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder, scratch = Path(name, "model"), Path(name, "scratch")
        make_model(folder, shape)
        rollouts = Rollouts(load_encoder(folder), shape, BOXES, ANSWERS)
        ours = Ours(folder, scratch, rollouts, max_steps=1)
        facts: dict[str, Any] = {
            "name": shape.name, "boxes": BOXES, "answers": ANSWERS, "questions": len(rollouts.questions),
            "image_tokens": shape.image_tokens, "crop_tokens": shape.crop_tokens, "vocab": shape.vocab,
        }  # fmt: skip
        facts |= counts(folder, ours, rollouts)
        facts["prefill_ratio"] = prefill_ratio(ours, rollouts)
        print(table_row(facts), flush=True)  # what needs no clock
        if trl:
            facts |= compare_trl(ours, Trl(folder, scratch, rollouts, max_steps=1), repeats)
        del ours
        if memory:
            peaks = {layout: measured_memory(layout, folder, shape) for layout in ("ours", "rows", "row")}
            facts |= {f"peak_mb_{layout}": round(peak / 1e6) for layout, peak in peaks.items()}
            facts["peak_memory_ratio_rows"] = peaks["rows"] / peaks["ours"]
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="small,long", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=1, help="per step, with all their questions")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--run-steps", type=int, default=8, help="of the real training; 0: none")
    parser.add_argument("--no-trl", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures here too, shape by shape")
    parser.add_argument("--measure-memory", choices=("ours", "rows", "row"), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    shapes = [replace(SHAPES[name], pictures=options.pictures) for name in options.shapes.split(",")]
    if options.measure_memory:
        with tempfile.TemporaryDirectory() as scratch:
            print(memory_of(options.measure_memory, options.model, Path(scratch), shapes[0]))
        return
    everything: dict[str, Any] = {"torch": torch.__version__, "threads": options.threads, "shapes": []}
    if options.run_steps:
        everything["run"] = shares_of_a_run(options.run_steps)
        print("a real run: " + "  ".join(f"{key} {value:.3g}" for key, value in everything["run"].items()), flush=True)
    for shape in shapes:
        facts = measure(shape, options.repeats, trl=not options.no_trl, memory=not options.no_memory)
        everything["shapes"].append(facts)
        print(table_row(facts), flush=True)
        if options.json:
            options.json.write_text(json.dumps(everything, indent=1) + "\n")


def table_row(facts: dict[str, Any]) -> str:
    """One shape in a line: how many times ours is better, and how near the floor."""
    shown = {
        "FLOPs": "flops_ratio_rows", "over floor": "over_floor", "time TRL": "time_ratio_trl",
        "processor TRL": "cpu_ratio_trl", "prefill": "prefill_ratio", "memory": "peak_memory_ratio_rows",
    }  # fmt: skip
    ratios = "  ".join(f"{name} {facts[key]:.2f}×" for name, key in shown.items() if key in facts)
    accuracy = [f"{name} error {facts[f'{name}_rel_error']:.1e}" for name in ("loss", "grad") if "repeats" in facts]
    return "  ".join((f"{facts['name']:<12} {ratios}", *accuracy))


if __name__ == "__main__":
    main()
