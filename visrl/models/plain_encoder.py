"""The encoder of the plain form: whole rows as the checkpoint's own processor makes them, for models that take no
prefix tree. It knows nothing of a family but what the model's forward names.

What it takes for granted, and what loading tries (engines/recompute.py, `try_out`): the processor's call takes images
and text and pads; a prompt's tokens depend on no response; and a token sees nothing that follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, final

import numpy as np
import torch
from PIL import Image

from visrl.box import Size
from visrl.conversation import PromptError, View, focus_conversation
from visrl.models.encode import EncodedView, Encoder, TokenPath, refusing

# What a processor may say of tokens and the model finds out by itself, or is not to know.
NOT_TAKEN = ("position_ids", "labels")
TRIAL_SIDE = 64  # px, of the image on which a processor's output is looked at


@final
class PlainEncoder(Encoder):
    """Prompts as text with one mark for each image; pixels and tokens row by row, when rows are put together."""

    def _prepare(self, views: dict[str, View], *, is_crop: bool, alone: bool) -> dict[str, EncodedView]:
        encoded = {}
        for key, view in views.items():
            image = self.sized(view)
            with refusing(view):
                count = self._count(image, 1 if alone else 2)
            encoded[key] = EncodedView(key, {}, self.image_mark, count, (1, 1, count), image.size, image)
        return encoded

    def _count(self, image: Image.Image, shown: int) -> int:
        """How many tokens a prompt of so many images has for each. Tried once for each size."""
        key = image.size, shown
        if key not in self._counts:
            text = self.image_mark * shown
            with self.tokenizing:
                marks = len(self.tokenizer(text, add_special_tokens=False).input_ids)
            made = self._call([text], [[image] * shown])
            self._counts[key] = (made["input_ids"].shape[1] - marks) // shown + 1
        return self._counts[key]

    @cached_property
    def _counts(self) -> dict[tuple[Size, int], int]:
        return {}

    def _expand(self, parts: Sequence[str], views: Sequence[EncodedView]) -> str:
        return self.image_mark.join(parts)

    def _tokenize(self, texts: Sequence[str], views: Sequence[EncodedView]) -> list[np.ndarray]:
        try:
            made = self._call(texts, [[_image(view) for view in views]] * len(texts))
        except ValueError as error:
            raise PromptError(f"the model's processor says: {error}") from error
        lengths = made["attention_mask"].sum(1).tolist()
        return [ids[:length].numpy() for ids, length in zip(made["input_ids"], lengths, strict=True)]

    def _positions(self, ids: np.ndarray, views: Sequence[EncodedView]) -> np.ndarray:
        return np.arange(len(ids), dtype=np.int64)[None]  # the model's own are found in its forward

    # --- rows put together

    def prompts(self, prompts: Sequence[TokenPath]) -> dict[str, Any]:
        """The model's inputs for rows that are to be continued, padded on the left: prompts as `encode` gives them for
        a response of None. All show as many images."""
        return self._taken(self._call(*self._texts_and_images(prompts), side="left"))

    def rows(self, paths: Sequence[TokenPath]) -> dict[str, Any]:
        """The model's inputs for whole rows [rows, length], prompts with responses, padded on the right. All show as
        many images.

        The processor makes the prompts; what it says of a prompt's last token (its kind, what it sees of an image) is
        so of the response's, whose ids are those of `paths`.
        """
        made = self._call(*self._texts_and_images(paths))
        width = max(len(path.ids) for path in paths)
        for name in self._per_token & made.keys():
            values = made[name]
            fill = self.tokenizer.pad_token_id if name == "input_ids" else 0
            longer = values.new_full((len(paths), width, *values.shape[2:]), fill)
            for row, path in enumerate(paths):
                longer[row, : path.start] = values[row, : path.start]
                longer[row, path.start : len(path.ids)] = values[row, path.start - 1]
            made[name] = longer
        for row, path in enumerate(paths):
            ids = torch.from_numpy(path.ids)
            if not torch.equal(made["input_ids"][row, : path.start], ids[: path.start]):
                raise ValueError("the processor makes other tokens of a prompt among others than of it alone")
            made["input_ids"][row, : len(ids)] = ids
        return self._taken(made)

    def _texts_and_images(self, paths: Sequence[TokenPath]) -> tuple[list[str], list[list[Image.Image]]]:
        return [path.prompt for path in paths], [[_image(view) for view in path.views] for path in paths]

    @cached_property
    def _per_token(self) -> frozenset[str]:
        """The outputs of the processor that say something of every token: those that a longer text makes longer."""
        blank = Image.new("RGB", (TRIAL_SIDE, TRIAL_SIDE))
        texts = [self.render(focus_conversation(question, View("", blank))) for question in ("?", "? ? ? ? ?")]
        short, long = (self._call([text], [[blank]]) for text in texts)
        return frozenset(
            name
            for name, values in short.items()
            if isinstance(values, torch.Tensor) and values.dim() > 1 and values.shape[1] != long[name].shape[1]
        )

    def _taken(self, made: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in made.items() if name in self.family.takes and name not in NOT_TAKEN}

    def _call(
        self, texts: Sequence[str], images: Sequence[Sequence[Image.Image]], side: Literal["left", "right"] = "right"
    ) -> dict[str, Any]:
        """The processor's own batch of some texts and the images that each shows."""
        limits = self.bounds()
        options = {"images_kwargs": {"size": limits}} if limits else {}
        shown = {"images": [list(own) for own in images]} if any(images) else {}
        with self.tokenizing:
            made = self.processor(
                **shown,
                text=list(texts),
                return_tensors="pt",
                add_special_tokens=False,
                padding=True,
                padding_side=side,
                **options,
            )
        return {name: value for name, value in made.items() if value is not None}


def _image(view: EncodedView) -> Image.Image:
    assert view.image is not None, "a view that another encoder prepared"
    return view.image
