"""Stage-2 training steps on a GPU: ours, with dense masks and with FlexAttention, and TRL's DPOTrainer, on randomly
initialised Qwen2.5-VL of the released shapes, with LoRA on the language model, bf16, and gradient checkpointing on or
off.

    python benchmarks/gpu.py --shapes 3b,7b --steps 8 --json gpu.json

Every layout runs in a process of its own. Reported are the median seconds of a step after the third (compiling is
over by then: how often it happened later is reported too), items a second, the peak memory of tensors and the
utilisation of the card by the operations that the model needs (each distinct token forward and backward, and
recomputed under checkpointing; no more for a layout that computes more), of `--peak-tflops`. Ours is charged a fifth of
its reference pass; TRL computes its reference in every step. `--shapes tiny` runs the same on a CPU, where the figures
say nothing about a GPU.
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
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from layouts import SHAPES as CPU_SHAPES
from layouts import Shape, make_items, trl_row
from peft import LoraConfig
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

from visrl.models.load import load_encoder
from visrl.models.parts import language_model
from visrl.models.tiny.make import CHAT_TEMPLATE, make_tokenizer
from visrl.train.config import TrainConfig
from visrl.train.dry_run import peak_bytes
from visrl.train.features import FeatureCache
from visrl.train.items import Collator, Item, TrainingBatch
from visrl.train.model import lora_targets, prepare_model
from visrl.train.reference import reference_logps
from visrl.train.trainer import VisrlTrainer

EPOCHS = 5  # over which ours spreads its one reference pass
WARM = 3  # steps after which nothing may compile any more
LAYOUTS = ("dense", "flex", "trl")
# The released sizes: text (hidden, MLP, layers, heads, key-value heads), vision (layers, hidden, MLP, heads).
MODELS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "tiny": ((128, 256, 2, 4, 2), (2, 64, 128, 4)),
    "3b": ((2048, 11008, 36, 16, 2), (32, 1280, 3420, 16)),
    "7b": ((3584, 18944, 28, 28, 4), (32, 1280, 3420, 16)),
}
# 512 × 512 pixels are 324 tokens; three items a step, as in the released configs.
PICTURES = {"tiny": CPU_SHAPES["tiny"], "3b": Shape("3b", 324, 144, 151_936), "7b": Shape("7b", 324, 144, 152_064)}


def make_model(folder: Path, name: str) -> None:
    """A random Qwen2.5-VL of this size in `folder`, in bf16, with a processor."""
    (hidden, mlp, layers, heads, key_heads), (depth, width, vision_mlp, vision_heads) = MODELS[name]
    tokenizer = make_tokenizer()
    ids: dict[str, Any] = {
        f"{kind}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for kind, token in (("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"),
                            ("vision_end", "vision_end"))
    }  # fmt: skip
    half = hidden // heads // 2
    section = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]  # 16, 24, 24 of 64
    text = {
        "vocab_size": max(PICTURES[name].vocab, len(tokenizer)), "hidden_size": hidden, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": key_heads,
        "max_position_embeddings": 8192, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section},
    }  # fmt: skip
    vision = {
        "depth": depth, "hidden_size": width, "intermediate_size": vision_mlp, "num_heads": vision_heads,
        "out_hidden_size": hidden, "fullatt_block_indexes": [layer for layer in range(depth) if layer % 8 == 7],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=name == "3b", **ids)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.set_default_dtype(torch.bfloat16)
        model = Qwen2_5_VLForConditionalGeneration(config)
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    pictures = Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 512 * 512})
    Qwen2_5_VLProcessor(pictures, tokenizer, Qwen2VLVideoProcessor(), chat_template=CHAT_TEMPLATE).save_pretrained(
        folder
    )


# --- one layout, in a process of its own ------------------------------------------------------------------------------


class Clock(TrainerCallback):
    """Seconds of each step, and how often something was compiled up to its end."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.compiled: list[int] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.compiled.append(len(torch._dynamo.utils.compilation_time_metrics.get("_compile.compile_inner", [])))

    def seconds(self) -> float:
        """The median step after the third."""
        steps = [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]
        return statistics.median(steps[WARM - 1 :])


def options(kind: type, scratch: Path, steps: int, checkpointing: bool, **more: Any) -> Any:
    return kind(
        output_dir=str(scratch), report_to="none", max_steps=steps, save_strategy="no", logging_strategy="no",
        disable_tqdm=True, bf16=True, use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=checkpointing, learning_rate=1e-6,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        remove_unused_columns=False, train_sampling_strategy="sequential", dataloader_pin_memory=False, **more,
    )  # fmt: skip


def run_ours(folder: Path, scratch: Path, items: Sequence[Item], per_step: int, given: Any) -> dict[str, Any]:
    config = TrainConfig(
        model_name_or_path=str(folder), output_dir=scratch, stage="dpo", rl_stage=2, attention=given.layout, bf16=True
    )
    arguments = options(
        TrainingArguments, scratch, given.steps, given.checkpointing, per_device_train_batch_size=per_step
    )
    encoder = load_encoder(folder)
    model = prepare_model(config).to(arguments.device)
    collator = Collator(encoder)
    features = FeatureCache(model, encoder.family, limit=0)  # pictures of a step are new, as in a first epoch
    start = time.perf_counter()
    with torch.autocast(arguments.device.type, torch.bfloat16):
        reference = reference_logps(
            model, items, collator, batch_size=per_step, cache=scratch / "reference.json", key="", features=features  # type: ignore[arg-type]
        )  # fmt: skip
    once = (time.perf_counter() - start) / given.steps
    trainer = VisrlTrainer(
        visrl_config=config, encoder=encoder, reference=reference, features=features, model=model, args=arguments,
        train_dataset=items, data_collator=collator,
    )  # fmt: skip
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    batch: TrainingBatch = collator(items[:per_step])["batch"]
    facts = {"operations": needed_operations(model, batch, given.checkpointing), "tokens": batch.packed.tokens}
    return {"seconds": clock.seconds() + once / EPOCHS, "compiled_late": late(clock), **facts}


def run_trl(folder: Path, scratch: Path, items: Sequence[Item], per_step: int, given: Any) -> dict[str, Any]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    arguments = options(
        DPOConfig, scratch, given.steps, given.checkpointing, per_device_train_batch_size=2 * per_step, max_length=None,
        beta=0.1,
    )  # fmt: skip
    model = prepare_model(TrainConfig(model_name_or_path=str(folder), output_dir=scratch, stage="dpo", bf16=True))
    base: Any = model.get_base_model()  # type: ignore[operator]
    base.set_attn_implementation("sdpa")
    plain = model.unload()  # type: ignore[operator]
    rows = Dataset.from_list([trl_row(row) for item in items for row in item.rows])
    trainer: Trainer = DPOTrainer(
        model=plain, args=arguments, train_dataset=rows,
        processing_class=load_encoder(folder).processor,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=lora_targets(plain, "all")),
    )  # fmt: skip
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    return {"seconds": clock.seconds(), "compiled_late": late(clock)}


def late(clock: Clock) -> int:
    """How often something was compiled after the third step."""
    return clock.compiled[-1] - clock.compiled[min(WARM, len(clock.compiled)) - 1]


def needed_operations(model: torch.nn.Module, batch: TrainingBatch, checkpointing: bool) -> float:
    """Of a step's distinct tokens: 2 per weight forward, 2 backward (to activations: base weights are frozen), 2 more
    where layers are recomputed; the frozen vision tower forward only; attention and the output layer left out."""
    decoder = language_model(model)
    passes = 3 if checkpointing else 2
    weights = sum(w.numel() for name, w in decoder.named_parameters() if "embed_tokens" not in name)
    return passes * 2 * weights * batch.packed.tokens


# --- the whole --------------------------------------------------------------------------------------------------------


def run_layout(given: argparse.Namespace) -> None:
    """One layout in this process; the last line printed is its figures."""
    logging.set_verbosity_error()
    shape = PICTURES[given.shapes]
    per_step = shape.pictures * shape.questions
    items = make_items(shape, given.steps * shape.pictures, seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        work = run_trl if given.layout == "trl" else run_ours
        facts = work(given.model, Path(scratch), items, per_step, given)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps({**facts, "items_per_second": per_step / facts["seconds"], "peak_mb": peak_bytes(device) / 1e6}))


def measure(name: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), name)
        for checkpointing in (False, True):
            operations = 0.0
            for layout in LAYOUTS:
                command = [sys.executable, __file__, "--layout", layout, "--model", folder, "--shapes", name]
                command += ["--steps", str(given.steps)] + ["--checkpointing"] * checkpointing
                done = subprocess.run(command, capture_output=True, text=True)
                row: dict[str, Any] = {"model": name, "layout": layout, "checkpointing": checkpointing}
                if done.returncode:
                    row["failed"] = (done.stderr.strip().splitlines() or ["?"])[-1]
                else:
                    row |= json.loads(done.stdout.strip().splitlines()[-1])
                    operations = row.get("operations", operations)  # what is needed is the same for all
                if "seconds" in row and given.peak_tflops:
                    row["utilisation"] = operations / row["seconds"] / (given.peak_tflops * 1e12)
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="3b,7b", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--peak-tflops", type=float, help="of the card in dense bf16 (H100 and H200: 989)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--layout", choices=LAYOUTS, help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.steps <= WARM:
        parser.error(f"--steps: more than the {WARM} that warm up")
    if given.layout:
        run_layout(given)
        return
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    rows = [row for name in given.shapes.split(",") for row in measure(name, given)]
    if given.json:
        everything = {"device": card, "torch": torch.__version__, "rows": rows}
        given.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
