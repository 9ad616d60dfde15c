"""The training loop: `transformers.Trainer` over packed sequences. Losses: losses.py; prefix trees: packing/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import SequentialSampler
from transformers import Trainer

from visrl.models.encode import Encoder
from visrl.models.load import load_model
from visrl.models.modes import evaluating
from visrl.models.router import Routed, experts_of_a_token, kept_router_logits, router_loss
from visrl.packing.forward import branch_logps
from visrl.records import RecordError, Sample
from visrl.sequences import batched
from visrl.train import losses
from visrl.train.checkpoints import TrainingError, check_not_diverged, resumed_step, writing
from visrl.train.config import TrainConfig
from visrl.train.curriculum import Curriculum
from visrl.train.distributed import shard_batches, shards_weights
from visrl.train.features import FeatureCache
from visrl.train.items import Branch, TrainingBatch, select
from visrl.train.log import RunningMeans
from visrl.train.model import make_tied_embedding_sparse, router_weight
from visrl.train.sampler import EpochOrder, SameImageSampler


class VisrlTrainer(Trainer):
    """Feeds packed batches through the model's own forward and a pure loss; the loop is transformers'.

    `validation` are items on which the loss is evaluated, `rollouts` samples on which the policy is. `reference` holds
    the log-probabilities of the reference by row and role; None where the loss asks for none.
    """

    loss_is_scaled_for_ga = True  # compute_loss normalises over the whole accumulated batch
    reads_logits = True  # whether the output layer has a part in the loss

    def __init__(
        self,
        *,
        visrl_config: TrainConfig,
        encoder: Encoder,
        reference: dict[str, float] | None = None,
        features: FeatureCache | None = None,
        validation: Any = None,
        rollouts: Sequence[Sample] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(eval_dataset=validation or list(rollouts) or None, **kwargs)
        self.visrl_config = visrl_config
        self.loss = visrl_config.loss
        self.encoder = encoder
        self.reference = reference
        self.features = features
        self.validation = validation
        self.rollouts = rollouts
        self.router_weight = router_weight(visrl_config, encoder.config)
        self._chosen = experts_of_a_token(encoder.config) or 0
        self._meters = RunningMeans()
        assert self.model is not None
        if self.reads_logits and self.args.world_size == 1 and not shards_weights(self.args):
            make_tied_embedding_sparse(self.model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if isinstance(self.train_dataset, Curriculum):
            return SequentialSampler(self.train_dataset)
        images = getattr(self.train_dataset, "images", None)
        if images is None or self.args.train_sampling_strategy == "sequential":
            return super()._get_train_sampler(train_dataset)
        sampler = SameImageSampler(images(), self.args.train_batch_size, self.args.seed)
        self.add_callback(EpochOrder(sampler))
        return sampler

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Restore full weights through `from_pretrained`.

        Checkpoints are written under the names of the model's first release, and transformers' own restore (5.23) does
        not translate them back: it would warn of missing keys and go on from the start's weights.
        """
        if self.visrl_config.finetuning_type == "lora" or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        restored: Any = model or self.model
        stored = load_model(resume_from_checkpoint, dtype=next(restored.parameters()).dtype).state_dict()
        restored.load_state_dict(stored)

    def _load_best_model(self) -> None:
        if self.visrl_config.finetuning_type == "lora" or self.state.best_model_checkpoint is None:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        batch: TrainingBatch = inputs["batch"]
        if self.features is not None:
            self.features.fill(batch.packed, self.args.device)
        batch.packed = batch.packed.to(self.args.device)
        return inputs

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, TrainingBatch]], device: torch.device
    ) -> torch.Tensor:
        """What the loss is divided by: rows (SFT) or items (preferences) of all ranks and accumulation steps."""
        total = torch.tensor(float(sum(self._count(samples["batch"]) for samples in batch_samples)), device=device)
        if self.args.world_size > 1:
            total = self.accelerator.gather(total).sum() / self.args.world_size  # gradients are averaged over ranks
        return total

    def _count(self, batch: TrainingBatch) -> int:
        return len(batch.branches) if self.visrl_config.stage == "sft" else batch.items

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch, a scalar: the sum over its rows, divided by `num_items_in_batch` where that is known.

        Raises:
            TrainingError: a row's loss is no number; the message names rows.
        """
        batch: TrainingBatch = inputs["batch"]
        with self._routed() as routed:
            per_row = self._row_losses(model, batch)
        if not torch.isfinite(per_row).all():
            raise TrainingError(
                f"the loss is no number any more at step {self.state.global_step + 1} (rows "
                f"{', '.join(sorted({branch.row for branch in batch.branches})[:3])}); lower learning_rate, set "
                "max_grad_norm, or look at the weights of the model; this training is not complete"
            )
        count = self._count(batch)
        total = num_items_in_batch if num_items_in_batch is not None else count
        loss = per_row.sum() / total
        if self.router_weight:  # a mean over tokens: of several batches each counts by its share of the step
            uneven = router_loss(routed, [call.uses for call in batch.packed.calls], self._chosen)
            self._meters.add("aux_loss", uneven.detach())
            loss = loss + self.router_weight * uneven * count / total
        return (loss, {}) if return_outputs else loss

    def _routed(self) -> AbstractContextManager[list[Routed]]:
        """What routers say within, where a loss reads it."""
        return kept_router_logits(self.accelerator.unwrap_model(self.model)) if self.router_weight else nullcontext([])

    def _row_losses(self, model: torch.nn.Module, batch: TrainingBatch) -> torch.Tensor:
        """The weighted loss of every row, to be divided by what `_count` counts."""
        logps = branch_logps(model, batch.packed)
        if self.visrl_config.stage == "sft":
            per_row = losses.sft(logps.sums / logps.counts)  # a short answer counts as much as a long box
            for number, branch in enumerate(batch.branches):
                self._meters.add(f"nll/{branch.step}", per_row[number])
            return per_row
        config, loss, device = self.visrl_config, self.loss, logps.sums.device
        ref_sums = torch.tensor(reference_of(batch.branches, self.reference), device=device, dtype=torch.float32)
        chosen, rejected = (select(batch.branches, role, device) for role in ("chosen", "rejected"))
        policy, reference = (x / logps.counts if loss.averages else x for x in (logps.sums, ref_sums))
        pairs, ref_pairs = ((x[chosen], x[rejected]) for x in (policy, reference))
        rows = [batch.branches[n] for n in chosen.tolist()]
        beta = torch.tensor([self._beta(row.step) for row in rows], device=device)
        keywords = {keyword: getattr(config, key) for keyword, key in loss.parameters.items()}
        if loss.beta is not None:
            keywords["beta"] = beta
        if loss.kl:
            mismatched = select(batch.branches, "mismatched", device)
            keywords["kl"] = self._kl(rows, policy[mismatched], reference[mismatched])
        per_row = loss.function(*loss.arguments(pairs, ref_pairs), **keywords)
        if per_row.shape != chosen.shape:
            raise TrainingError(
                f"pref_loss {config.pref_loss} gives a loss of shape {list(per_row.shape)} for {len(rows)} rows; it "
                f"must be one number a row, [{len(rows)}]"
            )
        if config.pref_ftx:
            per_row = per_row + config.pref_ftx * losses.sft(logps.sums[chosen] / logps.counts[chosen])
        if loss.reads != "pair":  # it compares none: how far they are apart is said in sums
            pairs, ref_pairs = ((x[chosen], x[rejected]) for x in (logps.sums, ref_sums))
        gains = beta * losses.margin(*pairs, *ref_pairs)
        self._log_pairs(rows, gains.detach(), logps.sums[chosen], logps.sums[rejected])
        return per_row * torch.tensor([row.weight * self._lambda(row.step) for row in rows], device=device)

    def _log_pairs(
        self, rows: Sequence[Branch], gains: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor
    ) -> None:
        """Add to the running means how far each pair is apart (`gains`, β included) and how likely its sides are."""
        for n, row in enumerate(rows):
            self._meters.add(f"rewards/margins/{row.step}", gains[n])
            self._meters.add(f"rewards/accuracies/{row.step}", (gains[n] > 0).float())
            self._meters.add(f"logps/chosen/{row.step}", chosen[n])
            self._meters.add(f"logps/rejected/{row.step}", rejected[n])

    def _kl(self, rows: Sequence[Branch], policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """KTO's estimate for each row, [rows]: that of its step, over the rows of this batch on all ranks."""
        gains = (policy - reference).tolist()
        pairs = [(row.step, gain) for row, gain in zip(rows, gains, strict=True)]
        pairs = gather_object(pairs)
        kl = {}
        for step in {row.step for row in rows}:
            own = policy.new_tensor([gain for other, gain in pairs if other == step])
            kl[step] = losses.kto_kl(own, torch.zeros_like(own))
            self._meters.add(f"kl/{step}", kl[step])
        return torch.stack([kl[row.step] for row in rows])

    def _lambda(self, step: str) -> float:
        if self.visrl_config.rl_stage == 1:
            return 1.0
        return self.visrl_config.lambda_box if step == "box" else self.visrl_config.lambda_answer

    def _beta(self, step: str) -> float:
        answer = self.visrl_config.pref_beta_answer
        return answer if step == "answer" and answer is not None else self.visrl_config.pref_beta

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The loss on the items to validate on, and greedy rollouts on the held-out samples: what the policy really
        does, not what its losses say."""
        metrics: dict[str, float] = {}
        if self.validation:
            metrics |= self._validate()
        if self.rollouts:
            metrics |= self._roll_out()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        model, since_log, validation = self.model_wrapped, self._meters, RunningMeans()
        batches = batched(range(len(self.validation)), self.args.eval_batch_size)
        with evaluating(model):
            for members, counts in shard_batches(batches):
                inputs = self._prepare_inputs(self.data_collator([self.validation[n] for n in members]))
                self._meters = validation if counts else RunningMeans()
                self._meters.add("loss", self._row_losses(model, inputs["batch"]).sum(), self._count(inputs["batch"]))
        self._meters = since_log
        return {f"eval_{name}": value for name, value in validation.means().items()}

    def _roll_out(self) -> dict[str, float]:
        """Greedy rollouts of the held-out samples with the weights as they are, shared out over the processes; where
        weights are split over them, each does all, as they must call the model equally often."""
        from visrl.engines.local import LocalEngine
        from visrl.rewards.results import training_measures
        from visrl.rewards.scored import evaluate_samples
        from visrl.rollout.protocols import VISRL, protocol_of

        policy = self.accelerator.unwrap_model(self.model)
        engine = LocalEngine(policy, self.encoder)
        rule, root = self.encoder.settings.crop_rule, self.visrl_config.image_root
        alone = shards_weights(self.args)
        part = slice(None) if alone else slice(self.args.process_index, None, self.args.world_size)
        asked = protocol_of(self.visrl_config)
        if asked.name != VISRL.name and self.visrl_config.is_online:
            asked = replace(asked, answer_tokens=self.visrl_config.max_completion_length)
        rows = evaluate_samples(engine, self.rollouts, protocol=asked, crop_rule=rule, root=root, part=part)
        rows = rows if alone else gather_object(rows)
        return {f"eval_rollout/{name}": value for name, value in training_measures(rows).items()}

    def check_trained(self, resumed: Path | None) -> None:
        """Refuse to call complete what learned nothing, or whose last step left weights that are no numbers.

        Raises:
            TrainingError: so it is.
        """
        steps = self.state.global_step
        if not steps:
            raise TrainingError("nothing was trained: 0 steps; give more items, epochs or max_steps")
        own = resumed is None or resumed.resolve().parent == Path(str(self.args.output_dir)).resolve()
        if resumed is not None and not own and resumed_step(resumed) >= steps:
            raise TrainingError(f"nothing was trained: {resumed} stands at step {steps} already; raise max_steps")
        check_not_diverged(self.model, steps)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with writing(Path(str(self.args.output_dir))):
            super()._save_checkpoint(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the running means since the last log."""
        if "loss" in logs:
            logs = {**logs, **self._meters.means()}
            self._meters = RunningMeans()
        super().log(logs, start_time)


def reference_of(branches: Sequence[Branch], reference: Mapping[str, float] | None) -> list[float]:
    """The reference log-probability of each branch, by row and role; zeros for a loss that asks for no reference.

    Raises:
        RecordError: one is not known. It is never taken for 0, which would say that the reference is certain.
    """
    if reference is None:
        return [0.0] * len(branches)
    names = [f"{branch.row}/{branch.role}" for branch in branches]
    missing = next((name for name in names if name not in reference), None)
    if missing is not None:
        raise RecordError(f"no reference log-probability of {missing}; remove reference.json and start again")
    return [reference[name] for name in names]
