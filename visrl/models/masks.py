"""What a token of a packed call sees, family by family: masks, and what a model takes beside them. The first line of
each function says it in words, as docs/FAMILIES.md does. Most families see their ancestors (`family.causal`).
"""

from __future__ import annotations

from typing import Any

import torch

from visrl.models.family import Family, Layout, causal, join_images
from visrl.models.tree_runs import plan_runs


def marked(ids: torch.Tensor, chosen: tuple[int, ...]) -> torch.Tensor:
    """1 where a token is one of `chosen`, else 0."""
    return torch.isin(ids, torch.tensor(chosen, dtype=ids.dtype, device=ids.device)).long()


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
    return {"attention_mask": masks, **join_images(family, layout.all_images)}


def paligemma(layout: Layout, family: Family) -> dict[str, Any]:
    """Its ancestors, and its whole prompt."""
    prompt = layout.prompt[:, :, None] & layout.prompt[:, None]
    return {"attention_mask": layout.ancestors | prompt[:, None], **join_images(family, layout.all_images)}


def hybrid(layout: Layout, family: Family) -> dict[str, Any]:
    """Its ancestors; recurrent layers hand their state on along its path."""
    plan = plan_runs(layout.segments, layout.depth.numel())
    masks = {"full_attention": layout.ancestors, str(family.recurrent): plan}
    return {"attention_mask": masks, **join_images(family, layout.all_images)}


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
