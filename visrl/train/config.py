"""The config of `visrl train`: the keys this field already types, and every field of `transformers.TrainingArguments`.

Imports no torch until a key is met that is not one of ours.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from visrl.box import CropRule
from visrl.config import Config
from visrl.data.scenes import KINDS, MAX_TAGS, Kind

PrefLoss = Literal["sigmoid", "ipo", "hinge", "robust", "simpo", "orpo", "kto", "sft"]
Task = Literal["read", "locate", "point"]  # point: the first corner of the box alone, in tenths
Attention = Literal["auto", "dense", "blocks", "flex"]


class Phase(BaseModel):
    """One phase of a curriculum over drawn scenes."""

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(gt=0)
    tasks: list[Task] = ["locate", "read"]
    kinds: list[Kind] = list(KINDS)
    max_tags: int = Field(MAX_TAGS, ge=1, le=MAX_TAGS)
    per_scene: int = Field(4, ge=1)
    grid: int | None = Field(None, ge=2)  # boxes are rounded outward to 1/grid: where something is, before how exactly
    close_up: tuple[float, float] | None = None  # crops to read, from 0 (the digit alone) to 1 (the tag); None: the box
    margin: float = Field(0.0, ge=0, le=1)  # each side of a box to locate is drawn up to this share further out
    loose: float = Field(0.0, ge=0, lt=0.5)  # each side of a crop to read is moved by up to this share of the box


class TrainConfig(Config):
    """What `visrl train` takes. Keys not listed here go to `transformers.TrainingArguments`."""

    model_config = ConfigDict(extra="allow")

    model_name_or_path: str
    adapter_name_or_path: str | None = None
    trust_remote_code: bool = False
    image_min_pixels: int | None = None
    image_max_pixels: int | None = None
    crop_min_pixels: int | None = None
    crop_max_pixels: int | None = None
    crop_rule: CropRule | None = None
    box_codec: str | None = None

    stage: Literal["sft", "dpo"] = "sft"
    rl_stage: Literal[1, 2] = 1
    do_train: Literal[True] = True  # kept for the reference's configs: this verb trains
    finetuning_type: Literal["full", "freeze", "lora"] = "lora"
    quantization_bit: Literal[4, 8] | None = None  # of the frozen weights under LoRA (QLoRA), with bitsandbytes
    quantization_type: Literal["nf4", "fp4"] = "nf4"
    double_quantization: bool = True
    pure_bf16: bool = False  # all weights in bf16; with bf16 alone, weights that are trained stay in fp32
    freeze_vision_tower: bool = True
    freeze_multi_modal_projector: bool = True
    freeze_language_model: bool = False
    lora_rank: int = Field(8, gt=0)
    lora_alpha: int | None = None  # twice the rank
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    lora_target: str = "all"

    pref_loss: PrefLoss = "sigmoid"
    pref_beta: float = Field(0.1, gt=0)
    pref_beta_answer: float | None = None  # β₂; pref_beta where not given
    pref_ftx: float = Field(0.0, ge=0)
    dpo_label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    simpo_gamma: float = 0.5
    lambda_box: float = Field(0.5, ge=0)
    lambda_answer: float = Field(0.5, ge=0)

    dataset: str | None = None
    dataset_dir: str = "data"
    image_root: str | None = None
    template: str | None = None  # the checkpoint's own chat template is used; kept for the reference's configs
    cutoff_len: int = Field(2048, gt=0)
    max_samples: int | None = None
    drop_unusable: bool = False  # leave out, and count, rows over cutoff_len and pictures that cannot be opened
    val_size: float = Field(0.0, ge=0)  # pictures held out to validate on: a share below 1, or a number
    curriculum: list[Phase] = Field(default_factory=list)
    bin_length: int = Field(512, gt=0)  # tokens that attend to each other at most, where no item needs more
    attention: Attention = "auto"
    feature_cache_gb: float = Field(4.0, ge=0)  # main memory for features of pictures that nothing trains
    processes: int | None = Field(None, ge=1)  # that train together on this machine; None: one for each GPU

    rollout_dataset: str | None = None
    rollout_samples: int = Field(0, ge=0)  # held-out questions rolled out greedily at every evaluation
    plot_loss: bool = False
    output_dir: Path
    dry_run: bool = False

    @classmethod
    def known_keys(cls) -> set[str]:
        return super().known_keys() | _training_argument_names()

    def training_arguments(self) -> dict[str, Any]:
        """What the config says beyond our own keys: fields of `transformers.TrainingArguments`."""
        return dict(self.model_extra or {})


@cache
def _training_argument_names() -> frozenset[str]:
    from dataclasses import fields

    from transformers import TrainingArguments

    return frozenset(field.name for field in fields(TrainingArguments) if field.init)
