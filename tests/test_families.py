"""Every family from a tiny random model: packed trees against the model's own processor and forward, one by one."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_families import MAKERS, make
from torch import Tensor, nn
from transformers import BertConfig

import visrl
from visrl.conversation import Conversation, Message, View, answer_conversation, focus_conversation
from visrl.engines.base import Request, Sampling
from visrl.engines.local import LocalEngine
from visrl.models.attention import use_tree_attention
from visrl.models.encode import Encoder, PromptError, TokenPath
from visrl.models.families import FAMILIES, family_of
from visrl.models.family import Family
from visrl.models.masks import hybrid
from visrl.models.parts import language_model, projector, vision_tower
from visrl.models.settings import ModelSettings
from visrl.packing.forward import branch_logps
from visrl.packing.pack import PackedBatch, pack
from visrl.packing.tree import prefix_trees

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


def packed_of(encoder: Encoder, groups: list[list[TokenPath]]) -> PackedBatch:
    family = encoder.family
    trees = prefix_trees(groups, encoder.image_token_id, pairs_only=family.shares == "pairs")
    return pack(trees, family, encoder.image_token_id)


def native_inputs(encoder: Encoder, talk: Conversation, response: str | None = None) -> dict[str, Tensor]:
    """What the family's own processor makes of a prompt, with a response or without."""
    images = [[view.image for view in talk.views]]
    text = encoder.render(talk) + ("" if response is None else response + encoder.end_of_turn)
    if encoder.family.name == "paligemma":  # its processor writes the pictures' tokens, <bos> and the newline itself
        prompt = encoder.render(talk).replace("<bos>", "").removesuffix("\n")
        suffix = None if response is None else [response]
        inputs = dict(encoder.processor(images=images, text=[prompt], suffix=suffix, return_tensors="pt"))
        return {key: value for key, value in inputs.items() if key != "labels"}
    return encoder.processor(images=images, text=[text], return_tensors="pt", add_special_tokens=False)


def separate(model: nn.Module, encoder: Encoder, paths: list[TokenPath], said: list[Any]) -> Tensor:
    """Summed log-probability of each response, every path a plain call on the inputs of its own processor."""
    language: Any = language_model(model).config
    language._attn_implementation = "eager"
    sums = []
    for path, (talk, response) in zip(paths, said, strict=True):
        inputs = dict(native_inputs(encoder, talk, response))
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


@pytest.mark.parametrize("made", [*([name] for name in sorted(MAKERS)), ["paligemma", "gemma"]], ids="-".join)
def test_a_packed_batch_equals_the_models_own_calls(made: list[str]) -> None:
    model, encoder = make(*made)
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
    # Gated DeltaNet computes in fp32 whatever the model's type, and sums a run in another order than a sequence.
    bound = 3e-4 if encoder.family.recurrent else 1e-4
    for key, gradient in native.items():
        assert (mine[key] - gradient).norm() < bound * max(gradient.norm(), 1e-3 * whole), key
    assert packed.tokens < packed.separate_tokens / (2 if encoder.family.shares == "all" else 1.5)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_a_plain_causal_mask_fails_the_check(name: str) -> None:
    model, encoder = make(name)
    use_tree_attention(model)
    packed = packed_of(encoder, groups_of(encoder)[0])
    right = branch_logps(model, packed).sums
    for call in packed.calls:
        masks = call.inputs["attention_mask"]
        for mask in masks.values() if isinstance(masks, dict) else (masks,):
            if isinstance(mask, Tensor):
                mask[:] = torch.ones_like(mask[0, 0]).tril()
    wrong = branch_logps(model, packed).sums
    assert ((wrong - right).abs() / right.abs()).max() > 1e-3


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_checkpointed_gradients_are_the_same(name: str) -> None:
    """Gradient checkpointing recomputes every layer with the same masks and pictures."""
    model, encoder = make(name)
    use_tree_attention(model)
    packed = packed_of(encoder, groups_of(encoder)[0])
    plain = gradients(model, branch_logps(model, packed).sums)
    model.train()  # no layer of these has dropout
    # Since 5.24 the library calls it activation checkpointing.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    again = gradients(model, branch_logps(model, packed).sums)
    assert plain.keys() == again.keys()
    whole = torch.cat([gradient.flatten() for gradient in plain.values()]).norm()
    for key, gradient in plain.items():
        assert (again[key] - gradient).norm() < 1e-5 * max(gradient.norm(), 1e-3 * whole), key


def sayable(model: Any, encoder: Encoder) -> list[int]:
    """The tokens that stand for images, as far as the output layer has them: they are never sampled."""
    return [token for token in encoder.image_ids if token < model.get_output_embeddings().weight.shape[0]]


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_generation_equals_the_models_own(name: str) -> None:
    """Greedy texts of both steps, and those of `generate` on the processor's own inputs."""
    model, encoder = make(name)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = encoder.end_id, 0
    conversations = [talk for talk, _ in talks(1, 2)]
    answers = LocalEngine(model, encoder).complete(conversations, Sampling(max_tokens=6), [[0]] * len(conversations))
    language: Any = language_model(model).config
    language._attn_implementation = "eager"
    for talk, answer in zip(conversations, answers, strict=True):
        inputs = native_inputs(encoder, talk)
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=sayable(model, encoder))
        assert answer[0].text == encoder.decode(out[0, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_rows_that_join_change_nothing(name: str) -> None:
    """A row that joins between two steps, and the one it joins, say what they say together from the start."""
    model, encoder = make(name)
    engine = LocalEngine(model.eval(), encoder)
    rows = [Request(talk, Sampling(1.0, max_tokens=4 + n), n) for n, (talk, _) in enumerate(talks(1, 2))]
    together = engine.generate(rows)
    engine.forget()
    running, done = engine.begin(), {}
    for n, row in enumerate(rows):
        done |= running.add({n: row}) | running.step()
    while len(running):
        done |= running.step()
    assert [done[n] for n in range(len(rows))] == together


@pytest.mark.parametrize("name", ["llava", "gemma3", "mllama"])
def test_a_draw_depends_on_its_seed_alone(name: str) -> None:
    model, encoder = make(name)
    conversations = [talk for talk, _ in talks(1, 1)]
    engine = LocalEngine(model, encoder)
    sampling = Sampling(temperature=1.0, max_tokens=4)
    together = engine.complete(conversations, sampling, [[1, 2], [3]])
    engine.forget()
    alone = engine.complete(conversations[:1], sampling, [[2]])
    assert alone[0][0].text == together[0][1].text
    assert together[0][0].text != together[0][1].text


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_the_parts_of_a_model_are_found(name: str) -> None:
    model, encoder = make(name)
    whole = {id(weights) for weights in model.parameters()}
    language, vision, bridge = (
        {id(weights) for weights in part(model).parameters()} for part in (language_model, vision_tower, projector)
    )
    assert language
    assert vision
    assert bridge
    assert not language & (vision | bridge)
    assert language | vision | bridge <= whole
    left = [weights for weights in model.parameters() if id(weights) not in language | vision | bridge]
    outputs = len(encoder.tokenizer)
    assert all(weights.dim() == 1 or weights.shape[0] == outputs for weights in left)  # newline vectors, output layers


def test_sliding_windows_are_masked_or_refused() -> None:
    model, encoder = make("gemma3")
    use_tree_attention(model)
    groups = groups_of(encoder)[0]
    right = branch_logps(model, packed_of(encoder, groups)).sums
    family = encoder.family
    assert family.window == 40
    encoder.family = replace(family, window=None)
    wrong = branch_logps(model, packed_of(encoder, groups)).sums
    assert ((wrong - right).abs() / right.abs()).max() > 1e-4
    _, other = make("paligemma")
    other.family = replace(other.family, window=40)
    with pytest.raises(ValueError, match="longer than the 40 tokens that sliding layers of paligemma look back"):
        packed_of(other, groups_of(other)[0])


def test_a_beginning_that_the_tokeniser_adds_is_in_every_prompt() -> None:
    _, encoder = make("llava")
    talk = talks(1, 1)[0][0]
    assert encoder.render(talk).startswith("<s><|im_start|>")
    assert encoder.encode(talk, [None])[0].ids[0] == encoder.tokenizer.bos_token_id
    _, other = make("gemma3")  # its template writes the beginning itself
    assert other.render(talk).count("<bos>") == 1


def test_a_picture_mark_that_is_a_token_is_no_control_token() -> None:
    _, encoder = make("llava")
    with pytest.raises(PromptError, match="control token"):
        encoder.render(Conversation((Message("user", "what is </s>?"),)))


def test_pictures_are_reduced_to_the_limit() -> None:
    _, encoder = make("llava_next")
    big = View("big", picture(3, 240, 160))
    free = encoder.encode_views([big])[0]
    encoder.settings = ModelSettings(image_max_pixels=3000)
    encoder.forget()
    small = encoder.encode_views([big])[0]
    assert small.inputs["image_sizes"].prod() <= 3000 < free.inputs["image_sizes"].prod()
    assert small.inputs["pixel_values"].shape[1] <= free.inputs["pixel_values"].shape[1]


def told_apart(path: Path) -> list[str]:
    """Where the code of a file names a family, or asks a model what it has; docstrings may name whom they like."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    words = [str(node.value) for node in nodes if isinstance(node, ast.Constant) and id(node) not in docstrings]
    words += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    words += [node.id for node in nodes if isinstance(node, ast.Name)]
    family = re.compile(f"qwen|{'|'.join(FAMILIES)}|^hasattr$", re.IGNORECASE)
    return [f"{path.name}: {word}" for word in words if family.search(word)]


# The table of families and what its entries name, which alone may tell models apart.
APART = ("families.py", "masks.py", "pixels.py", "parts.py")


def test_few_files_tell_families_apart() -> None:
    package = Path(visrl.__file__).parent
    files = [path for room in ("models", "packing", "engines", "rollout") for path in (package / room).glob("*.py")]
    files += [package / "train" / "model.py", package / "box.py"]
    assert all(told_apart(package / "models" / name) for name in APART)
    assert [found for path in files if path.name not in APART for found in told_apart(path)] == []


def test_a_family_without_an_entry_is_plain() -> None:
    family = family_of(BertConfig())
    assert family.plain == "bert has no entry"
    assert not family.cacheable


# --- the document -----------------------------------------------------------------------------------------------------


def row_of(family: Family) -> str:
    """A family's row in docs/FAMILIES.md, without its first column."""
    sees = str(family.inputs.__doc__).splitlines()[0].rstrip(".")
    shares = "every branch" if family.shares == "all" else "chosen and rejected"
    calls = "a prompt a row" if family.row_per_prompt else "one row"
    here = "shared prefixes" if family.cacheable else "everything again per token"
    here = "a cache row per sample" if family.inputs is hybrid else here
    end = f"`{family.end_of_turn}`".replace("|", "\\|") if family.end_of_turn else "end of sequence"
    return f"| `{family.name}` | {shares} | {calls} | {sees} | {here} | `{family.codec}` | {end} |"


def test_the_table_in_the_docs_is_that_of_the_code() -> None:
    text = (Path(__file__).parent.parent / "docs" / "FAMILIES.md").read_text(encoding="utf-8")
    rows = [line[line.index("| `") :] for line in text.splitlines() if line.startswith("| ") and "| `" in line]
    assert [row for row in rows if row.split("`")[1] in FAMILIES] == [row_of(family) for family in FAMILIES.values()]
    for family in FAMILIES.values():
        if family.note:
            assert f"`{family.name}`: {family.note}" in text
    assert set(MAKERS) == set(FAMILIES)
