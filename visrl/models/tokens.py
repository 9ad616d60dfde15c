"""How many tokens a model makes of texts and images, for the statistics of a data set (data/stats.py)."""

from __future__ import annotations

from PIL import Image

from visrl.box import CropRule, Size
from visrl.conversation import PromptError, View
from visrl.models.encode import Encoder


class TokenCounts:
    """A `TokenCounter` over an encoder. An image's tokens depend on its size only, so that each size is tried once."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._known: dict[tuple[Size, bool], int | None] = {}

    @property
    def crop_rule(self) -> CropRule:
        return self._encoder.settings.crop_rule

    def text(self, text: str) -> int:
        return len(self._encoder.tokenizer(text, add_special_tokens=False).input_ids)

    def picture(self, size: Size, is_crop: bool) -> int | None:
        if (size, is_crop) not in self._known:
            blank = View(f"blank {size} {is_crop}", Image.new("RGB", size), is_crop)
            try:
                self._known[size, is_crop] = self._encoder.encode_views([blank])[0].tokens
            except PromptError:
                self._known[size, is_crop] = None
        return self._known[size, is_crop]
