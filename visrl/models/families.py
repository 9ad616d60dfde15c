"""What differs between model families: positions, masks, inputs, image sizes, ends of turns, box codec. The only file
that tells models apart or looks into one; everything else asks a `Family` or a function here. docs/FAMILIES.md is this
table in words, checked by a test.

To add a family: an entry of `FAMILIES`, which says all of it. A model without an entry may be understood by trial
(models/probe.py), or trains and decodes in the plain form (`Family.plain`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from PIL import Image
from transformers.utils import ModelOutput

from visrl.box import Size
from visrl.models.folder import CheckpointError
from visrl.models.found import Axis, Found
from visrl.models.tree_runs import Segment, plan_runs

# The grid of one image in merged tokens (time, height, width), as the language model sees it.
Grid = tuple[int, int, int]
# What a processor makes of images, by the names of the model's inputs.
ImageInputs = dict[str, torch.Tensor]
# A smallest and a largest number of pixels, by the names of `PIXEL_LIMITS`.
PixelRange = dict[str, int]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tokens of one packed forward call lie, for the masks of families that need more than ancestors.

    The ancestor mask `ancestors` [bins, 1, length, length] is true from a token to its ancestors and itself. [bins,
    length]: `depth` counts ancestors, `prompt` is true before the response, `block` numbers runs of image tokens and is
    −1 elsewhere. `segments` says where in the row, bins one after the other, the parts of each tree lie.
    """

    ids: torch.Tensor
    ancestors: torch.Tensor
    depth: torch.Tensor
    prompt: torch.Tensor
    block: torch.Tensor
    images: list[list[ImageInputs]]  # of each tree, in the order in which they lie
    segments: list[Segment]


@dataclass(frozen=True, slots=True)
class Family:
    """What the rest of the code must know of a family.

    `positions` maps (ids, image token id, grids of the images in order) to positions [d, n]: d is 3 with M-RoPE, else
    1. `shares` says which branches of an item may share a prefix: "all", or only chosen and rejected of one prompt
    ("pairs"). With `row_per_prompt` every tree is a row of its own and only trees with as many images share a call.
    `inputs` maps a layout to what the model takes beside ids and positions: masks and images.
    """

    name: str
    positions: Callable[[np.ndarray, int, Sequence[Grid]], np.ndarray]
    codec: str
    inputs: Callable[[Layout, Family], dict[str, Any]]
    end_of_turn: str | None = None  # None: the tokenizer's end of sequence
    shares: Literal["all", "pairs"] = "all"
    row_per_prompt: bool = False
    takes: tuple[str, ...] = ("pixel_values",)  # what of a processor's output the model takes
    axis: int = 0  # along which images are joined
    pixel_limits: bool = False  # whether the image processor takes a smallest and largest number of pixels
    alone_differs: bool = False  # whether an image alone is cut otherwise than one among several
    chat_template: str | None = None  # for processors that come without one
    parts: tuple[str, str, str] = ("language_model", "vision_tower", "multi_modal_projector")  # of the model
    window: int | None = None  # tokens that sliding layers look back; set by `family_of`
    recurrent: str | None = None  # what the config calls layers that hand on a state; set by `family_of`
    chunk: int | None = None  # tokens in a chunk, which layers of chunks look back to the beginning of
    layers: tuple[str, ...] = ()  # kinds of attention layers, where each takes a mask of its own; by `family_of`
    masks_window: bool = False  # whether `inputs` masks what lies outside the window
    keeps_features: bool = True  # whether features of an image do not depend on what else is in its row
    note: str = ""
    found: Found | None = None  # what a trial found out, where there is no entry (see derive.py)
    plain: str = ""  # why its models take no prefix tree, a sentence's end; empty where they take one

    @property
    def cacheable(self) -> bool:
        """Whether a token sees its ancestors and nothing else, so that a KV cache holds what comes before it."""
        return not self.plain and (self.found.cached if self.found else self.inputs is causal)


# --- Positions --------------------------------------------------------------------------------------------------------


def mrope_positions(ids: np.ndarray, image_token: int, grids: Sequence[Grid]) -> np.ndarray:
    """Positions [3, n] (time, height, width) of the Qwen-VL families: text counts on, an image spreads over its grid.

    Equal to the model's own `get_rope_index` (tested), without its per-token Python loop.
    """
    positions = np.empty((3, len(ids)), dtype=np.int64)
    here = start = 0
    places = np.flatnonzero(ids == image_token)
    seen = 0
    for time, height, width in grids:
        first = int(places[seen])
        text = first - here
        positions[:, here:first] = start + np.arange(text)
        start += text
        count = time * height * width
        t, h, w = np.unravel_index(np.arange(count), (time, height, width))
        positions[:, first : first + count] = start + np.stack([t, h, w])
        start += max(height, width)
        here = first + count
        seen += count
    positions[:, here:] = start + np.arange(len(ids) - here)
    return positions


def depth_positions(ids: np.ndarray, image_token: int, grids: Sequence[Grid]) -> np.ndarray:
    """Positions [1, n]: the depth of each token on its path."""
    return np.arange(len(ids), dtype=np.int64)[None]


# --- Masks and images: what a token sees, in the first line of each --------------------------------------------------


def join_images(family: Family, images: Sequence[ImageInputs]) -> ImageInputs:
    """The inputs of several images as one, in their order, smaller ones padded with zeros."""
    axes = dict(family.found.axes) if family.found else {}
    return {name: joined(images, name, axes.get(name, family.axis)) for name in family.takes} if images else {}


def joined(images: Sequence[ImageInputs], name: str, axis: Axis) -> torch.Tensor:
    """One input of several images along `axis`; "patches" are numbers of patches, which count on from image to image
    (−1 is none)."""
    tensors = [image[name] for image in images]
    if axis == "patches":
        patches = [0, *(image["pixel_values"].shape[:2].numel() for image in images[:-1])]
        before = torch.tensor(patches).cumsum(0).tolist()
        return torch.cat([torch.where(one >= 0, one + first, one) for one, first in zip(tensors, before, strict=True)])
    return _join(tensors, axis)


def _join(tensors: list[torch.Tensor], axis: int) -> torch.Tensor:
    axis = min(axis, tensors[0].dim() - 1) % tensors[0].dim()
    largest = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [big - size for size, big in zip(tensor.shape, largest, strict=True)]
        missing[axis] = 0
        if any(missing):
            tensor = torch.nn.functional.pad(tensor, [pad for more in reversed(missing) for pad in (0, more)])
        padded.append(tensor)
    return torch.cat(padded, dim=axis)


def _flat(layout: Layout) -> list[ImageInputs]:
    return [image for tree in layout.images for image in tree]


def causal(layout: Layout, family: Family) -> dict[str, Any]:
    """Its ancestors."""
    return {"attention_mask": layout.ancestors, **join_images(family, _flat(layout))}


def onevision(layout: Layout, family: Family) -> dict[str, Any]:
    """Its ancestors; the model takes the number of images of each prompt."""
    counts = [len(tree) for tree in layout.images if tree]
    return {**causal(layout, family), **({"batch_num_images": torch.tensor(counts)} if counts else {})}


def gemma3(layout: Layout, family: Family) -> dict[str, Any]:
    """Its ancestors, and its whole image; sliding layers look back a window, by depth on the path."""
    own = (layout.block[:, :, None] == layout.block[:, None]) & (layout.block[:, :, None] >= 0)
    full = layout.ancestors | own[:, None]
    near = layout.depth[:, :, None] - layout.depth[:, None] < (family.window or layout.ancestors.shape[-1])
    masks = {"full_attention": full, "sliding_attention": full & near[:, None]}
    return {"attention_mask": masks, **join_images(family, _flat(layout))}


def paligemma(layout: Layout, family: Family) -> dict[str, Any]:
    """Its ancestors, and its whole prompt."""
    prompt = layout.prompt[:, :, None] & layout.prompt[:, None]
    return {"attention_mask": layout.ancestors | prompt[:, None], **join_images(family, _flat(layout))}


def hybrid(layout: Layout, family: Family) -> dict[str, Any]:
    """Its ancestors; recurrent layers hand their state on along its path."""
    plan = plan_runs(layout.segments, layout.depth.numel())
    masks = {"full_attention": layout.ancestors, str(family.recurrent): plan}
    return {"attention_mask": masks, **join_images(family, _flat(layout))}


def mllama(layout: Layout, family: Family) -> dict[str, Any]:
    """Its ancestors, and through cross-attention the last image before it.

    Tokens before the first image look at nothing by the mask, which the model turns into all images of their row; so a
    row holds one prompt and exactly its images.
    """
    from transformers.models.mllama.processing_mllama import (
        convert_sparse_cross_attention_mask_to_dense,
        get_cross_attention_token_mask,
    )

    rows = [join_images(family, images) for images in layout.images]
    inputs: dict[str, Any] = {"attention_mask": layout.ancestors}
    if not rows[0]:
        return inputs
    inputs |= {name: torch.cat([row[name] for row in rows]) for name in family.takes}
    tiles = inputs["aspect_ratio_mask"]  # [rows, images, tiles]
    # The tokens of a row read on from the prompt, so that its branches look where the prompt's last token looks.
    marks = [torch.nonzero(block >= 0).flatten().tolist() for block in layout.block]
    spans = [get_cross_attention_token_mask([int(n in own) for n in range(layout.block.shape[1])], 1) for own in marks]
    mask = convert_sparse_cross_attention_mask_to_dense(
        spans, tiles.sum(-1).tolist(), tiles.shape[-1], layout.block.shape[1]
    )
    return {**inputs, "cross_attention_mask": torch.from_numpy(mask)}


# --- Image processors with pixel limits (Qwen-VL) ---------------------------------------------------------------------

PIXEL_LIMITS = ("shortest_edge", "longest_edge")  # as these processors call their limits, which are areas all the same
THINNEST = 200  # the ratio of sides from which on they refuse an image


def limited_size(image_processor: Any, size: Size, limits: PixelRange) -> Size:
    """Width and height that the processor gives an image of `size`: whole merged patches, between the limits.

    Raises:
        ValueError: an image that is far too thin.
    """
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    low, high = (limits[name] for name in PIXEL_LIMITS)
    height, width = smart_resize(size[1], size[0], _merged_patch(image_processor), low, high)
    return width, height


def covering_limits(image_processor: Any, limits: Sequence[PixelRange]) -> PixelRange:
    """Limits under which every image that was sized under any of `limits` stays as it is.

    They are wider than the limits themselves: a side is rounded up or down to a whole number of merged patches, which
    makes a thin image larger, or smaller, than the limit it was sized by.
    """
    unit = _merged_patch(image_processor)
    low, high = (max(limit[name] for limit in limits) for name in PIXEL_LIMITS)
    # (h + unit)(w + unit) for h · w = low, at the thinnest shape that a processor takes.
    sides = (low * THINNEST) ** 0.5 + (low / THINNEST) ** 0.5
    both = unit**2, max(high, math.ceil(low + unit * sides + unit**2))
    return dict(zip(PIXEL_LIMITS, both, strict=True))


def limited_images(
    processor: Any, images: Sequence[Image.Image], limits: PixelRange
) -> Iterator[tuple[ImageInputs, str, Grid, Size]]:
    """Of each image, preprocessed in one batch: its inputs, the text that stands for it, its grid, and its size."""
    image_processor = processor.image_processor
    processed, placeholders = processor._process_images(list(images), size=limits)
    grids = processed["image_grid_thw"]
    pixels = torch.split(processed["pixel_values"], grids.prod(-1).tolist())
    patch, merge = image_processor.patch_size, image_processor.merge_size
    for grid, values, placeholder in zip(grids, pixels, placeholders, strict=True):
        time, height, width = grid.tolist()
        # Copies: a part of the batch's tensor would keep all of it in memory.
        inputs = {"pixel_values": values.clone(), "image_grid_thw": grid[None].clone()}
        yield inputs, placeholder, (time, height // merge, width // merge), (width * patch, height * patch)


def grid_of(processor: Any, inputs: ImageInputs, tokens: int) -> Grid:
    """The grid in merged tokens of an image whose processor does not resize it by pixel limits: as its inputs say it,
    else all in a row."""
    if "image_grid_thw" not in inputs:
        return 1, 1, tokens
    time, height, width = inputs["image_grid_thw"].flatten().tolist()
    merge = getattr(processor.image_processor, "merge_size", 1)
    return time, height // merge, width // merge


def _merged_patch(image_processor: Any) -> int:
    """The side in pixels of what becomes one token."""
    return image_processor.patch_size * image_processor.merge_size


# --- The families -----------------------------------------------------------------------------------------------------

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


# --- What a config says under several names ---------------------------------------------------------------------------


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


# --- The parts of a model ---------------------------------------------------------------------------------------------


def language_model(model: torch.nn.Module) -> torch.nn.Module:
    """The text decoder inside a vision-language model, through any adapter wrapped around it."""
    return _part(model, 0)


def vision_tower(model: torch.nn.Module) -> torch.nn.Module:
    """The vision tower (with its projector where that is part of it)."""
    return _part(model, 1)


def projector(model: torch.nn.Module) -> torch.nn.Module:
    """What maps the tower's features to the language model's."""
    return _part(model, 2)


def base_model(model: Any) -> Any:
    """The vision-language model itself, out of any adapter wrapped around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def older_names(model: Any) -> list[tuple[str, str]]:
    """Beginnings of layers' names before the decoder moved under `model.language_model`, and what they are now."""
    decoder, tower, bridge = _parts(model)
    inner = ("layers.", "embed_tokens", "norm")
    moves = [(f"model.{part}", f"model.{decoder}.{part}") for part in inner]
    moves += [(f"language_model.model.{part}", f"model.{decoder}.{part}") for part in inner]
    moves += [(f"language_model.{part}", f"model.{decoder}.{part}") for part in inner]
    moves += [("language_model.lm_head", "lm_head")]
    return moves + [(f"{part}.", f"model.{part}.") for part in (tower, bridge)]


def vision_names() -> list[str]:
    """The names that any family gives its vision tower or its projector."""
    return sorted({name for family in FAMILIES.values() for part in family.parts[1:] for name in part.split(".")})


def switch_off_dropout(model: torch.nn.Module) -> None:
    """Have the model compute the same thing every time, in training, too."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def _part(model: Any, which: int) -> torch.nn.Module:
    base = base_model(model)
    return _inner(base).get_submodule(_parts(base)[which])


def _inner(base: Any) -> torch.nn.Module:
    """What holds decoder, vision tower and projector: `model`, or the whole where a class has no such part."""
    inner = getattr(base, "model", None)
    decoder = base.get_decoder()
    return (
        inner if inner is not None and any(part is decoder for part in inner.modules() if part is not inner) else base
    )


def _parts(base: Any) -> tuple[str, str, str]:
    """The names of decoder, vision tower and projector in `_inner`: of the entry, else as the model's own
    `get_decoder` and `get_encoder` find them; the projector is what else has weights.

    Raises:
        CheckpointError: a model in which they are not apart.
    """
    if base.config.model_type in FAMILIES:
        return FAMILIES[base.config.model_type].parts
    inner = _inner(base)
    names = {module: name for name, module in inner.named_modules()}
    decoder, tower = (names.get(part) for part in (base.get_decoder(), base.get_encoder(modality="image")))
    if not decoder:
        raise CheckpointError(f"the decoder of a {type(base).__name__} is not told apart from the rest")
    output = base.get_output_embeddings()
    others = [
        name for name, part in inner.named_children()
        if part is not output and any(True for _ in part.parameters())
        and not any(known == name or known.startswith(f"{name}.") for known in (decoder, tower) if known)
    ]  # fmt: skip
    if not tower and not others:
        raise CheckpointError(f"a {type(base).__name__} has no weights that see images, beside its decoder")
    return decoder, tower or others[0], others[0] if others else str(tower)


# What configs call layers that see the past through a state.
RECURRENT_KINDS = ("linear_attention", "conv")


def recurrent_layers(model: torch.nn.Module) -> list[Any]:
    """What hands on a state in the decoder's layers: linear attention, short convolutions."""
    decoder: Any = language_model(model)
    kinds = getattr(decoder.config, "layer_types", None) or ()
    layers = [layer for layer, kind in zip(decoder.layers, kinds, strict=False) if kind in RECURRENT_KINDS]
    return [next(part for part in layer.children() if "layer_idx" in vars(part)) for layer in layers]


def state_argument(layer: torch.nn.Module) -> str:
    """What the forward of a recurrent layer calls the cache of its states: `cache`, or an older name."""
    names = inspect.signature(layer.forward).parameters
    return next(name for name in ("cache", "cache_params", "past_key_values") if name in names)


# --- What a model's own forward takes ---------------------------------------------------------------------------------

# What the vision tower made of images, in the output class of the model's own `get_image_features`.
Features = ModelOutput
# The fields of it that the language model reads, whatever else the tower says of itself.
READ_FIELDS = ("pooler_output", "deepstack_features")
FEATURES_ARGUMENT = "mm_encoder_outputs"  # of a forward that takes features in the place of images


def trains_features(model: torch.nn.Module) -> bool:
    """Whether any weight that image features depend on is trained."""
    base = base_model(model)
    decoder = _parts(base)[0]
    seeing = (weights for name, weights in _inner(base).named_parameters() if not name.startswith(f"{decoder}."))
    return any(weights.requires_grad for weights in seeing)


def keeps_features(model: torch.nn.Module) -> bool:
    """Whether what the model's family makes of an image depends on nothing else, so that it can be kept."""
    return family_of(base_model(model).config).keeps_features


def takes_features(model: torch.nn.Module) -> bool:
    """Whether the model's forward names an argument for features in the place of images, the inner one's too: what
    it does not name may be swallowed unread."""
    base = base_model(model)
    return all(FEATURES_ARGUMENT in inspect.signature(part.forward).parameters for part in (base, base.model))


def image_features(model: torch.nn.Module, image: ImageInputs) -> Features:
    """The features of one image, without what the language model does not read."""
    made = base_model(model).model.get_image_features(**image, return_dict=True)
    return type(made)(**{name: made[name] for name in READ_FIELDS if name in made})


def features_input(features: Sequence[Features]) -> dict[str, Any]:
    """The model's input in the place of its images: the features of several as one, in their order."""
    fields: dict[str, Any] = {"pooler_output": _joined([one["pooler_output"] for one in features])}
    if "deepstack_features" in features[0]:  # one entry per layer
        layers = zip(*(one["deepstack_features"] for one in features), strict=True)
        fields["deepstack_features"] = [_joined(layer) for layer in layers]
    return {FEATURES_ARGUMENT: {"image": type(features[0])(**fields)}}


def _joined(values: Sequence[Any]) -> Any:
    """Tensors along their first axis, lists one after another."""
    return torch.cat(list(values)) if isinstance(values[0], torch.Tensor) else [part for one in values for part in one]


def forward_arguments(model: Any) -> frozenset[str]:
    """The arguments that a model's forward names, through whatever is wrapped around the model; `model` may be its
    class. What a forward does not name it may swallow unread."""
    kind: Any = model if isinstance(model, type) else type(base_model(extract_model_from_parallel(model)))
    return frozenset(inspect.signature(kind.forward).parameters)


def cache_argument(model: torch.nn.Module) -> str:
    """What the model's forward calls the keys and values it is given: `cache`, or the older `past_key_values`."""
    return "cache" if "cache" in inspect.signature(base_model(model).forward).parameters else "past_key_values"
