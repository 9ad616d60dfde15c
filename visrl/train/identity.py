"""Which training an output folder holds: the keys and parents that make two trainings one, and whose it is to clear."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from visrl.config import LATER
from visrl.data.sources import hash_source
from visrl.engines.open import PatienceConfig
from visrl.manifest import NAME as MANIFEST
from visrl.manifest import STARTED, ManifestError, hash_checkpoint, hash_files, is_complete
from visrl.plugins import plugin_file
from visrl.redact import without_secrets
from visrl.rewards.asked_parts import JUDGEMENTS, VERDICTS
from visrl.rewards.open import critic_hash
from visrl.train.config import TrainConfig
from visrl.train.distributed import say
from visrl.train.fields import TrainerFields
from visrl.train.online_config import CRITIC_KEYS, JUDGE_KEYS, ROLLOUT_KEYS, OnlineFields, asked_by
from visrl.train.ppo_config import PPOFields
from visrl.zoom.config import LooksConfig

# Keys that change neither what is learned nor what is written beside it.
NOT_IDENTITY = {
    "output_dir", "overwrite_output_dir", "dry_run", "do_train", "plot_loss", "disable_tqdm", "logging_steps",
    "report_to", "feature_cache_gb", "run_name", "log_level", "log_level_replica", "log_completions",
    "num_completions_to_print", "rollouts_in_page", "judge_url", "critic_url", "rollout_url",
    "rollout_served_name", "api_key_env", *PatienceConfig.model_fields,
}  # fmt: skip
# What a training writes, beside settings and processor: removed where other work takes its folder.
WRITTEN = (
    MANIFEST, STARTED, "log.jsonl", "rollouts.jsonl", "rollouts.html", f"{JUDGEMENTS}*.jsonl", f"{VERDICTS}*.jsonl",
    "reference.json", "training_*.svg", "adapter_*", "*.safetensors", "*.safetensors.index.json", "checkpoint-*",
    "rollout-adapters",
)  # fmt: skip


def identity_of(config: TrainConfig) -> dict[str, Any]:
    """The keys that say which training it is: a folder that holds one with others is refused."""
    values = config.model_dump(mode="json")
    unsaid = {name for name in TrainerFields.model_fields if values[name] is None}
    if not isinstance(config.resume_from_checkpoint, str):
        unsaid.add("resume_from_checkpoint")
    asked = asked_by(config.rewards)
    unsaid |= set() if "judge" in asked else JUDGE_KEYS
    unsaid |= set() if "critic" in asked else CRITIC_KEYS
    unsaid |= {key for key, value in LATER.items() if values[key] == value}
    unsaid |= {"protocol"} if config.protocol is None else set()
    if not config.is_online:
        unsaid |= OnlineFields.model_fields.keys() - LooksConfig.model_fields.keys()
    elif not config.rollout_url:
        unsaid |= ROLLOUT_KEYS
    if config.stage != "ppo":
        unsaid |= PPOFields.model_fields.keys()
    if config.stage != "rm":
        unsaid.add("center_rewards_coefficient")
    return without_secrets({key: value for key, value in values.items() if key not in NOT_IDENTITY | unsaid})


def parents_of(config: TrainConfig, adapters: list[dict[str, Any]]) -> dict[str, str]:
    """Hashes of what the training starts from: model, adapter, data, and a loss or rewards from outside the package."""
    parents = {"model": hash_checkpoint(config.model_name_or_path)}
    if adapters:
        parents["adapter"] = adapters[-1]["hash"]
    if config.dataset:
        parents["dataset"] = hash_source(config.dataset, config.dataset_dir)
    if config.stage == "dpo" and (file := plugin_file(config.pref_loss)) is not None:
        parents["loss"] = hash_files(file)
    for part in config.rewards if config.is_online else []:
        if part.argument:
            parents[f"reward {part.name}"] = hash_checkpoint(part.argument)
        elif (file := plugin_file(part.name)) is not None:
            parents[f"reward {part.name}"] = hash_files(file)
    asked = asked_by(config.rewards) if config.is_online else set()
    if "judge" in asked and not config.judge_url:
        parents["judge"] = hash_checkpoint(str(config.judge_model_name_or_path))
    if "critic" in asked and (config.critic != "auto" or config.critic_model_name_or_path or config.critic_url):
        parents["critic"] = critic_hash(config, ())  # "auto" alone follows from data and model
    return parents


def replaces_other_work(config: TrainConfig, identity: dict[str, Any]) -> bool:
    """Whether the folder holds other work of `visrl train` that the config says to replace."""
    if not config.overwrite_output_dir or not (config.output_dir / STARTED).is_file():
        return False
    found = json.loads((config.output_dir / STARTED).read_text(encoding="utf-8"))
    try:
        is_complete(config.output_dir, identity)
    except ManifestError:
        return isinstance(found, dict) and "stage" in found and "rl_stage" in found
    return False


def clear_folder(out: Path) -> None:
    """Remove what an earlier training wrote in `out`, and nothing else."""
    say(f"{out} holds other work, which makes room (overwrite_output_dir)")
    for path in {path for pattern in WRITTEN for path in out.glob(pattern)}:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
