"""Log-probabilities of every branch of a packed batch, through the model's own forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from visrl.models.calls import forward_arguments
from visrl.models.value_head import ValueHead, kept_hidden_states
from visrl.packing.pack import PackedBatch

PART = 2**18  # logits that are held in fp32 at a time


class BranchLogps(NamedTuple):
    """Per branch: the sum of its response's log-probabilities, and how many tokens that is. Both [branches]."""

    sums: torch.Tensor
    counts: torch.Tensor


def branch_logps(model: nn.Module, packed: PackedBatch) -> BranchLogps:
    """Log-probabilities of each branch of `packed`, in fp32, with gradients where the model has them."""
    logps = token_logps(model, packed)
    sums = torch.zeros(packed.branches, dtype=torch.float32, device=logps.device)
    counts = torch.bincount(packed.branch, minlength=packed.branches).to(sums.dtype)
    return BranchLogps(sums.index_add(0, packed.branch, logps), counts)


def token_logps(model: nn.Module, packed: PackedBatch, temperature: float = 1.0) -> torch.Tensor:
    """Log-probability of every response token of `packed`, [T], in fp32, under the softmax at `temperature`."""
    return _LogProbability.apply(_at(kept_logits(model, packed), temperature), packed.row, packed.target)


def token_logps_and_entropies(
    model: nn.Module, packed: PackedBatch, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_logps`, and the entropy (nats) of the distribution that each token is one of, [T], without gradients."""
    logits = _at(kept_logits(model, packed), temperature)
    with torch.no_grad():
        entropies = torch.cat([_entropy(logits[part].float()) for part in _parts(logits)])
    return _LogProbability.apply(logits, packed.row, packed.target), entropies[packed.row]


def branch_scores(model: nn.Module, packed: PackedBatch, policy: nn.Module, head: ValueHead) -> torch.Tensor:
    """The head's value at the last token of every branch, [branches], in fp32. `packed` keeps those places (`ends`);
    `policy` is `model` out of any wrapper of several processes."""
    with kept_hidden_states(policy) as hidden:
        kept_logits(model, packed)
    return token_values(head, hidden, packed)[packed.branch.argsort()]


def token_values(head: ValueHead, hidden: Sequence[torch.Tensor], packed: PackedBatch) -> torch.Tensor:
    """The head's value at the kept place of every token, [T], where `hidden` is what `kept_hidden_states` found."""
    kept = [
        part if part.shape[1] == len(call.keep) else part[:, call.keep]  # of a model that computes all logits
        for part, call in zip(hidden, packed.calls, strict=True)
    ]
    return head(torch.cat([part.flatten(0, 1) for part in kept]))[packed.row]


def _at(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return logits if temperature == 1 else logits / temperature


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    logps = logits.log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


def kept_logits(model: nn.Module, packed: PackedBatch) -> torch.Tensor:
    """Logits at the predicting places of all calls, [rows × K of each, vocabulary].

    Hidden states meet the output layer there only (`logits_to_keep`), so no full-vocabulary logits of prompts exist,
    but for a model whose forward has no such argument.

    Raises:
        ValueError: a model that gives logits of other places than the tokens it is given.
    """
    logits = [logits_at(model, call.keep, **call.inputs, use_cache=False).flatten(0, 1) for call in packed.calls]
    return logits[0] if len(logits) == 1 else torch.cat(logits)


def logits_at(model: nn.Module, keep: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """The model's logits at the columns `keep` [K] alone, [rows, K, vocabulary].

    Raises:
        ValueError: a model that gives logits of other places than the tokens it is given.
    """
    keeps = "logits_to_keep" in forward_arguments(model)  # else it is swallowed, and all columns come
    logits: torch.Tensor = model(**inputs, **({"logits_to_keep": keep} if keeps else {})).logits
    places = len(keep) if keeps else inputs["input_ids"].shape[1]
    if logits.shape[1] != places:
        raise ValueError(f"the model gives logits of {logits.shape[1]} places where {places} are asked of it")
    return logits if keeps else logits[:, keep]


class _LogProbability(torch.autograd.Function):
    """log softmax(logits)[row, target] in fp32, with one copy of the logits in memory where the plain form has four.

    logits [N, vocabulary], row and target [T] → [T]. The gradient, Σ over tokens of a row of (one-hot − softmax), is
    written over the logits, which nothing else needs by then; so it can be taken once.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, row: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        norms = torch.cat([logits[part].float().logsumexp(-1) for part in _parts(logits)])
        ctx.logits = logits
        ctx.save_for_backward(row, target, norms)
        return logits[row, target].float() - norms[row]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, ctx.logits = ctx.logits, None
        assert logits is not None, "these log-probabilities have been differentiated before"
        row, target, norms = ctx.saved_tensors
        of_row = torch.zeros_like(norms).index_add_(0, row, gradient)
        for part in _parts(logits):
            softmax = (logits[part].float() - norms[part, None]).exp_()
            logits[part] = softmax.mul_(-of_row[part, None])
        logits.index_put_((row, target), gradient.to(logits.dtype), accumulate=True)
        return logits, None, None


def _parts(logits: torch.Tensor) -> Iterator[slice]:
    """Rows in parts that are small enough to be copied."""
    rows = max(1, PART // logits.shape[1])
    return (slice(start, start + rows) for start in range(0, len(logits), rows))
