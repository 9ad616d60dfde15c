"""What a trial at loading finds of a model: that it is right, what it refuses, what it costs, and where it is kept."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import torch
import transformers
from family_table import MADE, row_of
from more_families import MORE, made
from test_families import gradients, groups_of, native_inputs, packed_of, sayable, separate, talks
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from typer.testing import CliRunner

from visrl.cli import app
from visrl.engines.base import Request, Sampling
from visrl.engines.local import LocalEngine
from visrl.models import probe, proofs
from visrl.models.asked import taken
from visrl.models.attention import use_tree_attention
from visrl.models.derive import described, found_family
from visrl.models.encode import Encoder
from visrl.models.families import FAMILIES, family_of
from visrl.models.found import Found, NotFound
from visrl.models.parts import language_model, switch_off_dropout
from visrl.models.probe import NoProof, find_family, prove
from visrl.models.settings import ModelSettings
from visrl.models.small import small_copy, small_model
from visrl.models.tree_encoder import TreeEncoder
from visrl.packing.forward import branch_logps

FAST = ("ernie4_5_vl_moe",)
RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
TABLE = (5, 24)  # the release that the table in the docs is of
of_the_table = pytest.mark.skipif(RELEASE < TABLE, reason="older releases of transformers make other faults")
# Families whose forward cannot be called as it is in this release: what a user is told.
REFUSED = {"llama4": "its own calls cannot be made"}
FOUND = [name for name in MORE if name not in REFUSED]
# What no trial finds by itself: entries that are held as they are, and one that no trial can try, and why not.
HELD = ("llava_onevision", "mllama")
UNTRIED = {"paligemma": "its processor makes other tokens of a whole prompt than of its parts"}


def speeds(names: list[str], fast: tuple[str, ...] = FAST) -> list[Any]:
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(proofs.FOLDER, str(tmp_path / "cache"))
    return tmp_path / "cache"


def opened(name: str) -> tuple[Any, Encoder]:
    """A random model and its encoder, by what was found of it; weights loud enough that every token matters."""
    model, processor = made(name)
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(torch.randn_like(weights) * 0.07)
    switch_off_dropout(model)
    try:
        family = found_family(prove(processor, model.config), model.config)
    except NoProof as error:
        if RELEASE >= TABLE or not str(error).startswith("its own calls cannot be made"):
            raise
        pytest.skip(f"transformers {transformers.__version__}: {error}")
    return model.eval(), TreeEncoder(processor, model.config, ModelSettings(), family)


@pytest.mark.parametrize("name", speeds(FOUND))
def test_what_is_found_equals_the_models_own_calls(name: str) -> None:
    """On the whole model, not the trial's copy: packed log-probabilities and gradients against its own calls, and its
    greedy texts against those of `generate`, samples that join late among them."""
    model, encoder = opened(name)
    groups, said = groups_of(encoder)
    paths = [path for group in groups for path in group]
    theirs = separate(model, encoder, paths, said)
    use_tree_attention(model)
    ours = branch_logps(model.train(), packed_of(encoder, groups)).sums
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    mine, native = gradients(model, ours), gradients(model, theirs)
    assert mine.keys() == native.keys()
    whole = torch.cat([gradient.flatten() for gradient in native.values()]).norm()
    for key, gradient in native.items():
        assert (mine[key] - gradient).norm() < 1e-4 * max(gradient.norm(), 1e-3 * whole), key
    assert told(model.eval(), encoder) == [greedy(model, encoder, talk) for talk, _ in talks(1, 2)]


def told(model: Any, encoder: Encoder) -> list[str | None]:
    """Greedy texts of the engine, one row joining after the other."""
    engine = LocalEngine(model, encoder)
    running, done = engine.begin(), {}
    for number, (talk, _) in enumerate(talks(1, 2)):
        done |= running.add({number: Request(talk, Sampling(max_tokens=6), number)}) | running.step()
    while len(running):
        done |= running.step()
    return [done[number].text for number in sorted(done)]


def greedy(model: Any, encoder: Encoder, talk: Any) -> str:
    language: Any = language_model(model).config
    language._attn_implementation = "eager"
    inputs = taken(model, native_inputs(encoder, talk))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = encoder.end_id, 0
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=sayable(model, encoder))
    return encoder.decode(out[0, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize("name", speeds(sorted(FAMILIES), ("gemma3", "qwen2_5_vl")))
def test_the_entries_by_hand_are_found(name: str) -> None:
    """Loading takes what a trial finds, which is the entry by hand; or holds the entry, or says why it cannot. What no
    trial sees is by hand: codecs, ends of turns, whether features of images can be kept."""
    torch.manual_seed(0)
    model, processor = tiny_families.MAKERS[name]()
    entry, family = family_of(model.config), find_family(processor, model.config)
    if name in UNTRIED:
        assert family == replace(entry, untried=family.untried)
        assert UNTRIED[name] in family.untried
        return
    found = family.found
    assert found is not None
    assert found.by_hand == (name in HELD)
    for field in (
        "positions", "shares", "row_per_prompt", "pixel_limits", "alone_differs", "cacheable", "recurrent",
        "codec", "end_of_turn", "chat_template", "keeps_features",
    ):  # fmt: skip
        assert getattr(family, field) == getattr(entry, field), field
    assert set(family.takes) == set(entry.takes)
    if name in HELD:
        return
    assert found.sees == ("own image in the window" if name == "gemma3" else "ancestors")
    assert {axis for _, axis in found.axes} == {entry.axis}


@of_the_table
@pytest.mark.parametrize("name", speeds(sorted(MADE), ("qwen3_vl_moe", "llama4")))
def test_the_table_in_the_docs_is_what_is_found(name: str) -> None:
    text = (Path(__file__).parent.parent / "docs" / "FAMILIES.md").read_text(encoding="utf-8")
    (written,) = [line.split(" | ") for line in text.splitlines() if line.startswith(f"| {name} | ")]
    now = row_of(name).split(" | ")
    assert now[1:3] == written[1:3]
    assert now[3].startswith(written[3])


# --- What it refuses --------------------------------------------------------------------------------------------------


def broken(change: Callable[[dict[str, Any]], None]) -> probe.Build:
    """What makes a small copy whose decoder is given other inputs than it was called with."""

    def build(config: Any, numbers: torch.Tensor | None) -> torch.nn.Module:
        model = small_copy(config, numbers)
        decoder = language_model(model)
        own = decoder.forward

        def forward(*args: Any, **inputs: Any) -> Any:
            change(inputs)
            return own(*args, **inputs)

        decoder.forward = forward
        return model

    return build


def _ignore_mask(inputs: dict[str, Any]) -> None:
    mask = inputs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 4:
        inputs["attention_mask"] = torch.ones_like(mask).tril()


def _ignore_positions(inputs: dict[str, Any]) -> None:
    positions = inputs.get("position_ids")
    if positions is not None:
        inputs["position_ids"] = torch.arange(positions.shape[-1]).expand_as(positions)


def _unmask_window(inputs: dict[str, Any]) -> None:
    mask = inputs.get("attention_mask")
    if isinstance(mask, dict):
        inputs["attention_mask"] = dict.fromkeys(mask, mask["full_attention"])


@pytest.mark.parametrize(
    ("name", "change"),
    [("vipllava", _ignore_mask), ("vipllava", _ignore_positions), ("cohere2_vision", _unmask_window)],
    ids=["a mask ignored", "positions ignored", "a window unmasked"],
)
def test_a_broken_model_is_refused(name: str, change: Callable[[dict[str, Any]], None]) -> None:
    model, processor = made(name)
    assert isinstance(prove(processor, model.config), Found)
    with pytest.raises(NoProof, match="no mask gives what its own calls give"):
        prove(processor, model.config, broken(change))


def test_a_blind_trial_is_no_proof() -> None:
    """A model that sees nothing but its own token gives the same under every mask."""

    def blind(inputs: dict[str, Any]) -> None:
        size = inputs["inputs_embeds"].shape[1]
        own = torch.eye(size, dtype=torch.bool)[None, None]
        packed = isinstance(inputs.get("attention_mask"), torch.Tensor) and inputs["attention_mask"].dim() == 4
        inputs["attention_mask"] = own if packed else torch.zeros(own.shape).masked_fill(~own, -torch.inf)

    model, processor = made("vipllava")
    with pytest.raises(NoProof, match="the trial sees nothing"):
        prove(processor, model.config, broken(blind))


@of_the_table
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_called_is_told(name: str) -> None:
    model, processor = made(name)
    family = find_family(processor, model.config)
    assert family.plain.startswith(REFUSED[name])
    assert family.end_of_turn
    assert (
        described(family, "visrl")
        == f"{name} takes no prefix tree: {family.plain}; box codec visrl, turns end with {family.end_of_turn}"
    )


# --- What it costs ----------------------------------------------------------------------------------------------------


def test_what_was_found_is_kept(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = made("vipllava")
    first = find_family(processor, model.config)
    (file,) = own_cache.rglob("*.json")
    monkeypatch.setattr(probe, "prove", lambda *_: pytest.fail("tried again"))
    assert find_family(processor, model.config).found == first.found
    longer = type(model.config).from_dict(model.config.to_dict())
    longer.text_config.sliding_window = 99
    assert proofs.key_of(processor, longer) != file.stem
    proofs.keep(file.stem, NotFound("a reason", contradicted=False))
    assert find_family(processor, model.config).plain == "a reason"
    for damaged in ("", "[]", "{}", json.dumps({"found": {"takes": []}})):
        file.write_text(damaged)
        assert proofs.kept(file.stem) is None


def test_random_numbers_of_the_caller_stay() -> None:
    model, processor = made("vipllava")
    torch.manual_seed(7)
    prove(processor, model.config)
    after = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(after, torch.rand(1))


def test_a_large_vocabulary_costs_nothing() -> None:
    """A model as wide and with as many tokens as whole ones: the copy has those of the trial alone."""
    model, processor = made("mistral3")
    values = model.config.to_dict()
    values["text_config"] |= {
        "vocab_size": 150_000, "hidden_size": 5120, "intermediate_size": 32_768, "num_hidden_layers": 40,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    }  # fmt: skip
    config = type(model.config).from_dict(values)
    sizes = []

    def build(config: Any, numbers: torch.Tensor | None) -> torch.nn.Module:
        copy = small_copy(config, numbers)
        sizes.append(sum(weight.numel() for weight in copy.parameters()))
        return copy

    assert prove(processor, config, build).cached
    assert len(sizes) == 1
    assert sizes[0] < 1_000_000


LARGE = sorted(
    {*FAMILIES, "qwen3_vl_moe", "glm4v", "glm46v", "mistral3", "ovis2", "cohere2_vision", "aya_vision", "gemma4"}
)


@pytest.mark.parametrize("name", speeds(LARGE, ("qwen2_5_vl", "glm4v")))
def test_a_small_copy_of_a_whole_config_is_small(name: str) -> None:
    """Configs of whole models, as their classes have them: the copy is of their kind, and costs little."""
    config = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name]).config_class()
    text = config.get_text_config()
    if (text.pad_token_id or 0) >= text.vocab_size:
        pytest.skip(f"the default config of {name} in this release pads with a token that it does not have")
    with torch.device("meta"):
        copy = small_model(config, narrow=True)
    weights = sum(weight.numel() for name, weight in copy.named_parameters() if "embed" not in name)
    assert type(copy).__name__ == MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name]
    assert weights < 200_000_000


def test_the_command_says_what_a_model_takes(tiny: Path, tmp_path: Path) -> None:
    """`visrl env --model`: found, kept, and read from the cache; a folder that holds no model is a sentence."""
    ran = CliRunner().invoke(app, ["env", "--model", str(tiny)])
    (line,) = [line for line in ran.stdout.splitlines() if line.startswith(f"{tiny}: ")]
    assert re.fullmatch(
        r"qwen2_vl takes the prefix tree \(found by trial in \d+\.\d s, \de-\d\d in log-probabilities and \de-\d\d in "
        r"gradients off its own calls, from which a causal mask is \de-\d\d off\): every branch shares, decodes shared "
        r"prefixes; box codec visrl, turns end with <\|im_end\|>",
        line.removeprefix(f"{tiny}: "),
    )
    assert line in CliRunner().invoke(app, ["env", "--model", str(tiny)]).stdout  # its seconds are those of the trial
    refused = CliRunner().invoke(app, ["env", "--model", str(tmp_path)])
    assert (refused.exit_code, refused.stderr) == (1, f"visrl: {tmp_path} is no model folder: it has no config.json\n")
