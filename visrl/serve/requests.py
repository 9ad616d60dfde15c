"""One text that is to be drawn: what its client has seen of it, where a stop text ends it. Knows no engine, no HTTP."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from visrl.conversation import Conversation
from visrl.engines.base import Completion, Request, Sampling

PICTURE_TOKENS = 512  # a guess for sizing batches, no limit
UNSURE = "\ufffd"  # what a tokeniser gives for a character of which not all bytes are there yet

OnText = Callable[[str], None]


@dataclass(slots=True)
class QueuedRequest:
    """One text to draw. `on_text` is told the visible text so far, in the event loop, as it grows."""

    conversation: Conversation
    sampling: Sampling
    seed: int
    stops: tuple[str, ...] = ()
    on_text: OnText | None = None
    passed: Mapping[str, Any] = field(default_factory=dict)  # fields of the protocol that are the backend's to honour
    index: int = 0  # which of the texts that its request asks for
    cancelled: bool = False
    stopped_at: int | None = None  # where a stop text begins
    shown: int = 0  # characters told so far

    @property
    def request(self) -> Request:
        """What the engine is asked."""
        return Request(self.conversation, self.sampling, self.seed)

    @property
    def is_followed(self) -> bool:
        """Whether anything depends on the text before it ends."""
        return self.on_text is not None or bool(self.stops)

    def see(self, text: str) -> tuple[bool, str | None]:
        """Whether to go on after `text` so far, and the visible part of it where that has grown."""
        if self.cancelled:
            return False, None
        found = [place for place in (text.find(stop) for stop in self.stops) if place >= 0]
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


def length_guess(conversation: Conversation, of_pictures: Sequence[int] = ()) -> int:
    """An upper bound of a prompt's tokens as far as it can be known without the model: bytes of text, and pictures.

    `of_pictures` are the tokens of the pictures, where they are known.
    """
    text = sum(len(message.text.encode()) for message in conversation.messages)
    return text + (sum(of_pictures) if of_pictures else PICTURE_TOKENS * len(conversation.views))


def held_back(text: str, stops: tuple[str, ...]) -> int:
    """How many characters at the end of `text` must not be shown yet: half a character, or a stop text's beginning."""
    held = len(text) - len(text.rstrip(UNSURE))
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), held, -1):
            if text.endswith(stop[:length]):
                held = length
                break
    return held
