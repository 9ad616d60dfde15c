"""Reward models: the trainer of `stage: rm`. A scalar head on the packed tree, pairs of boxes and pairs of answers.

One pass computes a question's pairs; the score of a response is read at its last token, the end of its turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visrl.models.parts import base_model
from visrl.packing.forward import branch_scores
from visrl.train.items import Branch, TrainingBatch, select
from visrl.train.value_head import ValueHeadTrainer


def bradley_terry(chosen: Tensor, rejected: Tensor, *, center: float = 0.0) -> Tensor:
    """−log σ(r_chosen − r_rejected) + center · (r_chosen + r_rejected)², one loss for each pair: scores are [rows].

    Bradley and Terry (1952), as a loss of reward models in Ouyang et al. (2022), eq. 1. It says nothing of where the
    scores lie together: `center` holds them around 0 (Eisenstein et al. 2023, eq. 2).
    """
    return -nn.functional.logsigmoid(chosen - rejected) + center * (chosen + rejected) ** 2


def freeze_output_layer(model: nn.Module) -> None:
    """Train no output layer: no score depends on it. One that is the embedding, too, is trained as that."""
    base: Any = base_model(model)
    output = base.get_output_embeddings()
    if output.weight is not base.get_input_embeddings().weight:
        output.requires_grad_(False)


class RewardModelTrainer(ValueHeadTrainer):
    """`VisrlTrainer` that learns scores of responses from preferences. Its collator packs the ends of branches."""

    reads_logits = False

    def _row_losses(self, model: nn.Module, batch: TrainingBatch) -> Tensor:
        """The weighted loss of every pair, to be divided by the number of items."""
        scores = branch_scores(model, batch.packed, self.policy, self.head)
        chosen, rejected = (scores[select(batch.branches, role, scores.device)] for role in ("chosen", "rejected"))
        rows = [branch for branch in batch.branches if branch.role == "chosen"]
        per_row = bradley_terry(chosen, rejected, center=self.visrl_config.center_rewards_coefficient)
        self._log_scores(rows, chosen.detach(), rejected.detach())
        return per_row * per_row.new_tensor([row.weight * self._lambda(row.step) for row in rows])

    def _log_scores(self, rows: Sequence[Branch], chosen: Tensor, rejected: Tensor) -> None:
        """Add to the running means what TRL's RewardTrainer logs, of box pairs and of answer pairs."""
        for step in sorted({row.step for row in rows}):
            own = torch.tensor([row.step == step for row in rows], device=chosen.device)
            better, worse = chosen[own], rejected[own]
            self._meters.add(f"accuracy/{step}", (better > worse).float().sum(), len(better))
            self._meters.add(f"margin/{step}", (better - worse).sum(), len(better))
            both = torch.cat([better, worse])
            self._meters.add(f"mean_reward/{step}", both.sum(), len(both))
            self._meters.add(f"min_reward/{step}", both.min())
            self._meters.add(f"max_reward/{step}", both.max())
