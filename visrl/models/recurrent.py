"""Recurrent layers over packed prefix trees: each layer's own forward, run by run, states handed on through its cache.

A layer of linear attention or a short convolution takes the state before its tokens from a cache, and leaves there the
state behind them. Over a packed tree its forward is called on runs of tokens without a fork, side by side (see
tree_runs.py), with a cache that holds the states in which the runs above them end. What a layer computes, and with
which kernel, stays its own; gradients flow through the states.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Cache
from transformers.cache_utils import LinearAttentionLayer

from visrl.models.folder import CheckpointError
from visrl.models.parts import language_model, recurrent_layers, state_argument
from visrl.models.tree_runs import RunPlan, plan_runs


class RunStates(LinearAttentionLayer):
    """The states of one layer before some runs, and after it was called, behind them.

    They are assigned, where the library's own copies in place, through which no gradient goes.
    """

    def __init__(self, convolution: torch.Tensor | None = None, recurrent: torch.Tensor | None = None) -> None:
        super().__init__()
        self.conv_states[0], self.recurrent_states[0] = convolution, recurrent
        self.has_previous_state[0] = convolution is not None or recurrent is not None
        # Single tokens, too, go the way of many: the step of decoding changes states in place.
        self.activate_past_recording()

    def update_conv_state(
        self, conv_states: torch.Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """What the convolution is to see: the last columns before, and these."""
        width = conv_kernel_size or conv_states.shape[-1]
        before = self.conv_states[state_idx]
        seen = conv_states if before is None else torch.cat([before, conv_states], dim=-1)
        self.conv_states[state_idx] = nn.functional.pad(seen, (max(0, width - seen.shape[-1]), 0))[..., -width:]
        self.has_previous_state[state_idx] = True
        return seen

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs: Any) -> torch.Tensor:
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states


class TreeForward:
    """The forward of a recurrent layer: its own, run by run where its mask is a plan of runs."""

    def __init__(self, layer: Any) -> None:
        self.own = layer.forward
        self.number: int = layer.layer_idx
        self.cache = state_argument(layer)

    def __call__(
        self, hidden_states: torch.Tensor, *args: Any, attention_mask: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        if not isinstance(attention_mask, RunPlan):
            return self.own(hidden_states, *args, attention_mask=attention_mask, **kwargs)
        tokens = hidden_states.flatten(0, -2)  # [places, dim]
        convolutions: list[torch.Tensor | None] = []
        recurrents: list[torch.Tensor | None] = []
        outputs: list[torch.Tensor] = []
        for call in attention_mask.calls:
            states = RunStates(_rows(convolutions, call.starts), _rows(recurrents, call.starts))
            # The layer asks for its states by its own number.
            kwargs[self.cache] = Cache(layers=[states] * (self.number + 1))
            runs = tokens.index_select(0, call.places.flatten()).unflatten(0, call.places.shape)
            outputs.append(self.own(runs, attention_mask=None, **kwargs).flatten(0, 1))
            if call.keeps:
                convolutions.append(states.conv_states[0])
                recurrents.append(states.recurrent_states[0])
        outputs.append(outputs[0].new_zeros(1, outputs[0].shape[-1]))
        return torch.cat(outputs).index_select(0, attention_mask.outputs).view_as(hidden_states)


def _rows(states: list[torch.Tensor | None], numbers: torch.Tensor | None) -> torch.Tensor | None:
    """The states of these numbers; None where there are none, and where the layer keeps none of the kind."""
    kept = [state for state in states if state is not None]
    return None if numbers is None or not kept else torch.cat(kept).index_select(0, numbers)


def hand_on_states(model: nn.Module) -> None:
    """Have every recurrent layer of the language model take a `RunPlan` for its mask from now on; any other mask it
    takes as before.

    Raises:
        CheckpointError: a layer that does not compute in a tree what it computes by itself.
    """
    proven: set[type] = set()
    config: Any = language_model(model).config
    for layer in recurrent_layers(model):
        if isinstance(layer.forward, TreeForward):
            continue
        layer.forward = TreeForward(layer)
        if type(layer) not in proven:
            _prove(layer, config.hidden_size)
            proven.add(type(layer))


# Paths through one packed row, each with how many of its last tokens no other has: a long beginning, a fork within it,
# and a branch that forks again.
_SEGMENTS = (
    (0, 30, np.arange(0)),
    (30, 55, np.arange(30)),
    (55, 60, np.arange(28)),
    (60, 70, np.r_[:30, 30:52]),
)
_PATHS = ((np.arange(55), 55), (np.r_[:28, 55:60], 5), (np.r_[:52, 60:70], 10))
_PLACES = 71  # one of padding
_ERROR, _ROUNDED = 1e-4, 0.05  # relative to the norm; in fp32, and in types that round more


def _prove(layer: Any, dim: int) -> None:
    """Hold a layer over a small tree of random tokens against its own calls, path by path, and so their gradients."""
    weight = next(part for part in layer.parameters() if part.is_floating_point())
    if weight.is_meta:
        return
    own = layer.forward.own
    with torch.inference_mode(False), torch.enable_grad():
        draws = torch.Generator().manual_seed(0)
        tokens, upwards = torch.randn(2, _PLACES, dim, generator=draws).to(weight)
        tokens.requires_grad_()
        alone = torch.cat([own(tokens[None, places], attention_mask=None)[0, -tail:] for places, tail in _PATHS])
        plan = plan_runs(_SEGMENTS, _PLACES).to(weight.device)
        tree = layer.forward(tokens[None], attention_mask=plan)[0]
        tree = torch.cat([tree[places[-tail:]] for places, tail in _PATHS])
        pairs = [(tree, alone)]
        pairs += zip(*(torch.autograd.grad((part * upwards[:-1]).sum(), tokens) for part in pairs[0]), strict=True)
    allowed = _ERROR if weight.dtype in (torch.float32, torch.float64) else _ROUNDED
    error = max(float((one - other).detach().norm() / other.detach().norm()) for one, other in pairs)
    if not error <= allowed:  # what is no number is no proof either
        raise CheckpointError(
            f"layers {type(layer).__name__} of this transformers release do not hand on their state: over a prefix "
            f"tree they miss their own calls by {error:.1e} of {allowed:.0e}"
        )
