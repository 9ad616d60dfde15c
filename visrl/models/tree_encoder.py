"""The encoder of prefix trees: every image is made ready by itself, so that prompts which show it can share its tokens.

What families differ in is in families.py. The encoder of models that take no tree is plain_encoder.py's.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch

from visrl.conversation import View
from visrl.models.encode import EncodedView, Encoder, refusing
from visrl.models.families import family_of
from visrl.models.family import Family, PixelRange, join_images
from visrl.models.own_positions import found_by, method_without_weights
from visrl.models.pixels import grid_of, limited_images
from visrl.models.settings import ModelSettings

MOVED = ("use_image_special_tokens",)  # options of images that processors had among those of texts


@final
class TreeEncoder(Encoder):
    """Prompts as text in which each image's placeholder stands in its place; pixels image by image."""

    def __init__(self, processor: Any, config: Any, settings: ModelSettings, family: Family | None = None) -> None:
        super().__init__(processor, config, settings, family or family_of(config))
        found = self.family.found
        self._own_positions = method_without_weights(config) if found and found.positions == "own" else None

    def _prepare(self, views: dict[str, View], *, is_crop: bool, alone: bool) -> dict[str, EncodedView]:
        if self.family.pixel_limits:
            return self._prepare_together(views, self.limits(is_crop))
        return self._prepare_each(views, alone=alone)

    def _prepare_together(self, views: dict[str, View], limits: PixelRange) -> dict[str, EncodedView]:
        """All images in one batch, for processors that take pixel limits."""
        made = limited_images(self.processor, [view.image for view in views.values()], limits, self.family.takes)
        return {
            key: EncodedView(key, inputs, placeholder, math.prod(grid), grid, size)
            for key, (inputs, placeholder, grid, size) in zip(views, made, strict=True)
        }

    def _prepare_each(self, views: dict[str, View], *, alone: bool) -> dict[str, EncodedView]:
        """Each image by itself, as its processor cuts it (in tiles, to a fixed size)."""
        encoded = {}
        options = image_options(self.processor)
        for key, view in views.items():
            image = self.reduced(view)
            shown = [image] if alone else [image, image]
            with refusing(view):
                processed, placeholders = self.processor._process_images([shown], **options)
            count = placeholders[0].count(self.image_token)
            inputs = {name: _first_of(processed[name], len(shown)) for name in self.family.takes}
            # Some processors give bf16, whatever the model is in.
            inputs = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
            grid = grid_of(self.processor, inputs, count)
            encoded[key] = EncodedView(key, inputs, placeholders[0], count, grid, image.size)
        return encoded

    def _expand(self, parts: Sequence[str], views: Sequence[EncodedView]) -> str:
        begin, end = (self.family.found and self.family.found.numbering) or (None, None)
        shown = [view.placeholder for view in views]
        if begin is not None:
            shown = [f"{begin}{number}{end}{placeholder}" for number, placeholder in enumerate(shown)]
        return parts[0] + "".join(placeholder + part for placeholder, part in zip(shown, parts[1:], strict=True))

    def _tokenize(self, texts: Sequence[str], views: Sequence[EncodedView]) -> list[np.ndarray]:
        tokenised = self.tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
        return [np.array(ids, dtype=np.int64) for ids in tokenised]

    def _positions(self, ids: np.ndarray, views: Sequence[EncodedView]) -> np.ndarray:
        if self._own_positions is not None:
            assert self.family.found is not None
            images = join_images(self.family, [view.inputs for view in views])
            return found_by(self._own_positions, ids, self.family.found.image_ids, images)
        return self.family.positions(ids, self.image_token_id, [view.grid for view in views])


def image_options(processor: Any) -> dict[str, Any]:
    """What a processor is to be told where it makes images ready: its own options, by their names."""
    merged = processor._merge_kwargs(
        processor.valid_processor_kwargs, processor.tokenizer.init_kwargs, return_tensors="pt"
    )  # fmt: skip
    parameters = inspect.signature(processor._process_images).parameters.values()
    # Some take more than an image's options.
    wanted = {
        one.name: merged[one.name] for one in parameters if one.kind is not one.VAR_KEYWORD and one.name in merged
    }
    if not wanted:  # older releases have it among the text's
        wanted = {name: merged["text_kwargs"][name] for name in MOVED if name in merged["text_kwargs"]}
    return {**merged["images_kwargs"], **wanted}


def _first_of(values: Any, images: int) -> torch.Tensor:
    """The part of a processor's output that belongs to the first of `images` equal images, along the first axis."""
    tensor = torch.as_tensor(values)
    return tensor[: len(tensor) // images] if images > 1 else tensor
