"""Log-probabilities of every branch of a packed batch, through the model's own forward pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface

from visrl.models.families import language_model
from visrl.train.tree import Packed

ATTENTION = "visrl_tree"


class BranchLogps(NamedTuple):
    """Per branch: the sum of its response's log-probabilities, and how many tokens that is. Both [branches]."""

    sums: torch.Tensor
    counts: torch.Tensor


def branch_logps(model: nn.Module, packed: Packed) -> BranchLogps:
    """Log-probabilities of each branch of `packed`, in fp32, with gradients where the model has them.

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
    token_logps = torch.log_softmax(logits.float(), dim=-1)[packed.row, packed.target]
    sums = torch.zeros(packed.branches, dtype=torch.float32, device=token_logps.device)
    counts = torch.bincount(packed.branch, minlength=packed.branches).to(sums.dtype)
    return BranchLogps(sums.index_add(0, packed.branch, token_logps), counts)


def tree_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention inside each bin of a packed batch.

    `query`, `key`, `value` are [1, heads, bins × length, dim], the mask is [bins, 1, length, length]: tokens of
    different bins never meet, so attention costs bins × length² and not (bins × length)².
    """
    bins, _, length, _ = attention_mask.shape  # type: ignore[union-attr]
    groups = query.shape[1] // key.shape[1]
    q, k, v = (_per_bin(x, bins, length) for x in (query, key, value))
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    out = nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return out.transpose(1, 2).reshape(1, bins * length, query.shape[1], -1), None


def _per_bin(states: torch.Tensor, bins: int, length: int) -> torch.Tensor:
    """[1, heads, bins × length, dim] → [bins, heads, length, dim]"""
    heads, dim = states.shape[1], states.shape[3]
    return states[0].view(heads, bins, length, dim).transpose(0, 1)


AttentionInterface.register(ATTENTION, tree_attention)


def use_tree_attention(model: nn.Module) -> None:
    """Let the language model of `model` attend inside bins; the vision tower keeps its own attention."""
    language_model(model).config._attn_implementation = ATTENTION
