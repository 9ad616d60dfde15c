"""Replies in the OpenAI protocol's form: whole, in pieces and as events. One with crops is megabytes long."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse, Response, StreamingResponse

from visrl.conversation import ToolCall
from visrl.serve.adapters import HeldAdapter
from visrl.serve.schemas import FOCUS_SUFFIX, WHOLE_SUFFIX

Chunks = asyncio.Queue[dict[str, Any] | None]  # the parts of all choices of a request; None: there are no more


@dataclass(frozen=True, slots=True)
class Choice:
    """One finished text, what `:focus` found on the way, and what was asked about its tokens."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    focus: dict[str, Any] | None = None
    tokens: Tokens | None = None
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a text: with `ids` those of the prompt, too, as vLLM has them; `texts` and `logps` of each."""

    ids: tuple[int, ...] | None = None
    prompt_ids: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    logps: tuple[float, ...] | None = None

    def fields(self) -> dict[str, Any]:
        """What a choice of a reply holds of them."""
        found: dict[str, Any] = {} if self.ids is None else {"token_ids": list(self.ids)}
        if self.logps is not None:
            told = zip(self.texts, self.logps, strict=True)
            content = [
                {"token": text, "logprob": logp, "bytes": list(text.encode()), "top_logprobs": []}
                for text, logp in told
            ]
            found["logprobs"] = {"content": content}
        return found


@dataclass(frozen=True, slots=True)
class ChatReply:
    """What is common to a reply and all its chunks."""

    id: str
    model: str
    created: int

    @staticmethod
    def begin(model: str) -> ChatReply:
        return ChatReply(f"chatcmpl-{secrets.token_hex(12)}", model, int(time.time()))

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        """The reply to a request that does not stream."""
        listed, first = [_listed(index, choice) for index, choice in enumerate(choices)], choices[0].tokens
        prompt = {} if first is None or first.ids is None else {"prompt_token_ids": list(first.prompt_ids)}
        return self._head("chat.completion") | prompt | {"choices": listed, "usage": usage(choices)}

    def pieces(self, choices: list[Choice]) -> Iterator[bytes]:
        """`whole` as JSON, a choice at a time: all of it at once would lie in memory several times over."""
        head = json.dumps(self._head("chat.completion") | {"usage": usage(choices)})
        yield head[:-1].encode() + b', "choices": ['
        for index, choice in enumerate(choices):
            yield (", " if index else "").encode() + json.dumps(_listed(index, choice)).encode()
        yield b"]}"

    def chunk(self, index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        """One piece of one choice."""
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return self._head("chat.completion.chunk") | {"choices": [choice]}

    def last_chunk(self, choices: list[Choice]) -> dict[str, Any]:
        """The chunk with the usage, for who asked for it."""
        return self._head("chat.completion.chunk") | {"choices": [], "usage": usage(choices)}


def _listed(index: int, choice: Choice) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.calls:
        message |= {"content": choice.text or None, "tool_calls": [call.as_field() for call in choice.calls]}
    if choice.focus is not None:
        message["focus"] = choice.focus
    told = {"index": index, "message": message, "finish_reason": choice.finish_reason, "logprobs": None}
    return told | choice.tokens.fields() if choice.tokens else told


def usage(choices: list[Choice]) -> dict[str, int]:
    """Tokens of all choices together; the prompt counts once, as in the protocol (`:focus`: both steps' prompts)."""
    prompt = max(choice.prompt_tokens for choice in choices)
    completion = sum(choice.completion_tokens for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def model_list(
    name: str, created: int, adapters: Mapping[str, HeldAdapter], of_focus: Mapping[str, Any]
) -> dict[str, Any]:
    """The served names in the protocol's form; an adapter names its folder and the model it is put on, as with vLLM.
    `of_focus` is what is told of `:focus`."""
    listed = [_model(id, created) for id in (name, name + FOCUS_SUFFIX, name + WHOLE_SUFFIX)]
    listed[1].update(of_focus)
    for id, held in adapters.items():
        listed.append(_model(id, held.created) | {"root": str(held.adapter.folder), "parent": name})
    return {"object": "list", "data": listed}


def _model(id: str, created: int) -> dict[str, Any]:
    return {"id": id, "object": "model", "created": created, "owned_by": "visrl"}


def event(data: dict[str, Any] | str) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


class ChoiceStream:
    """The deltas of one streamed choice, each put into `chunks` as it comes; without these nothing is."""

    def __init__(self, index: int, chunks: Chunks | None) -> None:
        self._index, self._chunks = index, chunks
        self._first: dict[str, Any] = {"role": "assistant"}
        self._sent = 0  # characters of the text

    @property
    def is_read(self) -> bool:
        """Whether anybody follows it."""
        return self._chunks is not None

    def put(self, delta: dict[str, Any], finish_reason: str | None = None) -> None:
        if self._chunks is not None:
            delta, self._first = self._first | delta, {}
            self._chunks.put_nowait({"index": self._index, "delta": delta, "finish_reason": finish_reason})

    def put_text(self, text: str) -> None:
        """What of the visible text so far has not been sent."""
        if len(text) > self._sent:
            self.put({"content": text[self._sent :]})
            self._sent = len(text)


async def event_of(reply: ChatReply, chunk: dict[str, Any]) -> bytes:
    """One piece of a streamed reply; one with a crop is large, and written in a thread."""
    if "focus" in chunk["delta"]:
        return await asyncio.to_thread(lambda: event(reply.chunk(**chunk)))
    return event(reply.chunk(**chunk))


async def whole_reply(reply: ChatReply, choices: list[Choice]) -> Response:
    """The reply to a request that does not stream; one with crops is written and sent choice by choice."""
    if all(choice.focus is None for choice in choices):
        return JSONResponse(reply.whole(choices))
    pieces = await asyncio.to_thread(lambda: deque(reply.pieces(choices)))
    length = sum(map(len, pieces))

    async def sent() -> AsyncIterator[bytes]:
        while pieces:
            yield pieces.popleft()

    return StreamingResponse(sent(), media_type="application/json", headers={"Content-Length": str(length)})
