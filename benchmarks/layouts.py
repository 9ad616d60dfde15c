"""Models, rows and the three layouts that benchmarks/training.py compares. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    Trainer,
    TrainingArguments,
)

from visrl.conversation import Conversation, Message, View
from visrl.models.attention import use_tree_attention
from visrl.models.encode import Encoder
from visrl.models.load import load_encoder, load_model
from visrl.models.tiny.make import CHAT_TEMPLATE, make_tokenizer, tiny_config
from visrl.packing.forward import branch_logps
from visrl.packing.pack import TIGHT_BUCKET
from visrl.prompts import IMAGE
from visrl.train.config import TrainConfig
from visrl.train.items import Collator, Item, TrainingBatch, TrainingRow, encode_item
from visrl.train.losses import dpo
from visrl.train.trainer import VisrlTrainer

EPOCHS = 5  # over which ours spreads its one reference pass
QUESTION, BOX, ANSWER = 24, 18, 8  # tokens, the end of the turn included
PATCH = 28  # pixels along a merged token's side, of a Qwen2-VL
PATCHES = {"qwen2_vl": PATCH, "qwen3_5": 32}  # of every family that is measured


@dataclass(frozen=True)
class Shape:
    name: str
    image_tokens: int
    crop_tokens: int
    vocab: int
    questions: int = 1  # per picture
    pictures: int = 3  # per step: the batch of the released configs
    family: str = "qwen2_vl"


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
    """A random model of the shape's family in `folder`, and its processor: hidden 256, MLP 4×, vision tower of 4 layers
    of 192; of a Qwen2-VL 6 layers, of a Qwen3.5 8, six of them Gated DeltaNet."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model, processor = (_qwen3_5 if shape.family == "qwen3_5" else _qwen2_vl)(shape, tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _qwen2_vl(shape: Shape, tokenizer: Any) -> tuple[Any, Any]:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [8, 12, 12]}
    sizes: dict[str, Any] = {
        "vocab_size": max(shape.vocab, len(tokenizer)), "hidden_size": 256, "num_hidden_layers": 6,
        "intermediate_size": 1024, "max_position_embeddings": 8192, "rope_parameters": rope,
    }  # fmt: skip
    config = tiny_config(tokenizer, **sizes)
    config.vision_config.depth, config.vision_config.embed_dim = 4, 192
    pictures = Qwen2VLImageProcessor(size=_limits(shape))
    processor = Qwen2VLProcessor(pictures, tokenizer, Qwen2VLVideoProcessor(), chat_template=CHAT_TEMPLATE)
    return Qwen2VLForConditionalGeneration(config), processor


def _qwen3_5(shape: Shape, tokenizer: Any) -> tuple[Any, Any]:
    """Its proportions: three layers of Gated DeltaNet to one of attention, keys half as wide as the hidden states."""
    like = tiny_config(tokenizer)
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [8, 12, 12], "mrope_interleaved": True}
    text = {
        "vocab_size": max(shape.vocab, len(tokenizer)), "hidden_size": 256, "num_hidden_layers": 8,
        "intermediate_size": 1024, "max_position_embeddings": 8192, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "rope_parameters": {**rope, "partial_rotary_factor": 1.0},
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64,
        "linear_value_head_dim": 64, "tie_word_embeddings": True, "eos_token_id": like.text_config.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "depth": 4, "hidden_size": 192, "intermediate_size": 768, "num_heads": 4, "out_hidden_size": 256,
        "num_position_embeddings": 2304,
    }  # fmt: skip
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: getattr(like, name) for name in names}
    config = Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    pictures = Qwen2VLImageProcessor(patch_size=16, size=_limits(shape))
    processor = Qwen3VLProcessor(pictures, tokenizer, Qwen3VLVideoProcessor(), chat_template=CHAT_TEMPLATE)
    return Qwen3_5ForConditionalGeneration(config), processor


def _limits(shape: Shape) -> dict[str, int]:
    side = PATCHES[shape.family]
    return {"shortest_edge": side**2, "longest_edge": 8192 * side**2}


def make_items(shape: Shape, pictures: int, seed: int) -> list[Item]:
    """One item per question, `questions` of each of `pictures` random pictures; digits are a token each."""
    rng = np.random.default_rng(seed)

    def digits(count: int) -> str:
        return "".join(str(d) for d in rng.integers(0, 10, count))

    def picture(tokens: int) -> Image.Image:
        side = int(tokens**0.5) * PATCHES[shape.family]
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
                rows.append(TrainingRow(f"{name}/{step}", step, talk, pair))
            items.append(Item(name, tuple(rows)))
    return items


# --- the three layouts ------------------------------------------------------------------------------------------------


class Ours:
    """Packed trees, or the plain form of the same trainer; the reference's log-probabilities are made beforehand, by
    the same pass."""

    def __init__(
        self, folder: Path, scratch: Path, items: Sequence[Item], layout: Literal["tree", "plain"] = "tree"
    ) -> None:
        self.model, self.encoder = load_model(folder), load_encoder(folder, layout=layout)
        if layout == "tree":
            use_tree_attention(self.model, "blocks")
        self.collator = Collator(self.encoder, bucket=TIGHT_BUCKET)
        config = TrainConfig(
            model_name_or_path=str(folder), stage="dpo", rl_stage=2, finetuning_type="full", output_dir=scratch
        )
        self.trainer = VisrlTrainer(
            visrl_config=config, encoder=self.encoder, model=self.model, args=arguments(TrainingArguments, scratch),
            train_dataset=items, data_collator=self.batch,
        )  # fmt: skip
        self.trainer.reference = dict.fromkeys(
            (f"{row.key}/{role}" for item in items for row in item.rows for role, _ in row.responses), -50.0
        )

    def batch(self, items: Sequence[Item]) -> dict[str, TrainingBatch]:
        self.encoder.forget()  # in a real run the pictures of a step are new
        return self.collator(items)

    def logps(self, batch: dict[str, TrainingBatch]) -> Tensor:
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
        self.encoder.forget()  # in a real run the pictures of a step are new
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
    same: dict[str, Any] = {
        "output_dir": str(scratch), "report_to": "none", "use_cpu": True, "max_steps": 2, "save_strategy": "no",
        "disable_tqdm": True, "logging_strategy": "no", "remove_unused_columns": False,
        "train_sampling_strategy": "sequential", "dataloader_pin_memory": False, "learning_rate": 1e-6,
    }  # fmt: skip
    return kind(**{**same, **more})


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
    pictures = [view.inputs for path in paths for view in path.views]
    joined = {name: torch.cat([picture[name] for picture in pictures]) for name in pictures[0]}
    types = (ids == encoder.image_token_id).int()
    return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types, **joined}, labels


def stage2_loss(policy: Tensor, reference: Tensor) -> Tensor:
    """The stage-2 loss of log-probabilities ordered box chosen, box rejected, answer chosen, answer rejected, …"""
    chosen, rejected = slice(0, None, 2), slice(1, None, 2)
    rows = dpo(policy[chosen], policy[rejected], reference[chosen], reference[rejected])
    return 0.5 * rows.sum() / (len(rows) / 2)


def trl_row(row: TrainingRow) -> dict[str, Any]:
    """A row in TRL's conversational form."""
    answers = {
        role: [{"role": "assistant", "content": [{"type": "text", "text": text}]}] for role, text in row.responses
    }
    return {**trl_prompt(row.conversation), **answers}


def trl_prompt(talk: Conversation) -> dict[str, Any]:
    """What is asked in TRL's conversational form, and the pictures that it shows."""
    content: list[dict[str, str]] = []
    for number, text in enumerate(talk.messages[0].text.split(IMAGE)):
        content += [{"type": "image", "text": ""}] * (number > 0) + [{"type": "text", "text": text}] * bool(text)
    return {"images": [view.image for view in talk.views], "prompt": [{"role": "user", "content": content}]}
