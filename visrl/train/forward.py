"""Log-probabilities of every branch of a packed batch, through the model's own forward pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from visrl.train.tree import Packed


class BranchLogps(NamedTuple):
    """Per branch: the sum of its response's log-probabilities, and how many tokens that is. Both [branches]."""

    sums: torch.Tensor
    counts: torch.Tensor


def branch_logps(model: nn.Module, packed: Packed) -> BranchLogps:
    """Log-probabilities of each branch of `packed`, in fp32, with gradients where the model has them."""
    logps = token_logps(model, packed)
    sums = torch.zeros(packed.branches, dtype=torch.float32, device=logps.device)
    counts = torch.bincount(packed.branch, minlength=packed.branches).to(sums.dtype)
    return BranchLogps(sums.index_add(0, packed.branch, logps), counts)


def token_logps(model: nn.Module, packed: Packed) -> torch.Tensor:
    """Log-probability of every response token of `packed`, [T], in fp32.

    Hidden states meet the output layer at predicting places only (`logits_to_keep`), so no full-vocabulary logits of
    prompts exist.
    """
    logits = model(
        input_ids=packed.input_ids,
        attention_mask=packed.mask,
        position_ids=packed.position_ids,
        pixel_values=packed.pixel_values,
        image_grid_thw=packed.image_grid_thw,
        use_cache=False,
        logits_to_keep=packed.keep,
    ).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)[packed.row, packed.target]
