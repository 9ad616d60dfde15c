"""What a trial asks: two prompts about an image and a crop, two responses to each, and what the model's own processor
makes of them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from visrl.conversation import Conversation, View, answer_conversation, focus_conversation
from visrl.models.candidates import Clues
from visrl.models.pixels import grid_of
from visrl.models.tree_encoder import TreeEncoder, image_options

SIDES = ((120, 80), (72, 60))  # width and height of the trial's image and of its crop
SAID = (("[0.10, 0.20, 0.50, 0.70]", "[0.15, 0.25, 0.30, 0.40]"), ("7", "42.\n"))  # to the two prompts
QUESTION = "Which digit is on the card?"


def talks() -> list[Conversation]:
    """The two prompts of the trial: a question about an image, and about it and a crop of it."""
    whole, crop = (
        View(f"trial {number}", _image(number, size), is_crop=number > 0) for number, size in enumerate(SIDES)
    )
    return [focus_conversation(QUESTION, whole), answer_conversation(QUESTION, whole, crop)]


def _image(seed: int, size: tuple[int, int]) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def clues_of(encoder: TreeEncoder) -> Clues:
    """What the processor makes of the trial's images, alone and together, and of its second prompt."""
    processor, images = encoder.processor, [_image(number, size) for number, size in enumerate(SIDES)]
    options = image_options(processor)
    made = [processor._process_images([shown], **options) for shown in ([images[0]], [images[1]], images)]
    inputs = [{name: _tensor(value) for name, value in dict(one).items()} for one, _ in made]
    both = [{name: value for name, value in one.items() if value is not None} for one in inputs]
    shown = tuple(made[2][1])
    prompt = native(encoder, talks()[1], "")
    return Clues(
        alone=(both[0], both[1]),
        together=both[2],
        placeholders=((made[0][1][0], made[1][1][0]), shown),
        prompt=prompt,
        image_token=encoder.image_token_id,
        grids=tuple(
            grid_of(processor, one, text.count(encoder.image_token)) for one, text in zip(both, shown, strict=False)
        ),
        numbering=_numbering(encoder, prompt["input_ids"][0], shown),
    )


def _numbering(encoder: TreeEncoder, ids: torch.Tensor, placeholders: tuple[str, ...]) -> tuple[str, str] | None:
    """What the processor writes around the number of an image, before its placeholder; None where it numbers none."""
    texts = encoder.render(talks()[1]).split(encoder.image_mark)
    if len(texts) != 3 or len(placeholders) != 2:
        return None
    (before, between, after), (first, second) = map(re.escape, texts), map(re.escape, placeholders)
    found = re.fullmatch(
        f"{before}(.*?)0(.*?){first}{between}(.*?)1(.*?){second}{after}",
        encoder.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False),
        flags=re.DOTALL,
    )
    return (found[1], found[2]) if found and (found[1], found[2]) == (found[3], found[4]) else None


def _tensor(value: Any) -> torch.Tensor | None:
    try:
        return torch.as_tensor(value)
    except (ValueError, TypeError, RuntimeError):  # ragged lists, texts
        return None


def native(encoder: TreeEncoder, talk: Conversation, response: str) -> dict[str, torch.Tensor]:
    """What a processor's own call makes of a prompt with a response."""
    images = [[view.image for view in talk.views]]
    made = encoder.processor(
        images=images, text=[encoder.render(talk) + response], return_tensors="pt", add_special_tokens=False
    )
    return {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}


def taken(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of a processor's inputs that the model's forward names."""
    names = inspect.signature(model.forward).parameters
    kept = {name: value for name, value in inputs.items() if name in names}
    return {name: value.float() if value.is_floating_point() else value for name, value in kept.items()}
