"""Online reinforcement: the trainer samples from its own live weights, scores, and steps on advantages.

A step: the questions of all its batches → rollouts → rewards → advantages → packed batches → one update (or several,
`num_iterations`). Everything else, from accumulation to resuming, is `VisrlTrainer`'s. Sampling and packing:
online_rollouts.py; losses: online_losses.py; what a reward is made of: rewards/parts.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from visrl.engines.base import Policy
from visrl.engines.local import LocalEngine
from visrl.packing.forward import token_logps, token_logps_and_entropies
from visrl.records import Journal, Sample
from visrl.rewards.advantages import credit_at_forks
from visrl.rewards.grounding import boxes_by_image, other_objects
from visrl.rewards.parts import Scorer
from visrl.sequences import batched
from visrl.train import online_losses
from visrl.train.checkpoints import TrainingError
from visrl.train.importance import importance_weights
from visrl.train.items import Collator, TrainingBatch
from visrl.train.online_rollouts import (
    OnlineBatch,
    QuestionRollouts,
    estimator_of,
    pack_responses,
    responses_of,
    sample_rollouts,
    score_rollouts,
    still_batch,
)
from visrl.train.online_watch import Objects, journal_row, measures_of
from visrl.train.responses import Response
from visrl.train.rollout_cards import JOURNAL
from visrl.train.rollout_servers import RolloutServers
from visrl.train.sampler import RepeatedSteps
from visrl.train.show_rollouts import ShowRollouts
from visrl.train.trainer import VisrlTrainer


def gather_questions(samples: list[Sample]) -> dict[str, list[Sample]]:
    """The questions of a batch, as they are: nothing is computed before all of a step are there."""
    return {"samples": samples}


class OnlineTrainer(VisrlTrainer):
    """`VisrlTrainer` whose batches are sampled from its model, step by step. `collator` packs what was sampled;
    `scorers` are those of the reward's parts, by their labels; `servers` sample in the place of this process."""

    def __init__(
        self,
        *,
        collator: Collator,
        scorers: Mapping[str, Scorer],
        servers: RolloutServers | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(data_collator=gather_questions, **kwargs)
        self.collator, self.scorers, self.servers = collator, scorers, servers
        self.online_loss = self.visrl_config.online_loss[1]
        self._batches: list[OnlineBatch] = []  # of the rollouts that are learned from
        self._timed = True  # whether the time of this step's update is among the means
        questions: Any = self.train_dataset
        self._boxes = boxes_by_image(questions.samples)  # what objects of an image are known is read off all questions
        self._show = ShowRollouts(self.visrl_config, self.encoder.settings.crop_rule, self.callback_handler.callbacks)
        self.add_callback(self._show)
        self._start = self._frozen_start()

    def _frozen_start(self) -> Any:
        """The model at the start of its stage, for the KL: a copy, or nothing where an adapter can be switched off."""
        if not self.visrl_config.needs_start or self.visrl_config.finetuning_type == "lora":
            return None
        return deepcopy(self.accelerator.unwrap_model(self.model)).eval().requires_grad_(False)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        times = self.visrl_config.num_iterations
        if times == 1:
            return super()._get_train_sampler(train_dataset)
        return RepeatedSteps(super()._get_train_sampler(train_dataset), self._questions, times)

    @property
    def _questions(self) -> int:
        """How many questions a step learns from, on all processes."""
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | None]:
        """The batches of a step, sampled now, or again those of the rollouts that the step before it learned from."""
        questions = [batch["samples"] for batch in islice(epoch_iterator, num_batches)]
        if not questions:
            return [], None
        if self.state.global_step % self.visrl_config.num_iterations == 0:
            self._batches = self._sample(questions)
        batches: list[dict[str, TrainingBatch]] = [{"batch": batch} for batch in self._batches]
        self._timed = False
        return batches, self._get_num_items_in_batch(batches, device)

    # --- what a step learns from

    def _sample(self, questions: Sequence[Sequence[Sample]]) -> list[OnlineBatch]:
        """Rollouts of the questions of all batches of a step, scored, with their advantages, packed batch by batch."""
        step = self.state.global_step + 1
        engine = self._open_policy()
        rollouts = self._scored(engine, [sample for batch in questions for sample in batch], step)
        rollouts = self._sampled_again(engine, rollouts, step)
        if isinstance(engine, LocalEngine):
            self._add("tokens/prefilled", engine.prefilled_tokens)
        self._give_credit(rollouts)
        responses = [responses_of(one, self.collator) for one in rollouts]
        objects = self._objects_of(rollouts)
        flat, marks = [one for own in responses for one in own], self.encoder.image_ids
        for name, value in measures_of(rollouts, flat, objects, marks):
            self._add(name, value)
        self._write_journal(rollouts, step, objects)
        ends = [sum(map(len, questions[: n + 1])) for n in range(len(questions))]
        parts = [slice(end - len(batch), end) for end, batch in zip(ends, questions, strict=True)]
        batches = [self._pack(responses[part], rollouts[part]) for part in parts]
        self._add("tokens/update", sum(batch.packed.tokens for batch in batches))
        return batches

    def _open_policy(self) -> Policy:
        """What samples: the live weights in this process, or the servers, once they have been given them."""
        policy, started = self.accelerator.unwrap_model(self.model), time.perf_counter()
        if self.servers is None:
            return LocalEngine(policy, self.encoder)
        self.servers.sync(policy, self.state.global_step)
        self._add("time/sync", time.perf_counter() - started)
        return self.servers

    def _scored(self, engine: Policy, samples: Sequence[Sample], step: int, again: int = 0) -> list[QuestionRollouts]:
        config, rule, started = self.visrl_config, self.encoder.settings.crop_rule, time.perf_counter()
        rolled = sample_rollouts(engine, samples, config, rule, seed=self.args.seed, step=step, again=again)
        sampled = time.perf_counter()
        scored = score_rollouts(rolled, config, self.scorers)
        first = int(not again)  # what is sampled again adds to the time of its step
        self._add_time("rollout", sampled - started, first)
        self._add_time("reward", time.perf_counter() - sampled, first)
        return scored

    def _sampled_again(self, engine: Policy, rollouts: list[QuestionRollouts], step: int) -> list[QuestionRollouts]:
        """With `dynamic_sampling`, the rollouts with others in the place of those that are all worth the same."""
        config, count = self.visrl_config, 0
        for again in range(1, 1 + config.max_resample_times * config.dynamic_sampling):
            flat = [n for n, one in enumerate(rollouts) if one.flat]
            if not flat:
                break
            count += len(flat)
            others = self._scored(engine, [rollouts[n].question.sample for n in flat], step, again)
            for n, one in zip(flat, others, strict=True):
                rollouts[n] = one
        if config.dynamic_sampling:
            self._add("resampled", count / len(rollouts))
        return rollouts

    def _pack(self, responses: Sequence[Sequence[Response]], rollouts: Sequence[QuestionRollouts]) -> OnlineBatch:
        config = self.visrl_config
        packed = pack_responses(
            responses,
            self.collator,
            mask_truncated=config.mask_truncated_completions,
            keep_all=config.beta > 0 or config.stage == "ppo",
        )
        if packed is None and any(one.unfinished for one in rollouts):
            packed = still_batch(responses, self.collator)
        if packed is None:
            names = ", ".join(one.question.sample.id for one in rollouts[:3])
            raise TrainingError(
                f"step {self.state.global_step + 1}: nothing that was sampled of rows {names} can be learned from: no "
                f"reward could be told, or all was cut at {config.max_completion_length} tokens; see {JOURNAL}"
            )
        return packed

    def _give_credit(self, rollouts: Sequence[QuestionRollouts]) -> None:
        """Set the advantages of all rollouts of a step: those of the other processes count in a batch's statistics."""
        everyone = gather_object([[one.outcomes for one in rollouts]])
        forks = credit_at_forks(
            [outcomes for own in everyone for outcomes in own],
            estimator_of(self.visrl_config),
            lone_inherits=self.visrl_config.looks_several_times,
        )
        before = sum(map(len, everyone[: self.args.process_index]))
        for number, one in enumerate(rollouts, start=before):
            one.fork = forks[number]

    # --- the loss

    def _count(self, batch: TrainingBatch) -> int:
        assert isinstance(batch, OnlineBatch)
        return {"tokens": batch.tokens, "batch_tokens": 1}.get(self.online_loss.divide, batch.responses)

    def _row_losses(self, model: torch.nn.Module, batch: TrainingBatch) -> torch.Tensor:
        """The loss of a batch, [1], to be divided by what `_count` counts."""
        assert isinstance(batch, OnlineBatch)
        logps, entropies = token_logps_and_entropies(model, batch.packed, self.visrl_config.temperature)
        if batch.old is None:
            self._set_old(batch, logps.detach())
        advantages = batch.advantages.to(logps.device)[batch.packed.branch]
        return self._policy_loss(batch, logps, entropies, advantages).reshape(1)

    def _set_old(self, batch: OnlineBatch, logps: torch.Tensor) -> None:
        """Set what the policy before its update says of a batch's tokens, [T]: it is that still, at the first pass."""
        batch.old = logps
        self._add("sampling/logp_difference", float((logps - batch.sampled.to(logps.device)).abs().mean()))
        batch.weights = self._weights(batch)

    def _policy_loss(
        self, batch: OnlineBatch, logps: torch.Tensor, entropies: torch.Tensor, advantages: torch.Tensor
    ) -> torch.Tensor:
        """The loss of a batch, a scalar, from log-probabilities, entropies and advantages of its tokens, each [T]."""
        config, loss = self.visrl_config, self.online_loss
        assert batch.old is not None
        found = online_losses.batch_loss(
            loss, logps, batch.old, advantages, batch.packed.branch, batch.lengths.to(logps.device),
            ref=self._ref_logps(batch) if config.beta else None, beta=config.beta,
            correct_kl=config.use_bias_correction_kl, level=config.importance_sampling_level,
            parameters={name: getattr(config, name) for name in loss.parameters}, tokens=batch.tokens,
            length=config.max_completion_length, weights=batch.weights,
        )  # fmt: skip
        if found.kl is not None:
            self._meters.add("kl", found.kl.sum(), len(found.kl))
        self._log_update(batch, entropies, found.ratios.detach(), advantages)
        return found.total

    def _weights(self, batch: OnlineBatch) -> torch.Tensor | None:
        """What the tokens of a batch weigh, [T], that servers sampled; None where this process did."""
        config = self.visrl_config
        if self.servers is None or not config.vllm_importance_sampling_correction:
            return None
        assert batch.old is not None
        weights, cut = importance_weights(
            batch.old, batch.sampled.to(batch.old.device), batch.packed.branch, len(batch.lengths),
            mode=config.vllm_importance_sampling_mode, clip_min=config.vllm_importance_sampling_clip_min,
            clip_max=config.vllm_importance_sampling_clip_max,
        )  # fmt: skip
        name = "sampling/importance_sampling_ratio"
        self._meters.add(f"{name}/mean", weights.sum(), len(weights))
        self._add(f"{name}/max", float(weights.max()))
        self._meters.add(f"{name}/cut", cut.float().sum(), len(cut))
        return weights

    @torch.no_grad()
    def _ref_logps(self, batch: OnlineBatch) -> torch.Tensor:
        """Log-probabilities of a batch's tokens under the model at the start of its stage, [T]."""
        if batch.ref is None:
            policy: Any = self.accelerator.unwrap_model(self.model)
            with policy.disable_adapter() if self._start is None else nullcontext():
                start = policy if self._start is None else self._start
                batch.ref = token_logps(start, batch.packed, self.visrl_config.temperature)
        return batch.ref

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        started = time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        first = int(not self._timed)
        self._add_time("update", time.perf_counter() - started, first)
        self._add("step_time", 0.0, first)
        self._add("samples_per_second", self._questions * first, 0)
        self._timed = True  # the batches of a step add up to one time
        return loss

    # --- what people watch

    def _add(self, name: str, value: float, count: float = 1) -> None:
        self._meters.add(name, torch.tensor(value), count)

    def _add_time(self, part: str, seconds: float, count: int) -> None:
        """Add to the seconds of a part of a step and of the whole, whose steps and questions `training_step` counts."""
        self._add(f"time/{part}", seconds, count)
        self._add("step_time", seconds, 0)
        self._add("samples_per_second", 0.0, seconds)

    def _log_update(
        self, batch: OnlineBatch, entropies: torch.Tensor, ratios: torch.Tensor, advantages: torch.Tensor
    ) -> None:
        """Add to the running means what an update is like: means over the tokens that are computed."""
        config, branch = self.visrl_config, batch.packed.branch
        self._meters.add("entropy", entropies.sum(), len(entropies))
        for kind in ("box", "answer"):
            own = torch.tensor([one.step == kind for one in batch.branches], device=branch.device)[branch]
            if count := int(own.sum()):
                self._meters.add(f"entropy/{kind}", entropies[own].sum(), count)
        if self.online_loss.function is online_losses.clipped:
            low, high = online_losses.clip_shares(
                ratios, advantages, epsilon=config.epsilon, epsilon_high=config.epsilon_high
            )
            for name, clipped in (("low", low), ("high", high), ("region", low | high)):
                self._meters.add(f"clip_ratio/{name}_mean", clipped.float().sum(), len(clipped))

    def _objects_of(self, rollouts: Sequence[QuestionRollouts]) -> Objects:
        samples = [one.question.sample for one in rollouts]
        others = other_objects(samples, self._boxes)
        return {sample.place: own for sample, own in zip(samples, others, strict=True)}

    def _write_journal(self, rollouts: Sequence[QuestionRollouts], step: int, objects: Objects) -> None:
        rows = gather_object([journal_row(one, step, objects) for one in rollouts])
        if self.is_world_process_zero():
            self._show.rows = rows
            with Journal(Path(str(self.args.output_dir)) / JOURNAL) as journal:
                for part in batched(rows, 64):
                    journal.append(part)
