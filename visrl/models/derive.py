"""What processor, forward signature and text config say of a model without an entry: how images are joined, which
positions and masks it may take. Whether it is so, a trial says (probe.py)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from PIL import Image

from visrl.models.families import RECURRENT_KINDS, codec_of, is_windowed, kinds_of
from visrl.models.family import Family, ImageInputs, Layout, join_images, joined
from visrl.models.found import Axis, Found, Measured, Sight
from visrl.models.pixels import PIXEL_LIMITS, has_limits, limited_images, limited_size
from visrl.models.positions import depth_positions, mrope_positions
from visrl.models.tree_runs import plan_runs

POSITIONS = {"depth": depth_positions, "mrope": mrope_positions}
NOTHING = Measured(0.0, 0.0, 0.0, 0.0)
IDS = ("input_ids", "attention_mask")
END = "visrl-end"  # stands for what a model says, in a chat template's trial


def found_family(found: Found, config: Any) -> Family:
    """What was found of a config's models, as a family. Box codec and window are the config's own."""
    text = config.get_text_config()
    return Family(
        config.model_type,
        POSITIONS[found.positions],
        codec_of(config.model_type),
        derived,
        end_of_turn=found.end_of_turn,
        shares=found.shares,
        row_per_prompt=found.row_per_prompt,
        takes=found.takes,
        pixel_limits=found.pixel_limits,
        alone_differs=found.alone_differs,
        window=getattr(text, "sliding_window", None) if is_windowed(text) else None,
        chunk=getattr(text, "attention_chunk_size", None),
        layers=kinds_of(text),
        masks_window=True,
        keeps_features=found.features,
        found=found,
    )


def derived(layout: Layout, family: Family) -> dict[str, Any]:
    """What a trial found that it sees."""
    found = family.found
    assert found is not None
    masks: dict[str, Any] = dict(_masks(layout, family, found))
    if any(kind in RECURRENT_KINDS for kind in family.layers):  # states are handed on along paths
        masks |= dict.fromkeys(RECURRENT_KINDS, plan_runs(layout.segments, layout.depth.numel()))
    length = layout.ids.shape[-1]
    width = length if family.row_per_prompt else layout.ids.numel()  # of a row of the model's input
    images = layout.all_images
    inputs: dict[str, Any] = {name: marked(layout.ids, ids).view(-1, width) for name, ids in found.types}
    if images:
        counts = torch.tensor([len(tree) for tree in layout.images if tree])
        inputs |= {name: counts for name in found.counts}
    return {"attention_mask": _of_layers(family, masks), **inputs, **join_images(family, images)}


def cached_inputs(family: Family, ids: torch.Tensor, sees: torch.Tensor) -> dict[str, Any]:
    """What a model takes beside ids [rows, queries], positions and images over a KV cache, where `sees` [rows, queries,
    entries] is true for the entries of a token's ancestors and its own. The entries of a path lie in its order."""
    rank = sees.cumsum(-1) - 1  # how many ancestors an entry has that a token sees
    depth = sees.sum(-1, keepdim=True) - 1
    near = depth - rank < (family.window or sees.shape[-1])
    chunk = family.chunk or sees.shape[-1]
    masks = {
        "full_attention": sees,
        "sliding_attention": sees & near,
        "chunked_attention": sees & (depth // chunk == rank // chunk),
    }
    types = family.found.types if family.found else ()
    masks = {kind: mask[:, None] for kind, mask in masks.items()}
    return {"attention_mask": _of_layers(family, masks), **{name: marked(ids, chosen) for name, chosen in types}}


def _of_layers(family: Family, masks: Mapping[str, Any]) -> Any:
    """The mask of each kind of layer, or the one of all."""
    if family.layers:
        return {kind: masks[kind] for kind in family.layers}
    return masks["sliding_attention" if family.window else "full_attention"]


def _masks(layout: Layout, family: Family, found: Found) -> dict[str, torch.Tensor]:
    """The mask of each kind of layer: what it sees of images, a window by depth on the path, chunks by depth."""
    sees, depth = layout.ancestors, layout.depth
    if found.sees == "all images":
        shown = marked(layout.ids, dict(found.types).get("mm_token_type_ids", ())).bool()
        own = (shown[:, :, None] & shown[:, None])[:, None]
    else:
        own = ((layout.block[:, :, None] == layout.block[:, None]) & (layout.block[:, :, None] >= 0))[:, None]
    near = within(depth, family.window)
    full = sees if found.sees in ("ancestors", "own image in sliding layers") else sees | own
    sliding = sees & near if found.sees == "ancestors" else (sees | own) & near
    if found.sees == "own image":
        sliding = (sees & near) | own
    chunk = family.chunk or layout.ids.shape[-1]
    same = (depth[:, :, None] // chunk == depth[:, None] // chunk)[:, None]
    return {"full_attention": full, "sliding_attention": sliding, "chunked_attention": full & same}


def within(depth: torch.Tensor, window: int | None) -> torch.Tensor:
    """[bins, 1, length, length], true where a token lies within the window of another by depth on the path."""
    return (depth[:, :, None] - depth[:, None] < (window or depth.shape[-1]))[:, None]


def marked(ids: torch.Tensor, chosen: tuple[int, ...]) -> torch.Tensor:
    """1 where a token is one of `chosen`, else 0."""
    return torch.isin(ids, torch.tensor(chosen, dtype=ids.dtype)).long()


def described(family: Family) -> str:
    """What a family takes and how that is known, in one line."""
    if family.plain:
        return f"{family.name} takes no prefix tree: {family.plain}"
    shares = "every branch shares" if family.shares == "all" else "chosen and rejected share"
    decodes = "decodes over shared prefixes" if family.cacheable else "decodes everything again per token"
    end = family.end_of_turn or "the end of sequence"
    known = "entry by hand"
    if family.found:
        one = family.found.measured
        known = (
            f"found by trial in {one.seconds:.1f} s, {one.logps:.0e} in log-probabilities and {one.gradients:.0e} in "
            f"gradients off its own calls, from which a causal mask is {one.causal:.0e} off"
        )
    return (
        f"{family.name} takes the prefix tree ({known}): {shares}, {decodes}; box codec {family.codec}, turns end with "
        f"{end}"
    )


# --- What may be ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Clues:
    """What a processor makes of two images alone and together, and of a prompt: inputs by name, texts that stand for
    the images, and the tokens of the prompt with what is said of each."""

    alone: tuple[ImageInputs, ImageInputs]
    together: ImageInputs
    placeholders: tuple[tuple[str, ...], tuple[str, ...]]  # alone, together
    prompt: Mapping[str, torch.Tensor]


def candidates(clues: Clues, model: Any, processor: Any) -> Iterator[Found] | str:
    """What the model may take, the likeliest first; or why there is nothing to try, a sentence's end."""
    names = set(inspect.signature(model.forward).parameters)
    takes = tuple(name for name in clues.together if name in names)
    alone_differs = clues.placeholders[0] != clues.placeholders[1]
    axes: list[tuple[str, Axis]] = []
    for name in takes:
        axis = None if alone_differs else _axis_of(clues, name)
        if axis is None and not alone_differs:
            return f"its {name} of two images is not that of each, joined"
        axes.append((name, 0 if axis is None else axis))
    if not takes:
        return "nothing that its processor makes of an image is an input of its forward"
    return _combined(clues, model, processor, takes, tuple(axes), alone_differs)


def _combined(
    clues: Clues, model: Any, processor: Any, takes: tuple[str, ...], axes: tuple[tuple[str, Axis], ...],
    alone_differs: bool,
) -> Iterator[Found]:  # fmt: skip
    names = set(inspect.signature(model.forward).parameters)
    said = [name for name in clues.prompt if name in names and name not in (*IDS, *takes)]
    types = tuple((name, ids) for name in said if (ids := _marked_ids(clues, name)))
    counts = tuple(name for name in ("batch_num_images",) if name in names and alone_differs)
    base = Found(
        takes=takes,
        axes=axes,
        positions="mrope" if own_positions(model) is not None else "depth",
        sees="ancestors",
        shares="all",
        row_per_prompt=False,
        types=(),
        counts=counts,
        pixel_limits=takes_limits(processor, clues),
        alone_differs=alone_differs,
        cached=False,
        features=False,
        end_of_turn=None,
        measured=NOTHING,
    )
    ways: list[dict[str, Any]] = [{}] if not alone_differs else []
    ways += [{"shares": "pairs"}, {"shares": "pairs", "row_per_prompt": True}]
    for way in ways:
        for marks in ((), types) if types else ((),):
            for sees in get_args(Sight):
                if sees == "all images" and "mm_token_type_ids" not in dict(marks):
                    continue
                yield replace(base, sees=sees, types=marks, **way)


def own_positions(model: Any) -> Any:
    """The model's method that finds positions of more than one dimension; None where it counts tokens."""
    return getattr(model, "get_rope_index", None) or getattr(getattr(model, "model", None), "get_rope_index", None)


def takes_limits(processor: Any, clues: Clues) -> bool:
    """Whether the image processor takes a smallest and a largest number of pixels, and sizes images by them as
    `limited_size` does: some count an image's pixels once for every frame."""
    own = processor.image_processor
    if not (has_limits(own) and "image_grid_thw" in clues.together):
        return False
    side = own.patch_size * own.merge_size
    large, limits = (8 * side, 8 * side), dict(zip(PIXEL_LIMITS, (side**2, 16 * side**2), strict=True))
    ((_, _, _, made),) = limited_images(processor, [Image.new("RGB", large)], limits)
    return made == limited_size(own, large, limits)


def _axis_of(clues: Clues, name: str) -> Axis | None:
    whole = clues.together[name]
    axes: tuple[Axis, ...] = (0, 1, -1, "patches")
    for axis in axes:
        if axis == "patches" and (whole.is_floating_point() or "pixel_values" not in clues.alone[0]):
            continue
        if isinstance(axis, int) and not -whole.dim() <= axis < whole.dim():
            continue
        parts = [one[name] for one in clues.alone]
        others = [
            [size for number, size in enumerate(part.shape) if number != axis % part.dim()]
            for part in parts if isinstance(axis, int)
        ]  # fmt: skip
        if others and len(others[0]) != len(others[1]):
            continue
        made = joined(clues.alone, name, axis)
        if made.shape == whole.shape and torch.equal(made, whole):
            return axis
    return None


def _marked_ids(clues: Clues, name: str) -> tuple[int, ...]:
    """The ids that an input of a prompt marks by 1, where it marks nothing else; () where there is more to it."""
    ids, values = clues.prompt["input_ids"], clues.prompt[name]
    if values.shape != ids.shape or not set(values.unique().tolist()) <= {0, 1}:
        return ()
    chosen = tuple(sorted(set(ids[values == 1].tolist())))
    return chosen if torch.equal(marked(ids, chosen), values.long()) else ()


def end_of_turn(processor: Any, template: str) -> str | None:
    """The token with which the template ends what an assistant says: the first special one after it, that of the next
    turn where it writes none; None where there is none."""
    said = [{"role": role, "content": [{"type": "text", "text": text}]}
            for role, text in (("user", "?"), ("assistant", END), ("user", "!"))]  # fmt: skip
    text = processor.apply_chat_template(said, chat_template=template, tokenize=False)
    behind = text.rpartition(END)[2].partition("!")[0]
    tokenizer = processor.tokenizer
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    first = next((one for one in tokenizer(behind, add_special_tokens=False).input_ids if one in special), None)
    return None if first is None else tokenizer.convert_ids_to_tokens(first)
