"""Checkpoints of a training: which is whole, where a resumed run goes on, and what must not be called complete."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainingArguments

from visrl.config import ConfigError
from visrl.errors import UserError
from visrl.train.config import TrainConfig
from visrl.train.log import cut_log

COMPLETE = "complete"  # the marker in a checkpoint that was written to its end


class TrainingError(UserError, RuntimeError):
    """A training that must not be called complete; the message says what to change."""


def check_resume(config: TrainConfig) -> None:
    """Refuse a `resume_from_checkpoint` that cannot be done before anything is claimed.

    Raises:
        ConfigError: there is no such checkpoint, or one that is not to be gone on from.
    """
    given, out = config.resume_from_checkpoint, config.output_dir
    own = [path for path in out.glob("checkpoint-*") if (path / COMPLETE).is_file()]
    if given is True and not own:
        raise ConfigError(
            f"resume_from_checkpoint: {out} has no checkpoint to go on from; leave the key out to start anew"
        )
    if given is False and own:
        raise ConfigError(
            f"resume_from_checkpoint=false: {out} has {len(own)} checkpoints of this very training; leave the key out "
            "to go on from the newest, or give another output_dir to start anew"
        )
    if isinstance(given, str) and not (Path(given) / "trainer_state.json").is_file():
        raise ConfigError(
            f"resume_from_checkpoint: {given} is no checkpoint of a training (no trainer_state.json there); "
            "name a folder checkpoint-N, or true for the newest of output_dir"
        )


def checkpoint_to_resume(config: TrainConfig, arguments: TrainingArguments) -> Path | None:
    """Where training goes on: the newest whole checkpoint of the output folder, else one that the config names."""
    given = config.resume_from_checkpoint
    return _newest_whole(config.output_dir, arguments) or (Path(given) if isinstance(given, str) else None)


def _newest_whole(out: Path, arguments: TrainingArguments) -> Path | None:
    """The newest checkpoint that was written to its end; what a kill left of another, and log lines after it, are
    removed by the first process while the others wait."""
    with arguments.main_process_first(local=False, desc="looking for a checkpoint"):
        found = sorted(out.glob("checkpoint-*"), key=_step)
        complete = [checkpoint for checkpoint in found if (checkpoint / COMPLETE).is_file()]
        newest = complete[-1] if complete else None
        if arguments.process_index == 0:
            for checkpoint in set(found) - set(complete):
                shutil.rmtree(checkpoint)
            for name in ("log.jsonl", "rollouts.jsonl"):
                cut_log(out / name, _step(newest) if newest else 0)
    return newest


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What a disk that takes no more makes of writing weights and states, as a sentence.

    Raises:
        TrainingError: something could not be written.
    """
    try:
        yield
    except TrainingError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise TrainingError(
            f"{folder} cannot be written ({why}); {shutil.disk_usage(folder).free / 1e6:.0f} MB are free there; make "
            "room, and the same command goes on where this one stopped"
        ) from error


def resumed_step(checkpoint: Path) -> int:
    """The step that a checkpoint was written at."""
    return int(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])


def check_not_diverged(model: Any, step: int) -> None:
    """Refuse weights that are no numbers any more.

    Raises:
        TrainingError: so it is.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise TrainingError(
                f"{name} holds no numbers any more after step {step}; lower learning_rate or set max_grad_norm; this "
                "training is not complete"
            )


class MarkComplete(TrainerCallback):
    """Marks a checkpoint when all of it is on disk, so that a kill in the middle of writing leaves none to resume."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        check_not_diverged(kwargs["model"], state.global_step)
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()
