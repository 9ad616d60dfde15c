"""`visrl train`: from a config to a trained checkpoint. Warm-up (sft), stage 1 and stage 2 (dpo) are one program.

The output folder is claimed by its config: the same command again resumes or says that it is complete, another
command is refused.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments, set_seed

from visrl.config import ConfigError
from visrl.data.sources import read_preferences, read_samples
from visrl.manifest import claim_folder, hash_files, write_manifest
from visrl.models.attention import use_tree_attention
from visrl.models.encode import Encoder
from visrl.models.families import language_model, projector, vision_tower
from visrl.models.load import load_encoder, load_model
from visrl.models.settings import ModelSettings
from visrl.records import Sample
from visrl.train.config import TrainConfig
from visrl.train.data import Curriculum, Preferences, SftSamples
from visrl.train.items import Collator, Item
from visrl.train.pack import BUCKET, TIGHT_BUCKET
from visrl.train.reference import reference_key, reference_logps
from visrl.train.trainer import COMPLETE, JsonLog, MarkComplete, VisrlTrainer

NOT_IDENTITY = {"output_dir", "dry_run", "do_train", "plot_loss", "disable_tqdm", "logging_steps", "report_to"}


def train(config: TrainConfig) -> Path:
    """Train as `config` says; the folder with adapter or weights, processor, settings, log and manifest.

    Raises:
        ConfigError: keys that do not go together.
        ManifestError: the output folder belongs to other work.
        CheckpointError: no model at `model_name_or_path`.
    """
    started = time.time()
    out = config.output_dir
    settings = model_settings(config)
    encoder = load_encoder(config.model_name_or_path, settings, trust_remote_code=config.trust_remote_code)
    parents = {"model": _hash_local(config.model_name_or_path)}
    if config.dataset and Path(config.dataset).is_file():
        parents["dataset"] = hash_files(config.dataset)
    if claim_folder(out, {**_identity(config), "parents": parents}):
        print(f"{out} is already complete")
        return out
    arguments = training_arguments(config)
    set_seed(arguments.seed)
    model = prepare_model(config)
    dataset = build_dataset(config, encoder, arguments)
    bucket = TIGHT_BUCKET if arguments.device.type == "cpu" else BUCKET
    collator = Collator(encoder, bin_length=config.bin_length, bucket=bucket, cutoff=config.cutoff_len)
    print(f"{len(dataset)} items for {'warm-up' if config.stage == 'sft' else f'stage {config.rl_stage}'}")  # type: ignore[arg-type]
    reference = {}
    if config.stage == "dpo" and config.pref_loss not in ("simpo", "orpo", "sft"):
        reference = _reference(config, model, dataset, collator, parents, arguments)
    held_out = _held_out(config)
    resume = last_complete_checkpoint(out)
    _cut_log(out / "log.jsonl", _step(resume) if resume else 0)
    trainer = VisrlTrainer(
        visrl_config=config,
        reference=reference,
        encoder=encoder,
        model=model,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=held_out or None,
        data_collator=collator,
        callbacks=[JsonLog(out), MarkComplete()],
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    _save(trainer, encoder, out)
    facts = {
        "seed": arguments.seed,
        "items": len(dataset),  # type: ignore[arg-type]
        "steps": trainer.state.global_step,
        "best": {"metric": trainer.state.best_metric, "checkpoint": trainer.state.best_global_step},
        "seconds": round(time.time() - started, 1),
        "crop_rule": settings.crop_rule,
    }
    write_manifest(out, verb="train", config=_identity(config), parents=parents, **facts)
    return out


def model_settings(config: TrainConfig) -> ModelSettings:
    """How the checkpoint looks at pictures: its own settings with what the config gives in their place."""
    own = ModelSettings.load(config.model_name_or_path)
    return own.with_given(
        image_min_pixels=config.image_min_pixels,
        image_max_pixels=config.image_max_pixels,
        crop_min_pixels=config.crop_min_pixels,
        crop_max_pixels=config.crop_max_pixels,
        crop_rule=config.crop_rule,
        codec=config.box_codec,
    )


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """The `transformers.TrainingArguments` of a config, with defaults that suit a machine of any size."""
    given = config.training_arguments()
    defaults: dict[str, Any] = {"report_to": "none", "save_total_limit": 2, "dataloader_pin_memory": False}
    if config.rollout_samples and given.get("eval_strategy", "no") != "no":
        defaults |= {"metric_for_best_model": "eval_rollout/score", "greater_is_better": True}
    return TrainingArguments(output_dir=str(config.output_dir), **{**defaults, **given}, remove_unused_columns=False)


def prepare_model(config: TrainConfig) -> torch.nn.Module:
    """The policy at the start of its stage: an adapter given is merged first, then a new one is put on.

    The reference of a stage is this model before its first step (a new LoRA adapter starts as the identity).
    """
    model = load_model(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    if config.adapter_name_or_path:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, config.adapter_name_or_path).merge_and_unload()
    use_tree_attention(model, blocks=not torch.cuda.is_available())
    if config.finetuning_type == "lora":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha or 2 * config.lora_rank,
            lora_dropout=config.lora_dropout,
            target_modules=lora_targets(model, config.lora_target),
        )
        return get_peft_model(model, lora)
    if config.freeze_vision_tower:
        vision_tower(model).requires_grad_(False)
    if config.freeze_multi_modal_projector:
        projector(model).requires_grad_(False)
    if config.freeze_language_model:
        language_model(model).requires_grad_(False)
    return model


def lora_targets(model: torch.nn.Module, target: str) -> list[str]:
    """Names of the linear layers that get an adapter: "all" is every one of the language model, the output layer left
    out; otherwise a comma-separated list of last names (q_proj,v_proj).

    Raises:
        ConfigError: a name that no layer has.
    """
    decoder = language_model(model)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    linear = [f"{prefix}.{name}" for name, module in decoder.named_modules() if isinstance(module, torch.nn.Linear)]
    if target == "all":
        return linear
    wanted = {name.strip() for name in target.split(",")}
    chosen = [name for name in linear if name.rsplit(".", 1)[1] in wanted]
    missing = wanted - {name.rsplit(".", 1)[1] for name in chosen}
    if missing:
        known = sorted({name.rsplit(".", 1)[1] for name in linear})
        raise ConfigError(f"lora_target: no layer is called {', '.join(sorted(missing))}; there are {', '.join(known)}")
    return chosen


def build_dataset(config: TrainConfig, encoder: Encoder, arguments: TrainingArguments) -> Dataset[Item]:
    """The training items of a config.

    Raises:
        ConfigError: no data named, or a curriculum for a preference stage.
    """
    if config.curriculum:
        if config.stage != "sft":
            raise ConfigError("curriculum: only stage sft draws scenes with true boxes")
        return Curriculum(encoder, config.curriculum, arguments.per_device_train_batch_size)
    if not config.dataset:
        raise ConfigError("dataset: name the data to train on")
    places = {"dataset_dir": config.dataset_dir, "image_root": config.image_root}
    if config.stage == "sft":
        samples = read_samples(config.dataset, with_box=True, **places)
        return SftSamples(encoder, samples[: config.max_samples], config.image_root)
    preferences = read_preferences(config.dataset, **places)
    dataset = Preferences(encoder, preferences, stage=config.rl_stage, root=config.image_root)
    if config.max_samples is not None:
        dataset.groups = dataset.groups[: config.max_samples]
    if not len(dataset):
        raise ConfigError(f"dataset: {config.dataset} holds no preference for stage {config.rl_stage}")
    return dataset


def _held_out(config: TrainConfig) -> list[Sample]:
    if not config.rollout_samples:
        return []
    if config.rollout_dataset is None:
        raise ConfigError("rollout_dataset: name the held-out samples that rollout_samples are taken from")
    return read_samples(config.rollout_dataset, with_box=True)[: config.rollout_samples]


def _reference(
    config: TrainConfig,
    model: torch.nn.Module,
    dataset: Dataset[Item],
    collator: Collator,
    parents: dict[str, str],
    arguments: TrainingArguments,
) -> dict[str, float]:
    parts = {**parents, **_identity(config), "dtype": str(next(model.parameters()).dtype), "attention": "visrl_tree"}
    return reference_logps(
        model.to(arguments.device),
        dataset,
        collator,
        batch_size=max(8, arguments.per_device_train_batch_size),
        cache=config.output_dir / "reference.json",
        key=reference_key(parts),
    )


def _save(trainer: VisrlTrainer, encoder: Encoder, out: Path) -> None:
    trainer.save_model(str(out))
    if trainer.is_world_process_zero():
        encoder.processor.save_pretrained(out)
        encoder.settings.save(out)
        (out / "training_args.bin").unlink(missing_ok=True)  # a pickle; the manifest says the same in the open
        for checkpoint in out.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def last_complete_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint that was written to its end; what a kill left of another is removed."""
    complete = None
    for checkpoint in sorted(out.glob("checkpoint-*"), key=_step):
        if (checkpoint / COMPLETE).is_file():
            complete = checkpoint
        else:
            shutil.rmtree(checkpoint)
    return complete


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _cut_log(path: Path, step: int) -> None:
    """Drop log lines after the checkpoint that training resumes from: they will be written again."""
    if path.is_file():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _identity(config: TrainConfig) -> dict[str, Any]:
    values = config.model_dump(mode="json")
    return {key: value for key, value in values.items() if key not in NOT_IDENTITY}


def _hash_local(path: str) -> str:
    folder = Path(path)
    return hash_files(*sorted(folder.glob("*.safetensors"))) if folder.is_dir() else path
