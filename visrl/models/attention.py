"""Attention over trees: explicit masks through transformers' own attention interface. No model code is patched."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from visrl.models.families import language_model

ATTENTION = "visrl_tree"


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
    """Scaled dot-product attention under an explicit mask, inside each bin of a packed batch.

    With a mask of [bins, 1, length, length] and one row of bins × length tokens, tokens of different bins never meet:
    attention costs bins × length² and not (bins × length)². Any other mask [batch, 1, queries, keys] is applied as is.
    """
    if attention_mask is None:
        raise ValueError("tree attention needs its mask [bins, 1, length, length]")
    batch, heads, queries, dim = query.shape
    bins, length = attention_mask.shape[0], attention_mask.shape[2]
    if bins != batch:
        query, key, value = (_per_bin(states, bins, length) for states in (query, key, value))
    groups = heads // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return out.transpose(1, 2).reshape(batch, queries, heads, dim), None


def _per_bin(states: torch.Tensor, bins: int, length: int) -> torch.Tensor:
    """[1, heads, bins × length, dim] → [bins, heads, length, dim]"""
    heads, dim = states.shape[1], states.shape[3]
    return states[0].view(heads, bins, length, dim).transpose(0, 1)


AttentionInterface.register(ATTENTION, tree_attention)


def use_tree_attention(model: nn.Module) -> None:
    """Let the language model of `model` attend inside bins; the vision tower keeps its own attention."""
    config: Any = language_model(model).config
    config._attn_implementation = ATTENTION
