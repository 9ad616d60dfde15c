"""Calls of tools in the text of a turn, as Hermes, Qwen and the zoom protocols write them:

    <tool_call>
    {"name": …, "arguments": {…}}
    </tool_call>

What cannot be read stays text; nothing of a turn is lost but the space around its calls. Knows no tool.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from visrl.replies import whole_text
from visrl.zoom.written import CallError, json_of, named

BEGIN, END = "<tool_call>", "</tool_call>"
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")  # of a tool, as OpenAI's protocol has it, and with a point


@dataclass(frozen=True, slots=True)
class WrittenCall:
    """A call as it was written: `arguments` is the JSON of an object."""

    name: str
    arguments: str


def read_call(said: str) -> WrittenCall | None:
    """The call that stands between two tags, or None."""
    try:
        name, arguments = named(json_of(said.strip()))
        if not NAME.fullmatch(name):
            return None
        # Numbers that JSON does not have (NaN) are no arguments to anybody.
        return WrittenCall(name, whole_text(json.dumps(arguments, ensure_ascii=False, allow_nan=False)))
    except (CallError, ValueError):
        return None


class CallReader:
    """Takes a turn apart as it grows: text that is no call, and calls, in their order.

    Text is given as soon as it can no more be the beginning of a call. The space between a text and a call belongs to
    the call, as chat templates write it; with `keeps_space` to the text, for words that are no template's.
    """

    def __init__(self, keeps_space: bool = False) -> None:
        self._keeps_space = keeps_space
        self._place = 0  # up to where the turn has been given
        self._searched = 0  # up to where the end of the open call was looked for
        self.count = 0

    def feed(self, text: str) -> Iterator[str | WrittenCall]:
        """What of the turn so far has not been given."""
        while (begin := text.find(BEGIN, self._place)) >= 0:
            end = text.find(END, max(begin + len(BEGIN), self._searched))
            if end < 0:
                self._searched = max(begin + len(BEGIN), len(text) - len(END) + 1)
                yield from self._text(text, self._before(text, begin))
                return
            call = read_call(text[begin + len(BEGIN) : end])
            yield from self._call(text, begin, end + len(END), call)
        safe = len(text) - _begun(text)
        yield from self._text(text, self._before(text, safe))

    def finish(self, text: str) -> Iterator[str | WrittenCall]:
        """The rest of a turn that has ended. A call that is whole but for its closing tag is one."""
        yield from self.feed(text)
        begin = text.find(BEGIN, self._place)
        if begin >= 0 and (call := read_call(text[begin + len(BEGIN) :])) is not None:
            yield from self._call(text, begin, len(text), call)
        if not self.count or text[self._place :].strip():
            yield from self._text(text, len(text))

    def _call(self, text: str, begin: int, end: int, call: WrittenCall | None) -> Iterator[str | WrittenCall]:
        if call is None:
            yield from self._text(text, end)
            return
        yield from self._text(text, self._before(text, begin))
        self._place = end
        self.count += 1
        yield call

    def _before(self, text: str, begin: int) -> int:
        """Where the text ends that may stand before a call."""
        if self._keeps_space and not self.count:
            return begin
        return self._place + len(text[self._place : begin].rstrip())

    def _text(self, text: str, end: int) -> Iterator[str]:
        if end > self._place:
            yield text[self._place : end]
            self._place = end


def _begun(text: str) -> int:
    """How many characters at the end of a text may be the beginning of a call."""
    return next((length for length in range(len(BEGIN) - 1, 0, -1) if text.endswith(BEGIN[:length])), 0)
