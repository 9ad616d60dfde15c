"""What models and libraries do without a word: say tokens that stand for images, swallow arguments, hand a setting on
to the vision tower."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from test_families import groups_of, packed_of, talks
from tiny_families import make, plain
from torch import Tensor, nn

from visrl.engines.base import Request, Sampling
from visrl.engines.local import LocalEngine
from visrl.models.attention import KINDS, set_attention, use_tree_attention
from visrl.models.calls import forward_arguments
from visrl.models.encode import Encoder
from visrl.models.parts import language_model, vision_tower
from visrl.models.value_head import add_value_head
from visrl.packing.forward import branch_logps, branch_scores, logits_at

# Over a KV cache; everything again; a cache row per sample; `generate` in the plain form.
ENGINES = [("llava", "tree"), ("gemma3", "tree"), ("qwen3_5", "tree"), ("llava", "plain")]


def opened(name: str, layout: str) -> tuple[Any, Encoder]:
    model, encoder = make(name)
    return model, plain(model, encoder) if layout == "plain" else encoder


def said(model: Any, encoder: Encoder) -> list[tuple[int, ...]]:
    """Greedy and sampled tokens of both steps."""
    asked = [
        Request(talk, Sampling(heat, max_tokens=5), 3 + n) for n, (talk, _) in enumerate(talks(1, 1)) for heat in (0, 1)
    ]
    return [one.ids for one in LocalEngine(model, encoder).generate(asked)]


@pytest.mark.parametrize(("name", "layout"), ENGINES)
def test_tokens_that_stand_for_images_are_never_said(name: str, layout: str) -> None:
    """A model that would say nothing else says what it says without them."""
    model, encoder = opened(name, layout)
    before = said(model, encoder)
    output = model.get_output_embeddings()
    marks = torch.tensor([token for token in encoder.image_ids if token < output.weight.shape[0]])
    assert len(marks)
    output.register_forward_hook(lambda layer, inputs, logits: logits.index_fill(-1, marks, 1e4))
    assert said(model, encoder) == before


def swallowing(model: Any) -> None:
    """Let the model's forward take `logits_to_keep` as what it does not know: without a word, and without effect."""
    kind: Any = type(model)

    def forward(self: Any, **kwargs: Any) -> Any:
        kwargs.pop("logits_to_keep", None)
        return kind.forward(self, **kwargs)

    own = inspect.signature(kind.forward)
    left = [one for name, one in own.parameters.items() if name != "logits_to_keep"]
    forward.__signature__ = own.replace(parameters=left)  # type: ignore[attr-defined]
    model.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    assert "logits_to_keep" not in forward_arguments(model)


@pytest.mark.parametrize(("name", "layout"), ENGINES[:3])
def test_a_forward_that_picks_no_columns_gives_the_same(name: str, layout: str) -> None:
    model, encoder = opened(name, layout)
    head = add_value_head(model)
    nn.init.normal_(head.summary.weight)
    before = said(model, encoder)
    use_tree_attention(model)
    packed = packed_of(encoder, groups_of(encoder)[0])
    logps, scores = branch_logps(model, packed).sums, branch_scores(model, packed, model, head)
    swallowing(model)
    torch.testing.assert_close(branch_logps(model, packed).sums, logps)
    torch.testing.assert_close(branch_scores(model, packed, model, head), scores)
    assert said(model, encoder) == before


def test_a_forward_that_gives_other_columns_is_refused() -> None:
    class Short(nn.Module):
        def forward(self, input_ids: Tensor) -> Any:
            return type("Output", (), {"logits": torch.zeros(1, input_ids.shape[1] - 1, 3)})

    with pytest.raises(ValueError, match="logits of 4 places where 5 are asked"):
        logits_at(Short(), torch.arange(2), input_ids=torch.zeros(1, 5))


def test_attention_over_trees_is_the_texts_alone() -> None:
    model, _ = make("llava")
    tower: Any = vision_tower(model)
    own = tower.config._attn_implementation
    use_tree_attention(model)
    decoder: Any = language_model(model)
    assert decoder.config._attn_implementation == KINDS["dense"]
    assert tower.config._attn_implementation == own not in KINDS.values()
    whole = model.config  # as where a decoder's config is the whole model's
    whole.text_config._attn_implementation = "eager"
    set_attention(whole, KINDS["blocks"])
    assert whole._attn_implementation == KINDS["blocks"]
    assert whole.vision_config._attn_implementation == own
    assert whole.text_config._attn_implementation == "eager"
