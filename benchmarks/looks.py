"""Training and sampling with several looks: the tree of a question against rows, on a random Qwen2-VL of the sizes of
training.py, in fp32, all weights trained with AdamW.

A question has 8 rollouts of 4 looks: four boxes with a crop each, then the answer. What they share without a fork is
image and question; with `forked` every look of the first three is gone on from in two ways (2, 4, then 8 of each turn),
which is what `num_forks` samples. Two forms of prompt:

    question    crops under the question, what was said left out (`visrl`): a turn has a prompt that no other turn's
                sequence holds, so whoever trains on rows has a row per turn
    dialog      turns kept (`viscot`, and the public protocols): a row per rollout covers all of its turns, the best
                that rows can do; a row per turn is what is left to who trains on prompt and completion

    python benchmarks/looks.py --shapes tiny,crops16,crops64,large16,large64 --json looks.json

Rows are counted and timed without any padding, with logits at responses alone, in batches of eight; every row computes
its images. `grpo` is a step over every turn with the same advantages and loss (DAPO), for the tree that of
`stage: grpo`. `dpo` is a preference at every turn of one rollout (5 pairs); the reference of rows is computed in the
step, as TRL does for data with pictures, that of ours once for 5 epochs; `dpo_policy` is without any reference.
`prefill` is prompt tokens of every call by itself over those that the prefix KV cache computes.

FLOPs are counted with torch.utils.flop_counter over forward and backward pass; the floor is each distinct token forward
and backward once, every token attending to its ancestors only. Times: the layouts take turns, `--repeats` rounds; read
the processor's seconds on a machine where other things run. Memory is the peak of a step less the loaded weights, each
layout in a process of its own. `--shapes tiny --repeats 1` is a quick look.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from layouts import EPOCHS, Shape, make_model
from looks_layouts import FORKED, LOOKS, ROLLOUTS, SHAPES, Form, LookRollouts, Row, Rows
from online_layouts import Ours, Seconds, gradient_of
from operations import flops, token_flops, tower_flops
from torch import Tensor
from training import resident
from transformers.utils import logging

from visrl.engines.base import Sampling
from visrl.engines.local import LocalEngine
from visrl.models.load import load_encoder
from visrl.packing.forward import branch_logps
from visrl.train.losses import dpo

# --- Counts -----------------------------------------------------------------------------------------------------------


def row_flops(rows: Rows) -> float:
    """Of a step over all rows; rows that look alike cost alike."""
    total = 0.0
    known: dict[tuple[int, int], float] = {}
    for row in rows.rows:
        alike = len(row[0].ids), len(row[1])
        if alike not in known:
            known[alike] = flops(lambda row=row: rows.backward([row]))
            rows.model.zero_grad()
        total += known[alike]
    return total


def grpo_counts(folder: Path, scratch: Path, rollouts: LookRollouts) -> dict[str, Any]:
    ours = Ours(folder, scratch, rollouts)
    batch = ours.batch()
    step = flops(lambda: ours.loss(batch).backward())
    gradient = gradient_of(ours.model)
    ours.model.zero_grad()
    floor = 3 * token_flops(ours.model, batch.packed) + tower_flops(ours.model, batch.packed)[1]
    facts = {
        "tokens": batch.packed.tokens, "padding": batch.packed.padded_tokens - batch.packed.tokens,
        "separate_tokens": batch.packed.separate_tokens, "gflops": step / 1e9, "over_floor": step / floor,
    }  # fmt: skip
    for per in ("turn", "rollout") if rollouts.form == "dialog" else ("turn",):
        rows = Rows(folder, rollouts, per)
        facts[f"flops_ratio_{per}"] = row_flops(rows) / step
        facts[f"tokens_ratio_{per}"] = sum(len(path.ids) for path, _ in rows.rows) / batch.packed.tokens
        if per == "turn":
            rows.step()
            other = gradient_of(rows.model)
            facts["grad_rel_error"] = float((gradient - other).norm() / other.norm())
    return facts


def dpo_counts(ours: Ours, rollouts: LookRollouts, rows: Rows) -> dict[str, Any]:
    """A preference at every turn of the first rollout, against another text: the tree, and a row per response."""
    (own,) = rollouts.questions
    turns = [next(one for one in own if len(one.talk.views) == 1 + depth) for depth in range(LOOKS + 1)]
    encoder, paths = rollouts.encoder, []
    for turn in turns:
        other = rollouts._rollout(turn.step, "", turn.talk, len(turn.completion.ids))
        prompt = encoder.encode(turn.talk, [None])[0]
        paths += [encoder.continued(prompt, one.completion.ids) for one in (turn, other)]
    (packed, _), reference = ours.trainer.collator.pack([paths]), torch.full((2 * len(turns),), -50.0)

    def tree() -> Tensor:
        return branch_logps(ours.model, packed).sums

    step = flops(lambda: _dpo(tree(), reference).backward())
    policy = rows_once = 0.0
    for path in paths:
        row: Row = (path, [(path.start, 1.0, len(path.ids) - path.start)])
        policy += flops(lambda row=row: rows.logps([row]).sum().backward())
        with torch.no_grad():
            rows_once += flops(lambda row=row: rows.logps([row]))
    with torch.no_grad():
        once = flops(tree)
    for model in (ours.model, rows.model):
        model.zero_grad()
    return {
        "dpo_tokens": packed.tokens,
        "dpo_flops_ratio": (policy + rows_once) / (step + once / EPOCHS),
        "dpo_policy_flops_ratio": policy / step,
    }


def _dpo(sums: Tensor, reference: Tensor) -> Tensor:
    return dpo(sums[::2], sums[1::2], reference[::2], reference[1::2]).mean()


def prefill_ratio(ours: Ours, rollouts: LookRollouts) -> float:
    """Prompt tokens of every call by itself, over those that the engine computes, turn after turn."""
    engine, told = LocalEngine(ours.model, ours.encoder), []
    for depth in range(LOOKS + 1):
        talks = [one.talk for own in rollouts.questions for one in own if len(one.talk.views) == 1 + depth]
        told += engine.complete(talks, Sampling(1.0, 1.0, 1), [[n] for n in range(len(talks))])
    return sum(one.prompt_tokens for own in told for one in own) / engine.prefilled_tokens


# --- Time and memory --------------------------------------------------------------------------------------------------


def built_of(layout: str, folder: Path, scratch: Path, rollouts: LookRollouts) -> Ours | Rows:
    if layout == "ours":
        return Ours(folder, scratch, rollouts, max_steps=1)
    return Rows(folder, rollouts, "turn" if layout == "turn" else "rollout")


def update(built: Ours | Rows) -> Seconds:
    """How long one takes: forward pass, backward pass and optimiser, batches made beforehand."""
    if isinstance(built, Ours):
        built.trainer.train()
        return built.watch.updates[-1]
    optimizer = torch.optim.AdamW(built.model.parameters(), lr=1e-6)
    start = Seconds.now()
    built.step()
    optimizer.step()
    took = Seconds.now() - start
    optimizer.zero_grad()
    return took


def compare_times(layouts: dict[str, Ours | Rows], repeats: int) -> dict[str, Any]:
    """Medians over rounds in which the layouts take turns, and the ratios of every round."""
    taken: dict[str, list[Seconds]] = {name: [] for name in layouts}
    for _ in range(repeats):
        for name, built in layouts.items():
            taken[name].append(update(built))
    facts: dict[str, Any] = {"repeats": repeats}
    for kind, which in (("time", "clock"), ("cpu", "processor")):
        seconds = {name: [getattr(one, which) for one in own] for name, own in taken.items()}
        facts |= {f"{kind}_{name}": statistics.median(own) for name, own in seconds.items()}
        for name in layouts.keys() - {"ours"}:
            pairs = zip(seconds[name], seconds["ours"], strict=True)
            facts[f"{kind}_ratios_{name}"] = [round(theirs / mine, 2) for theirs, mine in pairs]
    return facts


def memory_of(layout: str, folder: Path, rollouts: LookRollouts) -> int:
    """Peak bytes of a step less what was there when the model had been loaded."""
    with tempfile.TemporaryDirectory() as scratch:
        built = built_of(layout, folder, Path(scratch), rollouts)
        for weights in built.model.parameters():
            weights.sum()  # what has been loaded lies in memory only once it has been read
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before = resident("VmRSS")
        update(built)
        return resident("VmHWM") - before


def measured_memory(layout: str, folder: Path, shape: Shape, form: Form) -> int:
    command = [sys.executable, __file__, "--measure-memory", layout, "--model", str(folder), "--shapes", shape.name]
    command += ["--forms", form, "--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


# --- The whole --------------------------------------------------------------------------------------------------------


def measure(shape: Shape, form: Form, repeats: int, *, memory: bool) -> Iterator[dict[str, Any]]:
    """The figures without forks, and the counts with them."""
    with tempfile.TemporaryDirectory() as name:
        folder, scratch = Path(name, "model"), Path(name, "scratch")
        make_model(folder, shape)
        for different in ((ROLLOUTS,) * LOOKS, FORKED):
            rollouts = LookRollouts(load_encoder(folder), shape, form, different)
            facts: dict[str, Any] = {
                "name": shape.name, "form": form, "forked": different == FORKED, "image_tokens": shape.image_tokens,
                "crop_tokens": shape.crop_tokens, "turns": len(rollouts.flat),
            }  # fmt: skip
            facts |= grpo_counts(folder, scratch, rollouts)
            names = ("ours", "turn", "rollout") if form == "dialog" else ("ours", "turn")
            if not facts["forked"]:
                layouts = {name: built_of(name, folder, scratch, rollouts) for name in names}
                ours, rows = layouts["ours"], layouts["turn"]
                assert isinstance(ours, Ours)
                assert isinstance(rows, Rows)
                facts["prefill_ratio"] = prefill_ratio(ours, rollouts)
                facts |= dpo_counts(ours, rollouts, rows)
                facts |= compare_times(layouts, repeats) if repeats else {}
                del layouts, ours, rows
                if memory:
                    facts |= {f"peak_mb_{one}": round(measured_memory(one, folder, shape, form) / 1e6) for one in names}
            yield facts


def table_row(facts: dict[str, Any]) -> str:
    """One shape in a line: how many times ours is better, and how near the floor."""
    shown = {
        "a row per turn": "flops_ratio_turn", "per rollout": "flops_ratio_rollout", "tokens": "tokens_ratio_turn",
        "over floor": "over_floor", "dpo": "dpo_flops_ratio", "dpo policy": "dpo_policy_flops_ratio",
        "prefill": "prefill_ratio",
    }  # fmt: skip
    ratios = "  ".join(f"{name} {facts[key]:.2f}×" for name, key in shown.items() if key in facts)
    seconds = "  ".join(f"{key} {facts[key]:.2f}" for key in facts if key.startswith("cpu_") and "ratios" not in key)
    peaks = "  ".join(f"{key} {facts[key]}" for key in facts if key.startswith("peak_mb_"))
    title = f"{facts['name']:<8} {facts['form']:<8} {'forked' if facts['forked'] else '':<6}"
    return "  ".join(filter(None, (title, ratios, seconds, peaks, f"grad error {facts['grad_rel_error']:.1e}")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="crops16,crops64,large16,large64", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--forms", default="question,dialog")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of steps that are timed; 0: counts alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures here too, shape by shape")
    parser.add_argument("--measure-memory", choices=("ours", "turn", "rollout"), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    shapes, forms = [SHAPES[name] for name in options.shapes.split(",")], options.forms.split(",")
    if options.measure_memory:
        rollouts = LookRollouts(load_encoder(options.model), shapes[0], forms[0])
        print(memory_of(options.measure_memory, options.model, rollouts))
        return
    results: list[dict[str, Any]] = []
    for shape in shapes:
        for form in forms:
            for facts in measure(shape, form, options.repeats, memory=not options.no_memory):
                results.append(facts)
                print(table_row(facts), flush=True)
                if options.json:
                    told = {"torch": torch.__version__, "threads": options.threads, "shapes": results}
                    options.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
