"""The table of model families: an entry says all that a family differs in. docs/FAMILIES.md is this table in words,
checked by a test. Beside it, what a config says under several names.

To add a family: an entry of `FAMILIES`; what its tokens see is a function of masks.py. These files, with pixels.py,
parts.py and calls.py, are the only ones that tell models apart or look into one; everything else asks a `Family`. A
model without an entry may be understood by trial (probe.py), or trains and decodes in the plain form (`Family.plain`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from visrl.models.family import Family, causal
from visrl.models.masks import gemma3, hybrid, mllama, onevision, paligemma
from visrl.models.positions import depth_positions, mrope_positions

_QWEN2_VL = Family(
    "qwen2_vl", mrope_positions, "qwen2_vl", causal, end_of_turn="<|im_end|>", pixel_limits=True,
    takes=("pixel_values", "image_grid_thw"), parts=("language_model", "visual", "visual.merger"),
)  # fmt: skip
_IDEFICS3 = Family(
    "idefics3", depth_positions, "visrl", causal, end_of_turn="<end_of_utterance>", axis=1,
    takes=("pixel_values", "pixel_attention_mask"), parts=("text_model", "vision_model", "connector"),
)  # fmt: skip
# PaliGemma's processor takes images first, then the text between <bos> and a newline.
_PALIGEMMA_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% endfor %}{{ bos_token }}{% for message in messages %}"
    "{{ message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | map('trim') | join(' ') }}"
    "{{ '\n' }}{% endfor %}"
)

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _QWEN2_VL,
        replace(_QWEN2_VL, name="qwen2_5_vl", codec="qwen2_5_vl"),
        replace(_QWEN2_VL, name="qwen3_vl", codec="qwen3_vl"),
        replace(_QWEN2_VL, name="qwen3_5", codec="qwen3_vl", inputs=hybrid),
        replace(_QWEN2_VL, name="qwen3_5_moe", codec="qwen3_vl", inputs=hybrid),
        Family("llava", depth_positions, "viscot", causal),
        Family("llava_next", depth_positions, "visrl", causal, takes=("pixel_values", "image_sizes")),
        Family(
            "llava_onevision", depth_positions, "visrl", onevision, end_of_turn="<|im_end|>", shares="pairs",
            takes=("pixel_values", "image_sizes"), alone_differs=True, keeps_features=False,
            note="an image alone is tiled, one among several is not: box and answer prompts show different tokens",
        ),
        Family("internvl", depth_positions, "internvl", causal, end_of_turn="<|im_end|>"),
        _IDEFICS3,
        replace(_IDEFICS3, name="smolvlm"),
        Family(
            "lfm2_vl", depth_positions, "visrl", hybrid, end_of_turn="<|im_end|>",
            takes=("pixel_values", "pixel_attention_mask", "spatial_shapes"),
        ),
        Family(
            "paligemma", depth_positions, "paligemma", paligemma, shares="pairs", row_per_prompt=True,
            chat_template=_PALIGEMMA_TEMPLATE,
            note="the whole prompt sees itself and holds both images before any text",
        ),
        Family("gemma3", depth_positions, "visrl", gemma3, end_of_turn="<end_of_turn>", masks_window=True),
        Family(
            "mllama", depth_positions, "visrl", mllama, end_of_turn="<|eot_id|>", shares="pairs", row_per_prompt=True,
            takes=("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"), axis=1, keeps_features=False,
            parts=("language_model", "vision_model", "multi_modal_projector"),
            note="tokens before the first image look at every image of their row, so no other may be there",
        ),
    )
}  # fmt: skip


# Box codecs of families without an entry: what no trial can see.
CODECS_BY_HAND = {"qwen3_vl_moe": "qwen3_vl"}


def codec_of(model_type: str) -> str:
    """The box codec in which a family was trained, where it is known; else our own."""
    return FAMILIES[model_type].codec if model_type in FAMILIES else CODECS_BY_HAND.get(model_type, "visrl")


def plain_family(model_type: str, reason: str) -> Family:
    """The family of models that take no prefix tree, for `reason`: one sequence at a time, as their own processor and
    forward have it, which is the same for all."""
    return Family(
        model_type, depth_positions, codec_of(model_type), causal, shares="pairs", keeps_features=False, plain=reason
    )


# --- Bases of the paper that transformers has no class for ------------------------------------------------------------

# By the model type of checkpoints that come with code of their own: what to take in their place.
SUCCESSORS = {"minicpmo": "or take a successor with a class there: MiniCPM-V 4.6 or 4.7 (minicpmv4_6, minicpmv4_7)"}


def other_program(values: Mapping[str, Any]) -> str | None:
    """Why a checkpoint is read by its own program alone, by what its config.json says; None where it is not so."""
    if "mm_vision_tower" not in values:
        return None
    return (
        "it is written for LLaVA's own program (mm_vision_tower), and transformers reads converted checkpoints alone: "
        "for LLaVA the -hf ones (llava, llava_next); Yi-VL has neither a class there nor a successor of its makers, "
        "and LLaVA-NeXT (llava_next) is built alike"
    )


# --- What a config says, some of it under several names ---------------------------------------------------------------

# What configs call layers that see the past through a state.
RECURRENT_KINDS = ("linear_attention", "conv")


def family_of(config: Any) -> Family:
    """The family of a model's config, as its entry says it; without one, a plain family."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        return plain_family(config.model_type, f"{config.model_type} has no entry")
    text = config.get_text_config()
    recurrent = next((kind for kind in kinds_of(text) if kind in RECURRENT_KINDS), None)
    family = replace(family, recurrent=recurrent)
    return replace(family, window=text.sliding_window, layers=kinds_of(text)) if is_windowed(text) else family


def is_windowed(text: Any) -> bool:
    """Whether any layer of a text config looks back a window only."""
    kinds = getattr(text, "layer_types", None)
    return "sliding_attention" in kinds if kinds else bool(getattr(text, "sliding_window", None))


def kinds_of(text: Any) -> tuple[str, ...]:
    """The kinds of a text config's layers, where there is another than full attention."""
    kinds = tuple(dict.fromkeys(getattr(text, "layer_types", None) or ()))
    return () if kinds == ("full_attention",) else kinds


def image_token_of(config: Any) -> int | None:
    """The token that stands for an image; None where the config leaves it to the tokenizer."""
    for name in ("image_token_id", "image_token_index"):
        if (token := getattr(config, name, None)) is not None:
            return token
    return None


def image_token(processor: Any, config: Any, family: Family) -> int:
    """The token that features of images replace. Where there is an entry, processor and config must agree on it (see
    prompting.py); else the config's comes first: a processor may name what stands for a whole image."""
    named = None if family.name in FAMILIES else image_token_of(config)
    return processor.image_token_ids[0] if named is None else named


def context_of(config: Any) -> int | None:
    """How many tokens the model may be shown; None where its config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def layer_counts(config: Any) -> Iterator[int]:
    """How many layers each part of the model has."""
    for part in (config, *(getattr(config, name) for name in config.sub_configs if getattr(config, name, None))):
        layers = getattr(part, "num_hidden_layers", None) or getattr(part, "depth", None)
        if isinstance(layers, int):
            yield layers
