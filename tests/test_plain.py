"""The plain form against prefix trees, for families that have both, by hand or found by trial: the same
log-probabilities, gradients and texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from more_families import made
from test_families import gradients, talks
from tiny_families import MAKERS, make, plain

from visrl.engines.base import Request, Sampling
from visrl.engines.local import LocalEngine
from visrl.models.attention import use_tree_attention
from visrl.models.derive import found_family
from visrl.models.encode import Encoder
from visrl.models.load import load_encoder
from visrl.models.parts import language_model
from visrl.models.probe import prove
from visrl.models.settings import ModelSettings
from visrl.models.tree_encoder import TreeEncoder
from visrl.packing.forward import branch_logps
from visrl.packing.lay_out import lay_out
from visrl.packing.pack import PackedBatch

# PaliGemma's whole prompt sees itself, and its processor takes prompt and response apart: it has no plain form.
BOTH = sorted(set(MAKERS) - {"paligemma"})
# Found by trial: windows by depth, pictures that see themselves, kinds of tokens, experts, pairs that share alone.
FOUND = [
    "aya_vision", "cohere2_vision", "ernie4_5_vl_moe", "gemma4", "gemma4_vision", "glm4v", "kimi_k25", "mistral3",
    "molmo2", "ovis2", "qwen3_vl_moe",
]  # fmt: skip
FAST = ["llava", "qwen2_5_vl"]
EACH = [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in (*BOTH, *FOUND)]


def opened(name: str) -> tuple[Any, TreeEncoder]:
    """A random model and its encoder of trees, by its entry or by what a trial finds."""
    if name in MAKERS:
        return make(name)
    model, processor = made(name)
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(torch.randn_like(weights) * 0.07)
    family = found_family(prove(processor, model.config), model.config)
    return model.eval(), TreeEncoder(processor, model.config, ModelSettings(), family)


def batch_of(encoder: Encoder) -> PackedBatch:
    """Three questions about two pictures, two boxes and two answers each, one item a picture."""
    items = [
        [path for talk, responses in talks(seed, questions) for path in encoder.encode(talk, responses)]
        for seed, questions in ((1, 2), (2, 1))
    ]
    packed, order = lay_out(items, encoder)
    assert order == [0, 1]
    return packed


def own_attention(model: Any) -> None:
    language: Any = language_model(model).config
    language._attn_implementation = "eager"


@pytest.mark.parametrize("name", EACH)
def test_log_probabilities_and_gradients_are_those_of_the_tree(name: str) -> None:
    model, tree = opened(name)
    own_attention(model)
    ours = branch_logps(model, batch_of(plain(model, tree)))
    mine = gradients(model, ours.sums)
    use_tree_attention(model)
    theirs = branch_logps(model, batch_of(tree))
    torch.testing.assert_close(ours.sums, theirs.sums, rtol=1e-5, atol=0)
    assert ours.counts.tolist() == theirs.counts.tolist()
    other = gradients(model, theirs.sums)
    assert mine.keys() == other.keys()
    whole = torch.cat([gradient.flatten() for gradient in other.values()]).norm()
    for key, gradient in other.items():
        assert (mine[key] - gradient).norm() < 1e-4 * max(gradient.norm(), 1e-3 * whole), key


@pytest.mark.parametrize("name", ["glm4v"])
def test_both_forms_of_a_checkpoint_show_and_end_the_same(name: str, tmp_path: Path) -> None:
    """A processor whose sizes are numbers of pixels for every frame, and turns that the next one ends."""
    model, processor = made(name)
    model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    tree, rows = (load_encoder(tmp_path, layout=layout) for layout in ("tree", "plain"))
    assert (tree.end_of_turn, tree.codec, tree.max_tokens) == (rows.end_of_turn, rows.codec, rows.max_tokens)
    assert rows.end_of_turn == "<|user|>"
    for talk, responses in talks(1, 1):
        for mine, other in zip(rows.encode(talk, responses), tree.encode(talk, responses), strict=True):
            assert mine.ids.tolist() == other.ids.tolist()


@pytest.mark.parametrize("name", EACH)
def test_texts_are_those_of_the_tree(name: str) -> None:
    """Greedy and sampled, of both steps, at the same seeds: tokens, reasons and log-probabilities."""
    model, tree = opened(name)
    own_attention(model)
    asked = [
        Request(talk, Sampling(heat, 0.9 if heat else 1.0, 5 + n, logprobs=True), seed)
        for n, (talk, _) in enumerate(talks(1, 2))
        for heat, seed in ((0.0, 0), (1.0, 1), (1.0, 2))
    ]
    ours = LocalEngine(model, plain(model, tree)).generate(asked)
    theirs = LocalEngine(model, tree).generate(asked)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.text, mine.ids, mine.finish_reason) == (other.text, other.ids, other.finish_reason)
        assert mine.prompt_tokens == other.prompt_tokens
        assert mine.logps == pytest.approx(other.logps, rel=1e-4, abs=1e-4)
    assert len({completion.ids for completion in ours}) > len(asked) / 3
