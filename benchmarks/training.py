"""Stage-2 training steps: ours against the reference layout and against TRL's DPOTrainer, on one random Qwen2-VL, or
with `--family qwen3_5` on a random Qwen3.5, most of whose layers are recurrent.

The reference layout computes every sequence by itself (box and answer, chosen and rejected, policy and reference,
every step) with logits over the whole vocabulary at every token. TRL gets the same rows as box pairs and answer pairs.
Ours computes reference log-probabilities once and is charged a fifth of that pass (5 epochs); so is, with `--plain`,
the plain form of the same trainer (`layout: plain`). All train in fp32, all weights, with AdamW, on pictures not seen
before; steps of all alternate, so that a busy machine is as busy for each.

    python benchmarks/training.py --shapes small,large_vocab,long,many --repeats 5 --json training.json

FLOPs are counted with torch.utils.flop_counter over forward and backward passes. The floor is each distinct token
forward and backward once, every token attending to its ancestors only (in Gated DeltaNet: reading a state, changing it
and reading it again). Memory is the peak of a whole step less the loaded weights, each layout in a process of its own.

Times mean something on a quiet machine only. Where something else runs, take one thread (`--threads 1`): several would
wait for each other, and the waiting is what would be measured. `--shapes small --pictures 1 --repeats 1` is a quick
look.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from layouts import EPOCHS, PATCHES, SHAPES, Ours, ReferenceLayout, Shape, Trl, make_items, make_model, stage2_loss
from operations import compare_flops
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from visrl.train.items import Item

# --- measures ---------------------------------------------------------------------------------------------------------


Seconds = tuple[float, float]  # by the clock, and of the processor, which other work changes less


def now() -> Seconds:
    return time.perf_counter(), time.process_time()


def since(start: Seconds, end: Seconds | None = None) -> Seconds:
    return tuple(b - a for a, b in zip(start, end or now(), strict=True))  # type: ignore[return-value]


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[Seconds] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(now())


def step_seconds(trainer: Trainer, rows_per_step: int) -> Seconds:
    """One whole step: the second of two, and the reading of its rows, which the loop does a step ahead."""
    clock = Clock()
    trainer.args.per_device_train_batch_size = trainer._train_batch_size = rows_per_step
    trainer.add_callback(clock)
    trainer.train()
    trainer.remove_callback(clock)
    rows = [trainer.train_dataset[n] for n in range(rows_per_step, 2 * rows_per_step)]
    start = now()
    trainer.data_collator(rows)
    step, reading = since(*clock.ends), since(start)
    return step[0] + reading[0], step[1] + reading[1]


def errors(ours: Ours, theirs: ReferenceLayout, items: Sequence[Item]) -> dict[str, float]:
    """Largest relative errors of log-probabilities, and of the gradient of the stage-2 loss over all weights, where a
    weight's gradient counts as no smaller than a thousandth of all: smaller ones are rounding."""
    logps, grads = [], []
    for layout in (ours, theirs):
        sums = layout.logps(layout.batch(items))
        logps.append(sums.detach())
        layout.model.zero_grad()
        stage2_loss(sums, torch.linspace(-60, -40, len(sums))).backward()
        grads.append([weights.grad.clone() for weights in layout.model.parameters()])
        layout.model.zero_grad()
    least = 1e-3 * torch.cat([gradient.flatten() for gradient in grads[1]]).norm()
    gaps = [(a - b).norm() / b.norm().clamp(min=least) for a, b in zip(*grads, strict=True)]
    return {
        "logp_rel_error": float(((logps[0] - logps[1]) / logps[1]).abs().max()),
        "grad_rel_error": float(max(gaps)),
    }


def reference_pass_seconds(ours: Ours, items: Sequence[Item]) -> Seconds:
    """One pass for reference log-probabilities over a step's items, reading them included."""
    start = now()
    with torch.no_grad():
        ours.logps(ours.batch(items))
    return since(start)


def compare_times(shape: Shape, repeats: int, layouts: dict[str, Any], steps: Sequence[Item]) -> dict[str, Any]:
    """Medians over `repeats` rounds in which the layouts take turns, and the ratios of every round."""
    per_step = shape.pictures * shape.questions
    ahead = [name for name in ("ours", "plain") if name in layouts]  # whose reference is computed beforehand
    seconds: dict[str, list[Seconds]] = {name: [] for name in (*layouts, *(f"{name}_reference" for name in ahead))}
    for _ in range(repeats):
        for name, layout in layouts.items():
            seconds[name].append(step_seconds(layout.trainer, per_step * (2 if name == "trl" else 1)))
        for name in ahead:
            seconds[f"{name}_reference"].append(reference_pass_seconds(layouts[name], steps[:per_step]))
    result: dict[str, Any] = {"repeats": repeats}
    for which, kind in enumerate(("time", "cpu")):
        taken = {name: [pair[which] for pair in pairs] for name, pairs in seconds.items()}
        median = {name: statistics.median(times) for name, times in taken.items()}
        result |= {f"{'seconds' if kind == 'time' else kind}_{name}": value for name, value in median.items()}
        for name in ahead:
            once = f"{name}_reference"
            taken[name] = [step + part / EPOCHS for step, part in zip(taken[name], taken[once], strict=True)]
            median[name] += median[once] / EPOCHS
        for name in layouts.keys() - {"ours"}:
            result[f"{kind}_ratio_{name}"] = median[name] / median["ours"]
            result[f"{kind}_ratios_{name}"] = [round(a / b, 2) for a, b in zip(taken[name], taken["ours"], strict=True)]
    return result


# --- memory, in processes of their own --------------------------------------------------------------------------------


def resident(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (peak) of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this system does not report {field}; memory is measured on Linux only")


def memory_of(layout: str, folder: Path, scratch: Path, shape: Shape) -> int:
    """Peak bytes of two whole steps less what was there when the model had been loaded."""
    items = make_items(shape, 2 * shape.pictures, seed=0)
    kind = Ours if layout == "ours" else ReferenceLayout
    built = kind(folder, scratch, items)
    for model in (built.model, getattr(built, "reference", None)):
        for weights in model.parameters() if model is not None else ():
            weights.sum()  # what has been loaded lies in memory only once it has been read
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    step_seconds(built.trainer, shape.pictures * shape.questions)
    return resident("VmHWM") - before


def measured_memory(layout: str, folder: Path, shape: Shape) -> int:
    command = [sys.executable, __file__, "--measure-memory", layout, "--model", str(folder)]
    command += ["--family", shape.family, "--shapes", shape.name, "--pictures", str(shape.pictures)]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


# --- the whole --------------------------------------------------------------------------------------------------------


def measure(shape: Shape, repeats: int, *, trl: bool, plain: bool, memory: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder, scratch = Path(name, "model"), Path(name, "scratch")
        make_model(folder, shape)
        items = make_items(shape, 2 * shape.pictures, seed=0)
        one_step = items[: shape.pictures * shape.questions]
        ours, theirs = Ours(folder, scratch, items), ReferenceLayout(folder, scratch, items)
        packed = ours.batch(one_step)["batch"].packed
        facts: dict[str, Any] = {
            "name": shape.name, "family": shape.family, "image_tokens": shape.image_tokens,
            "crop_tokens": shape.crop_tokens, "vocab": shape.vocab, "questions": shape.questions,
            "pictures_per_step": shape.pictures,
            "tokens": packed.tokens, "padding": packed.padded_tokens - packed.tokens,
            "separate_tokens": packed.separate_tokens,
        }  # fmt: skip
        facts |= errors(ours, theirs, one_step)
        layouts: dict[str, Any] = {"ours": ours, "reference": theirs}
        if trl:
            layouts["trl"] = Trl(folder, scratch, items)
        if plain:
            layouts["plain"] = Ours(folder, scratch, items, "plain")
        facts |= compare_flops(layouts, one_step)
        facts |= compare_times(shape, repeats, layouts, items)
        del ours, theirs, layouts
        if memory:
            peaks = {layout: measured_memory(layout, folder, shape) for layout in ("ours", "reference")}
            facts |= {f"peak_mb_{layout}": round(peak / 1e6) for layout, peak in peaks.items()}
            facts["peak_memory_ratio_reference"] = peaks["reference"] / peaks["ours"]
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="small,large_vocab,long,many", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--family", choices=tuple(PATCHES), default="qwen2_vl")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--pictures", type=int, default=3, help="per step, with all their questions (3: as released)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-trl", action="store_true")
    parser.add_argument("--plain", action="store_true", help="the plain form of our trainer, too")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--measure-memory", choices=("ours", "reference"), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    shapes = [
        replace(SHAPES[name], pictures=options.pictures, family=options.family) for name in options.shapes.split(",")
    ]
    if options.measure_memory:
        with tempfile.TemporaryDirectory() as scratch:
            print(memory_of(options.measure_memory, options.model, Path(scratch), shapes[0]))
        return
    results = []
    chosen = {"trl": not options.no_trl, "plain": options.plain, "memory": not options.no_memory}
    for shape in shapes:
        results.append(measure(shape, options.repeats, **chosen))
        print(table_row(results[-1]), flush=True)
    everything = {"torch": torch.__version__, "threads": torch.get_num_threads(), "shapes": results}
    if options.json:
        options.json.write_text(json.dumps(everything, indent=1) + "\n")


def table_row(facts: dict[str, Any]) -> str:
    """One shape in a line: how many times ours is better, and how near the floor."""
    shown = {
        "FLOPs": "flops_ratio_reference", "FLOPs TRL": "flops_ratio_trl", "over floor": "flops_over_floor",
        "FLOPs plain": "flops_ratio_plain", "time": "time_ratio_reference", "time TRL": "time_ratio_trl",
        "time plain": "time_ratio_plain", "memory": "peak_memory_ratio_reference",
    }  # fmt: skip
    ratios = "  ".join(f"{name} {facts[key]:.2f}×" for name, key in shown.items() if key in facts)
    accuracy = f"logp error {facts['logp_rel_error']:.1e}  grad error {facts['grad_rel_error']:.1e}"
    return f"{facts['name']:<12} {ratios}  {accuracy}"


if __name__ == "__main__":
    main()
