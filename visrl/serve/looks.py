"""Several looks for one HTTP request: the episode of a protocol (zoom/episode.py), asked of a backend turn by turn.

With the `visrl` protocol the turn that may only answer is the caller's own: streamed, under the caller's limits. With a
public one (`visrl api` with `protocol`) every turn may be a call or the answer, so that each is sampled under the same
limits, and the answer is told when its turn has ended. Nothing here knows about HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from visrl.box import Size
from visrl.conversation import View
from visrl.engines.base import Completion, seed_of
from visrl.replies import spoken
from visrl.rollout.protocols import VISRL
from visrl.serve.backend import Backend
from visrl.serve.errors import cannot_answer
from visrl.serve.focus import answer_plainly, crop_url, look_request, text_of
from visrl.serve.replies import Choice
from visrl.serve.requests import QueuedRequest
from visrl.zoom.episode import UNFINISHED, Episode, ZoomedLook, advance, begin
from visrl.zoom.protocols import ZoomProtocol, visrl_looks

Looks = Callable[[Backend, View, Size], ZoomProtocol]  # of a backend, an image and the size it is shown at
OnLook = Callable[[dict[str, Any], int], None]  # told a look as it is listed, and how many pixels it holds on to


def own_looks(most: int) -> Looks:
    """`visrl` with up to `most` looks. A box that cannot be read shows the whole image in the place of its crop."""

    def looks(backend: Backend, whole: View, shown: Size) -> ZoomProtocol:
        row = visrl_looks(backend.codec, whole.size, shown, backend.crop_rule, most)
        return replace(row, on_failure="show_whole")

    return looks


def public_looks(row: ZoomProtocol) -> Looks:
    """A public protocol, which is the same for every image."""
    return lambda backend, whole, shown: row


def within(row: ZoomProtocol, most: int | None) -> ZoomProtocol:
    """A public protocol with at most `most` looks, where that is less than its own limit."""
    if most is None:
        return row
    turns, pictures = min(row.max_turns, most + 1), min(row.max_pictures, most + 1)
    return replace(row, max_turns=turns, max_pictures=pictures)


async def answer_with_looks(
    backend: Backend,
    question: str,
    whole: View,
    request: QueuedRequest,
    on_look: OnLook | None = None,
    *,
    looks: Looks,
) -> Choice:
    """The episode of a question. `request` says how turns are sampled (sampling, seed, stops, `on_text`); its
    conversation is replaced.

    Raises:
        RequestError: what the backend raises, 400 for an image that its processor refuses, or 502 where it gave no
            text.
    """
    try:
        shown = backend.processed_size(whole.size)
    except ValueError as error:
        raise cannot_answer(error) from error
    protocol = looks(backend, whole, shown)
    episode, fields, turns, texts = begin(protocol, question, whole), list[dict[str, Any]](), list[Completion](), []
    while episode.end is None and not _may_only_answer(episode):
        asked = _turn_request(episode, request)
        completion = await backend.submit(asked)
        # Crops are cut, brought to size and written as PNG: not in the loop that serves everyone.
        after, found, pixels = await asyncio.to_thread(_after, episode, completion, shown)
        if after.end is not None and not protocol.keeps_turns and not _is_within(completion, asked, request):
            request.seed = asked.seed  # an answer beyond the caller's limits: the same again, under these
            break
        turns.append(completion)
        texts.append(text_of(completion))
        for field in found:
            fields.append(field)
            if on_look is not None:
                on_look(field | {"look": len(fields) - 1}, pixels)
                pixels = 0
        episode = after
    if episode.end is None:
        request.conversation = episode.conversation
        choice = await answer_plainly(backend, request)
    else:
        choice = _answered(episode, turns[-1], request)
        turns = turns[:-1]
    focus = (fields[-1] if fields else no_look(whole)) | {"looks": fields}
    if protocol.keeps_turns:
        focus |= {"end": episode.end, "turns": texts}
    return replace(
        choice,
        prompt_tokens=sum(one.prompt_tokens for one in turns) + choice.prompt_tokens,
        completion_tokens=sum(one.tokens for one in turns) + choice.completion_tokens,
        focus=focus,
    )


def _may_only_answer(episode: Episode) -> bool:
    """Whether the next turn is the answer, whatever it holds."""
    return episode.protocol.last_answers and episode.turn + 1 >= episode.protocol.max_turns


def _turn_request(episode: Episode, answer: QueuedRequest) -> QueuedRequest:
    """A turn that may look, as it is sampled: with a public protocol as evaluation does, by the same seeds."""
    if not episode.protocol.keeps_turns:
        asked = look_request(episode.conversation, answer, episode.turn)
        most = max(VISRL.box_tokens, answer.sampling.max_tokens)  # it may be the answer
        return replace(asked, sampling=replace(asked.sampling, max_tokens=most))
    seed = seed_of(answer.seed, "turn", episode.turn) if episode.turn else answer.seed
    return replace(answer, conversation=episode.conversation, seed=seed, stops=(), on_text=None)


def _is_within(completion: Completion, asked: QueuedRequest, answer: QueuedRequest) -> bool:
    """Whether a turn that turned out to be the answer is what the caller's own limits would have given."""
    most = answer.sampling.max_tokens
    is_short = most >= asked.sampling.max_tokens or 0 < completion.tokens <= most
    return is_short and asked.passed == dict(answer.passed)


def _answered(episode: Episode, last: Completion, request: QueuedRequest) -> Choice:
    """The answer of an episode that has ended: none where it came to a limit, and a turn that neither looks nor answers
    as it is. The caller's stop texts are of the answer."""
    if not episode.protocol.keeps_turns:
        said, reason = text_of(last), last.finish_reason
    elif episode.end in UNFINISHED:
        said, reason = "", "length"
    else:
        said = spoken(text_of(last)) if episode.end == "no_call" else episode.answer or ""
        reason = last.finish_reason
    ended = request.finish(replace(last, text=said, finish_reason=reason))
    return Choice(text_of(ended), ended.finish_reason, last.prompt_tokens, last.tokens)


def _after(before: Episode, completion: Completion, shown: Size) -> tuple[Episode, list[dict[str, Any]], int]:
    """The episode after a turn, what the turn found as it is listed, and the pixels of the images that it added."""
    text = text_of(completion)
    after = advance(before, text, shown, cut_short=completion.finish_reason == "length")
    new = (*after.views[len(before.views) :], *after.pictures[len(before.pictures) :])
    sizes = {id(view.image): view.size for view in new if view is not after.views[0]}
    return after, look_fields(before, after, text), sum(width * height for width, height in sizes.values())


def look_fields(before: Episode, after: Episode, text: str) -> list[dict[str, Any]]:
    """What one turn found, each look in the form of `focus.focus_field`; then its calls that could not be followed."""
    views = iter(after.views[len(before.views) :])
    found = [_look_field(after, look, next(views, None)) for look in after.looks[len(before.looks) :]]
    is_own = not after.protocol.keeps_turns
    for error in after.errors[len(before.errors) :]:
        view = next(views, None)  # of the whole image, where that is shown in the place of the crop
        said = "; the answer is from the whole picture" if is_own else "; the whole picture is shown" if view else ""
        field = no_look(after.views[0]) | {"box_text": spoken(text) if is_own else text, "error": error + said}
        if view is not None:
            field |= {"crop_window": [0, 0, *after.views[0].size], "crop": crop_url(view.image)}
        found.append(field)
    return found


def _look_field(episode: Episode, look: ZoomedLook, view: View | None) -> dict[str, Any]:
    """One look; without a `view` a box that was spoken of, and never cut."""
    size = episode.views[0].size
    window = look.window if look.source == 0 else tuple(round(value) for value in look.box.to_pixels(size))
    field: dict[str, Any] = {
        "box": [round(value, 2) for value in look.box.to_pixels(size)],
        "box_text": look.text if episode.protocol.keeps_turns else spoken(look.text),
        "crop_window": None if view is None else list(window),
        "crop": None if view is None else crop_url(view.image),
        "image_size": list(size),
        "error": None,
    }
    return field | {"source": look.source, "label": look.label} if episode.protocol.keeps_turns else field


def no_look(whole: View) -> dict[str, Any]:
    """The extension field of an answer that was given at once."""
    nothing = dict.fromkeys(("box", "crop_window", "crop", "error"))
    return {"box_text": "", "image_size": list(whole.size), **nothing}
