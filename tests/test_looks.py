"""Trees of several looks against every turn as a sequence of its own, through the model's own processor and forward:
log-probabilities, gradients and greedy texts, down to six looks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from looks import items_of
from loud import louder
from test_families import gradients, native_inputs, sayable, separate
from tiny_families import make, plain
from torch import Tensor

from visrl.engines.base import Completion, Sampling
from visrl.engines.local import LocalEngine
from visrl.models.attention import use_tree_attention
from visrl.models.encode import Encoder, TokenPath
from visrl.models.load import load_encoder, load_model
from visrl.models.parts import language_model
from visrl.models.plain_encoder import PlainEncoder
from visrl.models.settings import ModelSettings
from visrl.packing.forward import branch_logps
from visrl.packing.pack import PackedBatch
from visrl.train.items import Collator, Item, encode_item
from visrl.train.online_rollouts import Response, pack_responses

EMBEDDED = "visrl/models/tiny/checkpoint"
# Positions in several forms, tiles, sliding windows, recurrent layers, experts; rows of the plain form.
FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3", "qwen3_5", "qwen3_5_moe", "plain qwen2_5_vl"]
KEEPS_TURNS = ["qwen2_5_vl", "gemma3", "qwen3_5_moe", "plain qwen2_5_vl"]
FAST = ["embedded visrl", "qwen3_vl visrl"]
EACH = [
    pytest.param(
        name, protocol, id=f"{name} {protocol}", marks=[] if f"{name} {protocol}" in FAST else pytest.mark.slow
    )
    for protocol, names in (("visrl", ["embedded", *FAMILIES]), ("mini_o3", KEEPS_TURNS))
    for name in names
]


def opened(name: str) -> tuple[Any, Encoder]:
    if name == "embedded":
        model = load_model(EMBEDDED)
        louder(model, 0.02)
        return model.eval(), load_encoder(EMBEDDED, ModelSettings())  # the limits of its processor alone
    model, encoder = make(name.removeprefix("plain "))
    return model, plain(model, encoder) if name.startswith("plain") else encoder


def own_attention(model: Any) -> None:
    language: Any = language_model(model).config
    language._attn_implementation = "eager"


def of_preferences(encoder: Encoder, items: list[Item]) -> PackedBatch:
    """As preferences and targets are packed, from texts."""
    return Collator(encoder, bin_length=64)(items)["batch"].packed


def of_rollouts(encoder: Encoder, items: list[Item]) -> PackedBatch:
    """As rollouts are packed, from sampled ids."""
    responses = []
    for item in items:
        own = []
        for row in item.rows:
            prompt = encoder.encode(row.conversation, [None])[0]
            for path, (role, text) in zip(encode_row(encoder, row), row.responses, strict=True):
                ids = tuple(path.ids[path.start :].tolist())
                completion = Completion(text, len(prompt.ids), ids=ids, logps=(0.0,) * len(ids))
                own.append(Response(f"{row.key}/{role}", row.step, completion, prompt, 1.0))
        responses.append(own)
    batch = pack_responses(responses, Collator(encoder, bin_length=64), mask_truncated=False, keep_all=True)
    assert batch is not None
    return batch.packed


def encode_row(encoder: Encoder, row: Any) -> list[TokenPath]:
    return encoder.encode(row.conversation, [text for _, text in row.responses])


def joined(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


@pytest.mark.parametrize(("name", "protocol"), EACH)
def test_a_tree_of_six_looks_equals_every_turn_by_itself(name: str, protocol: str) -> None:
    model, encoder = opened(name)
    items = items_of(encoder, protocol)
    paths = [path for number, item in enumerate(items) for path in encode_item(encoder, number, item)[0]]
    said = [(row.conversation, text) for item in items for row in item.rows for _, text in row.responses]
    assert max(len(path.views) for path in paths) == 7
    theirs = separate(model, encoder, paths, said)
    native = gradients(model, theirs)
    if isinstance(encoder, PlainEncoder):
        own_attention(model)
    else:
        use_tree_attention(model)
    packed, sampled = of_preferences(encoder, items), of_rollouts(encoder, items)
    assert all(getattr(packed, name).equal(getattr(sampled, name)) for name in ("row", "target", "branch")), (
        "texts and sampled ids are packed alike"
    )
    ours = branch_logps(model, packed).sums
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    torch.testing.assert_close(branch_logps(model, sampled).sums.detach(), ours.detach(), rtol=1e-6, atol=0)
    mine = gradients(model, ours)
    assert mine.keys() == native.keys()
    whole, off = joined(native).norm(), (joined(mine) - joined(native)).norm()
    assert off < 1e-4 * whole
    # Gated DeltaNet computes in fp32 whatever the model's type, and sums a run in another order than a sequence.
    bound = 3e-4 if encoder.family.recurrent else 1e-4
    for key, gradient in native.items():
        assert (mine[key] - gradient).norm() < bound * max(gradient.norm(), 1e-3 * whole), key
    assert isinstance(encoder, PlainEncoder) or packed.tokens < packed.separate_tokens / 3


@pytest.mark.parametrize(("name", "protocol"), EACH)
def test_greedy_texts_after_every_look_are_those_of_generate(name: str, protocol: str) -> None:
    model, encoder = opened(name)
    talks = [row.conversation for row in items_of(encoder, protocol, (6,))[0].rows]
    own_attention(model)
    told = LocalEngine(model, encoder).complete(talks, Sampling(max_tokens=6), [[0]] * len(talks))
    own_attention(model)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = encoder.end_id, 0
    texts = set()
    for talk, (one,) in zip(talks, told, strict=True):
        inputs = native_inputs(encoder, talk)
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=sayable(model, encoder))
        assert one.text == encoder.decode(out[0, inputs["input_ids"].shape[1] :])
        texts.add(one.text)
    assert len(texts) >= (2 if name == "embedded" else 5)  # every look makes a difference
