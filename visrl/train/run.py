"""`visrl train`: from a config to a trained checkpoint. Warm-up (sft), stage 1 and stage 2 (dpo) and online
reinforcement (grpo and its like) are one program.

The output folder is claimed by its config: the same command again resumes or says that it is complete, another
command is refused. What cannot be trained is refused before the folder is claimed.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

from visrl.config import ConfigError, as_config
from visrl.engines.open import model_settings, open_encoder, own_settings
from visrl.engines.recompute import try_out
from visrl.manifest import claim_folder, hold, is_complete, write_manifest
from visrl.models.chain import adapter_chain, described
from visrl.models.encode import Encoder
from visrl.models.load import note_plain
from visrl.models.value_head import add_value_head
from visrl.packing.pack import BUCKET, TIGHT_BUCKET
from visrl.progress import next_command
from visrl.records import Sample
from visrl.rewards.asked_parts import RewardSetting
from visrl.rewards.open_parts import load_parts, opened_parts
from visrl.rewards.parts import Scorer
from visrl.train.arguments import check_start, refusals, training_arguments
from visrl.train.checkpoints import MarkComplete, check_resume, checkpoint_to_resume, writing
from visrl.train.config import TrainConfig
from visrl.train.curriculum import Curriculum
from visrl.train.data import SftSamples, build_data, read_questions, read_rollout_samples
from visrl.train.distributed import launched, on_processes, processes_wanted, say, sharding_forgotten, shards_weights
from visrl.train.dry_run import DatasetScan, dry_run, peak_bytes, scan_dataset
from visrl.train.features import open_features
from visrl.train.identity import clear_folder, identity_of, parents_of, replaces_other_work
from visrl.train.items import Collator
from visrl.train.log import JsonLog, plot_loss
from visrl.train.model import check_layout, check_policy, prepare_model, router_weight
from visrl.train.online import OnlineTrainer
from visrl.train.ppo import PPOTrainer
from visrl.train.reference import hash_images, reference_key, reference_logps
from visrl.train.reward_model import RewardModelTrainer, freeze_output_layer
from visrl.train.rollout_servers import RolloutServers
from visrl.train.sampler import SameImageSampler
from visrl.train.trainer import VisrlTrainer


def train(config: TrainConfig | str | Path | None = None, /, **keys: Any) -> Path:
    """Train, in one process for each GPU: warm-up (`stage="sft"`), preference training (`stage="dpo"`) of boxes
    (`rl_stage=1`) and of boxes and answers (`rl_stage=2`), as in VisRL (arXiv 2503.07523), a reward model from the same
    preferences (`stage="rm"`), or online reinforcement (`stage="grpo"`, "rloo", "reinforce++", "ppo" or "raft"), which
    samples what it learns from.

    The same call again resumes where it was stopped, or says that it is complete.

    Args:
        config: a `TrainConfig`, the path of a YAML file of its keys, or nothing where `keys` say it all.
        keys: keys of `TrainConfig`, over what `config` says; an unknown one is refused with the nearest known one.

    Returns:
        `output_dir`: adapter or weights, processor, settings, `log.jsonl` (a row for every logged step), manifest, and
        online `rollouts.jsonl` (a row for every question of every step) and `rollouts.html` (pictures of the last).

    Raises:
        ConfigError: an unknown key, keys that do not go together, or no data.
        ManifestError: the output folder belongs to other work, or another process writes it.
        CheckpointError: no model at `model_name_or_path`.
        RecordError: rows that are none, or longer than `cutoff_len`.
        ProcessError: one of several processes failed.
        TrainingError: the loss became NaN or infinite, or nothing was trained or could be learned from.
        RewardError: a reward of one's own stopped, or gave no scores.
    """
    config = as_config(TrainConfig, config, keys)
    count = processes_wanted(config.processes)
    # Of processes that somebody else launched the first holds the folder; of our own, we who started them.
    holds = not config.dry_run and os.environ.get("RANK", "0") == "0"
    with hold(config.output_dir) if holds else nullcontext():
        if launched() or count == 1 or config.dry_run:
            train_here(config)
        else:
            where = "each on its GPU" if torch.cuda.is_available() else "on the CPU"
            print(f"training in {count} processes, {where}", flush=True)
            on_processes(count, train_here, config)
    return config.output_dir


def train_here(config: TrainConfig) -> None:
    """Train in this process, which may be one of several."""
    with sharding_forgotten(), ExitStack() as opened:
        _train(config, opened)


def _train(config: TrainConfig, opened: ExitStack) -> None:
    """`train_here`; `opened` closes what is open for the run, as the models and servers that score."""
    started = time.time()
    out = config.output_dir
    settings = model_settings(config).with_given(crop_rule=config.crop_rule)
    encoder = open_encoder(config, settings)
    check_layout(config, encoder.family)
    if weight := router_weight(config, encoder.config):
        say(f"the loss of how evenly experts are used is added, with the weight {weight:g} (router_aux_loss_coef)")
    check_policy(config)
    load_parts(config.rewards)
    adapters = described(adapter_chain(config.model_name_or_path, config.adapter_name_or_path))
    parents = parents_of(config, adapters)
    identity = {**identity_of(config), "parents": parents}
    if not config.dry_run and not replaces_other_work(config, identity) and is_complete(out, identity):
        say(f"{out} is already complete")
        return
    check_resume(config)
    arguments = training_arguments(config)
    if notice := own_settings(config).other_rule(settings.crop_rule):
        say(f"{notice}, and what comes out is made for {settings.crop_rule!r}")
    set_seed(arguments.seed)
    rollouts = read_rollout_samples(config)
    bucket = TIGHT_BUCKET if arguments.device.type == "cpu" else BUCKET
    collator = Collator(
        encoder, bin_length=config.bin_length, bucket=bucket, cutoff=config.cutoff_len, ends=config.stage == "rm"
    )
    dataset, validation, scan = _usable_data(config, collator, arguments)
    model = _with_head(prepare_model(config, plain=bool(encoder.family.plain)), config).to(arguments.device)
    if not shards_weights(arguments):
        try_out(model, encoder, config.model_name_or_path)
    limit = int(config.feature_cache_gb * 1e9)
    keeps_none = config.is_online or shards_weights(arguments) or bool(encoder.family.plain)
    features = None if keeps_none else open_features(model, encoder.family, limit)
    kind = trainer_of(config)
    common: dict[str, Any] = {
        "visrl_config": config, "encoder": encoder, "model": model, "features": features,
        "collator" if config.is_online else "data_collator": collator,
    }  # fmt: skip
    if config.is_online:
        common["scorers"] = opened.enter_context(_scorers(config, dataset.samples, encoder, arguments))
    if config.rollout_url:
        common["servers"] = servers = RolloutServers(config, encoder)
        servers.check(model, config.temperature)
        opened.enter_context(servers.serving())
    if scan is not None and config.dry_run:
        dry_run(dataset, scan, kind, **common)
        return
    with refusals():
        trainer = kind(
            args=arguments, train_dataset=dataset, validation=validation, rollouts=rollouts,
            callbacks=[JsonLog(out), MarkComplete()], **common,
        )  # fmt: skip
    check_start(trainer, len(dataset))
    if arguments.process_index == 0:
        if replaces_other_work(config, identity):
            clear_folder(out)
        claim_folder(out, identity)
    note_plain(config.model_name_or_path, encoder)
    say(_format_data(config, arguments, dataset, validation))
    if config.needs_reference:
        trainer.reference = _reference(trainer, [part for part in (dataset, validation) if part is not None], identity)
    resume = checkpoint_to_resume(config, arguments)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    trainer.check_trained(resume)
    facts = {
        "adapters": adapters,
        "seed": arguments.seed,
        "items": len(dataset),
        "steps": trainer.state.global_step,
        "processes": arguments.world_size,
        "best": {"metric": trainer.state.best_metric, "checkpoint": trainer.state.best_global_step},
        "peak_memory_mb": round(peak_bytes(arguments.device) / 1e6),
        "crop_rule": settings.crop_rule,
    }
    _write(trainer, encoder, parents, facts, started)
    say(f"{facts['steps']} steps, peak memory {facts['peak_memory_mb']} MB a process → {out}")
    say(_next_command(config))


def trainer_of(config: TrainConfig) -> type[VisrlTrainer]:
    """The trainer of a stage."""
    if config.stage == "rm":
        return RewardModelTrainer
    if config.stage == "ppo":
        return PPOTrainer
    return OnlineTrainer if config.is_online else VisrlTrainer


def _with_head(model: torch.nn.Module, config: TrainConfig) -> torch.nn.Module:
    """The model with a value head where its stage trains one."""
    if config.stage in ("rm", "ppo"):
        add_value_head(model)
    if config.stage == "rm":
        freeze_output_layer(model)
    return model


def _scorers(
    config: TrainConfig, samples: Sequence[Sample], encoder: Encoder, arguments: TrainingArguments
) -> AbstractContextManager[dict[str, Scorer]]:
    """The parts of the reward, opened: before the folder is claimed, and before anything is sampled."""
    setting = RewardSetting(
        config, samples, encoder, encoder.settings.crop_rule, config.image_root, arguments.seed, arguments.device,
        config.output_dir, arguments.process_index,
    )  # fmt: skip
    return opened_parts(config.rewards, setting)


def _usable_data(
    config: TrainConfig, collator: Collator, arguments: TrainingArguments
) -> tuple[Any, Any, DatasetScan | None]:
    """The items to train on and to validate on (or None), and what a scan of the former found where one is wanted.

    Raises:
        ConfigError: nothing is left to train on, or to validate on.
    """
    if config.is_online:
        if shards_weights(arguments):
            raise ConfigError(
                f"stage: {config.stage} samples in each process, from whole weights; leave FSDP and DeepSpeed out, and "
                "train an adapter (finetuning_type: lora) on several GPUs"
            )
        questions, dropped = read_questions(config, collator)
        if dropped:
            say(dropped)
        return questions, None, None
    if config.stage == "rm" and shards_weights(arguments):
        raise ConfigError("stage: rm: the head is trained in each process; leave FSDP and DeepSpeed out")
    dataset: Any
    validation: Any
    dataset, validation = build_data(config, collator.encoder, arguments)
    scan = None
    if config.drop_unusable or config.dry_run:
        scan, dataset = scan_dataset(dataset, collator)
        say(scan.format_counts(config.drop_unusable))
        if validation is not None:
            to_validate, validation = scan_dataset(validation, collator)
            say(f"to validate on: {to_validate.format_counts(config.drop_unusable)}")
    for part in (dataset, validation):
        if isinstance(part, SftSamples) and (count := part.without_box()):
            say(f"{count:,} questions have no box: what is learned of them is the answer to the whole picture")
        if part is not None and not len(part):
            raise ConfigError(f"dataset: {config.dataset} holds no row for {config.stage_name} that can be used")
    return dataset, validation, scan


def _reference(trainer: VisrlTrainer, parts: list[Any], identity: dict[str, Any]) -> dict[str, float]:
    """Reference log-probabilities of all items: of the model as it is now, before its first step."""
    config, arguments = trainer.visrl_config, trainer.args
    model: Any = trainer.model
    collator: Any = trainer.data_collator
    shown = hash_images((image for part in parts for image in part.images()), config.image_root)
    return reference_logps(
        model,
        torch.utils.data.ConcatDataset(parts),
        collator,
        batch_size=max(8, arguments.per_device_train_batch_size),
        cache=config.output_dir / "reference.json",
        key=reference_key({**identity, "pictures": shown, "dtype": str(next(model.parameters()).dtype)}),
        features=trainer.features,
    )


def _next_command(config: TrainConfig) -> str:
    """What to type once a training is done."""
    if config.stage == "rm":
        rewards = f'rewards=["model:{config.output_dir}"]'
        return next_command("reward a policy by it", "visrl", "train", "configs/train_online.yaml", rewards)
    if config.finetuning_type == "lora":
        names = {"model_name_or_path": config.model_name_or_path, "adapter_name_or_path": config.output_dir}
        words = [f"{key}={value}" for key, value in names.items()]
        return next_command("merge it", "visrl", "export", *words, f"export_dir={config.output_dir}-merged")
    return next_command("try it", "visrl", "ask", "--model", config.output_dir, "--image", "PICTURE", "QUESTION")


def _format_data(config: TrainConfig, arguments: TrainingArguments, dataset: Any, validation: Any) -> str:
    """What is trained on, in a line."""
    text = f"{len(dataset)} items for {config.stage_name}"
    if not isinstance(dataset, Curriculum):
        images = dataset.images()
        sampler = SameImageSampler(images, arguments.train_batch_size, arguments.seed)
        text += f", of {len(set(images))} pictures; {sampler.sharing()} share theirs with another of their batch"
    return f"{text}; {len(validation)} to validate on" if validation is not None else text


def _write(
    trainer: VisrlTrainer, encoder: Encoder, parents: dict[str, str], facts: dict[str, Any], started: float
) -> None:
    """Write what is left of a training that has come to its end: weights, processor, settings, curves and manifest."""
    config, out = trainer.visrl_config, trainer.visrl_config.output_dir
    with writing(out):
        trainer.save_model(str(out))
    if not trainer.is_world_process_zero():
        return
    encoder.processor.save_pretrained(out)
    encoder.settings.save(out)
    (out / "training_args.bin").unlink(missing_ok=True)  # a pickle; the manifest says the same in the open
    if config.plot_loss:
        plot_loss(out)
    facts["seconds"] = round(time.time() - started, 1)
    write_manifest(out, verb="train", config=identity_of(config), parents=parents, **facts)
    for checkpoint in out.glob("checkpoint-*"):  # not before: a kill until here must leave what to resume from
        shutil.rmtree(checkpoint)
