"""VisRL's two steps for one HTTP request: where to look, then the answer from image and crop.

The steps are those of rollout/steps.py; here they are asked of a backend, one request at a time. What the caller's
limits bound is the answer: the box has its own. Several looks are in looks.py. Nothing here knows about HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from PIL import Image

from visrl.box import CropRule, crop_window
from visrl.conversation import Conversation, View
from visrl.engines.base import Completion, seed_of
from visrl.engines.endpoint import data_url
from visrl.rollout.protocols import VISRL
from visrl.rollout.steps import WHOLE, Look, answer_request, cut, look_of
from visrl.serve.backend import Backend
from visrl.serve.errors import RequestError
from visrl.serve.fields import for_the_box
from visrl.serve.replies import Choice, Tokens
from visrl.serve.requests import QueuedRequest

LONGEST_CROP = 1024  # px: a crop in a reply is an image to look at; the exact pixels are the caller's to cut


async def answer_with_focus(
    backend: Backend,
    question: str,
    whole: View,
    request: QueuedRequest,
    on_look: Callable[[dict[str, Any]], None] | None = None,
) -> Choice:
    """Both steps. `request` says how the answer is sampled (sampling, seed, stops, `on_text`); its conversation is
    replaced. Without a readable box the answer is from the whole image.

    Raises:
        RequestError: what the backend raises, or 502 where it gave no text.
    """
    first = await backend.submit(look_request(VISRL.focus(question, whole), request))
    look = look_of(question, whole, first, backend.codec, backend.processed_size(whole.size))
    look = cut(look, backend.crop_rule)
    focus = await asyncio.to_thread(focus_field, look, backend.crop_rule)  # a PNG: not in the loop that serves everyone
    if on_look is not None:
        on_look(focus)
    request.conversation = answer_request(look)
    choice = await answer_plainly(backend, request)
    return replace(
        choice,
        prompt_tokens=first.prompt_tokens + choice.prompt_tokens,
        completion_tokens=first.tokens + choice.completion_tokens,
        focus=focus,
    )


def look_request(talk: Conversation, answer: QueuedRequest, turn: int = 0) -> QueuedRequest:
    """A turn that may look, sampled as the answer is but for the tokens allowed, with a seed of its own."""
    sampling = replace(answer.sampling, max_tokens=VISRL.box_tokens)
    seed = seed_of(answer.seed, *(("look", turn) if turn else ("box",)))
    return QueuedRequest(talk, sampling, seed, passed=for_the_box(answer.passed), adapter=answer.adapter)


def focus_field(look: Look, crop_rule: CropRule) -> dict[str, Any]:
    """The extension field `focus` of a reply: the box in pixels of the upright image, and the crop."""
    assert look.crop is not None
    size = look.whole.size
    return {
        "box": [round(value, 2) for value in look.box_pixels] if look.box_pixels else None,
        "box_text": look.text,
        "crop_window": list(crop_window(look.box or WHOLE, size, crop_rule)),
        "crop": crop_url(look.crop),
        "image_size": list(size),
        "error": None if look.box else f"{look.fault or look.error}; the answer is from the whole picture",
    }


def crop_url(crop: Image.Image) -> str:
    """A crop as a reply shows it."""
    if max(crop.size) > LONGEST_CROP:
        crop = crop.copy()
        crop.thumbnail((LONGEST_CROP, LONGEST_CROP))
    return data_url(crop)


async def answer_from_whole(backend: Backend, question: str, whole: View, request: QueuedRequest) -> Choice:
    """The second step alone, shown the whole image in place of a crop: what focus is to be compared with.

    Raises:
        RequestError: what the backend raises, or 502 where it gave no text.
    """
    request.conversation = answer_request(cut(Look(question, whole), backend.crop_rule))
    return await answer_plainly(backend, request)


async def answer_plainly(backend: Backend, request: QueuedRequest) -> Choice:
    """One step: the conversation as it is.

    Raises:
        RequestError: what the backend raises, or 502 where it gave no text.
    """
    completion = await backend.submit(request)
    tokens, sampling = None, request.sampling
    if sampling.logprobs or sampling.prompt_ids:
        tokens = Tokens(
            completion.ids if sampling.prompt_ids else None,
            completion.prompt_ids,
            tuple(backend.decode([token]) for token in completion.ids) if sampling.logprobs else (),
            completion.logps if sampling.logprobs else None,
        )
    text = text_of(completion)
    return Choice(text, completion.finish_reason, completion.prompt_tokens, completion.tokens, tokens=tokens)


def text_of(completion: Completion) -> str:
    """The text of a completion.

    Raises:
        RequestError: 502 where an error took its place.
    """
    if completion.text is None:
        raise RequestError(502, completion.error or "the engine gave no text")
    return completion.text
