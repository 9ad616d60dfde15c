"""A family made of what a trial found: its masks, what it takes over a KV cache, and in words what it takes. What may
be found is in candidates.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from visrl.models.families import FAMILIES, RECURRENT_KINDS, codec_of, family_of, is_windowed, kinds_of
from visrl.models.family import Family, Layout, join_images
from visrl.models.found import Found
from visrl.models.masks import marked
from visrl.models.positions import depth_positions, mrope_positions
from visrl.models.tree_runs import plan_runs

# Where the model's own method finds positions the encoder asks it.
POSITIONS = {"depth": depth_positions, "mrope": mrope_positions, "own": mrope_positions}
# Layers whose masks `derived` makes.
KINDS = {"full_attention", "sliding_attention", "chunked_attention", *RECURRENT_KINDS}


def found_family(found: Found, config: Any) -> Family:
    """What was found of a config's models, as a family, with what no trial sees as it is known by hand: box codec, end
    of turn, template, whether features of images can be kept. The window is the config's own."""
    entry, text = FAMILIES.get(config.model_type), config.get_text_config()
    if found.by_hand and entry is not None:
        return replace(family_of(config), found=found)
    kinds = kinds_of(text)
    recurrent = next((kind for kind in kinds if kind in RECURRENT_KINDS), None)
    return Family(
        config.model_type,
        POSITIONS[found.positions],
        codec_of(config.model_type),
        derived,
        end_of_turn=entry.end_of_turn if entry else found.end_of_turn,
        shares=found.shares,
        row_per_prompt=found.row_per_prompt,
        takes=found.takes,
        pixel_limits=found.pixel_limits,
        alone_differs=found.alone_differs,
        window=getattr(text, "sliding_window", None) if is_windowed(text) else None,
        chunk=getattr(text, "attention_chunk_size", None),
        layers=kinds,
        recurrent=recurrent if {*kinds} <= {"full_attention", recurrent} else None,
        masks_window=True,
        keeps_features=entry.keeps_features if entry else found.features,
        chat_template=entry.chat_template if entry else None,
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


def decoding(family: Family) -> str:
    """How a family decodes in this process, in words."""
    if family.recurrent:
        return "a cache row per sample"
    return "shared prefixes" if family.cacheable else "everything again per token"


def described(family: Family, codec: str) -> str:
    """What a family takes, how that is known, and how its boxes are written, in one line."""
    if family.plain:
        end = f", turns end with {family.end_of_turn}" if family.end_of_turn else ""
        return f"{family.name} takes no prefix tree: {family.plain}; box codec {codec}{end}"
    shares = "every branch shares" if family.shares == "all" else "chosen and rejected share"
    decodes = f"decodes {decoding(family)}"
    end = family.end_of_turn or "the end of sequence"
    known = f"an entry by hand, which no trial holds: {family.untried}" if family.untried else "an entry by hand"
    if family.found:
        one, how = family.found.measured, "an entry by hand, held" if family.found.by_hand else "found"
        known = (
            f"{how} by trial in {one.seconds:.1f} s, {one.logps:.0e} in log-probabilities and {one.gradients:.0e} in "
            f"gradients off its own calls, from which a causal mask is {one.causal:.0e} off"
        )
    return (
        f"{family.name} takes the prefix tree ({known}): {shares}, {decodes}; box codec {codec}, turns end with {end}"
    )
