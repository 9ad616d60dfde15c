"""The keys of online reinforcement, under the names of TRL's `GRPOConfig` where it has them. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from visrl.config import Config
from visrl.engines.open import PatienceConfig, ServerUrls
from visrl.rewards.open import CriticKeys
from visrl.rewards.open_judge import JudgeKeys
from visrl.rewards.parts import Part, RewardPart, check_parts, kind_of
from visrl.train.fields import NotNegative, Positive
from visrl.train.importance import Mode
from visrl.train.online_losses import ONLINE_LOSSES, OnlineLoss
from visrl.zoom.config import ForkedLooksConfig
from visrl.zoom.protocols import ZOOM_PROTOCOLS

ONLINE_STAGES = ("grpo", "rloo", "reinforce++", "ppo", "raft")


# Keys that only the servers of rollouts read.
CORRECTION_KEYS = {
    "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min",
}  # fmt: skip
ROLLOUT_KEYS = CORRECTION_KEYS | {
    "rollout_served_name", "sync_every", "vllm_importance_sampling_correction", "api_key_env",
}  # fmt: skip
SAVE_STEPS = 500  # transformers' own, where a config names none


def _known_loss(name: str) -> str:
    if name not in ONLINE_LOSSES:
        raise ValueError(f"Input should be {', '.join(map(repr, ONLINE_LOSSES))}")
    return name


class OnlineFields(CriticKeys, JudgeKeys, ForkedLooksConfig):
    """What `visrl train` takes where it samples what it learns from."""

    num_generations: int = Field(8, ge=2)  # boxes sampled for a question
    num_answers: int = Field(4, ge=1)  # answers sampled from the crop of each box
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_completion_length: int = Field(64, ge=1)  # tokens of a box text, and of an answer
    mask_truncated_completions: bool = False  # responses that were cut at that length teach nothing
    punish_unfinished: bool = False  # several looks: an end at a limit is a wrong answer, where it else teaches nothing

    rewards: Annotated[
        list[Part],
        AfterValidator(check_parts),
        BeforeValidator(lambda given: [given] if isinstance(given, str | dict) else given),
    ] = Field(default_factory=lambda: [RewardPart(name="answer")])
    scale_rewards: Annotated[
        Literal["group", "batch", "none"],
        BeforeValidator(lambda given: {True: "group", False: "none"}[given] if isinstance(given, bool) else given),
    ] = "group"
    normalize_advantages: bool = False  # of RLOO: to mean 0 and deviation 1 over the batch
    dynamic_sampling: bool = False  # questions whose attempts are all worth the same are sampled again
    max_resample_times: int = Field(3, ge=1)  # how often at most

    loss_type: Annotated[str, AfterValidator(_known_loss)] | None = None
    importance_sampling_level: Literal["token", "sequence"] = "token"
    num_iterations: int = Field(1, ge=1)  # updates from what was sampled once; 1 is strictly on-policy
    epsilon: NotNegative = 0.2
    epsilon_high: Positive | None = None
    delta: Positive | None = None
    beta: NotNegative = 0.0  # weight of the KL to the model at the start of its stage
    use_bias_correction_kl: bool = True  # that KL is weighted by the importance ratio, too

    log_completions: bool = False  # a table of the last rollouts with every log, to the console and to trackers
    num_completions_to_print: Annotated[int, Field(ge=1)] | None = None  # of its rows; None: all
    rollouts_in_page: int = Field(12, ge=0)  # questions of the last step shown in rollouts.html; 0: no page

    rollout_url: ServerUrls = ()  # servers that sample, each up to `/v1`; none: this process does
    rollout_served_name: str | None = None  # under which they serve the model; by default `model_name_or_path`
    sync_every: int = Field(1, ge=1)  # steps between two adapters that they are given
    vllm_importance_sampling_correction: bool = True
    vllm_importance_sampling_mode: Mode = "sequence_mask"
    vllm_importance_sampling_clip_max: Positive | None = 3.0
    vllm_importance_sampling_clip_min: Positive | None = None
    api_key_env: str = Field("OPENAI_API_KEY", min_length=1)

    @property
    def online_loss(self) -> tuple[str, OnlineLoss]:
        """The name and the row of the loss: the stage's own where `loss_type` names none."""
        name = self.loss_type or default_loss(getattr(self, "stage", ""))
        return name, ONLINE_LOSSES[name]


# Of the keys of a reward, those that mean something to a judge, to a critic, and to any server.
JUDGE_KEYS = JudgeKeys.model_fields.keys() - PatienceConfig.model_fields.keys()
CRITIC_KEYS = CriticKeys.model_fields.keys() - PatienceConfig.model_fields.keys()
SERVER_KEYS = PatienceConfig.model_fields.keys() - {"max_failed"}


def default_loss(stage: str) -> str:
    """The loss of a stage where `loss_type` names none."""
    return "rloo" if stage == "rloo" else "dapo"


def given_keys(config: Config, keys: Any) -> list[str]:
    """Those of `keys` of which a config holds other values than the defaults, in the order of their declaration."""
    defaults = {
        key: field.get_default(call_default_factory=True, validated_data=dict(config))
        for key, field in type(config).model_fields.items()
        if key in keys
    }
    return [key for key, default in defaults.items() if getattr(config, key) != default]


def asked_by(parts: Sequence[RewardPart]) -> set[str]:
    """Who is asked about the parts of a reward: "judge", "critic", both or none."""
    return {part.name.partition("_")[0] for part in parts} & {"judge", "critic"}


def check_reward_keys(config: OnlineFields) -> None:
    """Refuse keys of a judge or a critic that no part of the reward asks, and a part whose keys are missing.

    Raises:
        ValueError: so it is; the message names the key.
    """
    asked = asked_by(config.rewards)
    if "judge" in asked and config.judge_model_name_or_path is None:
        raise ValueError(
            "judge_model_name_or_path: rewards ask a judge; name a model at judge_url, or a checkpoint to judge in "
            "this process"
        )
    for who, keys in (("judge", JUDGE_KEYS), ("critic", CRITIC_KEYS)):
        if who not in asked and (unread := given_keys(config, keys)):
            raise ValueError(f"{unread[0]}: no part of rewards asks a {who}; add {who} to them, or leave the key out")
    if not config.use_box_critic and any(part.name == "critic_box" for part in config.rewards):
        raise ValueError("use_box_critic: rewards ask critic_box; leave one of the two out")
    servers = config.judge_url or config.critic_url or config.rollout_url
    if unread := given_keys(config, SERVER_KEYS if asked and not servers else set()):
        raise ValueError(f"{unread[0]}: no server is asked; set judge_url or critic_url, or leave the key out")
    of_rollouts = SERVER_KEYS if config.rollout_url else set()
    if not asked and (unread := given_keys(config, PatienceConfig.model_fields.keys() - of_rollouts)):
        raise ValueError(f"{unread[0]}: no part of rewards asks a model; leave the key out")


def check_online(config: OnlineFields, stage: str, save_steps: float | None) -> None:
    """Refuse keys that do not go together, or that would have no effect.

    Raises:
        ValueError: so it is; the message names the key.
    """
    name, loss = config.online_loss
    check_reward_keys(config)
    check_looks(config)
    if stage != "grpo" and config.scale_rewards != "group":
        raise ValueError(f"scale_rewards: {stage} has an estimate of its own; set stage: grpo, or leave the key out")
    if stage != "rloo" and config.normalize_advantages:
        raise ValueError("normalize_advantages is of stage: rloo; with stage: grpo scale_rewards says how")
    if config.dynamic_sampling and stage in ("reinforce++", "ppo"):
        raise ValueError(
            f"dynamic_sampling: attempts that are all worth the same teach, too, under {stage}; leave it out"
        )
    if config.max_resample_times != 3 and not config.dynamic_sampling:
        raise ValueError("max_resample_times: nothing is sampled again; set dynamic_sampling, or leave the key out")
    if name == "cispo" and (config.epsilon_high is None or config.epsilon_high < 1):
        raise ValueError(
            "epsilon_high: for loss_type: cispo it is the largest ratio itself, from 1 on; give one (5.0 in its paper)"
        )
    if unread := given_keys(config, {"epsilon", "epsilon_high", "delta"} - set(loss.parameters)):
        raise ValueError(f"{unread[0]}: loss_type: {name} does not read it; leave it out")
    if loss.level is not None and config.importance_sampling_level not in ("token", loss.level):
        raise ValueError(f"importance_sampling_level: loss_type: {name} has a ratio of its own; leave the key out")
    if config.delta is not None and config.delta <= 1 + (config.epsilon_high or config.epsilon):
        raise ValueError(f"delta: {config.delta} would cut below what is clipped; give more than 1 + epsilon_high")
    if not config.use_bias_correction_kl and not config.beta:
        raise ValueError("use_bias_correction_kl: there is no KL to correct; set beta, or leave the key out")
    if config.num_completions_to_print is not None and not config.log_completions:
        raise ValueError("num_completions_to_print: nothing is printed; set log_completions, or leave the key out")
    if config.num_iterations > 1 and save_steps and save_steps % config.num_iterations:
        raise ValueError(
            f"save_steps: {save_steps:g} would save between two updates from the same rollouts; give a multiple of "
            f"num_iterations={config.num_iterations}"
        )


def check_looks(config: OnlineFields) -> None:
    """Refuse keys of several looks that do not go together, and parts of a reward that are about one look alone.

    Raises:
        ValueError: so it is; the message names the key.
    """
    if not config.looks_several_times:
        if config.punish_unfinished:
            raise ValueError("punish_unfinished: one look always comes to an answer; set max_looks, or leave it out")
        return
    row = ZOOM_PROTOCOLS.get(config.protocol or "")
    config.check_forks("num_answers", bool(given_keys(config, {"num_answers"})))
    for part in config.rewards:
        kind = kind_of(part.name)
        if kind is not None and not kind.about_several:
            raise ValueError(
                f"rewards: {part.name} is asked about one box and its answers; leave it out of several looks"
            )
        if kind is not None and kind.without_crop and row:
            raise ValueError(
                f"rewards: {part.name} compares with an answer as visrl asks for it, not {row.name}; leave it out"
            )


def check_servers(
    config: OnlineFields, stage: str, lora: bool, save_strategy: str | None, save_steps: float | None
) -> None:
    """Refuse keys about servers that do not go together, or that would have no effect. `lora`: an adapter is trained.

    Raises:
        ValueError: so it is; the message names the key.
    """
    every, low = config.sync_every, config.vllm_importance_sampling_clip_min
    if not config.rollout_url:
        if unread := given_keys(config, ROLLOUT_KEYS):
            raise ValueError(f"{unread[0]}: no server samples; set rollout_url, or leave the key out")
        return
    if not lora:
        raise ValueError(
            "rollout_url: servers are given each step's weights as a LoRA adapter; set finetuning_type: lora, or leave "
            "the key out to sample in this process"
        )
    if stage == "ppo":
        raise ValueError(
            "rollout_url: stage: ppo trains a value head beside the adapter, which no server takes; set stage: grpo, "
            "or leave the key out"
        )
    if every > 1 and every % config.num_iterations:
        raise ValueError(
            f"sync_every: {every} falls between two updates from the same rollouts; give a multiple of "
            f"num_iterations={config.num_iterations}"
        )
    saved_every = {None: save_steps or SAVE_STEPS, "steps": save_steps or SAVE_STEPS, "epoch": 1}.get(save_strategy, 0)
    if saved_every % every:
        raise ValueError(
            "save_steps: a training cannot go on as it was from between two adapters that servers are given; let it be "
            f"steps, and a multiple of sync_every={every}"
        )
    if not config.vllm_importance_sampling_correction and (unread := given_keys(config, CORRECTION_KEYS)):
        raise ValueError(f"{unread[0]}: vllm_importance_sampling_correction is off; leave the key out")
    if low is not None and low >= (config.vllm_importance_sampling_clip_max or float("inf")):
        raise ValueError(f"vllm_importance_sampling_clip_min: {low} is not below vllm_importance_sampling_clip_max")
