"""A server of the chat protocol on loopback that answers as a script says, sound or faulty."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Script = Callable[["Handler", dict[str, Any]], None]


class Handler(BaseHTTPRequestHandler):
    """Answers as its server's `script` says."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

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
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.open += 1
            self.server.most_open = max(self.server.most_open, self.server.open)
        try:
            self.server.script(self, body)
        finally:
            with self.server.lock:
                self.server.open -= 1


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # many clients connect at once


@contextmanager
def serving(script: Script, models: tuple[int, bytes] = (200, b'{"data": [{"id": "m"}]}')) -> Iterator[Any]:
    server = Server(("127.0.0.1", 0), Handler)
    server.script, server.models = script, models
    server.lock, server.bodies, server.open, server.most_open = threading.Lock(), [], 0, 0
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
