"""The config of `visrl train`: the keys this field already types, and every field of `transformers.TrainingArguments`.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from visrl.box import CropRule
from visrl.config import Adapters, ConfigError, Listed, SourceConfig, translate
from visrl.rewards.asked_parts import RewardConfig
from visrl.scenes import KINDS, LOOK_KINDS, LookKind, check_level
from visrl.train.fields import Count, Positive, TrainerFields
from visrl.train.losses import LOSSES, Loss, find_loss
from visrl.train.online_config import ONLINE_STAGES, OnlineFields, check_online, check_servers, given_keys
from visrl.train.ppo_config import PPOFields, check_ppo
from visrl.zoom.config import LooksConfig

Stage = Literal["sft", "dpo", "rm", "grpo", "rloo", "reinforce++", "ppo", "raft"]
Task = Literal["read", "locate"]
Attention = Literal["auto", "dense", "blocks", "flex"]
BETA = 0.1  # of the margins that are logged, where the loss has no β of its own


OTHER_STAGES = {
    **{name: f"write stage: dpo with pref_loss: {name}" for name in LOSSES if name != "sft"},
    "pt": "no plain text is trained on; stage: sft is the warm-up",
}


def _known_stage(value: Any) -> Any:
    if isinstance(value, str) and value in OTHER_STAGES:
        raise ValueError(OTHER_STAGES[value])
    return value


def _known_loss(name: str) -> str:
    unknown = set(find_loss(name).parameters.values()) - TrainConfig.known_keys()
    if unknown:
        raise ValueError(f"it reads the key {sorted(unknown)[0]!r}, which `visrl train` does not have")
    return name


def _beta_of_loss(values: dict[str, Any]) -> float:
    name = values.get("pref_loss")  # none where that was refused
    return find_loss(name).beta or BETA if name else BETA


def _share_or_number(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError("give a share below 1, or a whole number of pictures")
    return value


def _named_folder(path: Path) -> Path:
    if str(path) in ("", "."):
        raise ValueError("name a folder of its own; it must not be the one you work in")
    return path


def _kinds_of_level(values: dict[str, Any]) -> list[LookKind]:
    return list(LOOK_KINDS if values.get("looks") else KINDS)


class Phase(BaseModel):
    """One phase of a curriculum over drawn scenes."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    steps: int = Field(gt=0)
    tasks: list[Task] = ["locate", "read"]
    looks: bool = False  # scenes of several looks
    start: int = Field(0, ge=0)  # the scene that is the first; another start shows other scenes
    kinds: list[LookKind] = Field(default_factory=_kinds_of_level, min_length=1)
    boxes: list[LookKind] = Field(default_factory=_kinds_of_level)  # kinds with boxes to locate; others are read alone
    at_once: float = Field(1.0, ge=0, le=1)  # share of the questions about a large tag that are answered without a look
    max_looks: int | None = Field(None, ge=1)  # a question of more has one: the smallest box around them all
    per_scene: int = Field(4, ge=1)
    margin: float = Field(0.0, ge=0, le=1)  # each side of a box to locate is drawn up to this share further out
    loose: float = Field(0.0, ge=0, lt=0.5)  # each side of a crop to read is moved by up to this share of the box

    @model_validator(mode="after")
    def _all_kinds_teach(self) -> Phase:
        if "read" not in self.tasks and (without := sorted(set(self.kinds) - set(self.boxes))):
            raise ValueError(f"{', '.join(without)}: kinds without boxes have answers to read alone; add read to tasks")
        check_level((*self.kinds, *self.boxes), self.looks)
        if not self.looks and (of_looks := sorted({"at_once", "max_looks"} & self.model_fields_set)):
            raise ValueError(f"{of_looks[0]} is about the scenes of several looks: set looks: true")
        return self

    @model_serializer(mode="wrap")
    def _recorded(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keys that came later are left out where they say what was so before they came."""
        values: dict[str, Any] = write(self)
        return {key: value for key, value in values.items() if key not in _LATER or value != _LATER[key]}


_LATER: dict[str, Any] = {"looks": False, "start": 0, "at_once": 1.0, "max_looks": None}


class TrainConfig(PPOFields, OnlineFields, TrainerFields, RewardConfig, SourceConfig):
    """What `visrl train` takes, beside the fields of `transformers.TrainingArguments`."""

    adapter_name_or_path: Adapters | None = None
    """Adapters that are merged into the model before training, the first one first; with the last of a chain named,
    those that it was trained on come by themselves."""
    image_min_pixels: Count | None = None
    image_max_pixels: Count | None = None
    crop_min_pixels: Count | None = None
    crop_max_pixels: Count | None = None
    crop_rule: CropRule | None = None
    box_codec: str | None = None

    stage: Annotated[
        Literal["sft", "dpo", "rm", "grpo", "rloo", "reinforce++", "ppo", "raft"], BeforeValidator(_known_stage)
    ] = "sft"
    rl_stage: Literal[1, 2] = 1
    do_train: Literal[True] = True  # kept for the reference's configs: this verb trains
    finetuning_type: Literal["full", "freeze", "lora"] = "lora"
    quantization_bit: Literal[4, 8] | None = None  # of the frozen weights under LoRA (QLoRA), with bitsandbytes
    quantization_type: Literal["nf4", "fp4"] = "nf4"
    double_quantization: bool = True
    pure_bf16: bool = False  # all weights in bf16; with bf16 alone, weights that are trained stay in fp32
    freeze_vision_tower: bool = True
    freeze_multi_modal_projector: bool = True
    freeze_language_model: bool = False
    lora_rank: int = Field(8, gt=0, le=65_536)
    lora_alpha: Annotated[int, Field(gt=0)] | None = None  # twice the rank
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    lora_target: Listed = "all"

    pref_loss: Annotated[str, AfterValidator(_known_loss)] = "sigmoid"
    pref_beta: float = Field(default_factory=_beta_of_loss, gt=0)
    pref_beta_answer: Positive | None = None  # β₂; pref_beta where not given
    pref_ftx: float = Field(0.0, ge=0)
    dpo_label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    simpo_gamma: float = 0.5
    lambda_box: float = Field(0.5, ge=0)
    lambda_answer: float = Field(0.5, ge=0)
    router_aux_loss_coef: Annotated[float, Field(ge=0)] | None = None  # of a mixture of experts; None: as it asks
    center_rewards_coefficient: float = Field(0.01, ge=0)  # of stage rm: how firmly scores are held around 0

    dataset: Listed | None = None
    cutoff_len: int = Field(2048, gt=0)
    drop_unusable: bool = False  # leave out, and count, rows over cutoff_len and images that cannot be opened
    val_size: Annotated[float, AfterValidator(_share_or_number)] = Field(
        0.0, ge=0
    )  # images held out to validate on: a share below 1, or a number
    curriculum: list[Phase] = Field(default_factory=list)
    bin_length: int = Field(512, gt=0)  # tokens that attend to each other at most, where no item needs more
    attention: Attention = "auto"
    feature_cache_gb: float = Field(4.0, ge=0)  # main memory for features of images that nothing trains
    processes: int | None = Field(None, ge=1)  # that train together on this machine; None: one for each GPU

    rollout_dataset: str | None = None
    rollout_samples: int = Field(0, ge=0)  # held-out questions rolled out greedily at every evaluation
    plot_loss: bool = False
    output_dir: Annotated[Path, AfterValidator(_named_folder)]
    overwrite_output_dir: bool = False  # other work of `visrl train` in output_dir is removed; the same work goes on
    dry_run: bool = False

    @classmethod
    def with_sections(cls, values: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """With the file's keys `stage1` and `stage2`: the keys in that of the stage that is trained go over the file's.

        Raises:
            ConfigError: such a section holds no keys.
        """
        sections = {name: values.get(name) for name in SECTIONS}
        for name, section in sections.items():
            if section is not None and not (isinstance(section, dict) and all(isinstance(key, str) for key in section)):
                raise ConfigError(f"{name}: write the keys of that stage in it, as {{output_dir: …}}")
        plain = without_sections(values)
        both = {**plain, **given}
        section = sections.get(f"stage{both.get('rl_stage', 1)}") if both.get("stage") in PAIRED else None
        return {**plain, **translate(cls, section or {}, "the stage's own keys"), **given}

    @model_validator(mode="after")
    def _keys_of_the_stage(self) -> Self:
        if self.stage == "rm":
            if unread := given_keys(self, PREFERENCE_KEYS - REWARD_MODEL_KEYS):
                raise ValueError(f"{unread[0]}: stage: rm has one loss, Bradley and Terry's; leave the key out")
            if self.rollout_samples:
                raise ValueError("rollout_samples: a reward model scores, and answers nothing; set val_size")
        elif given_keys(self, {"center_rewards_coefficient"}):
            raise ValueError(f"center_rewards_coefficient: stage: {self.stage} scores nothing; set stage: rm")
        if self.is_online:
            if unread := given_keys(self, PREFERENCE_KEYS):
                raise ValueError(f"{unread[0]}: stage: {self.stage} learns from no preferences; leave the key out")
            if unread := given_keys(self, OFFLINE_KEYS):
                raise ValueError(f"{unread[0]}: {OFFLINE_KEYS[unread[0]]}")
            check_online(self, self.stage, self.save_steps)
            check_ppo(self, self.stage)
            check_servers(self, self.stage, self.finetuning_type == "lora", self.save_strategy, self.save_steps)
        elif unread := given_keys(self, self._online_keys()):
            raise ValueError(f"{unread[0]}: stage: {self.stage} samples nothing; set stage: grpo, or leave the key out")
        return self

    def _online_keys(self) -> set[str]:
        """Keys that mean something to online reinforcement alone; how often is looked, to held-out rollouts too."""
        keys = OnlineFields.model_fields.keys() | PPOFields.model_fields.keys()
        return keys - LooksConfig.model_fields.keys() if self.rollout_samples else keys

    @property
    def is_online(self) -> bool:
        """Whether what is learned from is sampled as training goes."""
        return self.stage in ONLINE_STAGES

    @property
    def stage_name(self) -> str:
        """What is trained, in words."""
        if self.is_online:
            return f"online reinforcement ({self.stage})"
        if self.stage == "rm":
            return f"a reward model over {'boxes' if self.rl_stage == 1 else 'boxes and answers'}"
        return "warm-up" if self.stage == "sft" else f"stage {self.rl_stage}"

    @property
    def loss(self) -> Loss:
        """What `pref_loss` names."""
        return find_loss(self.pref_loss)

    @property
    def needs_start(self) -> bool:
        """Whether online reinforcement reads log-probabilities under the model at the start of its stage."""
        return self.beta > 0 or (self.stage == "ppo" and self.kl_coef > 0)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads log-probabilities under the reference."""
        return self.stage == "dpo" and self.loss.reference

    def training_arguments(self) -> dict[str, Any]:
        """What the config says beyond our own keys: fields of `transformers.TrainingArguments`."""
        return self.trainer_values()


SECTIONS = ("stage1", "stage2")
PAIRED = ("dpo", "rm")  # the stages that learn from preferences
PREFERENCE_KEYS = {
    "rl_stage", "pref_loss", "pref_beta", "pref_beta_answer", "pref_ftx", "dpo_label_smoothing", "simpo_gamma",
    "lambda_box", "lambda_answer",
}  # fmt: skip
REWARD_MODEL_KEYS = {"rl_stage", "lambda_box", "lambda_answer"}  # those of them that a reward model's training reads
OFFLINE_KEYS = {
    "curriculum": "stage: sft alone draws scenes in phases; name questions by dataset",
    "val_size": "there are no responses to validate on; rollout_dataset and rollout_samples roll the policy out",
    "feature_cache_gb": "crops are new in every step, and no features of theirs are kept; leave the key out",
    "dry_run": "what a step takes is known only once it is sampled; try max_steps=1 in an output_dir of its own",
}


def without_sections(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config's values without those that are for one stage alone."""
    return {key: value for key, value in values.items() if key not in SECTIONS}
