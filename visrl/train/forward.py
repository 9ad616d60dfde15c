"""Log-probabilities of every branch of a packed batch, through the model's own forward pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from visrl.train.pack import Packed


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
    """Log-probability of every response token of `packed`, [T], in fp32."""
    return torch.log_softmax(kept_logits(model, packed).float(), dim=-1)[packed.row, packed.target]


def kept_logits(model: nn.Module, packed: Packed) -> torch.Tensor:
    """Logits at the predicting places of all calls, [rows × K of each, vocabulary].

    Hidden states meet the output layer there only (`logits_to_keep`), so no full-vocabulary logits of prompts exist.
    """
    logits = [
        model(**call.inputs, use_cache=False, logits_to_keep=call.keep).logits.flatten(0, 1) for call in packed.calls
    ]
    return logits[0] if len(logits) == 1 else torch.cat(logits)
