"""ONE way to open a model: a checkpoint in this process, or one behind OpenAI-compatible servers, for every verb.

Policy, critic, judge, server, trainer and `ask` open theirs here, so that images are sized, and boxes read, by one
setting. The seam to what lies below: `models/load.py` makes an encoder and weights from a folder, and only engines,
the trainer (`train/model.py`, whose weights are quantised and adapted) and export ask it for weights.
The configs import no torch, so that they can be refused at once; engines are imported when they are opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field

from visrl.codecs import CODECS
from visrl.config import CheckpointConfig, Config, ConfigError, OneOrMore
from visrl.engines.addresses import server_address
from visrl.failures import MAX_FAILED
from visrl.models.folder import refuse_reward_model
from visrl.models.settings import LIMITS, ModelSettings

if TYPE_CHECKING:
    from visrl.engines.base import Policy
    from visrl.engines.endpoint import EndpointEngine
    from visrl.engines.local import LocalEngine
    from visrl.engines.openai_server import Endpoint
    from visrl.models.encode import Encoder


def _addresses(urls: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(server_address, urls))


ServerUrl = Annotated[str, AfterValidator(server_address)]
ServerUrls = Annotated[OneOrMore[str], AfterValidator(_addresses)]


class RequestConfig(Config):
    """The keys that say how requests to one model's servers are put: the same for policy, critic, judge and `ask`."""

    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Added to every request: `top_k`, `chat_template_kwargs`, other things of one kind of server."""
    max_tokens_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the limit of tokens is called; newer models of OpenAI take `max_completion_tokens` only."""
    omit_fields: OneOrMore[Literal["temperature", "top_p", "seed", "logit_bias"]] = ()
    """Not sent, for servers that refuse them; they sample by their own default then."""
    thinking_tokens: int = Field(0, ge=0)
    """Room for what a model thinks aloud, beside the tokens of the reply itself."""
    api_key_env: str = Field("OPENAI_API_KEY", min_length=1)
    """The environment variable that holds the key of these servers. The key itself is in no file."""

    def given(self) -> list[str]:
        """The names of the keys of `RequestConfig` that differ from their defaults."""
        return [name for name in RequestConfig.model_fields if getattr(self, name) != getattr(_DEFAULTS, name)]


_DEFAULTS = RequestConfig()


def request_of(config: RequestConfig) -> RequestConfig:
    """The part of a larger config that says how requests are put."""
    return RequestConfig(**{name: getattr(config, name) for name in RequestConfig.model_fields})


class ModelConfig(CheckpointConfig):
    """The keys that say which model it is and how it looks at images: the same wherever it is opened."""

    adapter_name_or_path: str | None = None
    """A LoRA adapter that is merged into the model as it is loaded."""
    image_max_pixels: int | None = Field(None, ge=28 * 28)
    crop_max_pixels: int | None = Field(None, ge=28 * 28)


class PatienceConfig(Config):
    """The keys that say how patiently servers are treated."""

    concurrency: int = Field(32, ge=1)
    """Requests to servers at once."""
    request_timeout_s: float = Field(120.0, gt=0)
    request_attempts: int = Field(6, ge=1)
    max_failed: float = Field(MAX_FAILED, ge=0, le=1)
    """The share of what is asked for that may fail. A run of which more failed, or everything, ends with status 1."""

    @property
    def patience(self) -> dict[str, Any]:
        """How servers are treated, as an `Endpoint` takes it."""
        return {
            "concurrency": self.concurrency,
            "timeout_s": self.request_timeout_s,
            "attempts": self.request_attempts,
        }


class PolicyConfig(ModelConfig, RequestConfig, PatienceConfig):
    """The keys that say which model is asked, where it runs, and how patiently servers are treated."""

    policy_url: ServerUrls = ()
    """Servers of the policy, each up to `/v1`; none: it runs in this process."""
    policy_served_name: str | None = None
    """The name under which they serve it; by default `model_name_or_path`."""
    box_codec: str | None = Field(None, serialization_alias="codec")
    """How boxes are written, over what the checkpoint says. With it, `model_name_or_path` may be a server's name."""


# Keys that change where and how patiently the policy is asked, and not what comes of it.
PATIENCE = frozenset(
    {"policy_url", "api_key_env", "concurrency", "request_timeout_s", "request_attempts", "max_failed"}
)


# --- How it looks at images -------------------------------------------------------------------------------------------


def own_settings(config: CheckpointConfig) -> ModelSettings:
    """How a checkpoint looked at images before: what its last adapter's folder says, else its own.

    Raises:
        ConfigError: a file that is damaged, or says what this release does not know.
        CheckpointError: it is a reward model, which is no policy.
    """
    adapters = getattr(config, "adapter_name_or_path", None) or ()
    named = [adapters] if isinstance(adapters, str) else list(adapters)
    for path in (config.model_name_or_path, *named):
        refuse_reward_model(path)
    last = named[-1] if named else None
    return ModelSettings.load(config.model_name_or_path, last)


def model_settings(config: CheckpointConfig) -> ModelSettings:
    """How a model looks at images and writes boxes: `own_settings`, and what the config says over it.

    Raises:
        ConfigError: as `own_settings`, or no such codec.
    """
    given = {key: getattr(config, key, None) for key in LIMITS}
    return own_settings(config).with_given(**given, codec=getattr(config, "box_codec", None))


# --- In this process --------------------------------------------------------------------------------------------------


def open_encoder(config: CheckpointConfig, settings: ModelSettings) -> Encoder:
    """What sizes images, writes prompts and reads boxes as the model of a config does; no weights are loaded.

    Raises:
        CheckpointError: its processor cannot be loaded.
    """
    from visrl.models.load import load_encoder

    return load_encoder(
        config.model_name_or_path, settings, trust_remote_code=config.trust_remote_code, layout=config.layout
    )


def open_local(config: ModelConfig, settings: ModelSettings, device: str | None = None) -> LocalEngine:
    """The model of a config in this process, looking at images as `settings` say.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    from visrl.engines.local import LocalEngine

    return LocalEngine.load(
        config.model_name_or_path,
        device,
        adapter=config.adapter_name_or_path,
        settings=settings,
        trust_remote_code=config.trust_remote_code,
        layout=config.layout,
    )


def open_beside(
    name: str, like: ModelSettings | None = None, *, device: str | None = None, trust_remote_code: bool = False
) -> LocalEngine:
    """A critic or judge in this process. Where it has no limits of its own, it is shown images at the size of the
    policy's, which `like` says. How its rows are computed is its own model's affair.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    config = ModelConfig(model_name_or_path=name, trust_remote_code=trust_remote_code)
    own = model_settings(config)
    missing = {key: getattr(like, key) for key in LIMITS if getattr(own, key) is None} if like else {}
    return open_local(config, own.with_given(**missing), device)


# --- Behind servers ---------------------------------------------------------------------------------------------------


def open_served_encoder(config: ModelConfig, settings: ModelSettings) -> Encoder:
    """`open_encoder` of a model whose weights are a server's.

    Raises:
        ConfigError: an adapter, which a server cannot be given.
        CheckpointError: its processor cannot be loaded.
    """
    _refuse_adapter(config)
    return open_encoder(config, settings)


def _refuse_adapter(config: ModelConfig) -> None:
    if config.adapter_name_or_path:
        raise ConfigError("adapter_name_or_path: servers serve merged models; merge it first with `visrl export`")


def refuse_unused(request: RequestConfig, where: str, url_key: str) -> None:
    """Refuse keys about requests where none are sent.

    Raises:
        ConfigError: some are set; the message names them.
    """
    if names := request.given():
        raise ConfigError(f"{where}{', '.join(names)}: only servers are told that; set {url_key}, or leave it out")


def endpoint_of(urls: Sequence[str], name: str, request: RequestConfig, **patience: Any) -> Endpoint:
    """Where the model `name` is asked and how; `patience` are fields of `Endpoint` (see `PolicyConfig.patience`)."""
    from visrl.engines.openai_server import Endpoint

    return Endpoint(tuple(urls), name, **request_of(request).model_dump(), **patience)


@contextmanager
def reached(
    config: PatienceConfig,
    urls: Sequence[str],
    name: str,
    request: RequestConfig,
    encoder: Encoder | None = None,
    codec: str = "visrl",
) -> Iterator[EndpointEngine]:
    """The model `name` behind servers that answer and serve it; `encoder` or `codec` says how it writes boxes.

    Raises:
        EndpointError: the first server that does not.
    """
    from visrl.engines.endpoint import EndpointEngine

    endpoint = endpoint_of(urls, name, request, **config.patience)
    engine = EndpointEngine(endpoint, encoder.codec if encoder else CODECS[codec], encoder)
    try:
        engine.check()
        yield engine
    finally:
        engine.close()


def behind(urls: Sequence[str], name: str, encoder: Encoder, **options: Any) -> EndpointEngine:
    """The model `name` behind servers that have not been asked yet; `options` are an `Endpoint`'s."""
    from visrl.engines.endpoint import EndpointEngine
    from visrl.engines.openai_server import Endpoint

    return EndpointEngine(Endpoint(tuple(urls), name, **options), encoder.codec, encoder)


# --- The policy -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenedPolicy:
    """A policy ready to be asked, and how its checkpoint looks at images."""

    policy: Policy
    settings: ModelSettings


@contextmanager
def opened_policy(config: PolicyConfig) -> Iterator[OpenedPolicy]:
    """The policy of a config, loaded, or reached and found healthy; connections are closed at the end.

    Raises:
        CheckpointError: a model that cannot be loaded.
        ConfigError: an adapter, or box text that nobody described, at a server.
        EndpointError: a server that does not answer or serves another model.
    """
    settings = model_settings(config)
    if not config.policy_url:
        refuse_unused(request_of(config), "", "policy_url")
        yield OpenedPolicy(open_local(config, settings), settings)
        return
    name = config.policy_served_name or config.model_name_or_path
    encoder = _encoder_of_policy(config, settings)
    with reached(config, config.policy_url, name, config, encoder, settings.codec) as engine:
        yield OpenedPolicy(engine, settings)


def _encoder_of_policy(config: PolicyConfig, settings: ModelSettings) -> Encoder | None:
    """What sizes images as the served model does; None where the config only names the codec of a server's model."""
    if config.box_codec is None or Path(config.model_name_or_path).is_dir():
        return open_served_encoder(config, settings)
    _refuse_adapter(config)
    if CODECS[config.box_codec].in_processed_pixels:
        raise ConfigError(
            f"box_codec: {config.box_codec} writes pixels as the model's processor sized them; set model_name_or_path "
            "to the checkpoint's folder or hub name, and policy_served_name to the server's name of it"
        )
    return None
