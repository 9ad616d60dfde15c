"""The policy that a config names: a checkpoint in this process, or a model behind OpenAI-compatible servers.

The config imports no torch, so that it can be refused at once; engines are imported when they are opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from visrl.codecs import CODECS
from visrl.config import Config, ConfigError, OneOrMore
from visrl.failures import MAX_FAILED
from visrl.models.settings import ModelSettings

if TYPE_CHECKING:
    from visrl.engines.endpoint import EndpointEngine
    from visrl.evolve.rollout import Policy
    from visrl.models.encode import Encoder


class PolicyConfig(Config):
    """The keys that say which model is asked, where it runs, and how patiently servers are treated."""

    model_name_or_path: str
    """The policy: a checkpoint folder or hub name. Its processor says how boxes are written, wherever it runs."""
    adapter_name_or_path: str | None = None
    policy_url: OneOrMore[str] = ()
    """Servers of the policy, each up to `/v1`; none: it runs in this process."""
    policy_served_name: str | None = None
    """The name under which they serve it; by default `model_name_or_path`."""
    codec: str | None = None
    """How boxes are written, over what the checkpoint says. With it, `model_name_or_path` may be a server's name."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Added to every request to the policy's servers: `top_k`, `chat_template_kwargs`, other things of one kind."""
    concurrency: int = Field(32, ge=1)
    """Requests to servers at once."""
    request_timeout_s: float = Field(120.0, gt=0)
    request_attempts: int = Field(6, ge=1)
    max_failed: float = Field(MAX_FAILED, ge=0, le=1)
    """The share of what is asked for that may fail. A run of which more failed, or everything, ends with status 1."""
    image_max_pixels: int | None = Field(None, ge=28 * 28)
    crop_max_pixels: int | None = Field(None, ge=28 * 28)
    trust_remote_code: bool = False


# Keys that change where and how patiently the policy is asked, and not what comes of it.
PATIENCE = frozenset({"policy_url", "concurrency", "request_timeout_s", "request_attempts", "max_failed"})


@dataclass(frozen=True, slots=True)
class OpenedPolicy:
    """A policy ready to be asked, and how its checkpoint looks at pictures."""

    policy: Policy
    settings: ModelSettings


def policy_settings(config: PolicyConfig) -> ModelSettings:
    """How the policy looks at pictures and writes boxes: what its folder says, and what the config says over it.

    Raises:
        ConfigError: no such codec.
    """
    return ModelSettings.load(config.model_name_or_path).with_given(
        image_max_pixels=config.image_max_pixels, crop_max_pixels=config.crop_max_pixels, codec=config.codec
    )


@contextmanager
def opened_policy(config: PolicyConfig) -> Iterator[OpenedPolicy]:
    """The policy of a config, loaded, or reached and found healthy; connections are closed at the end.

    Raises:
        CheckpointError: a model that cannot be loaded.
        ConfigError: an adapter, or box text that nobody described, at a server.
        EndpointError: a server that does not answer or serves another model.
    """
    settings = policy_settings(config)
    if not config.policy_url:
        from visrl.engines.local import LocalEngine

        local = LocalEngine.load(
            config.model_name_or_path,
            adapter=config.adapter_name_or_path,
            settings=settings,
            trust_remote_code=config.trust_remote_code,
        )
        yield OpenedPolicy(local, settings)
        return
    if config.adapter_name_or_path:
        raise ConfigError("adapter_name_or_path: servers serve merged models; merge it first with `visrl export`")
    name = config.policy_served_name or config.model_name_or_path
    encoder = _encoder(config, settings)
    with reached(config, config.policy_url, name, encoder, settings.codec, config.extra_body) as engine:
        yield OpenedPolicy(engine, settings)


@contextmanager
def reached(
    config: PolicyConfig,
    urls: Sequence[str],
    name: str,
    encoder: Encoder | None = None,
    codec: str = "visrl",
    extra_body: Mapping[str, Any] | None = None,
) -> Iterator[EndpointEngine]:
    """The model `name` behind servers that answer and serve it; `encoder` or `codec` says how it writes boxes.

    Raises:
        EndpointError: the first server that does not.
    """
    from visrl.engines.client import Endpoint
    from visrl.engines.endpoint import EndpointEngine

    endpoint = Endpoint(
        tuple(urls),
        name,
        concurrency=config.concurrency,
        timeout_s=config.request_timeout_s,
        attempts=config.request_attempts,
        extra_body=dict(extra_body or {}),
    )
    engine = (
        EndpointEngine(endpoint, encoder.codec, encoder.processed_size)
        if encoder
        else EndpointEngine(endpoint, CODECS[codec])
    )
    try:
        engine.check()
        yield engine
    finally:
        engine.close()


def _encoder(config: PolicyConfig, settings: ModelSettings) -> Encoder | None:
    """What sizes pictures as the served model does; None where the config only names the codec of a server's model."""
    from visrl.models.load import load_encoder

    if config.codec is None or Path(config.model_name_or_path).is_dir():
        return load_encoder(config.model_name_or_path, settings, trust_remote_code=config.trust_remote_code)
    if CODECS[config.codec].in_processed_pixels:
        raise ConfigError(
            f"codec: {config.codec} writes pixels as the model's processor sized them; set model_name_or_path to the "
            "checkpoint's folder or hub name, and policy_served_name to the server's name of it"
        )
    return None
