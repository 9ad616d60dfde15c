"""How an iteration trains its two stages, and how online reinforcement runs beside the iterations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from visrl.config import ConfigError, build_config, read_yaml, translate
from visrl.evolve.config import TINY_ONLINE, TINY_RL, EvolveConfig
from visrl.report.loop import ONLINE

if TYPE_CHECKING:
    from visrl.train.config import TrainConfig


def check_train_configs(config: EvolveConfig) -> None:
    """Refuse a run whose configs of training are not there, or whose online one is of no such training.

    Raises:
        ConfigError: so it is.
    """
    wanted = {
        "train_config": config.train_config,
        **({"online_config": config.online_config} if config.online_steps else {}),
    }
    for key, path in wanted.items():
        if not path.is_file():
            remedy = "configs/ is part of the source and of the installed package; install it again"
            named = "" if path in (TINY_RL, TINY_ONLINE) else ", or name a config of `visrl train`"
            raise ConfigError(f"{key}: there is no {path}; {remedy}{named}")
    if config.online_steps:
        online_config(config)


def train_and_merge(config: EvolveConfig, base: Path, stage: int, policy: str, merged: Path) -> None:
    """Train a stage of the iteration in `base`, starting from `policy`, and merge its adapter into `merged`."""
    from visrl.train.run import train

    train(stage_config(config, base, stage, policy))
    _merge(config, policy, base / f"stage{stage}", merged)


def train_online(config: EvolveConfig) -> str:
    """Reinforce the start of a run online; the checkpoint that comes of it."""
    from visrl.train.run import train

    asked, out = online_config(config), config.output_dir / ONLINE
    train(asked)
    if asked.finetuning_type != "lora":
        return str(out)
    merged = out.with_name(f"{ONLINE}-merged")
    _merge(config, config.model_name_or_path, out, merged)
    return str(merged)


def _merge(config: EvolveConfig, policy: str, adapter: Path, merged: Path) -> None:
    from visrl.train.export import ExportConfig, export

    export(
        ExportConfig(
            model_name_or_path=policy,
            adapter_name_or_path=(str(adapter),),
            export_dir=merged,
            export_dtype=config.export_dtype,
            trust_remote_code=config.trust_remote_code,
            layout=config.layout,
        )
    )


def stage_config(config: EvolveConfig, base: Path, stage: int, policy: str) -> TrainConfig:
    """How a stage of the iteration in `base` is trained, starting from `policy`.

    Raises:
        ConfigError: `train_config` or what goes over it is no config of `visrl train`.
    """
    own = config.train_stage1 if stage == 1 else config.train_stage2
    values = {
        "dataset": str(base / "filter" / "preferences.jsonl"),
        "output_dir": str(base / f"stage{stage}"),
        "rl_stage": stage,
        **_as_the_loop_looks(config, policy),
    }
    if config.chosen_only:
        values |= {"pref_loss": "sft", "pref_ftx": 0.0}
    if config.max_looks is not None and {**config.train, **own}.get("rollout_samples"):
        values["max_looks"] = config.max_looks  # held-out questions are asked as the loop asks
    return build_train_config(config.train_config, {"train": config.train, f"train_stage{stage}": own}, values)


def online_config(config: EvolveConfig) -> TrainConfig:
    """How a run is reinforced online: on the questions of its first iteration, or on `online_dataset`.

    Raises:
        ConfigError: `online_config` or what goes over it is no config of online reinforcement.
    """
    values = {
        "dataset": config.online_dataset or config.dataset[0],
        "dataset_dir": config.dataset_dir,
        "output_dir": str(config.output_dir / ONLINE),
        "max_steps": config.online_steps,
        **_as_the_loop_looks(config, config.model_name_or_path),
    }
    shared = ("max_looks", "num_forks", "look_price", "punish_unfinished")
    looks = {key: getattr(config, key) for key in shared} if config.max_looks is not None else {}
    over = {"the loop's looks": looks, "train_online": config.train_online}
    found = build_train_config(config.online_config, over, values)
    if not found.is_online:
        raise ConfigError(f"online_config: {config.online_config} is of stage {found.stage}, which samples nothing")
    return found


def _as_the_loop_looks(config: EvolveConfig, policy: str) -> dict[str, Any]:
    """Keys by which training sees the images, limits, crops and box text that the loop samples with."""
    looks = {
        "image_root": config.image_root,
        "image_max_pixels": config.image_max_pixels,
        "crop_max_pixels": config.crop_max_pixels,
        "crop_rule": config.crop_rule,
        "box_codec": config.box_codec,
        "trust_remote_code": config.trust_remote_code or None,
        "layout": config.layout if config.layout != "auto" else None,
    }
    given = {key: value for key, value in looks.items() if value is not None}
    return {"model_name_or_path": policy, "seed": config.seed, **given}


def build_train_config(path: Path, over: dict[str, dict[str, Any]], values: dict[str, Any]) -> TrainConfig:
    """The config of `visrl train` in the file `path`, with the keys of `over`, said by where they are from, and then
    `values` over its own.

    Raises:
        ConfigError: together they are no config of `visrl train`.
    """
    from visrl.train.config import TrainConfig, without_sections

    read = translate(TrainConfig, without_sections(read_yaml(path)), str(path))
    for where, keys in over.items():
        read |= translate(TrainConfig, keys, where)
    return build_config(TrainConfig, read | values, where=str(path))
