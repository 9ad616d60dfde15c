"""What a trainer needs whose model carries a value head: the head in every checkpoint, restored with the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from visrl.models.value_head import ValueHead, load_value_head, save_value_head, value_head, without_value_head
from visrl.train.trainer import VisrlTrainer


class ValueHeadTrainer(VisrlTrainer):
    """`VisrlTrainer` of a model with a value head, which is written beside the weights and never among them.

    `keeps_head` says whether the head is a part of what the training makes, and not only of its checkpoints.
    """

    keeps_head = True

    @property
    def policy(self) -> Any:
        """The model, out of the wrapper of several processes."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def head(self) -> ValueHead:
        """The model's value head."""
        return value_head(self.policy)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with without_value_head(self.policy):
            super()._save(output_dir, state_dict)
        whole = output_dir is None or Path(output_dir).resolve() == Path(str(self.args.output_dir)).resolve()
        if self.args.should_save and (self.keeps_head or not whole):
            save_value_head(self.policy, output_dir or str(self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        with without_value_head(self.policy):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_value_head(self.policy, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.state.best_model_checkpoint is not None:
            load_value_head(self.policy, self.state.best_model_checkpoint)
