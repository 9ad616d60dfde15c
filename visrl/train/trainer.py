"""The training loop: `transformers.Trainer` over packed trees. Losses live in losses.py, trees in tree.py."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback

from visrl.models.encode import Encoder
from visrl.models.load import load_model
from visrl.train import losses
from visrl.train.config import TrainConfig
from visrl.train.data import Curriculum
from visrl.train.forward import BranchLogps, branch_logps
from visrl.train.items import Batch, select

COMPLETE = "complete"  # the marker in a checkpoint that was written to its end
AVERAGED = ("ipo", "simpo", "orpo")  # losses on log-probabilities averaged over a response's tokens


class VisrlTrainer(Trainer):
    """Feeds packed batches through the model's own forward and a pure loss; the loop is transformers'."""

    loss_is_scaled_for_ga = True  # compute_loss normalises over the whole accumulated batch

    def __init__(
        self, *, visrl_config: TrainConfig, encoder: Encoder, reference: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.visrl_config = visrl_config
        self.encoder = encoder
        self.reference = reference or {}
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if isinstance(self.train_dataset, Curriculum):
            return SequentialSampler(self.train_dataset)
        return super()._get_train_sampler(train_dataset)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Restore full weights through `from_pretrained`.

        Checkpoints are written under the names of the model's first release, and transformers' own restore (5.23) does
        not translate them back: it would warn of missing keys and go on from the start's weights.
        """
        if self.visrl_config.finetuning_type == "lora" or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        stored = load_model(resume_from_checkpoint).state_dict()
        (model or self.model).load_state_dict(stored)

    def _load_best_model(self) -> None:
        if self.visrl_config.finetuning_type == "lora" or self.state.best_model_checkpoint is None:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs["batch"].packed = inputs["batch"].packed.to(self.args.device)
        return inputs

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Batch]], device: torch.device) -> torch.Tensor:
        """What the loss is divided by: rows (SFT) or items (preferences) of all ranks and accumulation steps."""
        sft = self.visrl_config.stage == "sft"
        count = sum(len(s["batch"].branches) if sft else s["batch"].items for s in batch_samples)
        total = torch.tensor(float(count), device=device)
        if self.args.world_size > 1:
            total = self.accelerator.gather(total).sum() / self.args.world_size  # gradients are averaged over ranks
        return total

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        batch: Batch = inputs["batch"]
        logps = branch_logps(model, batch.packed)
        if self.visrl_config.stage == "sft":
            per_row = self._sft(batch, logps)
            count: Any = len(batch.branches)
        else:
            per_row = self._preference(batch, logps)
            count = batch.items
        loss = per_row.sum() / (num_items_in_batch if num_items_in_batch is not None else count)
        return (loss, {}) if return_outputs else loss

    def _sft(self, batch: Batch, logps: BranchLogps) -> torch.Tensor:
        """Mean over each response's tokens: a short answer counts as much as a long box."""
        per_row = losses.sft(logps.sums / logps.counts)
        for number, branch in enumerate(batch.branches):
            self._watch(f"nll/{branch.step}", per_row[number])
        return per_row

    def _preference(self, batch: Batch, logps: BranchLogps) -> torch.Tensor:
        """Weighted loss of every row, to be divided by items."""
        config, device = self.visrl_config, logps.sums.device
        chosen, rejected = select(batch.branches, "chosen", device), select(batch.branches, "rejected", device)
        reference = torch.tensor(
            [self.reference.get(f"{b.row}/{b.role}", 0.0) for b in batch.branches], device=device, dtype=torch.float32
        )
        scale = logps.counts if config.pref_loss in AVERAGED else torch.ones_like(logps.counts)
        policy, reference = logps.sums / scale, reference / scale
        rows = [batch.branches[n] for n in chosen.tolist()]
        weight = torch.tensor([row.weight * self._lambda(row.step) for row in rows], device=device)
        beta = torch.tensor([self._beta(row.step) for row in rows], device=device)
        w, r, ref_w, ref_r = policy[chosen], policy[rejected], reference[chosen], reference[rejected]
        loss = preference_loss(config, w, r, ref_w, ref_r, beta, logps.counts[chosen])
        if config.pref_ftx:
            loss = loss + config.pref_ftx * losses.sft(logps.sums[chosen] / logps.counts[chosen])
        with torch.no_grad():
            gains = beta * losses.margin(w, r, ref_w, ref_r)
            for n, row in enumerate(rows):
                self._watch(f"rewards/margins/{row.step}", gains[n])
                self._watch(f"rewards/accuracies/{row.step}", (gains[n] > 0).float())
                self._watch(f"logps/chosen/{row.step}", logps.sums[chosen[n]])
                self._watch(f"logps/rejected/{row.step}", logps.sums[rejected[n]])
        return weight * loss

    def _lambda(self, step: str) -> float:
        if self.visrl_config.rl_stage == 1:
            return 1.0
        return self.visrl_config.lambda_box if step == "box" else self.visrl_config.lambda_answer

    def _beta(self, step: str) -> float:
        answer = self.visrl_config.pref_beta_answer
        return answer if step == "answer" and answer is not None else self.visrl_config.pref_beta

    def _watch(self, name: str, value: torch.Tensor) -> None:
        self._sums[name] += float(value.detach())
        self._counts[name] += 1

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Greedy rollouts on the held-out samples: what the policy really does, not what its losses say."""
        from visrl.engines.local import LocalEngine
        from visrl.evaluate.rollouts import evaluate_samples, measures

        engine = LocalEngine(self.accelerator.unwrap_model(self.model), self.encoder)
        held_out: Any = self.eval_dataset
        rows = evaluate_samples(engine, held_out, crop_rule=self.encoder.settings.crop_rule)
        metrics = {f"eval_rollout/{name}": value for name, value in measures(rows).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **{name: self._sums[name] / self._counts[name] for name in self._sums}}
            self._sums.clear()
            self._counts.clear()
        super().log(logs, start_time)


def preference_loss(
    config: TrainConfig,
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    beta: torch.Tensor,
    chosen_counts: torch.Tensor,
) -> torch.Tensor:
    """The configured loss of each row, [rows], on log-probabilities that are summed or averaged as it wants them."""
    four = (chosen, rejected, ref_chosen, ref_rejected)
    smoothing = config.dpo_label_smoothing
    match config.pref_loss:
        case "sigmoid":
            return losses.dpo(*four, beta=beta, label_smoothing=smoothing)
        case "robust":
            return losses.robust_dpo(*four, beta=beta, label_smoothing=smoothing)
        case "ipo":
            return losses.ipo(*four, beta=beta)
        case "hinge":
            return losses.hinge(*four, beta=beta)
        case "simpo":
            return losses.simpo(chosen, rejected, beta=beta, gamma=config.simpo_gamma)
        case "orpo":
            return losses.orpo(chosen, rejected, beta=beta)
        case "sft":
            return losses.sft(chosen / chosen_counts)
    raise ValueError(f"pref_loss {config.pref_loss!r} is not a pairwise loss")


class MarkComplete(TrainerCallback):
    """Marks a checkpoint when all of it is on disk, so that a kill in the middle of writing leaves none to resume."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


class JsonLog(TrainerCallback):
    """Appends every log line to `log.jsonl` in the output folder, for curves."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "log.jsonl"

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as lines:
                lines.write(json.dumps({"step": state.global_step, **logs}) + "\n")
