"""The gate before the application: who may ask, from where, and how much. Knows no route's meaning and no model.

A request is read here as a whole, bounded in bytes and time, before anything else looks at it.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from visrl.serve.connections import Connection, Connections, Held
from visrl.serve.errors import RequestError
from visrl.serve.metrics import Metrics
from visrl.serve.schemas import Limits

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

PIECE = 65_536  # bytes of a reply handed over at once: the next only when these are on their way
CRUMBS, FRAMING = 16_384, 10  # a body may come with so much, and its length over this, in the marks of its chunks
OPEN_PATHS = {"/", "/health", "/page/page.js", "/page/page.css", "/page/icon.svg"}  # no key: nothing to steal there


HELD = "visrl.held"  # where in a request's scope its `Held` is
VALUE_MARKS = (b",", b"[", b"{")  # one stands before each value of a JSON text, and none in base64


class ClientLeft(Exception):
    """The connection ended before there was anybody to answer."""


class Budget:
    """An amount that all requests in work share; what does not fit is refused at once.

    The last `spare` of it is for amounts up to `small`.
    """

    def __init__(self, total: int, what: str, spare: int = 0, small: int = 0) -> None:
        self.total, self.what, self.spare, self.small = total, what, spare, small
        self.held = 0

    def hold(self, amount: int) -> AbstractContextManager[None]:
        """Hold `amount` while the context is open.

        Raises:
            RequestError: 429 where too much is held already.
        """
        if self.held + amount > self.total - (0 if amount <= self.small else self.spare):
            raise RequestError(429, f"the server holds too many {self.what} now; try again soon", retry_after_s=1)
        self.held += amount
        return self._release(amount)

    @contextmanager
    def _release(self, amount: int) -> Iterator[None]:
        try:
            yield
        finally:
            self.held -= amount


class Gate:
    """ASGI middleware: checks the caller, reads the body within limits, hands it on, counts how it ended."""

    def __init__(
        self, app: Application, *, limits: Limits, api_key: str | None, only_local_names: bool, metrics: Metrics
    ) -> None:
        self.app, self.limits, self.metrics = app, limits, metrics
        self.key = api_key.encode() if api_key else None
        self.only_local_names = only_local_names
        self.connections = Connections(limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no route speaks anything else; a refused handshake closes it
            return
        start = time.monotonic()
        connection = self.connections.of(scope)
        held = Held(self.connections, connection)
        sender = _Sender(send, connection, self.limits)
        scope[HELD] = held
        self.metrics.begin()
        connection.begin()
        try:
            await self._admit(scope, receive, sender, connection, held)
        finally:
            held.free()
            connection.end()
            self.metrics.end(scope["path"], sender.status, time.monotonic() - start)

    async def _admit(self, scope: Scope, receive: Receive, send: Send, connection: Connection, held: Held) -> None:
        try:
            receive = await self._check(scope, receive, connection, held)
        except RequestError as error:
            await refuse(send, error)
            return
        except ClientLeft:
            return
        await self.app(scope, receive, send)

    async def _check(self, scope: Scope, receive: Receive, connection: Connection, held: Held) -> Receive:
        """What the application shall receive from, once caller and body are in order."""
        headers = {name.decode("latin-1").lower(): value for name, value in scope["headers"]}
        self._check_host(headers.get("host", b""))
        if scope["path"] not in OPEN_PATHS:
            self._check_key(headers.get("authorization", b""))
        if scope["method"] != "POST":
            return receive
        size = self._check_body(headers)
        connection.waits_since = time.monotonic()
        try:
            body = await self._read(receive, size, connection, held)
        finally:
            connection.waits_since = None
        return _replay(body, receive)

    def _check_host(self, host: bytes) -> None:
        """A page elsewhere may point its own name at this machine; on loopback only local names are answered."""
        if self.only_local_names and not is_local_name(host.decode("latin-1")):
            raise RequestError(421, "this server answers to localhost only; set host to serve under other names")

    def _check_key(self, authorization: bytes) -> None:
        if self.key is None:
            return
        given = authorization[7:] if authorization[:7].lower() == b"bearer " else b""
        if not hmac.compare_digest(given, self.key):
            raise RequestError(401, "missing or wrong API key; send it as `Authorization: Bearer …`", "invalid_api_key")

    def _check_body(self, headers: dict[str, bytes]) -> int:
        """How many bytes the body may have: what it says of itself, else the limit."""
        # A form or plain text may be posted from any page without asking; JSON may not.
        if headers.get("content-type", b"").split(b";")[0].strip().lower() != b"application/json":
            raise RequestError(415, "send the body as application/json")
        if (packed := headers.get("content-encoding", b"identity").strip().lower()) not in (b"", b"identity"):
            raise RequestError(
                415, f"send the body unpacked, without Content-Encoding: {packed[:20].decode('latin-1')}"
            )
        stated = headers.get("content-length")
        if stated is None:
            return self.limits.body_bytes
        if not stated.isdigit() or int(stated) > self.limits.body_bytes:
            raise RequestError(413, f"the body is larger than the {self.limits.body_bytes:,} bytes allowed")
        return int(stated)

    async def _read(self, receive: Receive, size: int, connection: Connection, held: Held) -> bytes:
        """The body, held as it comes.

        Raises:
            ClientLeft: before it was whole.
            RequestError: 408 where it comes too slowly, 413 where it is longer than it may be or comes in crumbs, 400
                where it holds more values than a request has: JSON costs time and memory for each of them.
        """
        parts, length, values = [], 0, 0
        start, framed = time.monotonic(), connection.parsed
        while True:
            try:
                async with asyncio.timeout(self._left(start, length)):
                    message = await receive()
            except TimeoutError as error:
                raise RequestError(408, "the body comes too slowly") from error
            if message["type"] == "http.disconnect":
                raise ClientLeft
            part = message.get("body", b"")
            length += len(part)
            if length > size:
                raise RequestError(413, f"the body is larger than the {self.limits.body_bytes:,} bytes allowed")
            values += sum(map(part.count, VALUE_MARKS))
            if values > self.limits.values:
                raise RequestError(400, f"the body holds more than {self.limits.values:,} values")
            if connection.parsed - framed > CRUMBS + length + length // FRAMING:
                raise RequestError(413, "the body comes in chunks that are too small: their marks are more than it is")
            held.add(len(part))
            parts.append(part)
            if not message.get("more_body"):
                return b"".join(parts)

    def _left(self, start: float, length: int) -> float:
        """Seconds until the next part of a body must have come."""
        limits = self.limits
        return start + min(limits.body_s, limits.slow_body_s + length / limits.body_rate) - time.monotonic()


class _Sender:
    """A `send` that hands a reply over piece by piece, and ends the connection of who does not take them."""

    def __init__(self, send: Send, connection: Connection, limits: Limits) -> None:
        self._send, self._connection, self._limits = send, connection, limits
        self._waited = 0.0
        self.status = 0

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        body = message.get("body", b"")
        if len(body) <= PIECE:
            await self._hand_over(message)
            return
        more = message.get("more_body", False)
        for start in range(0, len(body), PIECE):
            end = start + PIECE
            await self._hand_over(dict(message, body=body[start:end], more_body=more or end < len(body)))

    async def _hand_over(self, message: MutableMapping[str, Any]) -> None:
        start = time.monotonic()
        # A reply is read within the time of a request, and never stands still for long.
        patience = max(0.0, min(self._limits.write_s, self._limits.request_s - self._waited))
        timer = asyncio.get_running_loop().call_later(patience, self._connection.abort)
        self._connection.waits_since = start
        try:
            await self._send(message)
        finally:
            timer.cancel()
            self._connection.waits_since = None
            self._waited += time.monotonic() - start


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once and then tells what the connection does."""
    bodies = [body]  # emptied as it is given, so that it is kept no longer than who takes it keeps it
    del body

    async def again() -> MutableMapping[str, Any]:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        return await receive()

    return again


async def refuse(send: Send, error: RequestError) -> None:
    """Answer with an error in the protocol's form."""
    body = json.dumps(error.body(), ensure_ascii=False).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(error.retry_after_s).encode()))
    if error.status in (408, 413, 429):
        headers.append((b"connection", b"close"))  # what is left of the body shall not be read as a new request
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def is_local_name(host: str) -> bool:
    """Whether a Host header names this machine's loopback: `localhost` or an address of it, with or without a port."""
    name = host.strip().lower()
    if name.startswith("["):
        name = name[1:].partition("]")[0]
    elif name.count(":") == 1:
        name = name.partition(":")[0]
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
