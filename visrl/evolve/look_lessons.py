"""Several looks in the demo: the embedded model that was warmed up on scenes which need none, one or two, reinforced
online with a price per look; and both on held-out scenes. Every step skips what is complete."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from visrl.evolve.clock import StepClock
from visrl.evolve.config import TINY_LOOKS, DemoConfig
from visrl.evolve.training import build_train_config
from visrl.models.tiny import LOOKS_CHECKPOINT
from visrl.report.several_looks import EVALUATED, LOOKS, ONLINE, WARM_UP

if TYPE_CHECKING:
    from visrl.train.config import TrainConfig


def check_lessons(config: DemoConfig) -> None:
    """Refuse a demo whose lessons could not start.

    Raises:
        ConfigError: their config is not there, or what the demo puts over it does not go with it.
    """
    if config.look_steps:
        _training(config)


def learn_looks(config: DemoConfig, clock: StepClock) -> None:
    """Reinforce the warmed-up model online, and evaluate it before and after."""
    from visrl.train.run import train

    asked = _training(config)
    clock.time(f"{LOOKS}/{EVALUATED.format(WARM_UP)}", partial(_evaluate, config, asked, WARM_UP, LOOKS_CHECKPOINT))
    clock.time(f"{LOOKS}/{ONLINE}", partial(train, asked))
    clock.time(f"{LOOKS}/{EVALUATED.format(ONLINE)}", partial(_evaluate, config, asked, ONLINE, Path(asked.output_dir)))


def _training(config: DemoConfig) -> TrainConfig:
    """The online training; every seed of a demo has scenes of its own."""
    asked = build_train_config(TINY_LOOKS, {}, {})
    kinds, batch = str(asked.dataset).partition("/")[0], int(asked.trainer_values()["per_device_train_batch_size"])
    values = {
        "model_name_or_path": str(LOOKS_CHECKPOINT),
        "output_dir": str(config.output_dir / LOOKS / ONLINE),
        "seed": config.seed,
        "max_steps": config.look_steps,
        "dataset": f"{kinds}/{_places(config.seed, config.look_steps * batch)}",
    }
    return build_train_config(TINY_LOOKS, {}, values)


def _evaluate(config: DemoConfig, asked: TrainConfig, name: str, policy: Path) -> None:
    """Evaluate `policy` with as many looks as the training `asked` allows."""
    from visrl.evaluate.config import EvalConfig
    from visrl.evaluate.run import evaluate

    evaluate(
        EvalConfig(
            model_name_or_path=str(policy),
            dataset=f"scenes:test@looks/{_places(config.seed, config.look_questions)}",
            max_looks=asked.max_looks,
            output_dir=config.output_dir / LOOKS / EVALUATED.format(name),
        )
    )


def _places(seed: int, questions: int) -> str:
    """What a source says of so many questions, two about each scene, of scenes that are this seed's alone."""
    count = -(-questions // 2)
    return f"{seed * count}+{count}*2"
