"""Attention over trees: explicit masks through transformers' own attention interface. No model code is patched."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from visrl.models.families import language_model

ATTENTION = "visrl_tree"
BLOCKS = "visrl_tree_blocks"  # the same, leaving out keys that lie behind a block of queries
BLOCK = 128


def tree_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
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
    if groups > 1 and 4 * queries < key.shape[2] and not kwargs.get("softcap"):
        # Decoding: few queries over many keys. Queries of one group share their keys, so no key is copied.
        folded = query.reshape(batch, key.shape[1], groups * queries, dim)
        out = nn.functional.scaled_dot_product_attention(
            folded, key, value, attn_mask=attention_mask.repeat(1, 1, groups, 1), dropout_p=dropout, scale=scaling
        )
        return out.view(batch, heads, queries, dim).transpose(1, 2), None
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    attend: Any = nn.functional.scaled_dot_product_attention
    if kwargs.get("softcap"):
        attend = partial(_capped, softcap=kwargs["softcap"])
    options = {"dropout_p": dropout, "scale": scaling}
    config: Any = module.config
    own = query.shape[2] == key.shape[2] > BLOCK and attention_mask.dtype == torch.bool
    if own and config._attn_implementation == BLOCKS:
        out = torch.cat([attend(*block, **options) for block in _blocks(query, key, value, attention_mask)], dim=2)
    else:
        out = attend(query, key, value, attention_mask, **options)
    return out.transpose(1, 2).reshape(batch, queries, heads, dim), None


def _blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Blocks of queries with the keys up to the last one that any of them sees."""
    for start in range(0, query.shape[2], BLOCK):
        part = mask[:, :, start : start + BLOCK]
        stop = int(part.any(dim=2).flatten(0, 1).any(dim=0).nonzero().max()) + 1
        yield query[:, :, start : start + BLOCK], key[:, :, :stop], value[:, :, :stop], part[..., :stop]


def _capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    *,
    softcap: float,
    dropout_p: float,
    scale: float | None,
) -> torch.Tensor:
    """Attention whose scores are bent to stay within ± `softcap` (Gemma 2), which PyTorch's own does not offer."""
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return nn.functional.dropout(weights, dropout_p) @ value


def _per_bin(states: torch.Tensor, bins: int, length: int) -> torch.Tensor:
    """[1, heads, bins × length, dim] → [bins, heads, length, dim]"""
    heads, dim = states.shape[1], states.shape[3]
    return states[0].view(heads, bins, length, dim).transpose(0, 1)


AttentionInterface.register(ATTENTION, tree_attention)
AttentionInterface.register(BLOCKS, tree_attention)


def use_tree_attention(model: nn.Module, *, blocks: bool = False) -> None:
    """Let the language model of `model` attend inside bins; the vision tower keeps its own attention.

    With `blocks` long sequences are computed in blocks of queries, which spares nearly half of the attention.
    """
    config: Any = language_model(model).config
    config._attn_implementation = BLOCKS if blocks else ATTENTION
