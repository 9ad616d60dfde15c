"""Image features kept over epochs give the log-probabilities and gradients of features made anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_families import gradients, groups_of, packed_of
from tiny_families import make
from torch import nn

from visrl.models.attention import use_tree_attention
from visrl.models.families import FAMILIES, language_model, vision_tower
from visrl.train.features import FeatureCache
from visrl.train.forward import branch_logps

CPU = torch.device("cpu")
KEEPING = sorted(name for name, family in FAMILIES.items() if family.keeps_features)


def frozen(name: str) -> tuple[nn.Module, Any]:
    """A model of which the decoder alone is trained."""
    model, encoder = make(name)
    use_tree_attention(model)
    model.requires_grad_(False)
    language_model(model).requires_grad_(True)
    return model, encoder


@pytest.mark.parametrize("name", KEEPING)
def test_kept_features_change_nothing(name: str) -> None:
    model, encoder = frozen(name)
    groups = groups_of(encoder)[0]
    wanted = branch_logps(model, packed_of(encoder, groups)).sums
    cache = FeatureCache(model, encoder.family, limit=10**9)
    assert FeatureCache.serves(model)
    seen = 0
    for epoch in range(2):
        packed = packed_of(encoder, groups)
        cache.fill(packed, CPU)
        assert not any(taken in call.inputs for call in packed.calls for taken in encoder.family.takes)
        sums = branch_logps(model, packed).sums
        torch.testing.assert_close(sums, wanted, rtol=1e-6, atol=0)
        seen += sum(len(call.views) for call in packed.calls)
        distinct = {view.key for call in packed.calls for view in call.views}
        assert (cache.misses, cache.hits) == (len(distinct), seen - len(distinct)), epoch
    mine, native = gradients(model, sums), gradients(model, branch_logps(model, packed_of(encoder, groups)).sums)
    assert mine.keys() == native.keys()
    whole = torch.cat([gradient.flatten() for gradient in native.values()]).norm()
    for key, gradient in native.items():
        assert (mine[key] - gradient).norm() < 1e-5 * max(gradient.norm(), 1e-3 * whole), key


def test_memory_is_bounded_and_what_came_first_stays() -> None:
    model, encoder = frozen("qwen2_vl")
    groups = groups_of(encoder)[0]
    roomy = FeatureCache(model, encoder.family, limit=10**9)
    roomy.fill(packed_of(encoder, groups), CPU)
    tight = FeatureCache(model, encoder.family, limit=roomy.bytes // 2)
    wanted = branch_logps(model, packed_of(encoder, groups)).sums
    for _ in range(2):
        packed = packed_of(encoder, groups)
        tight.fill(packed, CPU)
        torch.testing.assert_close(branch_logps(model, packed).sums, wanted, rtol=1e-6, atol=0)
    assert 0 < tight.bytes <= tight.limit
    assert 0 < tight.hits < roomy.misses


def test_features_that_something_trains_are_not_kept() -> None:
    model, _ = frozen("qwen2_vl")
    vision_tower(model).requires_grad_(True)
    assert not FeatureCache.serves(model)
    model, _ = frozen("llava_next")
    model.model.image_newline.requires_grad_(True)  # type: ignore[union-attr]
    assert not FeatureCache.serves(model)
    model, _ = frozen("mllama")
    assert not FeatureCache.serves(model)
