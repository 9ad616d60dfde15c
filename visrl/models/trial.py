"""The tree of a trial: some paths laid out as one packed row, by a trie of their tokens, and what a model makes of it.

Written apart from what packs batches (packing/), so that a family is not held to its own mistakes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from visrl.models.calls import features_input, image_features
from visrl.models.encode import EncodedView, TokenPath
from visrl.models.family import Family, Layout
from visrl.models.tree_runs import Segment


@dataclass(frozen=True, slots=True)
class Trial:
    """Paths in one row: the model's inputs for it are `Family.inputs` of the layout, ids and positions [d, n].
    `places[i]` [n of path i] says where its tokens lie."""

    layout: Layout
    positions: torch.Tensor
    places: list[np.ndarray]
    paths: list[TokenPath]


def lay_out(trees: Sequence[Sequence[TokenPath]], image_token: int) -> Trial:
    """The tries of some groups of paths one after the other in one row."""
    numbers: dict[tuple[int, int, object], int] = {}  # (tree, parent's place, token) → place
    ids: list[int] = []
    parents: list[int] = []
    positions: list[np.ndarray] = []
    prompts: list[bool] = []
    blocks: list[int] = []
    places: list[np.ndarray] = []
    images: list[list[EncodedView]] = []
    segments: list[Segment] = []
    marks: dict[tuple[int, str], int] = {}  # (tree, image) → number of its block
    for number, paths in enumerate(trees):
        images.append([])
        for path in paths:
            here, own, first = -1, [], len(ids)
            for place, (token, key) in enumerate(zip(path.ids.tolist(), _keys(path, image_token), strict=True)):
                known = numbers.get((number, here, key))
                if known is None:
                    known = numbers[number, here, key] = len(ids)
                    ids.append(token)
                    parents.append(here)
                    positions.append(path.positions[:, place])
                    prompts.append(False)
                    blocks.append(-1)
                    if isinstance(key, tuple):
                        view = path.views[key[0]]
                        if (number, view.key) not in marks:
                            marks[number, view.key] = len(marks)
                            images[-1].append(view)
                        blocks[-1] = marks[number, view.key]
                prompts[known] |= place < path.start
                own.append(known)
                here = known
            places.append(np.array(own))
            segments.append((first, len(ids), np.array([place for place in own if place < first], dtype=np.int64)))
    layout = _layout(ids, parents, prompts, blocks, images, segments)
    all_paths = [path for paths in trees for path in paths]
    return Trial(layout, torch.from_numpy(np.stack(positions, 1)), places, all_paths)


def _keys(path: TokenPath, image_token: int) -> list[object]:
    """Of each token what tells it apart: its id, or which image's token it is."""
    keys: list[object] = path.ids.tolist()
    shown = iter(np.flatnonzero(path.ids == image_token).tolist())
    for number, view in enumerate(path.views):
        for token in range(view.tokens):
            keys[next(shown)] = (number, view.key, token)
    return keys


def _layout(
    ids: list[int],
    parents: list[int],
    prompts: list[bool],
    blocks: list[int],
    images: list[list[EncodedView]],
    segments: list[Segment],
) -> Layout:
    ancestors = torch.eye(len(ids), dtype=torch.bool)
    for place, parent in enumerate(parents):
        if parent >= 0:
            ancestors[place] |= ancestors[parent]
    return Layout(
        ids=torch.tensor(ids)[None],
        ancestors=ancestors[None, None],
        depth=ancestors.sum(-1)[None] - 1,
        prompt=torch.tensor(prompts)[None],
        block=torch.tensor(blocks)[None],
        images=[[view.inputs for view in shown] for shown in images],
        segments=segments,
    )


Numbers = Callable[[torch.Tensor], torch.Tensor]  # what a model calls tokens


def sums_of(
    model: torch.nn.Module,
    family: Family,
    trial: Trial,
    numbers: Numbers,
    *,
    mask: torch.Tensor | None = None,
    features: bool = False,
) -> torch.Tensor:
    """Summed log-probability of every path's response, [paths]; with `mask` [n, n] under that one for all layers, with
    `features` from those of each image by itself."""
    inputs = family.inputs(trial.layout, family)
    if features:
        inputs = {name: value for name, value in inputs.items() if name not in family.takes}
        images = [image for shown in trial.layout.images for image in shown]
        inputs |= features_input([image_features(model, image) for image in images])
    if mask is not None:
        own = inputs["attention_mask"]
        plain = mask[None, None]
        inputs["attention_mask"] = (
            {kind: plain if isinstance(one, torch.Tensor) else one for kind, one in own.items()}
            if isinstance(own, dict)
            else plain
        )
    positions = trial.positions[:, None]
    out = model(
        input_ids=numbers(trial.layout.ids),
        position_ids=positions[0] if len(positions) == 1 else positions,
        use_cache=False,
        **inputs,
    )
    logits = out.logits[0]
    sums = [
        logps(logits[torch.from_numpy(places[path.start - 1 : -1])], numbers(torch.from_numpy(path.ids[path.start :])))
        for places, path in zip(trial.places, trial.paths, strict=True)
    ]
    return torch.stack(sums)


def logps(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The summed log-probability of `ids` [n] under `logits` [n, vocabulary]."""
    return torch.log_softmax(logits.float(), -1).gather(-1, ids[:, None]).sum()
