"""A scalar head on a model: one number for each place whose hidden state meets the output layer.

A reward model reads it at the last token of a response, PPO's values at every place that predicts a token. On disk it
is `value_head.safetensors` beside the weights, with the names of LLaMA-Factory's reward models (`v_head.summary.…`);
the model's own weights know nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visrl.models.folder import CheckpointError, read_headers
from visrl.models.load import check_finite, reading
from visrl.models.parts import base_model

HEAD = "value_head.safetensors"
PART = "v_head"  # what the head is called inside the model, and in the file


class ValueHead(nn.Module):
    """Hidden states [..., hidden] → values [...], in fp32; 0 everywhere before the first step of training."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.summary = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.summary.weight)
        nn.init.zeros_(self.summary.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.summary(hidden.float()).squeeze(-1)


def add_value_head(model: nn.Module) -> ValueHead:
    """Put a new head on `model`, a part of it from now on: trained, clipped and shared by processes like the rest."""
    base = base_model(model)
    head = ValueHead(base.config.get_text_config().hidden_size).to(next(base.parameters()).device)
    base.add_module(PART, head)
    return head


def value_head(model: nn.Module) -> ValueHead:
    """The head that `add_value_head` put on `model`."""
    head = base_model(model).get_submodule(PART)
    assert isinstance(head, ValueHead)
    return head


@contextmanager
def without_value_head(model: nn.Module) -> Iterator[None]:
    """The model as it is without its head, for what knows nothing of one: saving and restoring its weights."""
    head = value_head(model)
    base = base_model(model)
    delattr(base, PART)
    try:
        yield
    finally:
        base.add_module(PART, head)


@contextmanager
def kept_hidden_states(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """A list to which every forward pass within adds the hidden states that meet the output layer, [rows, K, hidden]:
    those at the places that `logits_to_keep` names. `model` is out of DDP's wrapper; who is called may be in it."""
    found: list[torch.Tensor] = []
    output: nn.Module = base_model(model).get_output_embeddings()
    handle = output.register_forward_pre_hook(lambda layer, inputs: found.append(inputs[0]))
    try:
        yield found
    finally:
        handle.remove()


# --- On disk ----------------------------------------------------------------------------------------------------------


def save_value_head(model: nn.Module, folder: str | Path) -> None:
    """Write the head of `model` into a folder."""
    from safetensors.torch import save_file

    parts = value_head(model).state_dict()
    save_file(
        {f"{PART}.{name}": part.cpu().contiguous() for name, part in parts.items()},
        Path(folder) / HEAD,
        metadata={"format": "pt"},
    )


def load_value_head(model: nn.Module, folder: str | Path) -> None:
    """Set the head of `model` to the one in a folder.

    Raises:
        CheckpointError: there is none, or one that is damaged or belongs to another model.
    """
    from safetensors.torch import load_file

    file = Path(folder) / HEAD
    if not file.is_file():
        raise CheckpointError(f"{folder} holds no {HEAD}: it is no reward model; train one with stage: rm")
    read_headers([file])
    with reading(file, "the head cannot be read"):
        found = load_file(file)
    check_finite(f"{file}: the head's weights", found)
    wanted: dict[str, Any] = {f"{PART}.{name}": part for name, part in value_head(model).state_dict().items()}
    shapes, own = ({name: list(part.shape) for name, part in parts.items()} for parts in (found, wanted))
    if shapes != own:
        raise CheckpointError(f"{file} holds {shapes}, and this model's head is {own}: it belongs to another model")
    value_head(model).load_state_dict({name.removeprefix(f"{PART}."): part for name, part in found.items()})
