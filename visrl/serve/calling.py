"""A turn that may call tools of the caller's: its calls are handed on, and what cannot be read of them stays text.

Nothing is executed here. With `tool_choice` the turn opens with the beginning of a call.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import replace

from visrl.conversation import ToolCall
from visrl.serve.backend import Backend
from visrl.serve.focus import answer_plainly
from visrl.serve.replies import Choice, ChoiceStream
from visrl.serve.requests import QueuedRequest
from visrl.serve.tools import ToolChoice
from visrl.zoom.tool_calls import END, CallReader, WrittenCall


async def answer_with_calls(
    backend: Backend,
    request: QueuedRequest,
    stream: ChoiceStream,
    choice: ToolChoice,
    *,
    several: bool,
    keeps_space: bool = False,
) -> Choice:
    """One turn, its text and its calls put into `stream` as they become whole. Unless it may make `several` calls, it
    ends with the first. `keeps_space` is `CallReader`'s.

    Raises:
        RequestError: what the backend raises, or 502 where it gave no text.
    """
    turn = _Turn(stream, choice.opening, CallReader(keeps_space))
    if request.on_text is not None:
        request.on_text = turn.grow
    if not several:
        request.ends = (*request.ends, END)
    said = await answer_plainly(backend, request)
    turn.end(said.text)
    reason = said.finish_reason
    if turn.calls and reason == "stop" and choice.kind != "named":  # as OpenAI and vLLM have it
        reason = "tool_calls"
    return replace(said, text="".join(turn.texts), calls=tuple(turn.calls), finish_reason=reason)


class _Turn:
    """The turn so far, taken apart and told."""

    def __init__(self, stream: ChoiceStream, opening: str, reader: CallReader) -> None:
        self._stream, self._opening, self._reader = stream, opening, reader
        self.texts: list[str] = []
        self.calls: list[ToolCall] = []

    def grow(self, text: str) -> None:
        """The visible text so far has grown."""
        self._tell(self._reader.feed(self._opening + text))

    def end(self, text: str) -> None:
        """This is the whole text."""
        self._tell(self._reader.finish(self._opening + text))

    def _tell(self, parts: Iterator[str | WrittenCall]) -> None:
        for part in parts:
            if isinstance(part, str):
                self.texts.append(part)
                self._stream.put({"content": part})
            else:
                call = ToolCall(f"call_{secrets.token_hex(12)}", part.name, part.arguments)
                self._stream.put({"tool_calls": [{"index": len(self.calls)} | call.as_field()]})
                self.calls.append(call)
