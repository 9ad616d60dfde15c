"""The operations of a training step in each layout that benchmarks/training.py compares, and the floor: counted by
torch.utils.flop_counter, attention between tokens and their ancestors by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from layouts import EPOCHS, Ours, Trl
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from visrl.models.parts import recurrent_layers
from visrl.packing.pack import PackedBatch
from visrl.train.items import Item, TrainingBatch


def flops(work: Callable[[], Any]) -> float:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def floor_flops(ours: Ours, batch: TrainingBatch) -> float:
    """Each distinct token forward and backward once, and a fifth of a forward pass for the reference."""
    forward, (looked, seen) = token_flops(ours.model, batch.packed), tower_flops(ours.model, batch.packed)
    return (3 + 1 / EPOCHS) * forward + seen + looked / EPOCHS


def token_flops(model: nn.Module, packed: PackedBatch) -> float:
    """Each distinct token of a batch through the decoder once; a backward pass costs twice as much. Attention is
    counted between tokens and their ancestors only."""
    call, text = packed.calls[0], model.config.text_config
    layers = [m for m in model.model.language_model.layers.modules() if isinstance(m, nn.Linear)]
    linear = 2 * sum(layer.weight.numel() for layer in layers) * packed.tokens
    padding = packed.padded_tokens - packed.tokens
    masks = call.inputs["attention_mask"]
    pairs = int((masks["full_attention"] if isinstance(masks, dict) else masks).sum()) - padding
    recurrent = recurrent_layers(model)
    attention = 4 * pairs * text.hidden_size * (text.num_hidden_layers - len(recurrent))
    states = sum(6 * layer.num_v_heads * layer.head_k_dim * layer.head_v_dim for layer in recurrent) * packed.tokens
    return linear + attention + states + 2 * len(call.keep) * text.hidden_size * text.vocab_size


def tower_flops(model: nn.Module, packed: PackedBatch) -> tuple[float, float]:
    """Each distinct image of a batch through the vision tower: forward, and forward and backward."""
    call, tower = packed.calls[0], model.model.visual
    pixels, grids = call.inputs["pixel_values"], call.inputs["image_grid_thw"]
    seen = flops(lambda: tower(pixels, grid_thw=grids).pooler_output.sum().backward())
    with torch.no_grad():
        looked = flops(lambda: tower(pixels, grid_thw=grids))
    model.zero_grad()
    return looked, seen


def trl_flops(trl: Trl, rows: int) -> float:
    """A step of TRL's own loss over the first `rows` rows, the reference's pass included."""
    inputs = trl.trainer.data_collator([trl.trainer.train_dataset[n] for n in range(rows)])
    inputs = trl.trainer._prepare_inputs(inputs)
    counted = flops(lambda: trl.trainer.compute_loss(trl.trainer.model, inputs).backward())
    trl.trainer.model.zero_grad()
    return counted


def charged_flops(ours: Ours, items: Sequence[Item]) -> float:
    """A step of ours, in either layout, with its share of the reference's pass."""
    mine = ours.batch(items)
    step = flops(lambda: ours.trainer.compute_loss(ours.model, mine).backward())
    with torch.no_grad():
        once = flops(lambda: ours.logps(mine))
    ours.model.zero_grad()
    return step + once / EPOCHS


def compare_flops(layouts: dict[str, Any], items: Sequence[Item]) -> dict[str, float]:
    ours, theirs = layouts["ours"], layouts["reference"]
    charged, other = charged_flops(ours, items), theirs.batch(items)
    counted = {"reference": flops(lambda: theirs.loss(other, theirs.reference).backward())}
    theirs.model.zero_grad()
    if "trl" in layouts:
        counted["trl"] = trl_flops(layouts["trl"], 2 * len(items))
    if "plain" in layouts:
        counted["plain"] = charged_flops(layouts["plain"], items)
    return {
        "gflops": charged / 1e9,
        **{f"flops_ratio_{name}": count / charged for name, count in counted.items()},
        "flops_over_floor": charged / floor_flops(ours, ours.batch(items)["batch"]),
    }
