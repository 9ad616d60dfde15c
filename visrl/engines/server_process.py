"""A model's server (vLLM's, or ours) as a process of ours: started, asked until it serves, stopped with its children.

However this process ends, by an error, a signal or SIGKILL, the server ends with it: see `keeper.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from visrl.engines.client import Client
from visrl.engines.openai_server import Endpoint, EndpointError
from visrl.engines.started import forget, remember
from visrl.redact import hidden
from visrl.replies import whole_text

if TYPE_CHECKING:
    from visrl.models.encode import Encoder

START_S = 900.0  # a large model may take this long to load
POLL_S = 1.0
STOP_S = 15.0
KEEPER = Path(__file__).with_name("keeper.py")


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(command: Sequence[str], log: Path | None = None) -> subprocess.Popen[bytes]:
    """Start `command` in a process group of its own that ends with this process; what it says goes to `log`, if given.

    What is given back is its keeper, which ends as the command ends.

    Raises:
        EndpointError: there is no such program.
    """
    if shutil.which(command[0]) is None:
        raise EndpointError(
            f"there is no program {command[0]!r} to start a server with; install it (vllm: visrl[vllm])"
        )
    kept = [sys.executable, "-I", "-S", str(KEEPER), *command]
    if log is None:
        return subprocess.Popen(kept, stdin=subprocess.PIPE, start_new_session=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as said:
        return subprocess.Popen(
            kept, stdin=subprocess.PIPE, start_new_session=True, stdout=said, stderr=subprocess.STDOUT
        )


def wait_until_served(
    client: Client,
    process: subprocess.Popen[bytes] | None = None,
    stopping: threading.Event | None = None,
    start_s: float = START_S,
) -> set[str]:
    """Ask until the model is served; who the servers say owns it. A server that is no `process` of ours is asked once.

    Raises:
        EndpointError: it does not come up in time, its process ends, or `stopping` is set meanwhile.
    """
    stopping = stopping or threading.Event()
    for _ in range(max(1, int(start_s / POLL_S))):
        try:
            owners = client.check()
            if process is None or all(map(_ready, client.endpoint.base_urls)):
                return owners
        except EndpointError as error:
            if process is None:
                raise
            if process.poll() is not None:
                raise EndpointError(f"the server ended with status {process.returncode} before it served") from error
        if stopping.wait(POLL_S):
            raise EndpointError("stopped before the server came up")
    raise EndpointError(f"the server did not begin to serve within {start_s:g} s")


def _ready(url: str) -> bool:
    """Whether the server says that it is healthy: ours lists its model while it is still loading it."""
    try:
        status = httpx.get(f"{url.removesuffix('/v1')}/health", timeout=POLL_S * 5).status_code
    except httpx.HTTPError:
        return False
    return status < 500  # a server without this route is asked no more of


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that `start` gave, and its children (vLLM's workers are processes of their own)."""
    try:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(STOP_S)
    finally:  # also where waiting took too long, or a second Ctrl-C ended it
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.stdin is not None:
            process.stdin.close()


def _tail(log: Path, lines: int = 12, most: int = 4_000) -> str:
    """The last lines of a log, each with a bar before it."""
    with open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - most))
        text = hidden(whole_text(file.read().decode("utf-8", "replace")))
    return "\n".join(f"  | {line}" for line in text.splitlines()[-lines:]) or "  | (nothing)"


@contextmanager
def served(command: Sequence[str], port: int, name: str, log: Path, start_s: float = START_S) -> Iterator[str]:
    """The address of the model `name` behind `command`, a server on `port`, healthy; it is stopped at the end.

    Raises:
        EndpointError: it does not come up, or ends while it is used; the message names the log.
    """
    url = f"http://127.0.0.1:{port}/v1"
    process = start(command, log)
    client = Client(Endpoint((url,), name))
    try:
        try:
            wait_until_served(client, process, start_s=start_s)
        except EndpointError as error:
            raise EndpointError(f"{command[0]}: {error}; {log} ends with:\n{_tail(log)}") from error
        remember(url, process)
        try:
            yield url
        except EndpointError as error:
            if process.poll() is None:
                raise
            raise EndpointError(
                f"{command[0]} ended with status {process.returncode}: {error}; {log} ends with:\n{_tail(log)}\n"
                "The same command starts it again and goes on where this one stopped"
            ) from error
    finally:
        forget(url)
        client.close()
        stop(process)


def vllm_command(
    model: str,
    encoder: Encoder,
    port: int,
    *,
    served_name: str,
    max_images: int,
    trust_remote_code: bool = False,
    more: Sequence[str] = (),
) -> list[str]:
    """The command line that serves `model` with vLLM on a local port.

    vLLM knows one limit for all images. They come to it in the sizes that `encoder` gives wholes and crops, so that
    its limits need only leave both alone.
    """
    command = ["vllm", "serve", model, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", served_name]
    command += ["--limit-mm-per-prompt", json.dumps({"image": max_images})]
    if (bounds := encoder.bounds()) is not None:
        command += ["--mm-processor-kwargs", json.dumps({"size": bounds})]
    if trust_remote_code:
        command.append("--trust-remote-code")
    return [*command, *more]
