"""The same server in front of a vLLM server: rows are passed on, each streamed, so that a client that leaves frees its
slot there too. Batching, there, is vLLM's.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import threading
from typing import Any

import openai

from visrl.box import CropRule, Size
from visrl.codecs import Codec
from visrl.config import ConfigError
from visrl.conversation import Completion
from visrl.engines.client import Client, Endpoint, EndpointError
from visrl.engines.endpoint import OWNER, data_url, to_messages
from visrl.engines.process import free_port, start, stop, wait_until_served
from visrl.models.encode import Encoder
from visrl.models.load import CheckpointError, load_encoder
from visrl.models.settings import ModelSettings
from visrl.serve.batching import State
from visrl.serve.commands import ServeConfig
from visrl.serve.errors import RequestError
from visrl.serve.metrics import Metrics
from visrl.serve.rows import Row


def vllm_command(config: ServeConfig, settings: ModelSettings, port: int) -> list[str]:
    """The command line that serves the config's model with vLLM on a local port.

    Raises:
        ConfigError: an adapter, which must be merged first.
    """
    command = ["vllm", "serve", config.model_name_or_path, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", config.vllm_model or config.model_name_or_path]
    command += ["--limit-mm-per-prompt", json.dumps({"image": config.max_images})]
    # vLLM knows one limit for all pictures; crops are smaller than their whole by nature.
    pixels = {
        "min_pixels": settings.image_min_pixels,
        "max_pixels": config.image_max_pixels or settings.image_max_pixels,
    }
    given = {key: value for key, value in pixels.items() if value}
    if given:
        command += ["--mm-processor-kwargs", json.dumps(given)]
    if config.adapter_name_or_path:
        raise ConfigError("the vllm backend serves merged models; merge the adapter first with `visrl export`")
    if config.trust_remote_code:
        command.append("--trust-remote-code")
    return command + config.vllm_args


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
        self._api: openai.AsyncOpenAI | None = None
        self._mark_crops = False
        self._in_work = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._begin, name="upstream", daemon=True)

    @property
    def state(self) -> State:
        return self._state

    @property
    def failure(self) -> Exception | None:
        """Why the server could not be started or reached, where it could not."""
        return self._failure

    @property
    def codec(self) -> Codec:
        return self._known().codec

    @property
    def crop_rule(self) -> CropRule:
        return self._known().settings.crop_rule

    def processed_size(self, size: Size) -> Size:
        return self._known().processed_size(size)

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
            # How boxes are written and pictures sized is the checkpoint's; its weights are the other server's.
            settings = ModelSettings.load(self._config.model_name_or_path)
            self._encoder = load_encoder(
                self._config.model_name_or_path, settings, trust_remote_code=self._config.trust_remote_code
            )
            if not self._url:
                self._start_vllm(settings)
            self._wait_until_served()
        except (EndpointError, ConfigError, CheckpointError, OSError) as error:
            self._failure = error
            if self._state == "loading":
                self._state = "failed"

    def _start_vllm(self, settings: ModelSettings) -> None:
        port = free_port()
        self._process = start(vllm_command(self._config, settings, port))
        self._url = f"http://127.0.0.1:{port}/v1"

    def _wait_until_served(self) -> None:
        """Ask until the server answers; one that is not ours is asked once."""
        client = Client(Endpoint((self._url,), self._model, timeout_s=self._config.request_timeout_s))
        try:
            self._mark_crops = wait_until_served(client, self._process, self._stopping) == {OWNER}
            self._state = "ready" if self._state == "loading" else self._state
        finally:
            client.close()

    async def submit(self, row: Row) -> Completion:
        """The completion of one row; cancelling this closes the stream, which frees the slot there.

        Raises:
            RequestError: 429 where too many wait, 400 for what the server refuses, 502 where it failed.
        """
        if self._state != "ready":
            raise RequestError(503, f"the model is not ready ({self._state})", retry_after_s=2)
        if self._in_work >= self._config.max_waiting:
            raise RequestError(429, "too many requests wait already; try again soon", retry_after_s=1)
        self._in_work += 1
        try:
            return row.finish(await self._stream(row))
        except asyncio.CancelledError:
            self._metrics.cancelled += 1
            raise
        except openai.APIStatusError as error:
            status = error.status_code if error.status_code in (400, 413, 422, 429) else 502
            raise RequestError(status, f"the model's server answered {error.status_code}: {error.message}") from error
        except (openai.APIError, ValueError) as error:
            raise RequestError(502, f"the model's server failed: {error}") from error
        finally:
            self._in_work -= 1

    async def _stream(self, row: Row) -> Completion:
        if self._api is None:  # made in the loop that uses it
            key = os.environ.get("OPENAI_API_KEY") or "none"
            self._api = openai.AsyncOpenAI(base_url=self._url, api_key=key, max_retries=0)
        urls = {
            view.key: await asyncio.to_thread(data_url, view.image)
            for view in {view.key: view for view in row.conversation.views}.values()
        }
        messages: Any = to_messages(row.conversation, urls, self._mark_crops)
        stream = await self._api.chat.completions.create(
            model=self._model,
            messages=messages,
            temperature=row.sampling.temperature,
            top_p=row.sampling.top_p,
            max_tokens=row.sampling.max_tokens,
            seed=row.seed,
            stop=list(row.stops) or openai.omit,
            extra_body=dict(row.passed) or None,
            stream=True,
            stream_options={"include_usage": True},
        )
        text, reason, prompt_tokens, tokens = "", "stop", 0, 0
        try:
            async for chunk in stream:
                if chunk.usage is not None:
                    prompt_tokens, tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
                if not chunk.choices:
                    continue
                text += chunk.choices[0].delta.content or ""
                reason = chunk.choices[0].finish_reason or reason
                go_on, visible = row.see(text)
                if visible is not None and row.on_text is not None:
                    row.on_text(visible)
                if not go_on:
                    break
        finally:
            await stream.close()
        return Completion(text, tokens, "length" if reason == "length" else "stop", prompt_tokens=prompt_tokens)
