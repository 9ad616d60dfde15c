"""Which critic scores trajectories: the one that a config names, in this process or behind servers.

The config imports no torch; the critics are imported when they are opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from visrl.box import CropRule, Size
from visrl.config import CheckpointConfig, ConfigError
from visrl.engines.open import (
    PATIENCE,
    OpenedPolicy,
    PatienceConfig,
    PolicyConfig,
    RequestConfig,
    ServerUrls,
    endpoint_of,
    open_beside,
    reached,
    refuse_unused,
)
from visrl.manifest import hash_checkpoint, hash_files, read_manifest
from visrl.models.settings import ModelSettings
from visrl.plugins import is_plugin, load_plugin, plugin_file
from visrl.records import Sample

if TYPE_CHECKING:
    from visrl.engines.base import Engine, Policy
    from visrl.rewards.critic import Critic


def _known_critic(name: str) -> str:
    if name != "auto" and name not in CRITICS and not is_plugin(name):
        known = ", ".join(map(repr, ("auto", *CRITICS)))
        raise ValueError(f"Input should be {known}, or module:function for one of your own")
    return name


# What `critic: outcome` grades answers by: metrics of rewards/metrics.py, and a model.
AnswerGrader = Literal["exact", "relaxed", "vqa", "anls", "judge"]
MODEL_KEYS = ("critic_model_name_or_path", "critic_url", "critic_served_name", "critic_request")


class CriticKeys(PatienceConfig):
    """The keys that say which critic scores what a policy does."""

    critic: Annotated[str, AfterValidator(_known_critic)] = "auto"
    """"oracle" knows what is drawn; "model" asks a model; "outcome" scores a box by the answers sampled from its crop;
    "auto" is the oracle for drawn scenes, else a model; `module:function` is a grader of one's own (see
    docs/EVOLVE.md)."""
    grader: AnswerGrader | None = None
    """Of critic: outcome, what says that an answer is right: a metric ("exact" by default), or "judge", a model."""
    critic_model_name_or_path: str | None = None
    """By default the original base model (the paper's choice): what the policy was first trained from."""
    critic_url: ServerUrls = ()
    critic_served_name: str | None = None
    critic_request: RequestConfig = Field(default_factory=RequestConfig)
    """How requests to the critic's servers are put: `{max_tokens_key: …, extra_body: …}`, as above for the policy."""
    critic_attempts: int = Field(3, ge=1)
    """How often a critic is asked until its reply can be read: first greedily, then with sampling. A judge is asked
    once."""
    critic_max_tokens: int = Field(64, ge=1)
    """The most that a critic may write; raise it for one that thinks aloud first."""
    use_box_critic: bool = True
    """False is the paper's ablation: the critic is not asked about boxes. `critic.box` is the same key."""

    @model_validator(mode="after")
    def _graded(self) -> Self:
        if self.critic != "outcome":
            if self.grader is not None:
                raise ValueError(f"grader: critic={self.critic} grades no answers by it; set critic: outcome")
            return self
        judged = self.grader == "judge"
        unused = ("critic_attempts",) if judged else ("critic_attempts", "critic_max_tokens", *MODEL_KEYS)
        for key in unused:
            if getattr(self, key) != CriticKeys.model_fields[key].get_default(call_default_factory=True):
                remedy = "a judge is asked once" if judged else "only grader: judge asks a model"
                raise ValueError(f"{key}: {remedy}; leave it out")
        return self


class GradingConfig(CheckpointConfig, CriticKeys):
    """`CriticKeys`, of a policy that was a checkpoint at its start."""


class CriticConfig(PolicyConfig, GradingConfig):
    """The keys that say which critic scores what the policy does, beside those of the policy."""


# Keys that change where and how patiently the work is done, and not what comes of it.
NOT_IDENTITY = PATIENCE | {"critic_url"}


def critic_kind(config: GradingConfig, samples: Sequence[Sample]) -> str:
    """The row of `CRITICS` that a config means for these samples, or the name of a grader of the user's own."""
    if config.critic != "auto":
        return config.critic
    drawn = all(sample.image.startswith("scene:") for sample in samples)
    named = bool(config.critic_url or config.critic_model_name_or_path)
    return "oracle" if drawn and not named else "model"


def critic_name(config: GradingConfig, samples: Sequence[Sample]) -> str:
    """The critic that a config means for these samples: "oracle", the path or name of a model, `module:function`, or
    "outcome" with its grader, a judge by the path or name of its model.

    Raises:
        ConfigError: the original base model cannot be found.
    """
    kind = critic_kind(config, samples)
    if kind == "outcome":
        return f"outcome:{_model_name(config) if config.grader == 'judge' else config.grader or 'exact'}"
    return _model_name(config) if kind == "model" else kind


def asks_model(config: GradingConfig, samples: Sequence[Sample]) -> bool:
    """Whether the critic that a config means for these samples is a model, or asks one."""
    return critic_kind(config, samples) == "model" or config.grader == "judge"


def critic_hash(config: GradingConfig, samples: Sequence[Sample]) -> str:
    """What decides the critic's scores, in short: its name, and the weights or the module that it is made of.

    Raises:
        ConfigError: the original base model, or the module of a grader, cannot be found.
    """
    name = critic_name(config, samples)
    if config.grader == "judge":
        return f"outcome:{hash_checkpoint(_model_name(config))}"
    if not is_plugin(critic_kind(config, samples)):
        return hash_checkpoint(name)
    load_plugin(name, "critic")
    file = plugin_file(name)
    return f"{name} {hash_files(file)}" if file is not None else name


def _model_name(config: GradingConfig) -> str:
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


@dataclass(frozen=True, slots=True)
class Grading:
    """What a critic is opened for: samples of a policy under a crop rule."""

    samples: Sequence[Sample]
    crop_size: Callable[[Size], Size]  # the size in pixels at which the policy is shown a crop of some size
    settings: ModelSettings  # how it looks at images
    crop_rule: CropRule
    image_root: str | None
    seed: int
    policy: Policy | None = None  # whose engine may be the critic's, too; None: its weights do not stay as they are
    device: str | None = None  # of a model in this process

    @staticmethod
    def of(
        opened: OpenedPolicy, samples: Sequence[Sample], crop_rule: CropRule, image_root: str | None, seed: int
    ) -> Grading:
        """The grading of a policy whose weights stay as they are."""
        size = partial(opened.policy.processed_size, is_crop=True)
        return Grading(samples, size, opened.settings, crop_rule, image_root, seed, opened.policy)


@contextmanager
def opened_critic(config: GradingConfig, grading: Grading) -> Iterator[Critic]:
    """The critic of a config, loaded, or reached and found healthy; connections are closed at the end.

    Raises:
        CheckpointError: a model that cannot be loaded.
        ConfigError: no critic for these samples.
        EndpointError: a server that does not answer or serves another model.
    """
    kind = critic_kind(config, grading.samples)
    if not config.critic_url:
        refuse_unused(config.critic_request, "critic_request: ", "critic_url")
    with CRITICS.get(kind, _function)(config, grading) as critic:
        yield critic


@contextmanager
def _function(config: GradingConfig, grading: Grading) -> Iterator[Critic]:
    """A grader of the user's own."""
    from visrl.rewards.grader import FunctionCritic

    for key in ("critic_url", "critic_model_name_or_path", "critic_served_name"):
        if getattr(config, key):
            raise ConfigError(f"{key}: critic={config.critic} asks no model; leave one of the two out")
    grader = load_plugin(config.critic, "critic")
    if not callable(grader):
        raise ConfigError(f"critic {config.critic!r} is no function of samples and trajectories")
    yield FunctionCritic(config.critic, grader)


@contextmanager
def _oracle(config: GradingConfig, grading: Grading) -> Iterator[Critic]:
    from visrl.rewards.critic import SceneOracle

    yield SceneOracle(grading.crop_size, grading.crop_rule)


@contextmanager
def _model(config: GradingConfig, grading: Grading) -> Iterator[Critic]:
    from visrl.rewards.critic import ModelCritic

    with _opened_engine(config, _model_name(config), grading) as engine:
        yield ModelCritic(
            engine,
            crop_rule=grading.crop_rule,
            root=grading.image_root,
            attempts=config.critic_attempts,
            max_tokens=config.critic_max_tokens,
            score_boxes=config.use_box_critic,
            seed=grading.seed,
        )


@contextmanager
def _outcome(config: GradingConfig, grading: Grading) -> Iterator[Critic]:
    from visrl.rewards.judge import client_asker, engine_asker
    from visrl.rewards.outcome import Judge, OutcomeCritic, metric_grader

    boxes = config.use_box_critic
    if config.grader != "judge":
        metric = config.grader or "exact"
        yield OutcomeCritic(metric, metric_grader(metric), score_boxes=boxes)
        return
    name, room = _model_name(config), config.critic_max_tokens
    if not config.critic_url:
        with _opened_engine(config, name, grading) as engine:
            yield OutcomeCritic(name, Judge(engine_asker(engine), name, room), score_boxes=boxes)
        return
    from visrl.engines.client import Client

    endpoint = endpoint_of(config.critic_url, name, config.critic_request, **config.patience)
    with closing(Client(endpoint)) as client:
        judge = Judge(client_asker(client), name, room)
        yield OutcomeCritic(name, judge, score_boxes=boxes, client=client)


@contextmanager
def _opened_engine(config: GradingConfig, name: str, grading: Grading) -> Iterator[Engine]:
    """The engine of the model that is the critic: the policy's own where it is the same model in this process."""
    from visrl.engines.local import LocalEngine

    own = name == config.model_name_or_path and not getattr(config, "adapter_name_or_path", None)
    if config.critic_url:
        with reached(config, config.critic_url, name, config.critic_request) as engine:
            yield engine
    elif own and isinstance(grading.policy, LocalEngine):
        yield grading.policy
    else:
        yield open_beside(
            name, grading.settings, device=grading.device, trust_remote_code=config.trust_remote_code
        )  # fmt: skip


# The critics by name: how each is opened. A row more is a critic more, for `visrl generate` and all that grade by name.
CRITICS: dict[str, Callable[[GradingConfig, Grading], AbstractContextManager[Critic]]] = {
    "oracle": _oracle,
    "model": _model,
    "outcome": _outcome,
}
