"""Running the application under uvicorn: load behind an open port, say where it lies, stop in order."""

from __future__ import annotations

import asyncio
import gc
import sys
import time

import uvicorn

from visrl.config import ConfigError
from visrl.conversation import Sampling
from visrl.serve.app import Settings, create_app
from visrl.serve.batching import Backend
from visrl.serve.commands import SHUTDOWN_S, ServeConfig, make_backend
from visrl.serve.metrics import Metrics
from visrl.serve.pictures import Fetcher
from visrl.serve.safety import Application, is_local_name

MOST_CONNECTIONS = 1024


def run_server(config: ServeConfig) -> None:
    """Serve until told to stop.

    Raises:
        ConfigError: the model cannot be loaded or reached, or the port is taken.
    """
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
    )
    if not settings.only_local_names and config.api_key is None:
        print(f"Warning: {config.host} is reachable from elsewhere and no API_KEY is set.", file=sys.stderr)
    backend.start()
    try:
        asyncio.run(_serve(config, create_app(backend, settings, metrics), backend))
    finally:
        died = backend.state == "stopped"
        backend.stop()
    if died:
        raise ConfigError("the engine ended with an error of its own (see above), and the server with it")
    if backend.failure is not None:
        raise ConfigError(f"{config.model_name_or_path} cannot be served: {backend.failure}") from backend.failure


async def _serve(config: ServeConfig, app: Application, backend: Backend) -> None:
    server = uvicorn.Server(
        uvicorn.Config(
            app,  # type: ignore[arg-type]
            host=config.host,
            port=config.port,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=SHUTDOWN_S,
        )
    )
    watch = asyncio.ensure_future(_watch(server, config, backend))
    try:
        await server.serve()
    except SystemExit as error:  # uvicorn's way to say that it cannot listen
        raise ConfigError(f"cannot listen on {config.host}:{config.port}; is it taken? set port") from error
    finally:
        watch.cancel()


async def _watch(server: uvicorn.Server, config: ServeConfig, backend: Backend) -> None:
    """Say when the model is loaded; end the server when it cannot be, or when its engine has died under it."""
    while backend.state == "loading" or not server.started:
        await asyncio.sleep(0.05)
    if backend.state == "ready":
        # What is loaded by now stays: without this, a fifth of the server's time goes into looking through it again.
        gc.collect()
        gc.freeze()
        _announce(server, config)
    while backend.state == "ready":
        await asyncio.sleep(0.5)
    server.should_exit = True


def _announce(server: uvicorn.Server, config: ServeConfig) -> None:
    port = server.servers[0].sockets[0].getsockname()[1]
    host = f"[{config.host}]" if ":" in config.host else config.host
    print(f"Serving {config.name} and {config.name}:focus at http://{host}:{port} (page) and /v1 (API)", flush=True)
