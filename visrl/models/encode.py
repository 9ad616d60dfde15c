"""From conversations to tokens and pixels: the one way in which any text or picture reaches a model.

Training, generation and serving all encode through here, so one conversation gives one sequence of tokens everywhere.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from visrl.box import Size
from visrl.codecs import CODECS, Codec
from visrl.conversation import Conversation, View
from visrl.models.families import Family, Grid, family_of
from visrl.models.settings import ModelSettings
from visrl.prompts import IMAGE


class PromptError(ValueError):
    """A text that cannot be put before a model, such as one that holds the model's control tokens."""


@dataclass(frozen=True, slots=True)
class EncodedView:
    """A picture ready for the vision tower: `pixel_values` [patches, values], `grid` in merged tokens."""

    key: str
    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor  # [1, 3]
    placeholder: str  # the text that stands for the picture in a prompt
    tokens: int
    grid: Grid
    size: Size  # width and height in pixels, as processed


@dataclass(frozen=True, slots=True)
class TokenPath:
    """One whole sequence: prompt and response. `positions` is [d, n]; the response starts at `start`."""

    ids: np.ndarray
    positions: np.ndarray
    views: tuple[EncodedView, ...]
    start: int


class Encoder:
    """Renders, tokenises and preprocesses for one checkpoint's processor and settings."""

    def __init__(self, processor: Any, config: Any, settings: ModelSettings, *, cache_views: int = 512) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.settings = settings
        self.family: Family = family_of(config)
        self.codec: Codec = CODECS[settings.codec]
        self.image_token = processor.image_token
        self.image_token_id = processor.image_token_id
        self.end_of_turn = self.family.end_of_turn or self.tokenizer.eos_token
        self.end_id = self.tokenizer.convert_tokens_to_ids(self.end_of_turn)
        self._control = [token for token in self.tokenizer.get_added_vocab() if token.startswith("<")]
        self._views: OrderedDict[str, EncodedView] = OrderedDict()
        self._cache_views = cache_views
        self._merge = processor.image_processor.merge_size

    # --- pictures

    def encode_views(self, views: Sequence[View]) -> list[EncodedView]:
        """The views, preprocessed in one batch; those seen lately come from a cache."""
        fresh = {view.key: view for view in views if view.key not in self._views}
        for is_crop in (False, True):
            group = [view for view in fresh.values() if view.is_crop == is_crop]
            if group:
                self._preprocess(group, self._limits(is_crop))
        encoded = [self._views[view.key] for view in views]
        for view in views:
            self._views.move_to_end(view.key)
        while len(self._views) > self._cache_views:
            self._views.popitem(last=False)
        return encoded

    def processed_size(self, size: Size, is_crop: bool = False) -> Size:
        """Width and height that the processor gives a picture of `size`."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        limits = self._limits(is_crop)
        processor = self.processor.image_processor
        height, width = smart_resize(
            size[1], size[0], processor.patch_size * self._merge, limits["shortest_edge"], limits["longest_edge"]
        )
        return width, height

    def _limits(self, is_crop: bool) -> dict[str, int]:
        own = self.processor.image_processor.size
        given = self.settings
        low = given.crop_min_pixels if is_crop else given.image_min_pixels
        high = given.crop_max_pixels if is_crop else given.image_max_pixels
        low, high = low or own["shortest_edge"], high or own["longest_edge"]
        return {"shortest_edge": min(low, high), "longest_edge": high}

    def _preprocess(self, views: list[View], limits: dict[str, int]) -> None:
        processed, placeholders = self.processor._process_images([view.image for view in views], size=limits)
        grids = processed["image_grid_thw"]
        pixels = torch.split(processed["pixel_values"], grids.prod(-1).tolist())
        patch = self.processor.image_processor.patch_size
        for view, grid, values, placeholder in zip(views, grids, pixels, placeholders, strict=True):
            time, height, width = grid.tolist()
            merged = (time, height // self._merge, width // self._merge)
            self._views[view.key] = EncodedView(
                view.key, values, grid[None], placeholder, int(np.prod(merged)), merged, (width * patch, height * patch)
            )

    # --- text

    def render(self, conversation: Conversation) -> str:
        """The prompt as text, with one image token per picture, up to where the model speaks.

        Raises:
            PromptError: a message holds one of the model's control tokens.
        """
        messages = []
        for message in conversation.messages:
            if any(token in message.text for token in self._control):
                raise PromptError(f"the text {message.text[:80]!r} holds a control token of the model; take it out")
            content: list[dict[str, str]] = []
            for number, text in enumerate(message.text.split(IMAGE)):
                if number:
                    content.append({"type": "image"})
                if text:
                    content.append({"type": "text", "text": text})
            messages.append({"role": message.role, "content": content})
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def encode(self, conversation: Conversation, responses: Sequence[str | None]) -> list[TokenPath]:
        """One path per response, whole paths tokenised; a response of None gives the prompt alone.

        A path with a response ends with the end of turn. The response starts where its tokens first differ from the
        prompt's, wherever a tokeniser merges across the edge.
        """
        views = self.encode_views(conversation.views)
        prompt = self._expand(self.render(conversation), views)
        texts = [prompt] + [prompt + response + self.end_of_turn for response in responses if response is not None]
        tokenised = [np.array(ids, dtype=np.int64) for ids in self.tokenizer(texts, add_special_tokens=False).input_ids]
        prompt_ids, answered = tokenised[0], iter(tokenised[1:])
        paths = []
        for response in responses:
            ids = prompt_ids if response is None else next(answered)
            start = len(ids) if response is None else common_prefix(prompt_ids, ids)
            positions = self.family.positions(ids, self.image_token_id, [view.grid for view in views])
            paths.append(TokenPath(ids, positions, tuple(views), start))
        return paths

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated tokens, control tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _expand(self, text: str, views: Sequence[EncodedView]) -> str:
        parts = text.split(self.image_token)
        if len(parts) != len(views) + 1:
            raise PromptError(f"{len(parts) - 1} image tokens for {len(views)} pictures")
        return parts[0] + "".join(view.placeholder + part for view, part in zip(views, parts[1:], strict=True))


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading entries two arrays share."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length
