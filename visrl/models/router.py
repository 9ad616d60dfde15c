"""Router losses of mixtures of experts: how unevenly routers send tokens to experts, as the library's own models have
it (Switch Transformers, arXiv 2101.03961, equations 4 to 6)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from visrl.models.parts import base_model

ARGUMENT = "output_router_logits"  # of forwards and text configs
Routed = tuple[torch.Tensor, ...]  # router logits of each layer, [tokens, experts]


def experts_of_a_token(config: Any) -> int | None:
    """To how many experts each token goes; None where the config's models do not give what their routers say."""
    text = config.get_text_config()
    return getattr(text, "num_experts_per_tok", None) if getattr(text, ARGUMENT, None) is not None else None


def own_weight(config: Any) -> float:
    """The weight of the router loss that a config asks for: its own where it has router logits switched on."""
    text = config.get_text_config()
    return getattr(text, "router_aux_loss_coef", 0.0) if getattr(text, ARGUMENT, False) else 0.0


def switch_off_router_logits(config: Any) -> None:
    """Have a config's models give no router logits unasked: with them comes a loss over padded rows, which fails under
    the mask of a tree and which nothing reads where nothing is trained."""
    text = config.get_text_config()
    if getattr(text, ARGUMENT, False):
        setattr(text, ARGUMENT, False)


@contextmanager
def kept_router_logits(model: nn.Module) -> Iterator[list[Routed]]:
    """A list to which every forward pass within that has gradients adds its router logits. `model` is out of DDP's
    wrapper; who is called may be in it."""
    found: list[Routed] = []
    inner: nn.Module = base_model(model).model

    def ask(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, ARGUMENT: torch.is_grad_enabled()}

    def keep(layer: nn.Module, args: Any, made: Any) -> None:
        if torch.is_grad_enabled():
            found.append(made.router_logits)

    handles = (inner.register_forward_pre_hook(ask, with_kwargs=True), inner.register_forward_hook(keep))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def router_loss(calls: Sequence[Routed], uses: Sequence[torch.Tensor], chosen: int) -> torch.Tensor:
    """The router loss of some sequences, a scalar, where a token that several share was computed once: `uses` [rows,
    length] of each call says in how many sequences each token lies, 0 for padding. `chosen` experts take a token.

    With f the share of the tokens of all layers that an expert takes, and P its mean probability over them, it is
    E Σ f P over the E experts: `chosen` where all are alike.

    Raises:
        ValueError: routers that do not see every token.
    """
    experts = calls[0][0].shape[-1]
    taken = probable = torch.zeros(experts, device=calls[0][0].device)
    total = 0.0
    for layers, counts in zip(calls, uses, strict=True):
        weights = counts.flatten().float()
        for logits in layers:
            if logits.shape != (len(weights), experts):
                raise ValueError(
                    f"router logits of {list(logits.shape)} for {len(weights)} tokens and {experts} experts"
                )
            probability = logits.softmax(-1)
            sent = torch.zeros_like(probability, dtype=torch.float32)
            taken = taken + weights @ sent.scatter_(-1, probability.topk(chosen, dim=-1).indices, 1.0)
            probable = probable + weights @ probability.float()
            total += float(weights.sum())
    return experts * (taken * probable).sum() / total**2
