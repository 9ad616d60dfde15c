"""Servers and pictures for the server's tests: real sockets on loopback, and an engine whose texts are known."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection
from typing import Any

import httpx
import uvicorn
from PIL import Image
from waiting import PATIENCE_S, wait_until

from visrl.box import Size
from visrl.codecs import CODECS, Codec
from visrl.conversation import Conversation
from visrl.engines.base import Completion
from visrl.engines.decoding import OnToken
from visrl.serve.app import Settings, create_app
from visrl.serve.backend import Backend, Loaded
from visrl.serve.batching import ContinuousBatcher
from visrl.serve.metrics import Metrics
from visrl.serve.requests import QueuedRequest
from visrl.serve.runner import http_config

NAME = "known"


class KnownEngine:
    """An engine that says what `speak` makes of a conversation, one character a token, `token_s` seconds each.

    While `go_on` is cleared no token is spoken, so that a test can let other things happen before it.
    """

    codec: Codec = CODECS["visrl"]

    def __init__(
        self,
        speak: Callable[[Conversation], str],
        token_s: float = 0.0,
        batch: type[KnownBatch] | None = None,
    ) -> None:
        self.speak, self.token_s, self.batch = speak, token_s, batch or KnownBatch
        self.batches: list[list[QueuedRequest]] = []
        self.said: list[str] = []
        self.prepared: list[tuple[str, int]] = []  # the thread in which pictures were made ready, and rows then running
        self.running = 0
        self.reads = 0  # how often a text was asked for before its end
        self.go_on = threading.Event()
        self.go_on.set()

    def processed_size(self, size: Size) -> Size:
        return size

    def prepare(self, conversation: Conversation) -> Sequence[Any]:
        self.prepared.append((threading.current_thread().name, self.running))
        return ()

    def keep(self, prepared: Iterable[Any]) -> None:
        assert list(prepared) == []

    def forget(self) -> None:
        pass

    def use_adapter(self, adapter: Any) -> None:
        assert adapter is None

    def check_adapter(self, adapter: Any) -> None:
        raise AssertionError("no adapter is loaded here")

    def read(self, text: str) -> str:
        self.reads += 1
        return text

    def begin(self, on_token: OnToken | None = None) -> KnownBatch:
        return self.batch(self, on_token)


class KnownBatch:
    """What a `KnownEngine` is saying."""

    def __init__(self, engine: KnownEngine, on_token: OnToken | None) -> None:
        self.engine, self.on_token = engine, on_token
        self.rows: dict[int, QueuedRequest] = {}
        self.said: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, rows: Mapping[int, QueuedRequest]) -> dict[int, Completion]:
        self.engine.batches.append(list(rows.values()))
        self.rows |= rows
        self.said |= dict.fromkeys(rows, "")
        return self.speak(list(rows))

    def step(self) -> dict[int, Completion]:
        return self.speak(list(self.rows))

    def speak(self, numbers: list[int]) -> dict[int, Completion]:
        self.engine.running = len(self.rows)
        time.sleep(self.engine.token_s)
        assert self.engine.go_on.wait(PATIENCE_S)
        ended = {}
        for number in numbers:
            row, said = self.rows[number], self.said[number]
            whole = self.engine.speak(row.conversation)[: row.sampling.max_tokens]
            reason = "length" if len(whole) == row.sampling.max_tokens else "stop"
            if said != whole:
                self.said[number] = said = whole[: len(said) + 1]
                if self.on_token is None or self.on_token(number, partial(self.engine.read, said)):
                    continue
                reason = "stop"
            ended[number] = Completion(said, len(said), reason, prompt_tokens=7)  # type: ignore[arg-type]
            self.engine.said.append(said)
            del self.rows[number]
        self.engine.running = len(self.rows)
        return ended


def echo(conversation: Conversation) -> str:
    return conversation.messages[-1].text


def two_steps(conversation: Conversation) -> str:
    """A box for one picture, an answer that names the crop's size for two."""
    if len(conversation.views) == 1:
        return "[0.250, 0.500, 0.750, 1.000]"
    return "crop {}x{}".format(*conversation.views[1].size) if conversation.views else "hello"


@contextmanager
def serving(backend: Backend, metrics: Metrics, wait: bool = True, **settings: Any) -> Iterator[str]:
    """The address of a real server with this backend."""
    app = create_app(backend, Settings(**{"name": NAME} | settings), metrics)
    server = uvicorn.Server(http_config(app, port=0, timeout_graceful_shutdown=PATIENCE_S))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    backend.start()
    thread.start()
    wait_until(lambda: server.started and not (wait and backend.state == "loading"))
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        backend.stop()


@contextmanager
def known(
    speak: Callable[[Conversation], str] = two_steps,
    token_s: float = 0.0,
    max_batch: int = 32,
    max_waiting: int = 256,
    **settings: Any,
) -> Iterator[tuple[str, KnownEngine, Metrics]]:
    """A server over a known engine: its address, engine and metrics."""
    engine, metrics = KnownEngine(speak, token_s), Metrics()
    batcher = ContinuousBatcher(lambda: Loaded(engine), metrics, max_batch=max_batch, max_waiting=max_waiting)
    with serving(batcher, metrics, **settings) as url:
        yield url, engine, metrics


def picture(size: tuple[int, int] = (200, 100), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()


def picture_part(url: str | None = None) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url or data_url(picture())}}


def body(question: str = "What is it?", pictures: Sequence[str] | None = None, **fields: Any) -> dict[str, Any]:
    """A chat request with pictures (one by default) and a question."""
    parts = [picture_part(url) for url in ([data_url(picture())] if pictures is None else pictures)]
    message = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
    return {"model": NAME, "messages": [message]} | fields


def post(url: str, fields: Any, **options: Any) -> httpx.Response:
    """Post a chat request; bytes go as they are."""
    content = {"content": fields} if isinstance(fields, bytes) else {"json": fields}
    headers = {"Content-Type": "application/json"} | options.pop("headers", {})
    return httpx.post(f"{url}/v1/chat/completions", headers=headers, timeout=PATIENCE_S, **content, **options)


def get(url: str, **options: Any) -> httpx.Response:
    return httpx.get(url, timeout=PATIENCE_S, **options)


@contextmanager
def left_open(url: str, fields: dict[str, Any]) -> Iterator[None]:
    """A client that posts a chat request and leaves at the end without having read a reply."""
    connection = HTTPConnection(url.removeprefix("http://"), timeout=PATIENCE_S)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(fields), headers)
    try:
        yield
    finally:
        connection.close()
