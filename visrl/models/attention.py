"""Attention under ancestor masks, through transformers' own attention interface: PyTorch's SDPA, the same in blocks, or
FlexAttention. No model code is patched.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface

from visrl.models.family import Family
from visrl.models.parts import language_model
from visrl.models.recurrent import hand_on_states

BLOCK = 128  # tokens
FLEX_TOKENS = 1024  # from which length on a block mask is worth more than it costs
KINDS = {
    "dense": "visrl_tree",  # PyTorch's attention under the mask as it is
    "blocks": "visrl_tree_blocks",  # the same in blocks of queries, leaving out keys that lie behind all of a block
    "flex": "visrl_tree_flex",  # FlexAttention, leaving out every block of keys that a block of queries does not see
}


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
        return out.view(batch, heads, queries, -1).transpose(1, 2), None
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    attend: Any = nn.functional.scaled_dot_product_attention
    if kwargs.get("softcap"):
        attend = partial(_capped, softcap=kwargs["softcap"])
    options = {"dropout_p": dropout, "scale": scaling}
    config: Any = module.config
    kind = config._attn_implementation
    own = query.shape[2] == key.shape[2] and attention_mask.dtype == torch.bool
    if own and kind == KINDS["flex"] and query.shape[2] >= FLEX_TOKENS and not dropout and _flex_runs(query):
        out = _flex(query, key, value, attention_mask, scaling, kwargs.get("softcap"))
    elif own and kind == KINDS["blocks"] and query.shape[2] > BLOCK:
        out = torch.cat([attend(*block, **options) for block in _blocks(query, key, value, attention_mask)], dim=2)
    else:
        out = attend(query, key, value, attention_mask, **options)
    return out.transpose(1, 2).reshape(batch, queries, heads, -1), None  # values may have a dimension of their own


def _blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Blocks of queries with the keys up to the last one that any of them sees."""
    for start in range(0, query.shape[2], BLOCK):
        part = mask[:, :, start : start + BLOCK]
        stop = int(part.any(dim=2).flatten(0, 1).any(dim=0).nonzero().max()) + 1
        yield query[:, :, start : start + BLOCK], key[:, :, :stop], value[:, :, :stop], part[..., :stop]


def _flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """FlexAttention under `mask` [batch, 1, length, length]: compiled on a GPU, step by step on a CPU."""

    attend: Any = _compiled_flex() if query.is_cuda else flex_attention
    cap = partial(_cap, softcap=softcap) if softcap else None
    return attend(query, key, value, score_mod=cap, block_mask=_block_mask(mask), scale=scaling)


def _cap(score: torch.Tensor, *place: torch.Tensor, softcap: float) -> torch.Tensor:
    """`score` bent to stay within ± `softcap`."""
    return torch.tanh(score / softcap) * softcap


def _flex_runs(query: torch.Tensor) -> bool:
    """Whether PyTorch has FlexAttention here: on a CPU it has no backward pass."""
    return query.is_cuda or not torch.is_grad_enabled()


@cache
def _compiled_flex() -> Any:
    """One kernel for all lengths: with fixed shapes every new packed length would compile again."""
    return torch.compile(flex_attention, dynamic=True)


def _block_mask(mask: torch.Tensor) -> BlockMask:
    """The block mask of `mask`, made once for all layers of a forward and backward pass."""
    for known, made in _block_masks:
        if known is mask:
            return made

    def sees(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return mask[row, 0, query, key]

    rows, _, queries, keys = mask.shape
    made = create_block_mask(sees, rows, None, queries, keys, device=mask.device, BLOCK_SIZE=BLOCK)
    _block_masks.append((mask, made))
    return made


_block_masks: deque[tuple[torch.Tensor, BlockMask]] = deque(maxlen=4)  # some families have two masks in a pass


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
    """Attention whose scores are bent to stay within ± `softcap`, which PyTorch's own does not offer."""
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = _cap(scores, softcap=softcap)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return nn.functional.dropout(weights, dropout_p) @ value


def _per_bin(states: torch.Tensor, bins: int, length: int) -> torch.Tensor:
    """[1, heads, bins × length, dim] → [bins, heads, length, dim]"""
    heads, dim = states.shape[1], states.shape[3]
    return states[0].view(heads, bins, length, dim).transpose(0, 1)


for name in KINDS.values():
    AttentionInterface.register(name, tree_attention)


def use_tree_attention(model: nn.Module, kind: str = "dense") -> None:
    """Let the language model of `model` attend inside bins from now on; the vision tower keeps its own attention.

    `kind` is one of `KINDS`, or "auto": blocks of queries on a CPU, FlexAttention on a GPU. All give the same. For a
    model that is trained: gradient checkpointing computes layers again, long after a forward pass has returned.
    Recurrent layers hand on their states along paths then (see recurrent.py).
    """
    hand_on_states(model)
    if kind == "auto":
        kind = "flex" if torch.cuda.is_available() else "blocks"
    set_attention(language_model(model).config, KINDS[kind])


def set_attention(config: Any, kind: str) -> None:
    """Let the layers of a config attend so, and not those of configs in it: where a decoder's config is the whole
    model's, its vision tower keeps its own attention."""
    config._attn_implementation = {"": kind} if config.sub_configs else kind


@contextmanager
def attending_trees(model: nn.Module, kind: str = "dense") -> Iterator[None]:
    """`use_tree_attention` for the calls within, without a backward pass; the model's own attention is back afterwards.

    One thread at a time is in here with a model, so that none takes another's setting for the model's own.
    """
    decoder = language_model(model)
    with _lock_of(decoder):
        config: Any = decoder.config
        own = config._attn_implementation
        use_tree_attention(model, kind)
        try:
            yield
        finally:
            set_attention(config, own)


def attending(model: nn.Module, family: Family) -> AbstractContextManager[None]:
    """`attending_trees` for a model that takes trees; one that takes none attends as it does by itself."""
    return nullcontext() if family.plain else attending_trees(model)


def _lock_of(module: nn.Module) -> threading.RLock:
    """The lock of a module, which one thread may take several times."""
    with _locks_lock:
        return _locks.setdefault(module, threading.RLock())


_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_locks_lock = threading.Lock()
