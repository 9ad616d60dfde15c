"""VisRL's two steps for one HTTP request: where to look, then the answer from image and crop; or up to k looks.

The steps are those of rollout/steps.py, several looks those of zoom/episode.py; here they are asked of a backend, one
request at a time. What the caller's limits bound is the answer: the box has its own. Nothing here knows about HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from visrl.box import CropRule, crop_window
from visrl.conversation import Conversation, View
from visrl.engines.base import Completion, seed_of
from visrl.engines.endpoint import data_url
from visrl.replies import spoken
from visrl.rollout.protocols import VISRL
from visrl.rollout.steps import WHOLE, Look, answer_request, cut, look_of
from visrl.serve.backend import Backend
from visrl.serve.errors import RequestError
from visrl.serve.fields import for_the_box
from visrl.serve.replies import Choice, Tokens
from visrl.serve.requests import QueuedRequest
from visrl.zoom.episode import Episode, advance, begin
from visrl.zoom.protocols import visrl_looks

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


async def answer_with_looks(
    backend: Backend,
    question: str,
    whole: View,
    request: QueuedRequest,
    on_look: Callable[[dict[str, Any]], None] | None = None,
    *,
    most: int,
) -> Choice:
    """Up to `most` looks, or none: each turn the model writes a box, or its answer. A box that cannot be read shows the
    whole image in the place of its crop. `request` as for `answer_with_focus`.

    Raises:
        RequestError: what the backend raises, or 502 where it gave no text.
    """
    shown, rule = backend.processed_size(whole.size), backend.crop_rule
    protocol = replace(visrl_looks(backend.codec, whole.size, shown, rule, most), on_failure="show_whole")
    episode, fields = begin(protocol, question, whole), list[dict[str, Any]]()
    prompt_tokens = completion_tokens = 0
    while episode.turn < most:
        asked = look_request(episode.conversation, request, episode.turn)
        completion = await backend.submit(asked)
        before, episode = episode, advance(episode, text_of(completion), shown)
        if episode.end is not None:  # it answered: the same again, under the caller's own limits
            episode, request.seed = before, asked.seed
            break
        prompt_tokens += completion.prompt_tokens
        completion_tokens += completion.tokens
        fields.append(await asyncio.to_thread(look_field, episode, before, text_of(completion), rule))
        if on_look is not None:
            on_look(fields[-1] | {"look": len(fields) - 1})
    request.conversation = episode.conversation
    choice = await answer_plainly(backend, request)
    return replace(
        choice,
        prompt_tokens=prompt_tokens + choice.prompt_tokens,
        completion_tokens=completion_tokens + choice.completion_tokens,
        focus=(fields[-1] if fields else no_look(whole)) | {"looks": fields},
    )


def look_request(talk: Conversation, answer: QueuedRequest, turn: int = 0) -> QueuedRequest:
    """A turn that may look, sampled as the answer is but for the tokens allowed, with a seed of its own."""
    sampling = replace(answer.sampling, max_tokens=VISRL.box_tokens)
    seed = seed_of(answer.seed, *(("look", turn) if turn else ("box",)))
    return QueuedRequest(talk, sampling, seed, passed=for_the_box(answer.passed), adapter=answer.adapter)


def look_field(episode: Episode, before: Episode, text: str, crop_rule: CropRule) -> dict[str, Any]:
    """What one turn found, in the form of `focus_field`; `before` is the episode as it was asked."""
    whole, crop = episode.views[0], episode.views[-1]
    found = len(episode.looks) > len(before.looks)
    error = None if found else episode.errors[-1]
    box = episode.looks[-1].box if found else None
    return focus_field(Look(before.question, whole, spoken(text), box, error, detail=crop), crop_rule)


def no_look(whole: View) -> dict[str, Any]:
    """The extension field of an answer that was given at once."""
    nothing = dict.fromkeys(("box", "crop_window", "crop", "error"))
    return {"box_text": "", "image_size": list(whole.size), **nothing}


def focus_field(look: Look, crop_rule: CropRule) -> dict[str, Any]:
    """The extension field `focus` of a reply: the box in pixels of the upright image, and the crop."""
    assert look.crop is not None
    size = look.whole.size
    shown = look.crop
    if max(shown.size) > LONGEST_CROP:
        shown = shown.copy()
        shown.thumbnail((LONGEST_CROP, LONGEST_CROP))
    return {
        "box": [round(value, 2) for value in look.box_pixels] if look.box_pixels else None,
        "box_text": look.text,
        "crop_window": list(crop_window(look.box or WHOLE, size, crop_rule)),
        "crop": data_url(shown),
        "image_size": list(size),
        "error": None if look.box else f"{look.fault or look.error}; the answer is from the whole picture",
    }


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
