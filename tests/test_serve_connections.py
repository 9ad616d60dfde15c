"""Clients that keep the server waiting, by never sending, never reading or in crumbs; and a good one beside them."""

from __future__ import annotations

import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPResponse
from typing import Any

import pytest
from PIL import Image
from serve_help import NAME, body, data_url, get, known, post, two_steps
from waiting import PATIENCE_S, wait_until

from visrl.serve.connections import SMALL_BYTES, Connection, Connections
from visrl.serve.errors import RequestError
from visrl.serve.schemas import Limits

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def connected(url: str, window: int | None = None) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    client = socket.socket()
    if window is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    client.settimeout(PATIENCE_S)
    client.connect((host, int(port)))
    return client


def answer_to(client: socket.socket) -> int:
    """The status of the next reply, which is read whole."""
    response = HTTPResponse(client)
    response.begin()
    response.read()
    return response.status


def ends_after(client: socket.socket) -> tuple[float, bytes]:
    """Seconds until the server ends the connection, and what it sent."""
    start, got = time.monotonic(), b""
    with client:
        try:
            while part := client.recv(65_536):
                got += part
        except ConnectionError:
            pass
    return time.monotonic() - start, got


@contextmanager
def dripping(client: socket.socket, part: bytes, every_s: float) -> Iterator[None]:
    """Send `part` again and again until the connection ends."""
    done = threading.Event()

    def drip() -> None:
        try:
            while not done.wait(every_s):
                client.sendall(part)
        except OSError:
            pass

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


# --- Slow requests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", HEAD, HEAD + b"X-A: "])
def test_a_connection_without_a_whole_request_is_ended(sent: bytes) -> None:
    with known(limits=Limits(idle_s=0.5)) as (url, _, _):
        client = connected(url)
        client.sendall(sent)
        with dripping(client, b"x" if sent else b"", 0.2):
            seconds, got = ends_after(client)
        assert 0.4 < seconds < 30
        assert got == b""
        assert post(url, body()).status_code == 200


def test_a_connection_that_asks_again_in_time_is_kept() -> None:
    with known(limits=Limits(idle_s=1.5)) as (url, _, _), connected(url) as client:
        for _ in range(4):
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert answer_to(client) == 200
            time.sleep(0.6)


@pytest.mark.parametrize("length", [b"Content-Length: 20000000\r\n", b"Transfer-Encoding: chunked\r\n"])
def test_bodies_that_are_claimed_and_never_come_hold_nothing(length: bytes) -> None:
    with known(limits=Limits(slow_body_s=1.0)) as (url, engine, _), ExitStack() as held:
        clients = [held.enter_context(connected(url)) for _ in range(25)]
        for client in clients:
            client.sendall(HEAD + length + b"\r\n")
        assert [post(url, body()).status_code for _ in range(5)] == [200] * 5
        _, got = ends_after(clients[0])
        assert got.startswith(b"HTTP/1.1 408")
        assert b"too slowly" in got
        assert len(engine.batches) == 5


def test_a_body_that_drips_is_given_up_and_one_that_flows_is_not() -> None:
    with known(limits=Limits(slow_body_s=0.5, body_rate=1000, body_s=60)) as (url, _, _):
        slow = connected(url)
        slow.sendall(HEAD + b"Content-Length: 5000\r\n\r\n{")
        with dripping(slow, b" ", 0.1):
            assert ends_after(slow)[1].startswith(b"HTTP/1.1 408")
        whole = json.dumps(body(pictures=[])).encode()
        whole = b" " * (3000 - len(whole)) + whole
        with connected(url) as steady:
            steady.sendall(HEAD + b"Content-Length: 3000\r\n\r\n")
            for start in range(0, 3000, 500):
                steady.sendall(whole[start : start + 500])
                time.sleep(0.15)
            assert answer_to(steady) == 200


def test_a_body_in_crumbs_is_refused_and_holds_nobody_up() -> None:
    with known() as (url, _, _):
        client = connected(url)
        client.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        with dripping(client, b"1\r\n \r\n" * 20_000, 0.0):
            slowest = 0.0
            for _ in range(10):
                start = time.monotonic()
                assert get(f"{url}/health").status_code == 200
                slowest = max(slowest, time.monotonic() - start)
            seconds, got = ends_after(client)
        assert got == b"" or b" 413 " in got.split(b"\r\n")[0]  # an end in mid-body may cost the reply
        assert seconds < 60
        assert slowest < 5


def test_a_body_in_chunks_of_fair_size_is_read() -> None:
    whole = json.dumps(body()).encode()
    parts = [whole[start : start + 200] for start in range(0, len(whole), 200)]
    with known() as (url, _, _), connected(url) as client:
        client.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        client.sendall(b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n")
        assert answer_to(client) == 200


def test_an_endless_head_is_refused() -> None:
    with known() as (url, _, _):
        client = connected(url)
        with dripping(client, HEAD + b"X: " + b"a" * 100_000, 0.01):
            assert ends_after(client)[1].startswith((b"HTTP/1.1 400", b""))
        assert post(url, body()).status_code == 200


def test_newcomers_get_the_places_of_idle_connections() -> None:
    with known(limits=Limits(connections=8)) as (url, _, _), ExitStack() as held:
        idle = [held.enter_context(connected(url)) for _ in range(30)]
        assert [post(url, body()).status_code for _ in range(5)] == [200] * 5
        ended = 0
        for client in idle:
            client.setblocking(False)
            try:
                ended += client.recv(1) == b""
            except ConnectionError:
                ended += 1
            except BlockingIOError:
                continue
        assert ended >= 22


# --- Replies that nobody reads ----------------------------------------------------------------------------------------


def noise() -> str:
    """A picture whose crops are large however they are packed."""
    image = Image.effect_noise((1000, 1000), 200).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return data_url(buffer.getvalue())


def everything(conversation: Any) -> str:
    return "[0.000, 0.000, 1.000, 1.000]" if len(conversation.views) == 1 else two_steps(conversation)


@contextmanager
def unread(url: str, count: int, **fields: Any) -> Iterator[list[socket.socket]]:
    """Clients that ask for large replies and read nothing of them."""
    asked = json.dumps(body(pictures=[noise()], n=8) | {"model": f"{NAME}:focus"} | fields).encode()
    with ExitStack() as held:
        clients = [held.enter_context(connected(url, window=4096)) for _ in range(count)]
        for client in clients:
            client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(asked) + asked)
        yield clients


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_that_is_not_read_is_given_up(stream: bool) -> None:
    with known(everything, limits=Limits(write_s=0.5)) as (url, engine, metrics), unread(url, 3, stream=stream):
        wait_until(lambda: len(engine.said) == 48)
        assert post(url, body()).status_code == 200
        wait_until(lambda: metrics.in_flight == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_that_drips_away_ends_with_the_time_of_a_request(stream: bool) -> None:
    with known(everything, limits=Limits(write_s=60, request_s=4)) as (url, engine, metrics):
        with unread(url, 1, stream=stream) as (client,):
            wait_until(lambda: len(engine.said) == 16)
            start = time.monotonic()
            while metrics.in_flight:
                client.recv(20_000)
                time.sleep(0.05)
                assert time.monotonic() - start < 60
        assert post(url, body()).status_code == 200


def test_who_keeps_the_server_waiting_makes_room_for_others() -> None:
    limits = Limits(held_bytes=30_000_000, write_s=60)
    with known(everything, limits=limits) as (url, engine, metrics), unread(url, 4):
        wait_until(lambda: len(engine.said) == 64 or metrics.requests["/v1/chat/completions", 429])
        time.sleep(1.2)
        for _ in range(3):
            reply = post(url, body(pictures=[noise()]))
            assert reply.status_code == 200, reply.text


def test_a_large_reply_arrives_whole() -> None:
    with known(everything) as (url, _, _):
        asked = body(pictures=[noise()], n=3) | {"model": f"{NAME}:focus"}
        reply = post(url, asked)
        assert int(reply.headers["content-length"]) == len(reply.content) > 4_000_000
        whole = reply.json()
        assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
        assert {len(choice["message"]["focus"]["crop"]) for choice in whole["choices"]}.pop() > 1_000_000
        assert list(whole)[:4] == ["id", "object", "created", "model"]
        streamed = post(url, asked | {"stream": True}).text
        assert streamed.count('"focus"') == 3
        assert streamed.endswith("data: [DONE]\n\n")


# --- The accounts -----------------------------------------------------------------------------------------------------


class Pipe:
    """A transport that can be cut."""

    def __init__(self, address: str, port: int) -> None:
        self.info = {"peername": (address, port), "sockname": ("here", 1)}
        self.is_cut = False

    def get_extra_info(self, name: str) -> Any:
        return self.info[name]

    def abort(self) -> None:
        self.is_cut = True


def accounts(**limits: int) -> tuple[Connections, Callable[..., Connection]]:
    connections = Connections(Limits(**limits))

    def opened(address: str, port: int, held: int = 0, waited: float | None = 0.0) -> Connection:
        connection = Connection((address, port, "here", 1), Pipe(address, port))  # type: ignore[arg-type]
        connections._all[connection.key] = connection
        if held:
            connections.hold(connection, held)
        connection.waits_since = None if waited is None else time.monotonic() - waited
        return connection

    return connections, opened


def test_room_is_made_by_the_address_that_takes_most_and_of_it_by_who_is_waited_for_longest() -> None:
    connections, opened = accounts(held_bytes=100_000_000)
    greedy = [opened("a", port, 30_000_000, waited) for port, waited in ((1, 2.0), (2, 9.0))]
    modest = opened("b", 1, 15_000_000, 50.0)
    connections.hold(opened("c", 1), 30_000_000)
    assert [connection.transport.is_cut for connection in (*greedy, modest)] == [False, True, False]  # type: ignore[union-attr]
    assert connections.held == 75_000_000


def test_nobody_is_cut_whom_the_server_itself_keeps_waiting() -> None:
    connections, opened = accounts(held_bytes=100_000_000)
    working = opened("a", 1, 70_000_000, None)
    with pytest.raises(RequestError, match="try again") as refused:
        connections.hold(opened("b", 1), 20_000_000)
    assert (refused.value.status, refused.value.retry_after_s) == (429, 1)
    assert not working.transport.is_cut  # type: ignore[union-attr]
    connections.hold(opened("b", 2), SMALL_BYTES)  # small ones have a part of their own
    connections.free(working, 70_000_000)
    assert connections.held == SMALL_BYTES


def test_what_was_cut_gives_its_bytes_back_once() -> None:
    connections, opened = accounts(held_bytes=100_000_000)
    idle = opened("a", 1, 70_000_000, 5.0)
    other = opened("b", 1)
    connections.hold(other, 70_000_000)
    connections.free(idle, 70_000_000)
    assert connections.held == 70_000_000
