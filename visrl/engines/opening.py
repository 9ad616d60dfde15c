"""Which engine a config names: a checkpoint in this process, or a model behind OpenAI-compatible servers.

Heavy imports wait until the engine is opened, so that a config can be refused at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from visrl.codecs import CODECS
from visrl.config import ConfigError
from visrl.models.settings import ModelSettings

if TYPE_CHECKING:
    from visrl.engines.client import Endpoint
    from visrl.evolve.rollout import Policy


@dataclass(frozen=True, slots=True)
class OpenedPolicy:
    """A policy ready to be asked, and how its checkpoint looks at pictures."""

    policy: Policy
    settings: ModelSettings


def open_policy(
    model: str,
    *,
    adapter: str | Path | None = None,
    endpoint: Endpoint | None = None,
    codec: str | None = None,
) -> OpenedPolicy:
    """The local checkpoint `model`; with `endpoint`, the servers there, which are asked whether they serve.

    How boxes are written and pictures sized is read from the checkpoint folder `model`; where `model` is only a name at
    the endpoint, `codec` must be given. `codec` overrides the folder's.

    Raises:
        CheckpointError, EndpointError: nothing there that can be loaded or asked.
        ConfigError: an endpoint's box text that nobody described.
    """
    if codec is not None and codec not in CODECS:
        raise ConfigError(f"no codec {codec!r}; there are {', '.join(CODECS)}")
    settings = ModelSettings.load(model).with_given(codec=codec)
    if endpoint is None:
        from visrl.engines.local import LocalEngine

        return OpenedPolicy(LocalEngine.load(model, adapter=adapter, settings=settings), settings)
    from visrl.engines.endpoint import EndpointEngine

    if Path(model).is_dir():
        from visrl.models.load import load_encoder

        encoder = load_encoder(model, settings)
        engine = EndpointEngine(endpoint, encoder.codec, encoder.processed_size)
    elif codec is None:
        raise ConfigError(
            f"how does {model!r} write boxes? set codec to one of {', '.join(CODECS)}, "
            "or model_name_or_path to its checkpoint folder"
        )
    elif codec == "qwen2_5_vl":
        raise ConfigError("qwen2_5_vl writes pixels as its processor sized them: set model_name_or_path to its folder")
    else:
        engine = EndpointEngine(endpoint, CODECS[codec])
    engine.check()
    return OpenedPolicy(engine, settings)


def as_urls(base_url: str | Sequence[str] | None) -> tuple[str, ...]:
    """The addresses of a config's `base_url`, which may be one or several."""
    return () if base_url is None else (base_url,) if isinstance(base_url, str) else tuple(base_url)
