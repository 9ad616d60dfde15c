"""Who draws and who judges: the policy and the critic that a config names, each in this process or behind servers.

The config imports no torch; the engines are imported when they are made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from visrl.box import CropRule
from visrl.config import ConfigError
from visrl.engines.open import (
    PATIENCE,
    ModelConfig,
    PolicyConfig,
    RequestConfig,
    ServerUrls,
    open_local,
    opened_policy,
    reached,
    refuse_unused,
)
from visrl.manifest import read_manifest
from visrl.records import Sample

if TYPE_CHECKING:
    from visrl.engines.base import Engine, Policy
    from visrl.engines.endpoint import EndpointEngine
    from visrl.models.settings import ModelSettings
    from visrl.rewards.critic import Critic


class PlayersConfig(PolicyConfig):
    """The keys that say which model draws (the policy) and which one judges (the critic)."""

    critic: Literal["auto", "oracle", "model"] = "auto"
    """"oracle" knows what is drawn; "model" asks a model; "auto" is the oracle for drawn scenes, else a model."""
    critic_model_name_or_path: str | None = None
    """By default the original base model (the paper's choice): what the policy was first trained from."""
    critic_url: ServerUrls = ()
    critic_served_name: str | None = None
    critic_request: RequestConfig = Field(default_factory=RequestConfig)
    """How requests to the critic's servers are put: `{max_tokens_key: …, extra_body: …}`, as above for the policy."""
    critic_attempts: int = Field(3, ge=1)
    """How often a critic is asked until its reply can be read: first greedily, then with sampling."""
    critic_max_tokens: int = Field(64, ge=1)
    """The most that a critic may write; raise it for one that thinks aloud first."""
    use_box_critic: bool = True
    """False is the paper's ablation: the critic is not asked about boxes. `critic.box` is the same key."""


# Keys that change where and how patiently the work is done, and not what comes of it.
NOT_IDENTITY = PATIENCE | {"critic_url"}


@dataclass(frozen=True, slots=True)
class Players:
    """The policy, its crop rule and the critic of one run, and what the servers' attempts came to so far."""

    policy: Policy
    critic: Critic
    crop_rule: CropRule
    servers: dict[str, EndpointEngine]

    @property
    def requests(self) -> dict[str, dict[str, int]]:
        """How the attempts at each server ended, by role: "ok", "http 500", "time-out", "gave up" and so on."""
        return {role: dict(sorted(engine.client.counts.items())) for role, engine in self.servers.items()}


@contextmanager
def players(
    config: PlayersConfig, samples: Sequence[Sample], *, crop_rule: CropRule | None, image_root: str | None, seed: int
) -> Iterator[Players]:
    """The policy and critic of a config, loaded, or reached and found healthy.

    Raises:
        CheckpointError: a model that cannot be loaded.
        ConfigError: no critic for these samples.
        EndpointError: a server that does not answer or serves another model.
    """
    from visrl.engines.endpoint import EndpointEngine

    servers: dict[str, EndpointEngine] = {}
    with ExitStack() as stack:
        opened = stack.enter_context(opened_policy(config))
        policy, settings = opened.policy, opened.settings
        if isinstance(policy, EndpointEngine):
            servers["policy"] = policy
        rule = crop_rule or settings.crop_rule
        if notice := settings.other_rule(rule):
            print(notice, flush=True)
        critic = _open_critic(config, samples, policy, settings, rule, image_root, seed, servers, stack)
        yield Players(policy, critic, rule, servers)


def critic_name(config: PlayersConfig, samples: Sequence[Sample]) -> str:
    """The critic that a config means for these samples: "oracle", or the path or name of a model.

    Raises:
        ConfigError: the original base model cannot be found.
    """
    drawn = all(sample.image.startswith("scene:") for sample in samples)
    named = bool(config.critic_url or config.critic_model_name_or_path)
    if config.critic == "oracle" or (config.critic == "auto" and drawn and not named):
        return "oracle"
    if config.critic_url:
        name = config.critic_served_name or config.critic_model_name_or_path
        if name is None:
            raise ConfigError("critic_url: say with critic_served_name which of the server's models is the critic")
        return name
    return config.critic_model_name_or_path or original_base(config.model_name_or_path)


def original_base(model: str) -> str:
    """The model that a checkpoint was first trained from, found by following the manifests of merges and trainings.

    Raises:
        ConfigError: the trail leads to a folder that is not there.
    """
    seen = [model]
    while manifest := read_manifest(seen[-1]):
        base = manifest.get("config", {}).get("model_name_or_path")
        if not isinstance(base, str) or base in seen:
            break
        seen.append(base)
    base = seen[-1]
    if len(seen) > 1 and not Path(base).exists() and (base.startswith((".", "/", "~")) or base.count("/") != 1):
        raise ConfigError(
            f"the critic would be the original base of {model}, which is {base} by its manifests, and that is not "
            "there; name a critic with critic_model_name_or_path or critic_url"
        )
    return base


def _open_critic(
    config: PlayersConfig,
    samples: Sequence[Sample],
    policy: Policy,
    settings: ModelSettings,
    rule: CropRule,
    image_root: str | None,
    seed: int,
    servers: dict[str, EndpointEngine],
    stack: ExitStack,
) -> Critic:
    from visrl.engines.local import LocalEngine
    from visrl.models.settings import ModelSettings
    from visrl.rewards.critic import ModelCritic, SceneOracle

    name = critic_name(config, samples)
    if not config.critic_url:
        refuse_unused(config.critic_request, "critic_request: ", "critic_url")
    if name == "oracle":
        return SceneOracle(lambda size: policy.processed_size(size, is_crop=True), rule)
    engine: Engine
    if config.critic_url:
        engine = servers["critic"] = stack.enter_context(
            reached(config, config.critic_url, name, config.critic_request)
        )
    elif name == config.model_name_or_path and not config.adapter_name_or_path and isinstance(policy, LocalEngine):
        engine = policy
    else:
        # A model from elsewhere has no limits of its own; it is shown pictures at the policy's size.
        limits = ("image_min_pixels", "image_max_pixels", "crop_min_pixels", "crop_max_pixels")
        own = ModelSettings.load(name)
        missing = {key: getattr(settings, key) for key in limits if getattr(own, key) is None}
        model = ModelConfig(model_name_or_path=name, trust_remote_code=config.trust_remote_code)
        engine = open_local(model, own.with_given(**missing))
    return ModelCritic(
        engine,
        crop_rule=rule,
        root=image_root,
        attempts=config.critic_attempts,
        max_tokens=config.critic_max_tokens,
        score_boxes=config.use_box_critic,
        seed=seed,
    )
