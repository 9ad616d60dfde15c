"""The ways in which a request is answered: as it is, `:whole`, `:focus` with its two steps, several looks, or the
public protocol that the checkpoint was trained on. Knows which way holds what; HTTP is app.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from visrl.conversation import Conversation, PromptError, View
from visrl.engines.base import Sampling
from visrl.rollout.protocols import instructed
from visrl.serve.backend import Backend
from visrl.serve.calling import answer_with_calls
from visrl.serve.errors import RequestError
from visrl.serve.fields import for_the_box
from visrl.serve.focus import answer_from_whole, answer_plainly, answer_with_focus
from visrl.serve.looks import Looks, answer_with_looks, own_looks, public_looks, within
from visrl.serve.replies import Choice, ChoiceStream
from visrl.serve.requests import QueuedRequest
from visrl.serve.schemas import FOCUS_SUFFIX, WHOLE_SUFFIX, ChatRequest, Limits, to_question
from visrl.zoom.handed import worded
from visrl.zoom.protocols import MOST_LOOKS, ZoomProtocol

Keep = Callable[[dict[str, Any], int], None]  # told each look of a reply, and how many pixels it holds on to


@dataclass(frozen=True, slots=True)
class Ways:
    """How this server's models are asked: by a public `protocol`, or by `visrl`, with up to `max_looks` looks where a
    request does not say (None: one, always)."""

    protocol: ZoomProtocol | None
    max_looks: int | None
    limits: Limits

    def told(self) -> dict[str, Any]:
        """What the list of models says of `:focus`."""
        if self.protocol is None:
            return {} if self.max_looks is None else {"max_looks": self.max_looks}
        most = min(self.protocol.max_pictures - 1, MOST_LOOKS)
        return {"protocol": self.protocol.name, "max_looks": most, "turn_tokens": self._turn_tokens()}

    def check(self, asked: ChatRequest, is_passed_on: bool) -> None:
        """Refuse what the way of a request cannot honour, before any work is done.

        Raises:
            RequestError: 400 with what is wrong.
        """
        if not asked.suffix:
            self._own_tool(asked)
            return
        to_question(asked)
        if asked.suffix != FOCUS_SUFFIX:
            return
        if self.protocol is not None and (beside := set(asked.passed) - set(for_the_box(asked.passed))):
            name = min(beside)
            said = f"{name} is not supported by this request; every turn of {self.protocol.name} may be a call"
            raise RequestError(400, said, "unsupported_parameter", param=name)
        pictures = self._pictures(asked)
        if is_passed_on and pictures > self.limits.images:
            said = f"up to {pictures} pictures are shown, and vLLM takes {self.limits.images} (max_images)"
            raise RequestError(400, f"max_looks: {said}", param="max_looks")

    def sampling(self, asked: ChatRequest, default: Sampling) -> Sampling:
        """What a request is sampled with where it does not say: a turn of a public protocol has the length of that."""
        if self.protocol is None or asked.suffix != FOCUS_SUFFIX:
            return default
        return replace(default, max_tokens=self._turn_tokens())

    async def answer(
        self,
        backend: Backend,
        asked: ChatRequest,
        views: list[View],
        queued: QueuedRequest,
        stream: ChoiceStream,
        keep: Keep,
    ) -> Choice:
        """One choice; its looks and its text go into `stream` as they come.

        Raises:
            RequestError: what the backend raises, or 502 where it gave no text.
        """

        def on_look(look: dict[str, Any], pixels: int = 0) -> None:
            keep(look, pixels)
            stream.put({"focus": look})

        own = None if asked.suffix else self._own_tool(asked)
        if own is not None:
            queued.conversation, queued.ends = _worded(own, queued.conversation), own.stop
        if asked.suffix == WHOLE_SUFFIX and self.protocol is not None:
            queued.conversation = instructed(None)(to_question(asked), views[0])
            choice = await answer_plainly(backend, queued)
        elif asked.suffix == WHOLE_SUFFIX:
            choice = await answer_from_whole(backend, to_question(asked), views[0], queued)
        elif asked.suffix and (looks := self._looks(asked)) is not None:
            choice = await answer_with_looks(backend, to_question(asked), views[0], queued, on_look, looks=looks)
        elif asked.suffix:
            choice = await answer_with_focus(backend, to_question(asked), views[0], queued, on_look)
        elif asked.choice.kind != "none":
            several, keeps_space = asked.parallel_tool_calls, own is not None
            choice = await answer_with_calls(
                backend, queued, stream, asked.choice, several=several, keeps_space=keeps_space
            )
        else:
            choice = await answer_plainly(backend, queued)
        if asked.choice.kind == "none":  # else it is told already
            stream.put_text(choice.text)
        if stream.is_read and choice.focus is not None:
            if "end" in choice.focus:
                stream.put({"focus": {name: choice.focus[name] for name in ("end", "turns")}})
            choice = replace(choice, focus=None)  # it is sent, and kept no longer
        stream.put({}, choice.finish_reason)
        return choice

    def _own_tool(self, asked: ChatRequest) -> ZoomProtocol | None:
        """The checkpoint's protocol, where a request defines its tool and no other.

        Raises:
            RequestError: 400 where it is defined with arguments that it does not have.
        """
        names = [tool.function.name for tool in asked.tools]
        if self.protocol is None or names != [*self.protocol.tool[:1]] or not names:
            return None
        known = self.protocol.tool[1:]
        given = (asked.tools[0].function.parameters or {}).get("properties")
        if given is not None and not (isinstance(given, dict) and set(given) <= set(known)):
            said = f"{names[0]} of {self.protocol.name} takes {' and '.join(known)}, and nothing else"
            raise RequestError(400, said, param="tools.0.function.parameters")
        return self.protocol

    def _most(self, asked: ChatRequest) -> int | None:
        return self.max_looks if asked.max_looks is None else asked.max_looks

    def _looks(self, asked: ChatRequest) -> Looks | None:
        most = self._most(asked)
        if self.protocol is None:
            return None if most is None else own_looks(most)
        return public_looks(within(self.protocol, most))

    def _pictures(self, asked: ChatRequest) -> int:
        most = self._most(asked)
        return (most or 0) + 1 if self.protocol is None else within(self.protocol, most).max_pictures

    def _turn_tokens(self) -> int:
        assert self.protocol is not None
        return min(self.protocol.turn_tokens, self.limits.max_tokens)


def _worded(protocol: ZoomProtocol, talk: Conversation) -> Conversation:
    try:
        return worded(protocol, talk)
    except PromptError as error:
        raise RequestError(400, str(error)) from error
