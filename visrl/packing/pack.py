"""Sequence packing: prefix trees → what a model's own forward takes (ids, positions, ancestor masks, images), without
the padding of a batch.

Trees lie in bins of one long row, and tokens of different bins never meet. What a family's masks and images look like
is the family's (models/family.py); this file knows where tokens lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from visrl.models.encode import EncodedView
from visrl.models.family import Family, Layout
from visrl.models.tree_runs import RunPlan
from visrl.packing.tree import PrefixTree

BUCKET = 64  # packed lengths are multiples of this, so that few distinct shapes occur
TIGHT_BUCKET = 16  # the same where shapes may be many, as on a CPU, and padding costs more than they do
ATTENTION_TOKENS = 600  # the bin length at which attention costs about as much as the rest of a small layer


@dataclass(slots=True)
class Call:
    """One call of a model's forward: tokens [rows, length] with masks and images, and the columns [K] whose logits are
    needed. `uses` [rows, length] says in how many paths each token lies, 0 for padding. `views` are the images in the
    order in which they lie, until they are on their device."""

    inputs: dict[str, Any]
    keep: torch.Tensor
    uses: torch.Tensor
    views: list[EncodedView]


@dataclass(slots=True)
class PackedBatch:
    """Prefix trees packed side by side, ready for a model's own forward; T response tokens.

    Nearly always one call; families that cannot mix trees take several. In the kept logits of all calls, [rows × K]
    one after the other, `row[t]` predicts response token `target[t]`, which belongs to branch `branch[t]`.
    """

    calls: list[Call]
    row: torch.Tensor  # [T]
    target: torch.Tensor  # [T]
    branch: torch.Tensor  # [T]
    branches: int
    tokens: int  # of the trees, padding left out
    padded_tokens: int  # the same with padding
    separate_tokens: int  # of the same paths as separate sequences

    def to(self, device: torch.device | str) -> PackedBatch:
        """This batch with every tensor on `device`."""
        return PackedBatch(**{name: moved(getattr(self, name), device) for name in self.__slots__})


def moved(value: Any, device: torch.device | str) -> Any:
    """`value` with every tensor in it on `device`, in classes of its own (a model's output stays one); what is no
    tensor and holds none known here stays."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return type(value)(**{name: moved(part, device) for name, part in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(moved(part, device) for part in value)
    if isinstance(value, RunPlan):
        return value.to(device)
    if isinstance(value, Call):
        keep, uses = (part.to(device, non_blocking=True) for part in (value.keep, value.uses))
        return Call(moved(value.inputs, device), keep, uses, [])
    return value


def pack(
    trees: Sequence[PrefixTree],
    family: Family,
    image_token: int,
    *,
    bin_length: int = 512,
    bucket: int = BUCKET,
    pad_id: int = 0,
    ends: bool = False,
) -> PackedBatch:
    """Pack `trees` into bins of equal length; a bin holds as many as fit `bin_length`, or one longer tree.

    Branches keep the numbers that `prefix_trees` gave them. Lengths are multiples of `bucket`. With `ends` the places
    that are kept are not those that predict response tokens: `row` is the last token of each branch, where a reward
    model reads its score, and `target` that token.

    Raises:
        ValueError: a path is longer than the window of sliding layers for which the family has no mask.
    """
    longest = max(len(places) for tree in trees for places, _ in tree.paths)
    if family.window is not None and not family.masks_window and longest > family.window:
        raise ValueError(
            f"a path of {longest} tokens is longer than the {family.window} tokens that sliding layers of "
            f"{family.name} look back: take smaller pictures (image_max_pixels) or shorter texts"
        )
    calls, rows, targets, branches = [], [], [], []
    kept = 0
    for members in _members_of_calls(trees, family):
        call, row = _pack_call(members, family, image_token, bin_length, bucket, pad_id, ends)
        calls.append(call)
        rows.append(kept + row)
        kept += len(call.inputs["input_ids"]) * len(call.keep)
        for tree in members:
            told = [path.ids[-1:] if ends else path.ids[path.start :] for _, path in tree.paths]
            targets += told
            branches += [np.full(len(ids), number) for ids, number in zip(told, tree.branches, strict=True)]
    return PackedBatch(
        calls=calls,
        row=torch.from_numpy(np.concatenate(rows)),
        target=torch.from_numpy(np.concatenate(targets)),
        branch=torch.from_numpy(np.concatenate(branches)),
        branches=sum(len(tree.paths) for tree in trees),
        tokens=sum(tree.size for tree in trees),
        padded_tokens=sum(call.inputs["input_ids"].numel() for call in calls),
        separate_tokens=sum(len(path.ids) for tree in trees for _, path in tree.paths),
    )


def _members_of_calls(trees: Sequence[PrefixTree], family: Family) -> list[list[PrefixTree]]:
    """All trees in one call; where each is a row of its own, those with as many images."""
    if not family.row_per_prompt:
        return [list(trees)]
    by_images: dict[int, list[PrefixTree]] = {}
    for tree in trees:
        by_images.setdefault(len(tree.views), []).append(tree)
    return list(by_images.values())


def _pack_call(
    trees: list[PrefixTree], family: Family, image_token: int, bin_length: int, bucket: int, pad_id: int, ends: bool
) -> tuple[Call, np.ndarray]:
    """The call of `trees`, and for each response token, in their order, the row of its prediction; with `ends`, for
    each branch the row of its last token."""
    if family.row_per_prompt:
        length, bins = -(-max(tree.size for tree in trees) // bucket) * bucket, len(trees)
        offsets = [length * n for n in range(bins)]
    else:
        length, offsets, bins = _choose_bins([tree.size for tree in trees], bin_length, bucket)
    width = length if family.row_per_prompt else bins * length  # of a row of the model's input
    ids = np.full(bins * length, pad_id, dtype=np.int64)
    uses = np.zeros_like(ids)
    positions = np.zeros((trees[0].positions[0].shape[0], bins * length), dtype=np.int64)
    predictors = []
    for tree, offset in zip(trees, offsets, strict=True):
        ids[offset : offset + tree.size] = np.concatenate(tree.ids)
        positions[:, offset : offset + tree.size] = np.concatenate(tree.positions, axis=1)
        for places, _ in tree.paths:
            uses[offset + places] += 1
        predictors += [offset + (places[-1:] if ends else places[path.start - 1 : -1]) for places, path in tree.paths]
    places = np.concatenate(predictors)
    keep, column = np.unique(places % width, return_inverse=True)
    in_order = [tree for _, tree in sorted(zip(offsets, trees, strict=True), key=lambda pair: pair[0])]
    layout = _layout(trees, offsets, in_order, ids.reshape(bins, length), image_token)
    position_ids = torch.from_numpy(positions).view(len(positions), -1, width)
    inputs = {
        "input_ids": torch.from_numpy(ids).view(-1, width),
        "position_ids": position_ids[0] if len(positions) == 1 else position_ids,
        **family.inputs(layout, family),
    }
    views = [view for tree in in_order for view in tree.views]
    call = Call(inputs, torch.from_numpy(keep), torch.from_numpy(uses).view(-1, width), views)
    return call, places // width * len(keep) + column


def _layout(
    trees: list[PrefixTree], offsets: list[int], in_order: list[PrefixTree], ids: np.ndarray, image_token: int
) -> Layout:
    """Masks and places of trees that lie at `offsets` in bins of `ids` [bins, length]."""
    bins, length = ids.shape
    ancestors = torch.zeros(bins, 1, length, length, dtype=torch.bool)
    ancestors[:, 0].diagonal(dim1=1, dim2=2).fill_(True)  # padding sees itself: no row is empty
    depth, block = np.zeros(ids.size, dtype=np.int64), np.full(ids.size, -1, dtype=np.int64)
    prompt = np.zeros(ids.size, dtype=bool)
    blocks = 0
    for tree, offset in zip(trees, offsets, strict=True):
        _fill_ancestor_mask(ancestors[offset // length, 0], tree, offset % length)
        for first, last, above in tree.segments:
            a, b = offset + first, offset + last
            depth[a:b] = len(above) + np.arange(b - a)
            is_image = ids.reshape(-1)[a:b] == image_token
            starts = is_image & ~np.concatenate([[False], is_image[:-1]])
            block[a:b] = np.where(is_image, blocks + np.cumsum(starts) - 1, -1)
            blocks += int(starts.sum())
        for places, path in tree.paths:
            prompt[offset + places[: path.start]] = True
    return Layout(
        ids=torch.from_numpy(ids),
        ancestors=ancestors,
        depth=torch.from_numpy(depth).view(bins, length),
        prompt=torch.from_numpy(prompt).view(bins, length),
        block=torch.from_numpy(block).view(bins, length),
        images=[[view.inputs for view in tree.views] for tree in in_order],
        segments=[
            (offset + first, offset + last, offset + above)
            for tree, offset in zip(trees, offsets, strict=True)
            for first, last, above in tree.segments
        ],
    )


def _choose_bins(sizes: Sequence[int], limit: int, bucket: int) -> tuple[int, list[int], int]:
    """Bin length, offsets and bin count that cost least: padding costs, and so does attention in long bins."""
    longest, total = max(sizes), sum(sizes)
    top = max(longest, min(limit, total))
    best = None
    for length in range(-(-longest // bucket) * bucket, -(-top // bucket) * bucket + 1, bucket):
        offsets, bins = _place(sizes, length)
        cost = bins * length * (1 + length / ATTENTION_TOKENS)
        if best is None or cost < best[0]:
            best = (cost, length, offsets, bins)
    assert best is not None
    return best[1:]


def _place(sizes: Sequence[int], length: int) -> tuple[list[int], int]:
    """Offsets of trees in bins of `length`, longest first into the first bin with room, and how many bins."""
    free: list[int] = []
    offsets = [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        size = sizes[number]
        home = next((b for b, room in enumerate(free) if room >= size), len(free))
        if home == len(free):
            free.append(length)
        offsets[number] = home * length + length - free[home]
        free[home] -= size
    return offsets, len(free)


def _fill_ancestor_mask(mask: torch.Tensor, tree: PrefixTree, offset: int) -> None:
    """Let every token of `tree` see its ancestors and itself; `mask` is [length, length], true where a token sees."""
    for first, last, ancestors in tree.segments:
        a, b = offset + first, offset + last
        mask[a:b, a:b] = torch.ones(b - a, b - a, dtype=torch.bool).tril_()
        if len(ancestors):
            mask[a:b, torch.from_numpy(offset + ancestors)] = True
