"""Servers in a thread on loopback: one of the chat protocol that does as a script says, and the faults it may have."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from visrl.engines.endpoint import TRIAL

Script = Callable[["Handler", dict[str, Any]], None]


class Quiet(BaseHTTPRequestHandler):
    """A handler that logs nothing and takes it that clients leave."""

    def log_message(self, *args: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # many clients connect at once


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler], **state: Any) -> Iterator[Any]:
    """A server of this handler on a free port, in a thread; `state` becomes its attributes."""
    server = Server(("127.0.0.1", 0), handler)
    vars(server).update(state)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class Handler(Quiet):
    """Answers as its server's `script` says."""

    protocol_version = "HTTP/1.1"

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", headers.pop("content_type", "application/json"))
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def text(self, text: str, finish_reason: str = "stop") -> None:
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
        body = {"id": "1", "object": "chat.completion", "choices": [choice], "usage": {"completion_tokens": 3}}
        self.send(200, json.dumps(body).encode())

    def do_GET(self) -> None:
        self.send(*self.server.models)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.server.trials and TRIAL in json.dumps(body.get("messages")):
            return self.text("yes")
        self.server.bodies.append(body)
        return self.server.script(self, body)


@contextmanager
def serving(
    script: Script, models: tuple[int, bytes] = (200, b'{"data": [{"id": "m"}]}'), trials: bool = False
) -> Iterator[Any]:
    """A server of the chat protocol, its address up to `/v1` as `url`; `bodies` are the requests it got.

    The small question that every server is put first is answered by itself; with `trials` it is the script's as well.
    """
    with listening(Handler, script=script, models=models, bodies=[], trials=trials) as server:
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        yield server


# --- Faults ---------------------------------------------------------------------------------------------------------


def hang(handler: Handler, body: dict[str, Any]) -> None:
    """Says nothing until the client has left."""
    handler.connection.recv(1)
    handler.close_connection = True


def drip(handler: BaseHTTPRequestHandler, body: object = None) -> None:
    """Keeps the connection busy until the client has left: no silence for a read time-out to notice."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    while True:  # a client that has left is a ConnectionError
        handler.wfile.write(b" ")
        handler.wfile.flush()
        threading.Event().wait(0.02)


def cut(handler: Handler, body: dict[str, Any]) -> None:
    """Begins a reply and ends the connection."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


# By the name under which a client counts them.
FAULTS: dict[str, Script] = {
    "http 500": lambda handler, _: handler.send(500, b"boom", content_type="text/plain"),
    "http 429": lambda handler, _: handler.send(429, b"{}"),
    "garbage": lambda handler, _: handler.send(200, b'{"choices": [{"mess'),
    "connection": cut,
    "time-out": hang,
}


def often_faulty(sound: Script, faults: Sequence[str] = tuple(FAULTS), hangs: int = 3) -> tuple[Script, Counter[str]]:
    """A script of which 30 % of the calls end in one of these faults, and its count of what it did.

    Each of its `hangs` costs the client its whole limit. They are few, so that a limit can be long enough for every
    sound reply of a slow machine; the other faults take their place afterwards.
    """
    dice, lock, done = random.Random(1), threading.Lock(), Counter[str]()
    passing = [kind for kind in faults if kind != "time-out"]

    def script(handler: Handler, body: dict[str, Any]) -> None:
        with lock:
            kinds = faults if done["time-out"] < hangs else passing
            what = dice.choice(kinds) if dice.random() < 0.3 else "ok"
            done[what] += 1
        FAULTS.get(what, sound)(handler, body)

    return script, done
