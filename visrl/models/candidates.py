"""What processor, forward signature and text config say of a model: how images are joined, which positions and masks
it may take. Whether it is so, a trial says (probe.py)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image

from visrl.models.derive import KINDS
from visrl.models.families import kinds_of
from visrl.models.family import Family, Grid, ImageInputs, joined
from visrl.models.found import Axis, Found, Measured, Sight
from visrl.models.masks import marked
from visrl.models.own_positions import found_by, method_of
from visrl.models.pixels import PIXEL_LIMITS, has_limits, limited_images, limited_size
from visrl.models.positions import mrope_positions

NOTHING = Measured(0.0, 0.0, 0.0, 0.0)
IDS = ("input_ids", "attention_mask")
END = "visrl-end"  # stands for what a model says, in a chat template's trial
TURNS = [
    {"role": role, "content": [{"type": "text", "text": text}]}
    for role, text in (("user", "?"), ("assistant", END), ("user", "!"))
]


@dataclass(frozen=True, slots=True)
class Clues:
    """What a processor makes of two images alone and together, and of a prompt: inputs by name, texts that stand for
    the images, and the tokens of the prompt with what is said of each; the grids of the images, and what stands around
    their numbers in the prompt, where it numbers them."""

    alone: tuple[ImageInputs, ImageInputs]
    together: ImageInputs
    placeholders: tuple[tuple[str, ...], tuple[str, ...]]  # alone, together
    prompt: Mapping[str, torch.Tensor]
    image_token: int
    grids: tuple[Grid, ...]
    numbering: tuple[str, str] | None


def unknown_kinds(config: Any) -> list[str]:
    """The kinds of a config's layers whose masks are not known here."""
    return sorted(set(kinds_of(config.get_text_config())) - KINDS)


def by_hand(entry: Family) -> Found:
    """An entry as what is to be held: its masks and its images are its own."""
    return Found(
        takes=entry.takes,
        axes=(),
        positions="mrope" if entry.positions is mrope_positions else "depth",
        sees="ancestors",
        shares=entry.shares,
        row_per_prompt=entry.row_per_prompt,
        types=(),
        counts=(),
        image_ids=(),
        numbering=None,
        pixel_limits=entry.pixel_limits,
        alone_differs=entry.alone_differs,
        cached=False,
        features=False,
        end_of_turn=None,
        by_hand=True,
        measured=NOTHING,
    )


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
    image_ids = _marked_ids(clues, "mm_token_type_ids") if "mm_token_type_ids" in clues.prompt else (clues.image_token,)
    counts = tuple(name for name in ("batch_num_images",) if name in names and alone_differs)
    base = Found(
        takes=takes,
        axes=axes,
        positions=_positions_of(clues, model, image_ids),
        sees="ancestors",
        shares="all",
        row_per_prompt=False,
        types=(),
        counts=counts,
        image_ids=image_ids,
        numbering=clues.numbering,
        pixel_limits=takes_limits(processor, clues),
        alone_differs=alone_differs,
        cached=False,
        features=False,
        end_of_turn=None,
        by_hand=False,
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


def _positions_of(clues: Clues, model: Any, image_ids: tuple[int, ...]) -> Literal["depth", "mrope", "own"]:
    """How positions are found: by depth where the model has no method of its own, by `mrope_positions` where that is
    equal to it on the trial's prompt, else by the model's own method."""
    method = method_of(model)
    if method is None:
        return "depth"
    ids = clues.prompt["input_ids"][0].numpy()
    theirs = found_by(method, ids, image_ids, clues.together)
    if len(image_ids) != 1 or len(theirs) != 3:
        return "own"
    ours = mrope_positions(ids, image_ids[0], clues.grids)
    return "mrope" if np.array_equal(ours, theirs) else "own"


def takes_limits(processor: Any, clues: Clues) -> bool:
    """Whether the image processor takes a smallest and a largest number of pixels, and sizes images by them as
    `limited_size` does: some count an image's pixels once for every frame."""
    own = processor.image_processor
    if not has_limits(own) or "image_grid_thw" not in clues.together:
        return False
    side = own.patch_size * own.merge_size
    large, limits = (8 * side, 8 * side), dict(zip(PIXEL_LIMITS, (side**2, 16 * side**2), strict=True))
    ((_, _, _, made),) = limited_images(processor, [Image.new("RGB", large)], limits, ())
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
    text = processor.apply_chat_template(TURNS, chat_template=template, tokenize=False)
    behind = text.rpartition(END)[2].partition("!")[0]
    tokenizer = processor.tokenizer
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    first = next((one for one in tokenizer(behind, add_special_tokens=False).input_ids if one in special), None)
    return None if first is None else tokenizer.convert_ids_to_tokens(first)
