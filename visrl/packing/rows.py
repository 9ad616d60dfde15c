"""Rows of the plain form: each path a row of its own, padded, in the class of a packed batch, so that whatever reads
one reads both. Nothing is shared; for models that take no prefix tree (pack.py is for those that do).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from visrl.models.encode import TokenPath
from visrl.models.plain_encoder import PlainEncoder
from visrl.packing.pack import Call, PackedBatch


def pack_rows(paths: Sequence[TokenPath], encoder: PlainEncoder, *, ends: bool = False) -> PackedBatch:
    """Every path as a row; branches are numbered in their order, `ends` as in `pack`. The rows of a call show as many
    images: some models let the images of a call be seen by all of its rows' first tokens."""
    by_images: dict[int, list[int]] = {}
    for number, path in enumerate(paths):
        by_images.setdefault(len(path.views), []).append(number)
    calls, rows, targets, branches = [], [], [], []
    kept = 0
    for members in by_images.values():
        own = [paths[number] for number in members]
        inputs = encoder.rows(own)
        starts = [len(path.ids) - 1 if ends else path.start for path in own]  # of the tokens that are kept
        predictors = [np.arange(len(path.ids))[start:] - (not ends) for start, path in zip(starts, own, strict=True)]
        keep, column = np.unique(np.concatenate(predictors), return_inverse=True)
        row = np.repeat(np.arange(len(own)), [len(places) for places in predictors])
        uses = np.arange(inputs["input_ids"].shape[1]) < np.array([[len(path.ids)] for path in own])
        calls.append(Call(inputs, torch.from_numpy(keep), torch.from_numpy(uses.astype(np.int64)), []))
        rows.append(kept + row * len(keep) + column)
        targets += [path.ids[start:] for start, path in zip(starts, own, strict=True)]
        branches.append(np.array(members)[row])
        kept += len(own) * len(keep)
    tokens = sum(len(path.ids) for path in paths)
    return PackedBatch(
        calls=calls,
        row=torch.from_numpy(np.concatenate(rows)),
        target=torch.from_numpy(np.concatenate(targets)),
        branch=torch.from_numpy(np.concatenate(branches)),
        branches=len(paths),
        tokens=tokens,
        padded_tokens=sum(call.inputs["input_ids"].numel() for call in calls),
        separate_tokens=tokens,
    )
