"""`visrl api`: the server's config, and starting and stopping it. Heavy things are imported when they are needed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from visrl.config import ConfigError
from visrl.engines.opening import ModelConfig, RequestConfig, ServerUrl, refuse_unused, request_of

if TYPE_CHECKING:
    from visrl.serve.batching import Backend, Loaded
    from visrl.serve.metrics import Metrics
    from visrl.serve.schemas import Limits

ENVIRONMENT = {"API_HOST": "host", "API_PORT": "port", "API_KEY": "api_key", "API_MODEL_NAME": "served_model_name"}
KEPT_BYTES = 64_000_000  # of pictures before the batch in work: strangers seldom send one twice
PLAIN_KEY = re.compile(r"[^\s\x00-\x1f\x7f]+")
SHUTDOWN_S = 20  # how long requests in work may still run once the server is told to stop


class ServeConfig(ModelConfig, RequestConfig):
    """What `visrl api` takes; the variables API_HOST, API_PORT, API_KEY and API_MODEL_NAME win over the file.

    The keys of requests (`extra_body` and its like) are of those to the server behind this one.
    """

    infer_backend: Literal["huggingface", "vllm"] = "huggingface"
    """"huggingface" runs the model in this process; "vllm" asks the server at `vllm_url`, or starts one."""
    allow_remote_code: bool = False
    """Beside `trust_remote_code`: run code that comes with a checkpoint on a server for others."""
    served_model_name: str | None = None
    """The name that clients ask for; by default the folder's."""
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, lt=65536)
    api_key: str | None = Field(None, min_length=1)
    device: str | None = None
    temperature: float = Field(0.0, ge=0, le=2)
    """Used where a request names none; 0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(256, ge=1)
    max_batch: int = Field(64, ge=1)
    """Rows computed together."""
    vllm_url: ServerUrl | None = None
    """A running vLLM (or any OpenAI-compatible) server up to `/v1`; without it one is started."""
    vllm_model: str | None = None
    """The name under which that server serves the model; by default `model_name_or_path`."""
    vllm_args: list[str] = Field(default_factory=list)
    """More arguments for the vLLM server that is started."""
    allowed_image_hosts: list[str] = Field(default_factory=list)
    """Hosts (`name` or `name:port`) from which http(s) pictures may be fetched; none by default."""
    max_body_bytes: int = Field(20_000_000, ge=1024)
    max_images: int = Field(8, ge=1)
    max_picture_pixels: int = Field(25_000_000, ge=1)
    max_text_bytes: int = Field(8_192, ge=1)
    max_tokens_limit: int = Field(4096, ge=1)
    max_choices: int = Field(16, ge=1)
    max_waiting: int = Field(512, ge=1)
    max_connections: int = Field(512, ge=1)
    """Beyond these the connection that keeps the server waiting longest makes room."""
    request_timeout_s: float = Field(120.0, gt=0)

    def with_environment(self, environment: Mapping[str, str]) -> ServeConfig:
        """This config with what the environment says in place.

        Raises:
            ConfigError: API_PORT is no port, or a variable is set to nothing: an empty key would be none.
        """
        given: dict[str, Any] = {key: environment[name] for name, key in ENVIRONMENT.items() if name in environment}
        for name, key in ENVIRONMENT.items():
            if key in given and not given[key].strip():
                raise ConfigError(f"{name} is set to nothing; unset it, or give it a value")
        if "port" in given:
            if not given["port"].isdecimal() or int(given["port"]) > 65535:
                raise ConfigError(f"API_PORT is {given['port']!r}; it must be a port number")
            given["port"] = int(given["port"])
        return self.model_copy(update=given)

    @property
    def name(self) -> str:
        """The name that clients ask for."""
        return self.served_model_name or Path(self.model_name_or_path).name

    @property
    def limits(self) -> Limits:
        from visrl.serve.schemas import Limits

        return Limits(
            body_bytes=self.max_body_bytes,
            images=self.max_images,
            picture_pixels=self.max_picture_pixels,
            text_bytes=self.max_text_bytes,
            max_tokens=self.max_tokens_limit,
            choices=self.max_choices,
            request_s=self.request_timeout_s,
            waiting_rows=self.max_waiting,
            connections=self.max_connections,
        )


def serve(config: ServeConfig) -> None:
    """Serve until told to stop (SIGINT or SIGTERM), which lets the requests in work finish.

    Raises:
        ConfigError: remote code that was not allowed, or a model that cannot be loaded or reached.
    """
    from visrl.serve.runner import run_server

    config = config.with_environment(os.environ)
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


def load_local(config: ServeConfig) -> Loaded:
    """The in-process engine of the config's checkpoint."""
    from visrl.engines.opening import model_settings, open_local
    from visrl.serve.batching import Loaded

    settings = model_settings(config)
    engine = open_local(config, settings, config.device)
    engine.encoder.cache_bytes = KEPT_BYTES
    return Loaded(engine, settings.crop_rule)


def make_backend(config: ServeConfig, metrics: Metrics) -> Backend:
    """The backend that the config names, not yet started."""
    from visrl.serve.batching import Batcher

    if config.infer_backend == "vllm":
        from visrl.serve.upstream import Upstream

        return Upstream(config, metrics)
    refuse_unused(request_of(config), "", "infer_backend: vllm")
    return Batcher(lambda: load_local(config), metrics, max_batch=config.max_batch, max_waiting=config.max_waiting)
