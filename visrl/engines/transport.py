"""HTTP to servers that may send anything: replies are bounded in size, unpacked too, and no redirect is followed."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import import_module
from typing import TYPE_CHECKING

import openai

if TYPE_CHECKING:
    import httpx2 as http
else:  # the HTTP library that the installed openai speaks through: httpx, or its successor
    http = import_module(openai.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0])

MOST_BYTES = 4_000_000  # of one reply: a text of some thousand tokens is a thousandth of it
_CHUNK = 1 << 16


class ReplyError(http.TransportError):
    """A reply that is not read to its end; the message says why."""


def bounded_client(timeout_s: float | None, most_bytes: int = MOST_BYTES) -> http.AsyncClient:
    """A client that reads at most so many bytes of a reply, after unpacking, and follows no redirect."""
    return http.AsyncClient(
        timeout=timeout_s,
        follow_redirects=False,
        event_hooks={"response": [_bounded(most_bytes)]},
        limits=http.Limits(max_connections=None, max_keepalive_connections=100),
        headers={"Accept-Encoding": "gzip, deflate"},
    )


def _bounded(most_bytes: int) -> Callable[[http.Response], Awaitable[None]]:
    """A hook that puts a bound on the body of a response, and unpacks it piece by piece."""

    async def hook(response: http.Response) -> None:
        packed = response.headers.get("content-encoding", "").strip().lower()
        if packed not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise ReplyError(f"the reply is packed as {packed[:40]!r}, which was not asked for")
        response.headers.pop("content-encoding", None)
        assert isinstance(response.stream, http.AsyncByteStream)
        response.stream = _Bounded(response.stream, most_bytes, unpack=packed not in ("", "identity"))

    return hook


class _Bounded(http.AsyncByteStream):
    def __init__(self, stream: http.AsyncByteStream, most_bytes: int, unpack: bool) -> None:
        self._stream, self._most_bytes, self._unpack = stream, most_bytes, unpack

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for piece in self._pieces():
            size += len(piece)
            if size > self._most_bytes:
                raise ReplyError(f"the reply has more than {self._most_bytes:,} bytes")
            yield piece

    async def _pieces(self) -> AsyncIterator[bytes]:
        if not self._unpack:
            async for piece in self._stream:
                yield piece
            return
        unpacker = zlib.decompressobj(wbits=47)  # zlib's or gzip's header, whichever is there
        async for packed in self._stream:
            try:
                while packed and not unpacker.eof:
                    yield unpacker.decompress(packed, _CHUNK)
                    packed = unpacker.unconsumed_tail
            except zlib.error as error:
                raise ReplyError(f"the reply cannot be unpacked ({error})") from error
        yield unpacker.flush()  # what a few last bits stand for

    async def aclose(self) -> None:
        await self._stream.aclose()
