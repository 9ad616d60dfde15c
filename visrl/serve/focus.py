"""VisRL's two steps for one request: where to look, then the answer from picture and crop.

The box is bounded and parsed here; what the caller's limits bound is the answer. Nothing here knows about HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from visrl.box import Box, BoxError, crop_window
from visrl.conversation import View, answer_conversation, crop_view, focus_conversation
from visrl.engines.base import Completion, seed_of
from visrl.engines.endpoint import data_url
from visrl.records import Picture
from visrl.replies import spoken
from visrl.rollout.rollout import MAX_BOX_TOKENS
from visrl.serve.batching import Backend
from visrl.serve.errors import RequestError
from visrl.serve.fields import for_the_box
from visrl.serve.replies import Choice
from visrl.serve.requests import QueuedRequest

LONGEST_CROP = 1024  # px: a crop in a reply is a picture to look at; the exact pixels are the caller's to cut
WHOLE = Box(0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Focus:
    """Where the model looked. Without a readable box `box` is None, `error` says why, and the crop is the whole."""

    box: Box | None
    box_text: str
    error: str | None
    whole: View
    crop: View
    window: tuple[int, int, int, int]

    def as_field(self) -> dict[str, Any]:
        """The extension field `focus` of a reply: the box in pixels of the upright picture, and the crop."""
        shown = self.crop.image
        if max(shown.size) > LONGEST_CROP:
            shown = shown.copy()
            shown.thumbnail((LONGEST_CROP, LONGEST_CROP))
        return {
            "box": [round(value, 2) for value in self.box.to_pixels(self.whole.size)] if self.box else None,
            "box_text": self.box_text,
            "crop_window": list(self.window),
            "crop": data_url(shown),
            "image_size": list(self.whole.size),
            "error": self.error,
        }


async def look(backend: Backend, question: str, whole: View, answer: QueuedRequest) -> tuple[Focus, Completion]:
    """Step 1: ask for the box, drawn as `answer` is to be, read it, cut the crop."""
    box_sampling = replace(answer.sampling, max_tokens=MAX_BOX_TOKENS)
    seed = seed_of(answer.seed, "box")
    row = QueuedRequest(focus_conversation(question, whole), box_sampling, seed, passed=for_the_box(answer.passed))
    completion = await backend.submit(row)
    text = spoken(completion.text or "")
    box: Box | None = None
    error: str | None = None
    try:
        box = backend.codec.parse(text, whole.size, backend.processed_size(whole.size))
    except BoxError as fault:
        error = f"{fault}; the answer is from the whole picture"
    picture = Picture(whole.key, box or WHOLE)
    crop = crop_view(whole, picture, backend.crop_rule)
    return Focus(box, text, error, whole, crop, crop_window(box or WHOLE, whole.size, backend.crop_rule)), completion


async def answer_with_focus(
    backend: Backend,
    question: str,
    whole: View,
    row: QueuedRequest,
    on_look: Callable[[dict[str, Any]], None] | None = None,
) -> Choice:
    """Both steps. `row` says how the answer is drawn (sampling, seed, stops, `on_text`); its conversation is replaced.

    Raises:
        RequestError: what the backend raises, or 502 where it gave no text.
    """
    seen, first = await look(backend, question, whole, row)
    focus = await asyncio.to_thread(seen.as_field)  # a PNG is written: not in the loop that serves everyone
    if on_look is not None:
        on_look(focus)
    row.conversation = answer_conversation(question, whole, seen.crop)
    second = await backend.submit(row)
    return Choice(
        text_of(second),
        second.finish_reason,
        first.prompt_tokens + second.prompt_tokens,
        first.tokens + second.tokens,
        focus,
    )


async def answer_from_whole(backend: Backend, question: str, whole: View, row: QueuedRequest) -> Choice:
    """The second step alone, shown the whole picture in place of a crop: what focus is to be compared with.

    Raises:
        RequestError: what the backend raises, or 502 where it gave no text.
    """
    crop = crop_view(whole, Picture(whole.key, WHOLE), backend.crop_rule)
    row.conversation = answer_conversation(question, whole, crop)
    return await answer_plainly(backend, row)


async def answer_plainly(backend: Backend, row: QueuedRequest) -> Choice:
    """One step: the conversation as it is.

    Raises:
        RequestError: what the backend raises, or 502 where it gave no text.
    """
    completion = await backend.submit(row)
    return Choice(text_of(completion), completion.finish_reason, completion.prompt_tokens, completion.tokens)


def text_of(completion: Completion) -> str:
    """The text of a completion.

    Raises:
        RequestError: 502 where an error took its place.
    """
    if completion.text is None:
        raise RequestError(502, completion.error or "the engine gave no text")
    return completion.text
