"""One reply of a server piece by piece, as it is sampled. Whatever the server does wrong is one kind of error here."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import openai

from visrl.engines.client import Client
from visrl.engines.openai_server import CHARACTERS_PER_TOKEN, Ask
from visrl.engines.transport import http
from visrl.engines.wire import StreamChunk, read_chunk, read_finish_reason, read_reply

DONE = "[DONE]"
PASSED_ON = (400, 413, 422, 429)  # what a server says of the request, and not of itself


class StreamError(RuntimeError):
    """A stream that failed: a sentence, and the HTTP status that says whose fault it is (502: the server's)."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


async def stream(client: Client, ask: Ask, more: dict[str, Any]) -> AsyncGenerator[StreamChunk, None]:
    """The pieces of a reply of the client's first server; `more` are fields beside those of `ask`.

    A server that answers whole instead gives one piece. Closing this closes the connection.

    Raises:
        StreamError: the server refused, failed, sent what is no stream, or ended before the reply did.
    """
    server = client.first
    shown = f"the model's server {server.shown}"
    body = server.body(ask)
    most = CHARACTERS_PER_TOKEN * body[client.endpoint.max_tokens_key]
    extra = server.extra(ask, more)
    try:
        async with server.api.chat.completions.with_streaming_response.create(
            **body, stream=True, stream_options={"include_usage": True}, extra_body=extra or None
        ) as response:
            lines = _lines(response.iter_bytes())
            first = await _first_line(lines)
            if first.startswith("{"):
                rest = [line async for line in lines]
                reply = read_reply(json.loads("\n".join([first, *rest])), most)
                yield StreamChunk(
                    reply.text or "", read_finish_reason(reply.finish_reason), (reply.tokens, reply.prompt_tokens)
                )
                return
            async for piece in _pieces(first, lines, most):
                yield piece
    except openai.APIStatusError as error:
        status = error.status_code if error.status_code in PASSED_ON else 502
        raise StreamError(status, server.refusal(error)) from error
    except (openai.APIError, http.HTTPError, http.StreamError, ValueError, RecursionError) as error:
        cause = error.__cause__ if isinstance(error, openai.APIConnectionError) and error.__cause__ else error
        raise StreamError(502, f"{shown} failed: {server.format_fault(cause)}") from error


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncGenerator[str, None]:
    """The lines of an event stream: ended by CR LF, LF or CR.

    What else Unicode counts among the ends of lines (U+2028, U+0085, …) may stand in a text, as JSON has it unescaped.
    """
    parts: list[bytes] = []
    after_cr = False
    async for piece in pieces:
        await asyncio.sleep(0)  # a reply that was packed well is many pieces of one arrival
        piece = piece[1:] if after_cr and piece.startswith(b"\n") else piece
        after_cr = piece.endswith(b"\r")
        first, *more = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        parts.append(first)
        for part in more:
            yield b"".join(parts).decode("utf-8", "replace")
            parts = [part]
    if any(parts):
        yield b"".join(parts).decode("utf-8", "replace")


async def _first_line(lines: AsyncIterator[str]) -> str:
    async for line in lines:
        if line.strip():
            return line.removeprefix("\ufeff")
    raise ValueError("it sent nothing")


async def _pieces(first: str, lines: AsyncIterator[str], most_characters: int) -> AsyncIterator[StreamChunk]:
    size, begun, ended = 0, False, False
    async for data in _events(first, lines):
        if data.strip() == DONE:
            ended = True
            break
        piece = read_chunk(json.loads(data))
        begun = begun or piece.of_choice
        ended = ended or piece.reason is not None
        size += len(piece.text)
        if size > most_characters:
            raise ValueError(f"a reply of more than {most_characters:,} characters, far beyond the tokens asked for")
        yield piece
    if not begun:
        raise ValueError("the stream held no choice")
    if not ended:
        raise ValueError("the stream ended before the reply did")


async def _events(first: str, lines: AsyncIterator[str]) -> AsyncIterator[str]:
    """The data of server-sent events."""
    data: list[str] = []
    line: str | None = first
    while line is not None:
        if not line.strip():
            if data:
                yield "\n".join(data)
            data = []
        elif line.startswith("data:"):
            data.append(line[5:])
        elif not line.startswith((":", "event", "id", "retry")):
            raise ValueError(f"it sent what is no event: {line[:80]!r}")
        line = await anext(lines, None)
    if data:
        yield "\n".join(data)
