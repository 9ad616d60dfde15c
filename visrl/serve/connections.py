"""Who is connected, whose turn it is, and what each has the server keep: so that nobody is waited for without end.

A connection waits on its client while a request, the rest of a body or the reading of a reply is outstanding. One that
stays idle is cut. Where places or bytes run out, room is made by cutting who has kept the server waiting the longest,
of the address that takes the most; a newcomer is refused only where nobody is waited for. Knows no HTTP beyond bytes.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import MutableMapping
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from visrl.serve.errors import RequestError
from visrl.serve.schemas import Limits

SWEEP_S = 1.0
STALLED_S = 1.0  # so long a client may be waited for before its room is given to another
SMALL_BYTES = 1_000_000  # of one connection: it may use the part of the budget that is closed to larger ones
RESERVE = 5  # which is the total over this; so is the part of other budgets
SLICE = 4_096  # bytes parsed at once: in chunks of a byte each they take some 10 ms

Addresses = tuple[Any, ...]  # of the client and of this server: what tells a connection from all others


class Connection:
    """One client's connection: since when it is waited for, and the bytes that it has the server keep."""

    def __init__(self, key: Addresses, transport: asyncio.Transport | None = None) -> None:
        self.key, self.transport = key, transport
        self.address = str(key[0])
        self.requests = 0  # in work
        self.waits_since: float | None = time.monotonic()
        self.held = 0
        self.parsed = 0  # bytes that came, of heads and framing too

    def abort(self) -> None:
        """End it now, whatever lies unsent."""
        if self.transport is not None:
            self.transport.abort()

    def begin(self) -> None:
        self.requests += 1
        self.waits_since = None

    def end(self) -> None:
        self.requests -= 1
        if not self.requests:
            self.waits_since = time.monotonic()

    def waited(self, now: float) -> float:
        """Seconds for which the client has been waited for; 0 where it waits for us."""
        return 0.0 if self.waits_since is None else now - self.waits_since


class Connections:
    """All connections of one server, and the bytes that they share."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.held = 0
        self._all: dict[Addresses, Connection] = {}
        self._sweeper: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._all)

    def of(self, scope: MutableMapping[str, Any]) -> Connection:
        """The connection of a request; under a server that does not tell of them, one of its own."""
        key = _key(scope.get("client"), scope.get("server"))
        return self._all.get(key) or Connection(key)

    def open(self, transport: asyncio.Transport) -> Connection:
        """A new connection; where there are too many, the one that is waited for the longest ends, or else this."""
        connection = Connection(
            _key(transport.get_extra_info("peername"), transport.get_extra_info("sockname")), transport
        )
        self._all[connection.key] = connection
        if len(self._all) > self.limits.connections:
            counts = Counter(other.address for other in self._all.values())
            self._cut(self._longest_waiting(counts, connection) or connection)
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)
        return connection

    def lost(self, connection: Connection) -> None:
        """A connection has ended. What its request still holds is given back as that ends."""
        if self._all.get(connection.key) is connection:
            del self._all[connection.key]

    def hold(self, connection: Connection, amount: int) -> None:
        """Keep `amount` bytes for a connection.

        Raises:
            RequestError: 429 where there is no room, and none to be made.
        """
        is_small = connection.held + amount <= SMALL_BYTES
        room = self.limits.held_bytes - (0 if is_small else self.limits.held_bytes // RESERVE)
        while self.held + amount > room:
            shares = Counter({other.address: 0 for other in self._all.values()})
            for other in self._all.values():
                shares[other.address] += other.held
            victim = self._longest_waiting(shares, connection, STALLED_S, must_hold=True)
            if victim is None:
                raise RequestError(429, "the server holds too many bytes now; try again soon", retry_after_s=1)
            self._cut(victim)
        connection.held += amount
        self.held += amount

    def free(self, connection: Connection, amount: int) -> None:
        amount = min(amount, connection.held)  # one that was cut holds nothing any more
        connection.held -= amount
        self.held -= amount

    def _longest_waiting(
        self, shares: Counter[str], newcomer: Connection, at_least_s: float = 0.0, must_hold: bool = False
    ) -> Connection | None:
        now = time.monotonic()
        waiting = [
            other
            for other in self._all.values()
            if other is not newcomer and other.waits_since is not None and other.waited(now) >= at_least_s
            and (other.held or not must_hold)
        ]  # fmt: skip
        return max(waiting, key=lambda other: (shares[other.address], other.waited(now)), default=None)

    def _cut(self, connection: Connection) -> None:
        self.free(connection, connection.held)
        self.lost(connection)
        connection.abort()

    def _sweep(self) -> None:
        """Cut who has sent no whole request for too long, or has not read the end of a reply."""
        now = time.monotonic()
        for connection in list(self._all.values()):
            if not connection.requests and connection.waited(now) > self.limits.idle_s:
                self._cut(connection)
        self._sweeper = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep) if self._all else None


class Held:
    """The bytes that one request has the server keep: of its body, then of its reply."""

    def __init__(self, connections: Connections, connection: Connection) -> None:
        self._connections, self._connection, self._amount = connections, connection, 0

    def add(self, amount: int) -> None:
        """Keep so many more.

        Raises:
            RequestError: 429 where there is no room for them.
        """
        self._connections.hold(self._connection, amount)
        self._amount += amount

    def free(self) -> None:
        """Give back all."""
        self._connections.free(self._connection, self._amount)
        self._amount = 0


def protocol_of(connections: Connections) -> type[asyncio.Protocol]:
    """uvicorn's protocol for HTTP/1.1, telling `connections` what comes and goes, and parsing a little at a time."""

    class CountedProtocol(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            self.unread = bytearray()
            super().connection_made(transport)
            self.counted = connections.open(transport)

        def connection_lost(self, exc: Exception | None) -> None:
            connections.lost(self.counted)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            is_idle = not self.unread
            if is_idle and len(data) <= SLICE:
                self.counted.parsed += len(data)
                super().data_received(data)
                return
            self.unread += data
            if is_idle:
                self.parse_some()

        def parse_some(self) -> None:
            """Parse the next slice; the rest waits until others had their turn."""
            if self.transport.is_closing():
                return
            part = bytes(self.unread[:SLICE])
            del self.unread[:SLICE]
            self.counted.parsed += len(part)
            super().data_received(part)
            if self.unread:
                self.transport.pause_reading()
                self.loop.call_soon(self.parse_some)
            elif not self.flow.read_paused and not self.transport.is_closing():
                self.transport.resume_reading()

    return CountedProtocol


def _key(client: Any, server: Any) -> Addresses:
    return (*(client or ("", 0))[:2], *(server or ("", 0))[:2])
