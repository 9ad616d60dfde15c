"""Rollouts and the three layouts that benchmarks/online.py compares. Measures nothing but how long a step takes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from layouts import ANSWER, BOX, PATCH, QUESTION, Shape, arguments, padded, trl_prompt
from PIL import Image
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from visrl.conversation import Conversation, Message, View
from visrl.engines.base import Completion
from visrl.models.attention import use_tree_attention
from visrl.models.encode import Encoder
from visrl.models.load import load_encoder, load_model
from visrl.packing.pack import TIGHT_BUCKET
from visrl.prompts import IMAGE
from visrl.records import Sample, Step
from visrl.train.config import TrainConfig
from visrl.train.data import Questions
from visrl.train.items import Collator
from visrl.train.online import OnlineTrainer
from visrl.train.online_losses import ONLINE_LOSSES, batch_loss
from visrl.train.online_rollouts import OnlineBatch, Response, pack_responses

LENGTH = 32  # max_completion_length
ROWS = 8  # a padded batch of rollouts: per_device_train_batch_size as TRL has it


# --- rollouts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rollout:
    """A sampled box text or answer: what was asked, what was said, and the advantage that it has."""

    row: str
    step: Step
    talk: Conversation
    completion: Completion
    advantage: float


class Rollouts:
    """Random questions of a shape, with random responses as if they had been sampled: digits, a token each.

    `questions` holds for each its boxes and, crop by crop, its answers.
    """

    def __init__(self, encoder: Encoder, shape: Shape, boxes: int, answers: int) -> None:
        self.encoder, self.boxes, self.answers = encoder, boxes, answers
        self.rng = np.random.default_rng(0)
        self.questions: list[list[Rollout]] = []
        for n in range(shape.pictures):
            whole = View(str(n), self._picture(shape.image_tokens))
            for q in range(shape.questions):
                self.questions.append(self._ask(shape, f"{n}/{q}", whole))

    @property
    def flat(self) -> list[Rollout]:
        return [one for own in self.questions for one in own]

    def talks(self) -> tuple[list[Conversation], list[Conversation]]:
        """What is asked: where to look, once a question; what is there, once a crop."""
        crops = range(self.boxes, self.boxes * (1 + self.answers), self.answers)
        return [own[0].talk for own in self.questions], [own[b].talk for own in self.questions for b in crops]

    def responses(self, encoder: Encoder) -> list[list[Response]]:
        """The rollouts as the trainer has them once they are scored; each prompt is encoded, its pictures included."""
        prompts = {id(one.talk): encoder.encode(one.talk, [None])[0] for one in self.flat}
        return [
            [Response(one.row, one.step, one.completion, prompts[id(one.talk)], one.advantage) for one in own]
            for own in self.questions
        ]

    def _picture(self, tokens: int) -> Image.Image:
        side = int(tokens**0.5) * PATCH
        return Image.fromarray(self.rng.integers(0, 256, (side, side, 3), dtype=np.uint8))

    def _ask(self, shape: Shape, name: str, whole: View) -> list[Rollout]:
        question = "".join(map(str, self.rng.integers(0, 10, QUESTION)))
        # The question alone, without the sentences of the prompts: its length is part of the shape.
        talk = Conversation((Message("user", f"{IMAGE}\n{question}"),), (whole,))
        own = [self._rollout("box", f"{name}/{b}", talk, BOX) for b in range(self.boxes)]
        for b in range(self.boxes):
            crop = View(f"{name}#{b}", self._picture(shape.crop_tokens), is_crop=True)
            talk = Conversation((Message("user", f"{IMAGE}\n{question}\n{IMAGE}"),), (whole, crop))
            own += [self._rollout("answer", f"{name}/{b}/{m}", talk, ANSWER) for m in range(self.answers)]
        return own

    def _rollout(self, step: Step, row: str, talk: Conversation, length: int) -> Rollout:
        digits = "".join(map(str, self.rng.integers(0, 10, length - 1)))
        ids = (*self.encoder.tokenizer(digits, add_special_tokens=False).input_ids, self.encoder.end_id)
        completion = Completion(digits, length - 1, ids=ids, logps=(0.0,) * length)
        return Rollout(row, step, talk, completion, float(self.rng.normal(0.2)))


# --- how long a step takes --------------------------------------------------------------------------------------------


class Seconds:
    """By the clock, and of the processor, which other work changes less."""

    def __init__(self, clock: float = 0.0, processor: float = 0.0) -> None:
        self.clock, self.processor = clock, processor

    @classmethod
    def now(cls) -> Seconds:
        return cls(time.perf_counter(), time.process_time())

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.clock + other.clock, self.processor + other.processor)

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(self.clock - other.clock, self.processor - other.processor)


class Watch(TrainerCallback):
    """Of every step: the seconds of its update (forward, backward, optimiser) and of making its batches from
    completions, apart; its loss; and the gradient of the last."""

    def __init__(self) -> None:
        self.updates: list[Seconds] = []
        self.prepared: list[Seconds] = []
        self.losses: list[float] = []
        self.gradient = torch.empty(0)
        self._start: Seconds | None = None
        self._preparing, self._inside, self._loss = Seconds(), Seconds(), 0.0

    @contextmanager
    def preparing(self) -> Iterator[None]:
        start = Seconds.now()
        yield
        took = Seconds.now() - start
        self._preparing += took
        if self._start is not None:
            self._inside += took

    def add_loss(self, loss: Tensor) -> Tensor:
        self._loss += float(loss)
        return loss

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = Seconds.now()

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        start = Seconds.now()
        self.gradient = gradient_of(model)
        self._inside += Seconds.now() - start

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        assert self._start is not None
        self.updates.append(Seconds.now() - self._start - self._inside)
        self.prepared.append(self._preparing)
        self.losses.append(self._loss)
        self._start, self._preparing, self._inside, self._loss = None, Seconds(), Seconds(), 0.0


def gradient_of(model: nn.Module) -> Tensor:
    return torch.cat([weights.grad.flatten() for weights in model.parameters() if weights.grad is not None])


# --- the three layouts ------------------------------------------------------------------------------------------------


class GivenRollouts(OnlineTrainer):
    """`stage: grpo` with rollouts that are given in the place of those that it samples."""

    given: Rollouts
    watch: Watch

    def _sample(self, questions: Sequence[Sequence[Any]]) -> list[OnlineBatch]:
        with self.watch.preparing():
            self.encoder.forget()  # in a real run the pictures of a step are new
            batch = pack_responses(
                self.given.responses(self.encoder), self.collator, mask_truncated=False, keep_all=False
            )
            assert batch is not None
            return [batch]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.watch.add_loss(super().training_step(*args, **kwargs))


class Ours:
    """What `stage: grpo` computes: the tree of each question, packed."""

    def __init__(self, folder: Path, scratch: Path, rollouts: Rollouts, loss_type: str = "dapo", **more: Any) -> None:
        self.model, self.encoder = load_model(folder), load_encoder(folder)
        use_tree_attention(self.model, "blocks")
        own: dict[str, Any] = {"epsilon_high": 5.0} if loss_type == "cispo" else {}
        own |= {name: more.pop(name) for name in ("num_iterations", "beta", "epsilon") if name in more}
        config = TrainConfig(
            model_name_or_path=str(folder), stage="grpo", finetuning_type="full", output_dir=scratch,
            num_generations=rollouts.boxes, num_answers=rollouts.answers, loss_type=loss_type,
            max_completion_length=LENGTH, **own,
        )  # fmt: skip
        options = arguments(TrainingArguments, scratch, max_grad_norm=0.0, **more)
        options.per_device_train_batch_size = len(rollouts.questions)
        self.watch = Watch()
        self.trainer = GivenRollouts(
            visrl_config=config, encoder=self.encoder, model=self.model, args=options, callbacks=[self.watch],
            collator=Collator(self.encoder, bucket=TIGHT_BUCKET), scorers={},
            train_dataset=Questions([Sample(str(n), str(n), "", "") for n in range(len(rollouts.questions))]),
        )  # fmt: skip
        self.trainer.given, self.trainer.watch = rollouts, self.watch

    def batch(self) -> OnlineBatch:
        (batch,) = self.trainer._sample([])
        return batch

    def loss(self, batch: OnlineBatch) -> Tensor:
        """Of a whole step, a scalar."""
        return self.trainer.compute_loss(self.model, {"batch": batch})


class Rows:
    """Every rollout a row by itself, in padded batches of `size` boxes or answers, with logits at responses alone."""

    def __init__(self, folder: Path, rollouts: Rollouts, size: int = ROWS) -> None:
        self.model, encoder = load_model(folder), load_encoder(folder)
        flat = [one for own in rollouts.responses(encoder) for one in own]
        self.tokens = sum(len(one.completion.ids) for one in flat)
        self.batches: list[tuple[dict[str, Tensor], int, Tensor]] = []
        for step, length in (("box", BOX), ("answer", ANSWER)):
            same = [one for one in flat if one.step == step]
            for members in (same[start : start + size] for start in range(0, len(same), size)):
                inputs, _ = padded([encoder.continued(one.prompt, one.completion.ids) for one in members], encoder)
                self.batches.append((inputs, length, torch.tensor([one.advantage for one in members])))

    def backward(self, batch: tuple[dict[str, Tensor], int, Tensor]) -> float:
        """The part that a batch has in the DAPO loss of the step, and its gradient in the weights."""
        inputs, length, advantages = batch
        logits = self.model(**inputs, use_cache=False, logits_to_keep=length + 1).logits[:, :-1].float()
        logps = logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, -length:, None]).flatten()
        branch = torch.arange(len(advantages)).repeat_interleave(length)
        loss = batch_loss(
            ONLINE_LOSSES["dapo"], logps, logps.detach(), advantages[branch], branch,
            torch.full((len(advantages),), float(length)), parameters={}, tokens=1, length=LENGTH,
        ).total / self.tokens  # fmt: skip
        loss.backward()
        return float(loss.detach())


class GivenCompletions(GRPOTrainer):
    """TRL's trainer with advantages that are given: boxes are compared with all boxes of their question, which are
    more than the answers of a crop, and TRL's groups are all of one size."""

    advantages: Tensor
    watch: Watch

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        return super()._generate_and_score_completions(inputs) | {"advantages": self.advantages}

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        with self.watch.preparing():
            return super()._prepare_inputs(generation_batch)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.watch.add_loss(super().training_step(*args, **kwargs))


class Trl:
    """TRL's own trainer on the same rollouts, each a row with a prompt of its own, through its `rollout_func`.

    Its groups are `num_generations` completions of one prompt: the answers of a crop are one, the boxes of a question
    several. It makes its batches, mixes and pads them as it does.
    """

    def __init__(
        self, folder: Path, scratch: Path, rollouts: Rollouts, loss_type: str = "dapo", size: int = ROWS, **more: Any
    ) -> None:
        from datasets import Dataset

        encoder, flat = load_encoder(folder), rollouts.flat
        responses = [one for own in rollouts.responses(encoder) for one in own]
        assert rollouts.boxes % rollouts.answers == 0
        more |= {"epsilon_high": 5.0} if loss_type == "cispo" else {}
        options = arguments(
            GRPOConfig, scratch, gradient_checkpointing=False, bf16=False, loss_type=loss_type,
            num_generations=rollouts.answers, max_completion_length=LENGTH, per_device_train_batch_size=size,
            gradient_accumulation_steps=len(flat) // size, shuffle_dataset=False, max_grad_norm=0.0, **more,
        )  # fmt: skip
        completions = {
            "prompt_ids": [one.prompt.ids.tolist() for one in responses],
            "completion_ids": [list(one.completion.ids) for one in responses],
            "logprobs": None,
        }
        self.watch = Watch()
        self.trainer = GivenCompletions(
            model=load_model(folder), args=options, callbacks=[self.watch],
            train_dataset=Dataset.from_list([trl_prompt(one.talk) for one in flat[:: rollouts.answers]]),
            reward_funcs=lambda completions, **columns: [0.0] * len(completions),
            rollout_func=lambda prompts, trainer: dict(completions),
        )  # fmt: skip
        self.model: Any = self.trainer.model
        self.trainer.advantages = torch.tensor([one.advantage for one in flat])
        self.trainer.watch = self.watch
