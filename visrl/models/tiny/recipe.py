"""The keys of configs/tiny/pretrain.yaml: everything that the pre-training of the embedded model hangs on.

Imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, model_validator

from visrl.config import Config
from visrl.scenes import KINDS, Kind

Share = Annotated[float, Field(ge=0, le=1)]


class LossWeights(BaseModel):
    """What each loss weighs; the first five are read-outs or reading, `box` is the text of the box."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    cell: float = Field(1.0, ge=0)  # colour and box of the tag that an image token shows
    shape: float = Field(2.0, ge=0)  # its shape; within `cell`, which weighs it again
    word: float = Field(1.0, ge=0)  # box of the tag that a word of the question names
    mark: float = Field(1.0, ge=0)  # box of the tag asked about, at the question mark
    crop: float = Field(0.3, ge=0)  # what a crop says, from its image tokens
    read: float = Field(0.5, ge=0)  # the answer's text, from the crop
    box: float = Field(1.0, ge=0)


class Stretch(BaseModel):
    """A part of the schedule."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    steps: int = Field(gt=0)
    boxes: list[Kind] = []  # kinds of question whose rows go on to the text of the box; others end at the question mark
    zoom: tuple[Share, Share] = (1.0, 1.0)  # crops to read, from 0 (the number or the dots alone) to 1 (the whole tag)
    loose: float = Field(0.0, ge=0, lt=0.5)  # each side of a crop is moved by up to this share of its length
    square: Share = 1.0  # share of the crops that stay square
    weights: LossWeights = LossWeights()


class PretrainConfig(Config):
    """What `python -m visrl.models.tiny.pretrain` takes. Names are those of `transformers.TrainingArguments`."""

    output_dir: Path
    seed: int = Field(0, ge=0)  # of the weights, of every draw, and of which scenes are shown
    threads: int = Field(1, ge=1)  # of torch; with one the weights repeat to the bit
    bf16: bool = True  # products in bfloat16 (weights stay fp32): twice as fast where the processor has them

    kinds: dict[Kind, NonNegativeFloat] = Field(
        default_factory=lambda: dict.fromkeys(KINDS, 1.0)
    )  # shares of the questions
    scenes: int = Field(48, ge=1)  # pictures of a step
    per_scene: int = Field(3, ge=1)  # questions of a picture; beside them one of its tags is read from a crop
    window: int = Field(256, ge=1)  # a step draws its pictures from so many that follow each other,
    fresh: int = Field(16, ge=1)  # which move on by so many: each is shown `scenes`/`fresh` times
    word_layer: int = Field(3, ge=1)  # after which layer of the language model the read-out of words looks
    mark_layer: int = Field(4, ge=1)  # and that of the question mark

    learning_rate: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(50, ge=0)
    decay_from: float = Field(0.6, ge=0, lt=1)  # the share of all steps after which the rate falls in a straight line
    min_lr_ratio: Share = 0.03
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.98, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)

    logging_steps: int = Field(50, ge=1)
    eval_steps: int = Field(200, ge=1)
    eval_scenes: int = Field(50, ge=1)
    save_steps: int = Field(100, ge=1)
    phases: list[Stretch] = Field(min_length=1)

    @model_validator(mode="after")
    def _goes_together(self) -> PretrainConfig:
        if not sum(self.kinds.values()):
            raise ValueError("kinds: at least one kind of question needs a share above 0")
        if self.save_steps % self.logging_steps:
            raise ValueError(
                f"save_steps={self.save_steps} must be a multiple of logging_steps={self.logging_steps}, so that a run "
                "that goes on logs what an uninterrupted one does"
            )
        return self

    @property
    def steps(self) -> int:
        """Of the whole schedule."""
        return sum(phase.steps for phase in self.phases)

    def phase_at(self, step: int) -> Stretch:
        """The part of the schedule that `step` (from 0) lies in."""
        for phase in self.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        raise IndexError(step)
