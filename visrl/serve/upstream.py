"""The backend in front of a vLLM server: requests are passed on, each streamed, so that a client that leaves frees its
slot there too. Continuous batching, there, is vLLM's.
"""

from __future__ import annotations

import asyncio
import subprocess
import threading
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace

from visrl.box import CropRule, Size
from visrl.codecs import Codec
from visrl.config import ConfigError
from visrl.engines.base import Completion
from visrl.engines.client import Client
from visrl.engines.endpoint import OWNER, sized_url, to_messages, trial, unsaid_at
from visrl.engines.open import endpoint_of, model_settings, open_served_encoder
from visrl.engines.openai_server import Ask, EndpointError
from visrl.engines.server_process import free_port, start, stop, vllm_command, wait_until_served
from visrl.engines.streaming import StreamError, stream
from visrl.models.adapters import Adapter
from visrl.models.encode import Encoder
from visrl.models.load import CheckpointError
from visrl.serve.admission import room_of
from visrl.serve.backend import State
from visrl.serve.config import ServeConfig
from visrl.serve.metrics import Metrics
from visrl.serve.requests import QueuedRequest
from visrl.serve.schemas import RequestError

STREAM_BYTES = 64_000_000  # of one stream, which spends some hundred bytes on a token


class Upstream:
    """A `Backend` over an OpenAI-compatible server: the one at `vllm_url`, else a vLLM server of its own."""

    is_passed_on = True

    def __init__(self, config: ServeConfig, metrics: Metrics) -> None:
        self._config, self._metrics = config, metrics
        self._model = config.vllm_model or config.model_name_or_path
        self._encoder: Encoder | None = None
        self._state: State = "loading"
        self._failure: Exception | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._url = config.vllm_url or ""
        self._client: Client | None = None
        self._mark_crops = False
        self._unsaid: tuple[int, ...] = ()
        self._in_work = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._begin, name="upstream", daemon=True)

    @property
    def state(self) -> State:
        if self._state == "ready" and self._process is not None and self._process.poll() is not None:
            status = self._process.returncode
            self._failure = EndpointError(f"the vLLM server behind this one ended with status {status}")
            self._state = "failed"
        return self._state

    @property
    def failure(self) -> Exception | None:
        """Why the server could not be started or reached, or how it ended by itself."""
        return self._failure

    @property
    def codec(self) -> Codec:
        return self._known().codec

    @property
    def crop_rule(self) -> CropRule:
        return self._known().settings.crop_rule

    def processed_size(self, size: Size) -> Size:
        return self._known().processed_size(size)

    def decode(self, ids: Sequence[int]) -> str:
        return self._known().decode(list(ids))

    def check_adapter(self, adapter: Adapter) -> None:
        """None is put on the model from here: `serve` refuses the key that would allow it."""
        raise RequestError(404, "adapters are loaded at the server behind this one")

    def _known(self) -> Encoder:
        if self._encoder is None:
            raise RequestError(503, "the model is not ready; try again soon", retry_after_s=2)
        return self._encoder

    def start(self) -> None:
        """Begin to start, or to look for, the server; returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the server if it is ours."""
        self._state = "stopped"
        self._stopping.set()
        self._thread.join()
        if self._process is not None:
            stop(self._process)

    def _begin(self) -> None:
        try:
            # How boxes are written and images sized is the checkpoint's; its weights are the other server's.
            self._encoder = open_served_encoder(self._config, model_settings(self._config))
            if not self._url:
                self._start_vllm(self._encoder)
            self._wait_until_served()
        except (EndpointError, ConfigError, CheckpointError, OSError) as error:
            self._failure = error
            if self._state == "loading":
                self._state = "failed"

    def _start_vllm(self, encoder: Encoder) -> None:
        port = free_port()
        self._process = start(
            vllm_command(
                self._config.model_name_or_path,
                encoder,
                port,
                served_name=self._model,
                max_images=self._config.max_images,
                trust_remote_code=self._config.trust_remote_code,
                more=self._config.vllm_args,
            )
        )
        self._url = f"http://127.0.0.1:{port}/v1"

    def _wait_until_served(self) -> None:
        """Ask until the server answers; one that is not ours is asked once, and put a small question."""
        client = self._new_client()
        try:
            owners = wait_until_served(client, self._process, self._stopping)
            self._mark_crops = owners == {OWNER}
            self._unsaid = unsaid_at(owners, self._encoder)
            if not self._mark_crops:
                client.try_out(replace(trial(), unsaid=self._unsaid))
            self._url = client.first.url  # where `/v1` was forgotten, it has been found
            self._state = "ready" if self._state == "loading" else self._state
        finally:
            client.close()

    def _new_client(self) -> Client:
        endpoint = endpoint_of((self._url,), self._model, self._config, timeout_s=self._config.request_timeout_s)
        return Client(endpoint, most_bytes=STREAM_BYTES)

    async def submit(self, request: QueuedRequest) -> Completion:
        """The completion of one request; cancelling this closes the stream, which frees the slot there.

        Raises:
            RequestError: 429 where too many wait, 400 for what the server refuses, 502 where it failed.
        """
        if self.state != "ready":
            raise RequestError(503, f"the model is not ready ({self._state})", retry_after_s=2)
        if self._in_work >= room_of(request, self._config.max_waiting):
            raise RequestError(429, "too many requests wait already; try again soon", retry_after_s=1)
        self._in_work += 1
        try:
            return request.finish(await self._stream(request))
        except asyncio.CancelledError:
            self._metrics.cancelled += 1
            raise
        except StreamError as error:
            raise RequestError(error.status, str(error)) from error
        finally:
            self._in_work -= 1

    async def _stream(self, request: QueuedRequest) -> Completion:
        if self._client is None:  # made in the loop that uses it
            self._client = self._new_client()
        try:
            await asyncio.to_thread(self._known().check_tools, request.conversation)
        except ValueError as error:
            raise RequestError(400, str(error)) from error
        try:
            urls = {
                view.key: await asyncio.to_thread(sized_url, view, None if self._mark_crops else self._encoder)
                for view in {view.key: view for view in request.conversation.views}.values()
            }
        except ValueError as error:
            raise RequestError(400, f"the model's processor refuses a picture: {error}") from error
        messages = to_messages(request.conversation, urls, self._mark_crops)
        goes_on = bool(request.conversation.prefill)
        ask = Ask(
            messages,
            request.sampling,
            request.seed,
            unsaid=self._unsaid,
            goes_on=goes_on,
            tools=request.conversation.tools,
        )
        more = {**request.passed, **({"stop": list(request.stops)} if request.stops else {})}
        text, reason, counts = "", "stop", (0, 0)
        async with aclosing(stream(self._client, ask, more)) as pieces:
            async for piece in pieces:
                text += piece.text
                reason = piece.reason or reason
                counts = piece.counts or counts
                go_on, visible = request.see(text)
                if visible is not None and request.on_text is not None:
                    request.on_text(visible)
                if not go_on and not request.ends:  # of what goes on to its end the tokens are counted there
                    break
        return Completion(text, counts[0], "length" if reason == "length" else "stop", prompt_tokens=counts[1])
