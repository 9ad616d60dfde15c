"""Running the application under uvicorn: load behind an open port, say where it lies, stop in order."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from visrl.config import ConfigError, as_config
from visrl.engines.base import Sampling
from visrl.engines.open import model_settings, open_local, refuse_unused, request_of
from visrl.serve.adapters import RuntimeAdapters
from visrl.serve.app import Settings, create_app
from visrl.serve.backend import Backend, Loaded
from visrl.serve.batching import ContinuousBatcher
from visrl.serve.config import ServeConfig
from visrl.serve.connections import protocol_of
from visrl.serve.images import Fetcher, Opener
from visrl.serve.memory import give_back, keep_little
from visrl.serve.metrics import Metrics
from visrl.serve.safety import Gate, is_local_name

BACKLOG = 1024
KEPT_BYTES = 64_000_000  # of images before the batch in work: strangers seldom send one twice
PLAIN_KEY = re.compile(r"[^\s\x00-\x1f\x7f]+")
SHUTDOWN_S = 20  # how long requests in work may still run once the server is told to stop
OWN_FILES = 512
TIDY_S = 10.0  # between two times that memory is given back, while there are requests


def serve(config: ServeConfig | str | Path | None = None, /, **keys: Any) -> None:
    """Serve a checkpoint behind the OpenAI protocol until stopped (SIGINT or SIGTERM), which lets the requests in
    work finish. A model name that ends in `:focus` looks before it answers.

    Args:
        config: a `ServeConfig`, the path of a YAML file of its keys, or nothing where `keys` say it all.
        keys: keys of `ServeConfig`, over what `config` says; an unknown one is refused with the nearest known one.
            API_HOST, API_PORT, API_KEY and API_MODEL_NAME of the environment win over both.

    Raises:
        ConfigError: an unknown key, remote code that was not allowed, or a model that cannot be loaded or reached.
    """
    config = as_config(ServeConfig, config, keys).with_environment(os.environ)
    if config.api_key is not None and not PLAIN_KEY.fullmatch(config.api_key):
        raise ConfigError("api_key is sent in a header, so it can hold no blanks or control characters")
    if config.trust_remote_code and not config.allow_remote_code:
        raise ConfigError(
            "trust_remote_code runs code that comes with a checkpoint, on a server for others; "
            "set allow_remote_code=true as well if you mean it"
        )
    if ":" in config.name:
        raise ConfigError(f"the served name {config.name!r} holds a colon, which marks `:focus`; set served_model_name")
    run_server(config)


def run_server(config: ServeConfig) -> None:
    """Serve until told to stop.

    Raises:
        ConfigError: the model cannot be loaded or reached, or the port is taken.
    """
    keep_little()
    with ExitStack() as held:
        # Before the model is loaded: a taken port must not cost that time. What connects meanwhile is told to wait.
        sockets = [held.enter_context(listening) for listening in listen(config.host, config.port)]
        held.enter_context(_signals_end_nothing_else())
        _serve_on(sockets, config)


def _serve_on(sockets: list[socket.socket], config: ServeConfig) -> None:
    _allow_files(2 * config.max_connections)
    metrics = Metrics()
    backend = make_backend(config, metrics)
    settings = Settings(
        name=config.name,
        sampling=Sampling(config.temperature, config.top_p, min(config.max_new_tokens, config.max_tokens_limit)),
        limits=config.limits,
        fetcher=Fetcher(frozenset(host.lower() for host in config.allowed_image_hosts)),
        api_key=config.api_key,
        only_local_names=is_local_name(config.host),
        created=int(time.time()),
        adapters=runtime_adapters(config),
        protocol=config.zoom_protocol,
        max_looks=config.max_looks,
    )
    if not settings.only_local_names and config.api_key is None:
        print(f"Warning: {config.host} is reachable from elsewhere and no API_KEY is set.", file=sys.stderr)
    backend.start()
    opener = Opener(settings.limits, settings.fetcher)
    opener.decoders.warm()
    try:
        asyncio.run(_serve(sockets, config, create_app(backend, settings, metrics, opener), backend))
    finally:
        opener.close()
        died = backend.state == "stopped"
        backend.stop()
    if died:
        raise ConfigError("the engine ended with an error of its own (see above), and the server with it")
    if backend.failure is not None:
        raise ConfigError(f"{config.model_name_or_path} cannot be served: {backend.failure}") from backend.failure


def _allow_files(connections: int) -> None:
    """Have this process open as many files as it may have connections, and some of its own."""
    with suppress(ImportError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = connections + OWN_FILES
        if soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard < 0 else min(wanted, hard), hard))


def listen(host: str, port: int) -> list[socket.socket]:
    """Listening sockets of every address of `host`; with port 0 all have the one that the first was given.

    Raises:
        ConfigError: a name without an address, or a port that is taken or not ours to take.
    """
    sockets: list[socket.socket] = []
    with ExitStack() as held:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, _, _, _, address in dict.fromkeys(found):
                listening = held.enter_context(socket.socket(family, socket.SOCK_STREAM))
                if os.name == "posix":
                    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                listening.bind((address[0], sockets[0].getsockname()[1] if sockets else port, *address[2:]))
                listening.listen(BACKLOG)
                sockets.append(listening)
        except (OSError, UnicodeError) as error:
            said = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"cannot listen on {host}:{port} ({said}); is it taken? set port") from error
        held.pop_all()
    return sockets


@contextmanager
def _signals_end_nothing_else() -> Iterator[None]:
    """Have SIGINT and SIGTERM end the server and nothing else.

    uvicorn raises the signal that stopped it once more at its end; that must not end this process before the backend
    (another server, perhaps) is stopped.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {asked: signal.signal(asked, lambda *_: None) for asked in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for asked, handler in before.items():
            signal.signal(asked, handler)


def http_config(app: Gate, **options: Any) -> uvicorn.Config:
    """How the application is served; `options` are uvicorn's."""
    given: dict[str, Any] = {
        "http": protocol_of(app.connections),
        "ws": "none",
        "lifespan": "off",
        "proxy_headers": False,  # a caller must not be able to pass for another
        "log_level": "error",  # every stranger's malformed request would be a line
        "access_log": False,
        "server_header": False,
        "limit_concurrency": 2 * app.limits.connections,  # a backstop: `Connections` makes room before
        "timeout_graceful_shutdown": SHUTDOWN_S,
    }
    return uvicorn.Config(app, **given | options)  # type: ignore[arg-type]


async def _serve(sockets: list[socket.socket], config: ServeConfig, app: Gate, backend: Backend) -> None:
    server = uvicorn.Server(http_config(app))
    beside = [
        asyncio.ensure_future(_watch(server, sockets, config, backend)),
        asyncio.ensure_future(_tidy(app.metrics)),
    ]
    try:
        await server.serve(sockets)
    finally:
        for task in beside:
            task.cancel()


async def _watch(server: uvicorn.Server, sockets: list[socket.socket], config: ServeConfig, backend: Backend) -> None:
    """Say when the model is loaded; end the server when it cannot be, or when its engine has died under it."""
    while backend.state == "loading" or not server.started:
        await asyncio.sleep(0.05)
    if backend.state == "ready":
        # What is loaded by now stays: without this, a fifth of the server's time goes into looking through it again.
        gc.collect()
        gc.freeze()
        gc.collect()  # so that the next full collection is not put off by the many objects that are frozen now
        _announce(sockets[0].getsockname()[1], config)
    while backend.state == "ready":
        await asyncio.sleep(0.5)
    server.should_exit = True


async def _tidy(metrics: Metrics) -> None:
    """Give memory back every now and then, where requests have taken some."""
    seen = 0
    while True:
        await asyncio.sleep(TIDY_S)
        if (ended := metrics.requests.total()) != seen:
            seen = ended
            await asyncio.to_thread(give_back)


def _announce(port: int, config: ServeConfig) -> None:
    host = f"[{config.host}]" if ":" in config.host else config.host
    focus = f"{config.name}:focus ({config.protocol})" if config.zoom_protocol else f"{config.name}:focus"
    print(f"Serving {config.name} and {focus} at http://{host}:{port} (page) and /v1 (API)", flush=True)


def load_local(config: ServeConfig) -> Loaded:
    """The in-process engine of the config's checkpoint."""
    settings = model_settings(config)
    engine = open_local(config, settings, config.device)
    engine.encoder.cache_bytes = KEPT_BYTES
    return Loaded(engine, settings.crop_rule)


def runtime_adapters(config: ServeConfig) -> RuntimeAdapters | None:
    """What holds the adapters that clients have loaded; None where the config lets them load none.

    Raises:
        ConfigError: the folder is not there, or the model is another server's.
    """
    if config.runtime_lora_folder is None:
        if given := [key for key in ("max_loras", "max_lora_bytes") if key in config.model_fields_set]:
            raise ConfigError(f"{given[0]}: no adapters are loaded; set runtime_lora_folder, or leave the key out")
        return None
    if config.infer_backend == "vllm":
        raise ConfigError(
            "runtime_lora_folder: with infer_backend: vllm, adapters are loaded at the vLLM server itself"
        )
    if not config.runtime_lora_folder.is_dir():
        raise ConfigError(f"runtime_lora_folder: {config.runtime_lora_folder} is no folder; make it first")
    return RuntimeAdapters(config.name, config.runtime_lora_folder, config.max_loras, config.max_lora_bytes)


def make_backend(config: ServeConfig, metrics: Metrics) -> Backend:
    """The backend that the config names, not yet started."""
    if config.infer_backend == "vllm":
        from visrl.serve.upstream import Upstream

        return Upstream(config, metrics)
    refuse_unused(request_of(config), "", "infer_backend: vllm")
    load = partial(load_local, config)
    return ContinuousBatcher(load, metrics, max_batch=config.max_batch, max_waiting=config.max_waiting)
