"""Stage-2 training steps: ours against the reference layout and against TRL's DPOTrainer, on one random Qwen2-VL.

The reference layout computes every sequence by itself (box and answer, chosen and rejected, policy and reference,
every step) with logits over the whole vocabulary at every token. TRL gets the same rows as box pairs and answer pairs.
Ours computes reference log-probabilities once and is charged a fifth of that pass (5 epochs). All train in fp32, all
weights, with AdamW, on pictures not seen before; steps of the three alternate, so that a busy machine is as busy for
each.

    python benchmarks/training.py --shapes small,large_vocab,long,many --repeats 5 --json training.json

FLOPs are counted with torch.utils.flop_counter over forward and backward passes. The floor is each distinct token
forward and backward once, every token attending to its ancestors only. Memory is the peak of a whole step less the
loaded weights, each layout in a process of its own.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

from visrl.conversation import Conversation, Message, View
from visrl.models.attention import use_tree_attention
from visrl.models.encode import Encoder
from visrl.models.load import load_encoder, load_model
from visrl.models.tiny.make import CHAT_TEMPLATE, make_tokenizer, tiny_config
from visrl.prompts import IMAGE
from visrl.train.config import TrainConfig
from visrl.train.forward import branch_logps
from visrl.train.items import Batch, Collator, Item, Row, encode_item
from visrl.train.losses import dpo
from visrl.train.pack import TIGHT_BUCKET
from visrl.train.trainer import VisrlTrainer

EPOCHS = 5  # over which ours spreads its one reference pass
QUESTION, BOX, ANSWER = 24, 18, 8  # tokens, the end of the turn included
PATCH = 28  # pixels along a merged token's side


@dataclass(frozen=True)
class Shape:
    name: str
    image_tokens: int
    crop_tokens: int
    vocab: int
    questions: int = 1  # per picture
    pictures: int = 2  # per step


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 16, 4, 640),
        Shape("small", 256, 64, 2_000),
        Shape("large_vocab", 256, 64, 152_000),
        Shape("long", 1024, 256, 32_000),
        Shape("many", 256, 64, 2_000, questions=4),
    )
}


# --- model and rows ---------------------------------------------------------------------------------------------------


def make_model(folder: Path, shape: Shape) -> None:
    """A random Qwen2-VL in `folder`: hidden 256, 6 layers, MLP 4×, vision tower of 4 layers of 192; and a processor."""
    tokenizer = make_tokenizer()
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [8, 12, 12]}
    sizes: dict[str, Any] = {
        "vocab_size": max(shape.vocab, len(tokenizer)), "hidden_size": 256, "num_hidden_layers": 6,
        "intermediate_size": 1024, "max_position_embeddings": 8192, "rope_parameters": rope,
    }  # fmt: skip
    config = tiny_config(tokenizer, **sizes)
    config.vision_config.depth, config.vision_config.embed_dim = 4, 192
    torch.manual_seed(0)
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    pictures = Qwen2VLImageProcessor(size={"shortest_edge": PATCH**2, "longest_edge": 8192 * PATCH**2})
    Qwen2VLProcessor(pictures, tokenizer, Qwen2VLVideoProcessor(), chat_template=CHAT_TEMPLATE).save_pretrained(folder)


def make_items(shape: Shape, pictures: int, seed: int) -> list[Item]:
    """One item per question, `questions` of each of `pictures` random pictures; digits are a token each."""
    rng = np.random.default_rng(seed)

    def digits(count: int) -> str:
        return "".join(str(d) for d in rng.integers(0, 10, count))

    def picture(tokens: int) -> Image.Image:
        side = int(tokens**0.5) * PATCH
        return Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))

    items = []
    for n in range(pictures):
        whole = View(f"{seed}/{n}", picture(shape.image_tokens))
        for q in range(shape.questions):
            name = f"{seed}/{n}/{q}"
            detail = View(f"{name}#crop", picture(shape.crop_tokens), is_crop=True)
            question = digits(QUESTION)
            # The question alone, without the sentences of the prompts: its length is part of the shape.
            box_talk = Conversation((Message("user", f"{IMAGE}\n{question}"),), (whole,))
            answer_talk = Conversation((Message("user", f"{IMAGE}\n{question}\n{IMAGE}"),), (whole, detail))
            rows = []
            for step, talk, length in (("box", box_talk, BOX), ("answer", answer_talk, ANSWER)):
                pair = (("chosen", digits(length - 1)), ("rejected", digits(length - 1)))
                rows.append(Row(f"{name}/{step}", step, talk, pair))
            items.append(Item(name, tuple(rows)))
    return items


# --- the three layouts ------------------------------------------------------------------------------------------------


class Ours:
    """Packed trees; the reference's log-probabilities are made beforehand, by the same pass."""

    def __init__(self, folder: Path, scratch: Path, items: Sequence[Item]) -> None:
        self.model, self.encoder = load_model(folder), load_encoder(folder)
        use_tree_attention(self.model, blocks=True)
        self.collate = Collator(self.encoder, bucket=TIGHT_BUCKET)
        config = TrainConfig(
            model_name_or_path=str(folder), stage="dpo", rl_stage=2, finetuning_type="full", output_dir=scratch
        )
        self.trainer = VisrlTrainer(
            visrl_config=config, encoder=self.encoder, model=self.model, args=arguments(TrainingArguments, scratch),
            train_dataset=items, data_collator=self.collate,
        )  # fmt: skip
        self.trainer.reference = dict.fromkeys(
            (f"{row.key}/{role}" for item in items for row in item.rows for role, _ in row.responses), -50.0
        )

    def batch(self, items: Sequence[Item]) -> dict[str, Batch]:
        return self.collate(items)

    def logps(self, batch: dict[str, Batch]) -> Tensor:
        return branch_logps(self.model, batch["batch"].packed).sums


class ReferenceLayout:
    """Every sequence by itself, two padded batches (box, answer), full logits, policy and reference every step."""

    def __init__(self, folder: Path, scratch: Path, items: Sequence[Item]) -> None:
        self.model, self.reference, self.encoder = load_model(folder), load_model(folder).eval(), load_encoder(folder)
        self.reference.requires_grad_(False)
        layout = self

        class Loop(Trainer):
            def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
                return layout.loss(inputs, layout.reference)

        self.trainer = Loop(
            model=self.model, args=arguments(TrainingArguments, scratch), train_dataset=items, data_collator=self.batch
        )

    def batch(self, items: Sequence[Item]) -> dict[str, Any]:
        paths, branches = [], []
        for number, item in enumerate(items):
            own, what = encode_item(self.encoder, number, item)
            paths += own
            branches += what
        halves = []
        for step in ("box", "answer"):
            members = [n for n, branch in enumerate(branches) if branch.step == step]
            halves.append((torch.tensor(members), padded([paths[n] for n in members], self.encoder)))
        return {"halves": halves, "count": len(paths)}

    def logps(self, batch: dict[str, Any], model: nn.Module | None = None) -> Tensor:
        model = model or self.model
        sums = torch.zeros(batch["count"])
        for members, (inputs, labels) in batch["halves"]:
            logits = model(**inputs, use_cache=False).logits[:, :-1].float()
            every = logits.log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
            sums = sums.index_add(0, members, (every * (labels[:, 1:] >= 0)).sum(-1))
        return sums

    def loss(self, batch: dict[str, Any], reference: nn.Module) -> Tensor:
        with torch.no_grad():
            before = self.logps(batch, reference)
        return stage2_loss(self.logps(batch), before)


class Trl:
    """TRL's own trainer on the same rows, a box pair and an answer pair per item. It refuses to compute reference
    log-probabilities beforehand for data with pictures."""

    def __init__(self, folder: Path, scratch: Path, items: Sequence[Item]) -> None:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        rows = [trl_row(row) for item in items for row in item.rows]
        options = arguments(DPOConfig, scratch, max_length=None, gradient_checkpointing=False, bf16=False, beta=0.1)
        options.per_device_train_batch_size *= 2
        encoder = load_encoder(folder)
        self.trainer = DPOTrainer(
            model=load_model(folder), args=options, train_dataset=Dataset.from_list(rows),
            processing_class=encoder.processor,
        )  # fmt: skip


def arguments(kind: type, scratch: Path, **more: Any) -> Any:
    """The same loop for all: AdamW, fp32, no dropout, no saving."""
    return kind(
        output_dir=str(scratch), report_to="none", use_cpu=True, max_steps=3, save_strategy="no", disable_tqdm=True,
        logging_strategy="no", remove_unused_columns=False, train_sampling_strategy="sequential", 
        dataloader_pin_memory=False, learning_rate=1e-6, **more,
    )  # fmt: skip


def padded(paths: Sequence[Any], encoder: Encoder) -> tuple[dict[str, Tensor], Tensor]:
    """A padded batch of whole sequences, each with its own copy of its pictures, and labels [rows, length]."""
    length = max(len(path.ids) for path in paths)
    ids = torch.full((len(paths), length), encoder.tokenizer.pad_token_id)
    labels = torch.full((len(paths), length), -100)
    mask = torch.zeros(len(paths), length, dtype=torch.long)
    for n, path in enumerate(paths):
        ids[n, : len(path.ids)] = torch.from_numpy(path.ids)
        labels[n, path.start : len(path.ids)] = torch.from_numpy(path.ids[path.start :])
        mask[n, : len(path.ids)] = 1
    pictures = [view.pictures for path in paths for view in path.views]
    joined = {name: torch.cat([picture[name] for picture in pictures]) for name in pictures[0]}
    types = (ids == encoder.image_token_id).int()
    return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types, **joined}, labels


def stage2_loss(policy: Tensor, reference: Tensor) -> Tensor:
    """The stage-2 loss of log-probabilities ordered box chosen, box rejected, answer chosen, answer rejected, …"""
    chosen, rejected = slice(0, None, 2), slice(1, None, 2)
    rows = dpo(policy[chosen], policy[rejected], reference[chosen], reference[rejected])
    return 0.5 * rows.sum() / (len(rows) / 2)


def trl_row(row: Row) -> dict[str, Any]:
    """A row in TRL's conversational form."""
    content: list[dict[str, str]] = []
    for number, text in enumerate(row.conversation.messages[0].text.split(IMAGE)):
        content += [{"type": "image", "text": ""}] * (number > 0) + [{"type": "text", "text": text}] * bool(text)
    answers = {
        role: [{"role": "assistant", "content": [{"type": "text", "text": text}]}] for role, text in row.responses
    }
    images = [view.image for view in row.conversation.views]
    return {"images": images, "prompt": [{"role": "user", "content": content}], **answers}


# --- measures ---------------------------------------------------------------------------------------------------------


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def step_seconds(trainer: Trainer, rows_per_step: int) -> float:
    """One whole step, from the end of the first to the end of the second of three: the third one's rows are read in
    that time."""
    clock = Clock()
    trainer.args.per_device_train_batch_size = trainer._train_batch_size = rows_per_step
    trainer.add_callback(clock)
    trainer.train()
    trainer.remove_callback(clock)
    return clock.ends[1] - clock.ends[0]


def flops(work: Callable[[], Any]) -> float:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def floor_flops(ours: Ours, batch: Batch) -> float:
    """Each distinct token forward and backward once, and a fifth of a forward pass for the reference.

    A backward pass costs twice the forward pass. Attention is counted between tokens and their ancestors only.
    """
    call = batch.packed.calls[0]
    text = ours.model.config.text_config
    layers = [m for m in ours.model.model.language_model.layers.modules() if isinstance(m, nn.Linear)]
    linear = 2 * sum(layer.weight.numel() for layer in layers) * batch.packed.tokens
    padding = batch.packed.laid_tokens - batch.packed.tokens
    pairs = int(call.inputs["attention_mask"].sum()) - padding
    attention = 4 * pairs * text.hidden_size * text.num_hidden_layers
    output = 2 * len(call.keep) * text.hidden_size * text.vocab_size
    tower = ours.model.model.visual
    pixels, grids = call.inputs["pixel_values"], call.inputs["image_grid_thw"]
    seen = flops(lambda: tower(pixels, grid_thw=grids).pooler_output.sum().backward())
    with torch.no_grad():
        looked = flops(lambda: tower(pixels, grid_thw=grids))
    ours.model.zero_grad()
    return (3 + 1 / EPOCHS) * (linear + attention + output) + seen + looked / EPOCHS


def compare_flops(ours: Ours, theirs: ReferenceLayout, items: Sequence[Item]) -> dict[str, float]:
    mine, other = ours.batch(items), theirs.batch(items)
    step = flops(lambda: ours.trainer.compute_loss(ours.model, mine).backward())
    with torch.no_grad():
        once = flops(lambda: ours.logps(mine))
    reference = flops(lambda: theirs.loss(other, theirs.reference).backward())
    ours.model.zero_grad()
    theirs.model.zero_grad()
    charged = step + once / EPOCHS
    return {
        "gflops": charged / 1e9,
        "flops_ratio_reference": reference / charged,
        "flops_over_floor": charged / floor_flops(ours, mine["batch"]),
    }


def errors(ours: Ours, theirs: ReferenceLayout, items: Sequence[Item]) -> dict[str, float]:
    """Largest relative errors of log-probabilities, and of the gradient of the stage-2 loss over all weights."""
    logps, grads = [], []
    for layout in (ours, theirs):
        sums = layout.logps(layout.batch(items))
        logps.append(sums.detach())
        layout.model.zero_grad()
        stage2_loss(sums, torch.linspace(-60, -40, len(sums))).backward()
        grads.append([weights.grad.clone() for weights in layout.model.parameters()])
        layout.model.zero_grad()
    gaps = [(a - b).norm() / b.norm().clamp(min=1e-12) for a, b in zip(*grads, strict=True)]
    return {
        "logp_rel_error": float(((logps[0] - logps[1]) / logps[1]).abs().max()),
        "grad_rel_error": float(max(gaps)),
    }


def reference_pass_seconds(ours: Ours, items: Sequence[Item]) -> float:
    """One pass for reference log-probabilities over a step's items, reading them included."""
    start = time.perf_counter()
    with torch.no_grad():
        ours.logps(ours.batch(items))
    return time.perf_counter() - start


def compare_times(
    folder: Path, scratch: Path, shape: Shape, repeats: int, layouts: dict[str, Any], steps: Sequence[Item]
) -> dict[str, float]:
    """Medians over `repeats` rounds in which the layouts take turns."""
    per_step = shape.pictures * shape.questions
    seconds: dict[str, list[float]] = {name: [] for name in (*layouts, "ours_reference")}
    for _ in range(repeats):
        for name, layout in layouts.items():
            if hasattr(layout, "encoder"):
                layout.encoder._views.clear()  # a picture is new at every step of a real run
            seconds[name].append(step_seconds(layout.trainer, per_step * (2 if name == "trl" else 1)))
        layouts["ours"].encoder._views.clear()
        seconds["ours_reference"].append(reference_pass_seconds(layouts["ours"], steps[:per_step]))
    median = {name: statistics.median(times) for name, times in seconds.items()}
    charged = median["ours"] + median["ours_reference"] / EPOCHS
    result = {f"seconds_{name}": value for name, value in median.items()}
    result["time_ratio_reference"] = median["reference"] / charged
    if "trl" in median:
        result["time_ratio_trl"] = median["trl"] / charged
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
    items = make_items(shape, 3 * shape.pictures, seed=0)
    kind = Ours if layout == "ours" else ReferenceLayout
    built = kind(folder, scratch, items)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    step_seconds(built.trainer, shape.pictures * shape.questions)
    return resident("VmHWM") - before


def measured_memory(layout: str, folder: Path, shape: Shape) -> int:
    command = [sys.executable, __file__, "--measure-memory", layout, "--model", str(folder), "--shapes", shape.name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


# --- the whole --------------------------------------------------------------------------------------------------------


def measure(shape: Shape, repeats: int, *, trl: bool, memory: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder, scratch = Path(name, "model"), Path(name, "scratch")
        make_model(folder, shape)
        items = make_items(shape, 3 * shape.pictures, seed=0)
        one_step = items[: shape.pictures * shape.questions]
        ours, theirs = Ours(folder, scratch, items), ReferenceLayout(folder, scratch, items)
        packed = ours.batch(one_step)["batch"].packed
        facts: dict[str, Any] = {
            "name": shape.name, "image_tokens": shape.image_tokens, "crop_tokens": shape.crop_tokens,
            "vocab": shape.vocab, "questions": shape.questions, "pictures_per_step": shape.pictures,
            "tokens": packed.tokens, "padding": packed.laid_tokens - packed.tokens,
            "separate_tokens": packed.naive_tokens,
        }  # fmt: skip
        facts |= errors(ours, theirs, one_step)
        facts |= compare_flops(ours, theirs, one_step)
        layouts: dict[str, Any] = {"ours": ours, "reference": theirs}
        if trl:
            layouts["trl"] = Trl(folder, scratch, items)
        facts |= compare_times(folder, scratch, shape, repeats, layouts, items)
        del ours, theirs, layouts
        if memory:
            peaks = {layout: measured_memory(layout, folder, shape) for layout in ("ours", "reference")}
            facts |= {f"peak_mb_{layout}": round(peak / 1e6) for layout, peak in peaks.items()}
            facts["peak_memory_ratio_reference"] = peaks["reference"] / peaks["ours"]
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="small,large_vocab,long,many", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--no-trl", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--measure-memory", choices=("ours", "reference"), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    shapes = [SHAPES[name] for name in options.shapes.split(",")]
    if options.measure_memory:
        with tempfile.TemporaryDirectory() as scratch:
            print(memory_of(options.measure_memory, options.model, Path(scratch), shapes[0]))
        return
    results = []
    for shape in shapes:
        results.append(measure(shape, options.repeats, trl=not options.no_trl, memory=not options.no_memory))
        print(table_row(results[-1]), flush=True)
    everything = {"torch": torch.__version__, "threads": torch.get_num_threads(), "shapes": results}
    if options.json:
        options.json.write_text(json.dumps(everything, indent=1) + "\n")


def table_row(facts: dict[str, Any]) -> str:
    """One shape in a line: how many times ours is better, and how near the floor."""
    shown = {
        "FLOPs": "flops_ratio_reference", "over floor": "flops_over_floor", "time": "time_ratio_reference",
        "time TRL": "time_ratio_trl", "memory": "peak_memory_ratio_reference",
    }  # fmt: skip
    ratios = "  ".join(f"{name} {facts[key]:.2f}×" for name, key in shown.items() if key in facts)
    accuracy = f"logp error {facts['logp_rel_error']:.1e}  grad error {facts['grad_rel_error']:.1e}"
    return f"{facts['name']:<12} {ratios}  {accuracy}"


if __name__ == "__main__":
    main()
