"""One text asked of a backend: what its client has seen of it, where a stop text ends it, who waits for it.

An HTTP request asks for as many of these as it wants choices, and for one more where it looks first. Knows no engine
and no HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from visrl.conversation import Conversation
from visrl.engines.base import Completion, Request, Sampling
from visrl.models.adapters import Adapter
from visrl.serve.errors import RequestError

IMAGE_TOKENS = 512  # a guess for sizing batches, no limit
UNSURE = "\ufffd"  # what a tokeniser gives for a character of which not all bytes are there yet

OnText = Callable[[str], None]


@dataclass(slots=True)
class QueuedRequest:
    """One text to sample. `on_text` is told the visible text so far, in the event loop, as it grows."""

    conversation: Conversation
    sampling: Sampling
    seed: int
    stops: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()  # texts that end it and stay
    on_text: OnText | None = None
    passed: Mapping[str, Any] = field(default_factory=dict)  # fields of the protocol that are the backend's to honour
    index: int = 0  # which choice of its HTTP request
    adapter: Adapter | None = None  # that is to be on the model
    cancelled: bool = False
    stopped_at: int | None = None  # where a stop text begins, or one that ends it has ended
    shown: int = 0  # characters told so far

    @property
    def request(self) -> Request:
        """What the engine is asked."""
        return Request(self.conversation, self.sampling, self.seed)

    @property
    def is_followed(self) -> bool:
        """Whether anything depends on the text before it ends."""
        return self.on_text is not None or bool(self.stops or self.ends)

    def see(self, text: str) -> tuple[bool, str | None]:
        """Whether to go on after `text` so far, and the visible part of it where that has grown."""
        if self.cancelled:
            return False, None
        found = [place for place in (text.find(stop) for stop in self.stops) if place >= 0]
        found += [place + len(end) for end in self.ends if (place := text.find(end)) >= 0]
        if found:
            self.stopped_at = min(found)
            visible = text[: self.stopped_at]
        else:
            visible = text[: len(text) - held_back(text, self.stops)]
        if len(visible) <= self.shown:
            return not found, None
        self.shown = len(visible)
        return not found, visible

    def finish(self, completion: Completion) -> Completion:
        """The completion with everything from a stop text on cut off."""
        if completion.text is None:
            return completion
        if self.stopped_at is None:
            self.see(completion.text)  # an engine may end in the same step in which the stop text became whole
        if self.stopped_at is None:
            return completion
        return replace(completion, text=completion.text[: self.stopped_at], finish_reason="stop")


@dataclass(slots=True, eq=False)
class PendingRequest:
    """A request whose completion is waited for; two are never the same one, whatever they ask."""

    queued: QueuedRequest
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Completion]
    prepared: Sequence[Any] = ()  # its images, ready for the engine
    ready_at: float = 0.0  # since when it waits for the engine, by `time.monotonic`
    length: int = 0  # a guess at its tokens

    def post(self, action: Callable[..., None], *args: Any) -> None:
        """Run `action` in the event loop; a loop that has closed has nobody left to tell."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(action, *args)

    def resolve(self, completion: Completion) -> None:
        if not self.future.done():
            self.future.set_result(completion)

    def fail(self, error: RequestError) -> None:
        if not self.future.done():
            self.future.set_exception(error)


def length_guess(conversation: Conversation, of_images: Sequence[int] = ()) -> int:
    """An upper bound of a prompt's tokens as far as it can be known without the model: bytes of text, and images.

    `of_images` are the tokens of the images, where they are known.
    """
    text = sum(len(text.encode()) for text in conversation.texts())
    return text + (sum(of_images) if of_images else IMAGE_TOKENS * len(conversation.views))


def held_back(text: str, stops: tuple[str, ...]) -> int:
    """How many characters at the end of `text` must not be shown yet: half a character, or a stop text's beginning."""
    held = len(text) - len(text.rstrip(UNSURE))
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), held, -1):
            if text.endswith(stop[:length]):
                held = length
                break
    return held
