"""Every family from a tiny random model: packed trees against the model's own processor and forward, one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_families import MAKERS, make
from torch import Tensor, nn

from visrl.conversation import Conversation, View, answer_conversation, focus_conversation
from visrl.models.attention import use_tree_attention
from visrl.models.encode import Encoder, TokenPath
from visrl.models.families import language_model
from visrl.train.forward import branch_logps
from visrl.train.pack import Packed, pack
from visrl.train.tree import grow

RESPONSES = {"box": ("[0.10, 0.20, 0.50, 0.70]", "[0.15, 0.25, 0.30, 0.40]"), "answer": ("7", "42.\n")}


def picture(seed: int, width: int, height: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def talks(seed: int, questions: int) -> list[tuple[Conversation, tuple[str, str]]]:
    """Step 1 and step 2 of some questions about one picture."""
    whole = View(f"whole {seed}", picture(seed, 120, 80))
    made = []
    for n in range(questions):
        detail = View(f"crop {seed} {n}", picture(100 + seed + n, 60 + 40 * n, 60), is_crop=True)
        question = f"Which digit is on card {n}?"
        made.append((focus_conversation(question, whole), RESPONSES["box"]))
        made.append((answer_conversation(question, whole, detail), RESPONSES["answer"]))
    return made


def groups_of(encoder: Encoder) -> tuple[list[list[TokenPath]], list[tuple[Conversation, str]]]:
    """Paths of two pictures with two and one questions, and in the same order what they say."""
    groups, said = [], []
    for seed, questions in ((1, 2), (2, 1)):
        group = []
        for talk, responses in talks(seed, questions):
            group += encoder.encode(talk, responses)
            said += [(talk, response) for response in responses]
        groups.append(group)
    return groups, said


def packed_of(encoder: Encoder, groups: list[list[TokenPath]]) -> Packed:
    family = encoder.family
    trees = grow(groups, encoder.image_token_id, pairs_only=family.shares == "pairs")
    return pack(trees, family, encoder.image_token_id)


def native_inputs(encoder: Encoder, talk: Conversation, response: str) -> dict[str, Tensor]:
    """What the family's own processor makes of a prompt with a response."""
    images = [[view.image for view in talk.views]]
    text = encoder.render(talk) + response + encoder.end_of_turn
    if encoder.family.name == "paligemma":  # its processor writes the pictures' tokens, <bos> and the newline itself
        prompt = encoder.render(talk).replace("<bos>", "").removesuffix("\n")
        return encoder.processor(images=images, text=[prompt], suffix=[response], return_tensors="pt")
    return encoder.processor(images=images, text=[text], return_tensors="pt", add_special_tokens=False)


def separate(model: nn.Module, encoder: Encoder, paths: list[TokenPath], said: list[Any]) -> Tensor:
    """Summed log-probability of each response, every path a plain call on the inputs of its own processor."""
    language: Any = language_model(model).config
    language._attn_implementation = "eager"
    sums = []
    for path, (talk, response) in zip(paths, said, strict=True):
        inputs = dict(native_inputs(encoder, talk, response))
        inputs.pop("labels", None)
        assert inputs["input_ids"][0].tolist() == path.ids.tolist()
        logits = model(**inputs, use_cache=False).logits
        logps = torch.log_softmax(logits[0, path.start - 1 : -1].float(), -1)
        sums.append(logps.gather(-1, inputs["input_ids"][0, path.start :, None]).sum())
    use_tree_attention(model)
    return torch.stack(sums)


def gradients(model: nn.Module, sums: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (sums * torch.linspace(-1, 2, len(sums))).sum().backward()
    return {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_a_packed_batch_equals_the_models_own_calls(name: str) -> None:
    model, encoder = make(name)
    groups, said = groups_of(encoder)
    paths = [path for group in groups for path in group]
    use_tree_attention(model)
    packed = packed_of(encoder, groups)
    ours = branch_logps(model, packed).sums
    theirs = separate(model, encoder, paths, said)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    mine, native = gradients(model, ours), gradients(model, theirs)
    assert mine.keys() == native.keys()
    whole = torch.cat([gradient.flatten() for gradient in native.values()]).norm()
    for key, gradient in native.items():
        assert (mine[key] - gradient).norm() < 1e-4 * max(gradient.norm(), 1e-3 * whole), key
    assert packed.tokens < packed.naive_tokens / (2 if encoder.family.shares == "all" else 1.5)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_a_plain_causal_mask_fails_the_check(name: str) -> None:
    model, encoder = make(name)
    use_tree_attention(model)
    packed = packed_of(encoder, groups_of(encoder)[0])
    right = branch_logps(model, packed).sums
    for call in packed.calls:
        masks = call.inputs["attention_mask"]
        for mask in masks.values() if isinstance(masks, dict) else (masks,):
            mask[:] = torch.ones_like(mask[0, 0]).tril()
    wrong = branch_logps(model, packed).sums
    assert ((wrong - right).abs() / right.abs()).max() > 1e-3
