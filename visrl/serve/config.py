"""What `visrl api` takes. Imports no torch: a typo is refused at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from visrl.config import ConfigError
from visrl.engines.open import ModelConfig, RequestConfig, ServerUrl
from visrl.zoom.config import LooksConfig
from visrl.zoom.protocols import ZOOM_PROTOCOLS, ZoomProtocol

if TYPE_CHECKING:
    from visrl.serve.schemas import Limits

ENVIRONMENT = {"API_HOST": "host", "API_PORT": "port", "API_KEY": "api_key", "API_MODEL_NAME": "served_model_name"}


class ServeConfig(ModelConfig, RequestConfig, LooksConfig):
    """What `visrl api` takes; the variables API_HOST, API_PORT, API_KEY and API_MODEL_NAME win over the file.

    The keys of requests (`extra_body` and its like) are of those to the server behind this one. Those of looks say how
    `:focus` answers: by `protocol`, with up to `max_looks` where a request does not say.
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
    """Most requests in the running batch of continuous batching."""
    vllm_url: ServerUrl | None = None
    """A running vLLM (or any OpenAI-compatible) server up to `/v1`; without it one is started."""
    vllm_model: str | None = None
    """The name under which that server serves the model; by default `model_name_or_path`."""
    vllm_args: list[str] = Field(default_factory=list)
    """More arguments for the vLLM server that is started."""
    runtime_lora_folder: Path | None = None
    """A folder below which clients may have LoRA adapters loaded (`POST /v1/load_lora_adapter`); none: they may not."""
    max_loras: int = Field(4, ge=1)
    """Most adapters held at once."""
    max_lora_bytes: int = Field(1_000_000_000, ge=1)
    """Of the weights of one adapter."""
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

    @model_validator(mode="after")
    def _shows_enough(self) -> Self:
        self.check_protocol()
        pictures = self.zoom_protocol.max_pictures if self.zoom_protocol else (self.max_looks or 0) + 1
        if self.infer_backend == "vllm" and pictures > self.max_images:
            named = f"protocol={self.protocol}" if self.zoom_protocol else f"max_looks={self.max_looks}"
            raise ValueError(
                f"{named} shows up to {pictures} pictures, and vLLM takes {self.max_images} of a request; "
                f"set max_images={pictures}"
            )
        return self

    @property
    def zoom_protocol(self) -> ZoomProtocol | None:
        """The public protocol of the checkpoint, with its faults that are to be followed; None for `visrl`."""
        row = ZOOM_PROTOCOLS.get(self.protocol or "")
        return row and row.with_faults(*self.protocol_faults)

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
            image_pixels=self.max_picture_pixels,
            text_bytes=self.max_text_bytes,
            max_tokens=self.max_tokens_limit,
            choices=self.max_choices,
            request_s=self.request_timeout_s,
            connections=self.max_connections,
        )
