"""Runs of packed trees: every place is computed from the state behind its own ancestors, and layers that lose their
state are told."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from test_families import groups_of, packed_of
from tiny_families import make
from torch import Tensor, nn

from visrl.models.attention import use_tree_attention
from visrl.models.folder import CheckpointError
from visrl.models.parts import recurrent_layers
from visrl.models.recurrent import TreeForward, hand_on_states
from visrl.models.tree_runs import RunPlan, Segment, plan_runs
from visrl.packing.forward import branch_logps


def random_segments(seed: int, parts: int) -> tuple[list[Segment], int]:
    """Segments of two trees side by side, with padding behind each; every branch leaves a path at a random place."""
    rng = np.random.default_rng(seed)
    segments: list[Segment] = []
    here = 0
    for _ in range(2):
        paths = []
        for n in range(parts):
            length = int(rng.integers(1, 60))
            above = np.arange(0)
            if n:
                path = paths[rng.integers(len(paths))]
                above = path[: rng.integers(0, len(path) + 1)]
            own = np.arange(here, here + length)
            segments.append((here, here + length, above))
            paths.append(np.concatenate([above, own]))
            here += length
        segments.append((here, here, paths[0]))  # a path that another holds already adds nothing
        here += 7
    return segments, here


def followed(plan: RunPlan, tokens: np.ndarray) -> np.ndarray:
    """A recurrence whose state depends on every token before and on their order, computed call by call."""
    kept: list[float] = []
    outputs: list[float] = []
    for call in plan.calls:
        ends = []
        for n, places in enumerate(call.places.tolist()):
            state = kept[int(call.starts[n])] if call.starts is not None else 0.0
            for place in places:
                state = 0.9 * state + tokens[place]
                outputs.append(state)
            ends.append(state)
        kept += ends if call.keeps else []
    return np.array([*outputs, np.nan])[plan.outputs.numpy()]


@pytest.mark.parametrize("seed", range(40))
def test_every_place_follows_its_own_path(seed: int) -> None:
    segments, total = random_segments(seed, parts=2 + seed % 12)
    tokens = np.random.default_rng(seed).normal(size=total)
    found = followed(plan_runs(segments, total), tokens)
    filled = set()
    for first, last, above in segments:
        for place in range(first, last):
            state = 0.0
            for token in tokens[np.r_[above, first : place + 1].astype(int)]:
                state = 0.9 * state + token
            assert found[place] == pytest.approx(state)
            filled.add(place)
    assert np.isnan(np.delete(found, sorted(filled))).all()  # padding is nothing


def test_calls_are_few_and_their_padding_small() -> None:
    """Three pictures of nearly one size, each with a box prompt and an answer prompt, two responses to each: the
    beginnings in one call, the answer prompts in one, the few tokens before two boxes with each of them, all ends in
    two or three."""
    segments: list[Segment] = []
    here = 0
    for size in (300, 304, 309):
        trunk = np.arange(here, here + size)
        segments += [(here, here + size + 25, np.arange(0))]  # with 5 more tokens and a box
        here += size + 25
        segments += [(here, here + 18, np.r_[trunk, trunk[-1] + 1 : trunk[-1] + 6])]
        here += 18
        segments += [(here, here + 70 + 8, trunk)]
        prompt = np.r_[trunk, here : here + 70]
        here += 78
        segments += [(here, here + 8, prompt)]
        here += 8
    plan = plan_runs(segments, here)
    assert [call.places.shape for call in plan.calls if call.keeps] == [(3, 300), (3, 70)]
    assert len(plan.calls) <= 4
    assert sum(call.places.numel() for call in plan.calls) < 1.2 * here


class Forgetful(nn.Module):
    """A layer that takes a cache and does not look at it."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer, self.layer_idx = layer, layer.layer_idx

    def forward(self, hidden_states: Tensor, cache: Any = None, attention_mask: Any = None) -> Tensor:
        return self.layer(hidden_states, cache=None, attention_mask=attention_mask)


def test_a_layer_that_loses_its_state_is_refused() -> None:
    model, _ = make("qwen3_5")
    layer = model.model.language_model.layers[2]
    layer.linear_attn = Forgetful(layer.linear_attn)
    with pytest.raises(CheckpointError, match="layers Forgetful of this transformers release do not hand on"):
        use_tree_attention(model)


def test_runs_are_computed_by_the_kernel_that_the_layer_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in the place of the reference function, as an installed kernel does, is given every run, those behind
    a fork with the state before it."""
    model, encoder = make("qwen3_5")
    module: Any = sys.modules[type(recurrent_layers(model)[0]).__module__]
    if hasattr(recurrent_layers(model)[0], "chunk_gated_delta_rule"):
        pytest.skip("this release of transformers hands layers their kernels when they are made")
    own, starts = module.torch_chunk_gated_delta_rule, []

    def kernel(*args: Any, **kwargs: Any) -> Any:
        starts.append(kwargs["initial_state"])
        return own(*args, **kwargs)

    use_tree_attention(model)
    monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", kernel)
    packed = packed_of(encoder, groups_of(encoder)[0])
    branch_logps(model, packed)
    (plan,) = [mask for mask in packed.calls[0].inputs["attention_mask"].values() if isinstance(mask, RunPlan)]
    behind = [call.starts is not None for call in plan.calls]
    assert [start is not None for start in starts] == behind * len(recurrent_layers(model))
    assert any(behind)


def test_a_layer_of_its_own_stays_what_it_is() -> None:
    """Outside of trees a layer computes what it did, and is changed once only."""
    model, _ = make("qwen3_5")
    layer = recurrent_layers(model)[0]
    tokens = torch.randn(2, 9, 64)
    before = layer(tokens)
    hand_on_states(model)
    wrapped = layer.forward
    hand_on_states(model)
    assert layer.forward is wrapped
    assert isinstance(wrapped, TreeForward)
    assert torch.equal(layer(tokens), before)
    assert len(recurrent_layers(model)) == 3
