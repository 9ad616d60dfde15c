"""Several looks in the demo: a warm-up on scenes that need none, one or two, then online reinforcement with a price per
look, and both checkpoints on held-out scenes. Every step skips what is complete."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visrl.config import CONFIGS
from visrl.evolve.clock import StepClock
from visrl.evolve.config import LOOK_BATCH, DemoConfig
from visrl.evolve.training import build_train_config
from visrl.report.several_looks import EVALUATED, LOOKS, ONLINE, WARM_UP
from visrl.scenes import LOOK_KINDS, format_source

if TYPE_CHECKING:
    from visrl.train.config import TrainConfig

CONFIG_OF = {
    WARM_UP: CONFIGS / "tiny" / "train_looks.yaml",
    ONLINE: CONFIGS / "tiny" / "train_online_looks.yaml",
}


def check_looks(config: DemoConfig, start: str) -> None:
    """Refuse a demo whose trainings of several looks could not start.

    Raises:
        ConfigError: a config is not there, or what the demo puts over it does not go with it.
    """
    if config.look_steps:
        for name in CONFIG_OF:
            _training(config, name, start)


def learn_looks(config: DemoConfig, start: str, clock: StepClock) -> None:
    """Warm up the model `start`, reinforce it, and evaluate it after each."""
    from visrl.train.run import train

    policy = start
    for name in CONFIG_OF:
        asked = _training(config, name, policy)
        clock.time(f"{LOOKS}/{name}", partial(train, asked))
        policy = str(asked.output_dir)
        clock.time(f"{LOOKS}/eval {name}", partial(_evaluate, config, name, policy))


def _training(config: DemoConfig, name: str, policy: str) -> TrainConfig:
    """One of the two trainings, from the model `policy`; every seed of a demo has scenes of its own."""
    values: dict[str, Any] = {
        "model_name_or_path": policy,
        "output_dir": str(_folder(config) / name),
        "seed": config.seed,
    }
    if name == ONLINE:
        questions = config.look_steps * LOOK_BATCH
        values |= {"max_steps": config.look_steps, "dataset": _scenes("preference", config.seed, questions)}
    return build_train_config(CONFIG_OF[name], {}, values)


def _evaluate(config: DemoConfig, name: str, policy: str) -> None:
    from visrl.evaluate.config import EvalConfig
    from visrl.evaluate.run import evaluate

    evaluate(
        EvalConfig(
            model_name_or_path=policy,
            dataset=_scenes("test", config.seed, config.look_questions),
            max_looks=_training(config, ONLINE, policy).max_looks,
            output_dir=_folder(config) / EVALUATED.format(name),
        )
    )


def _folder(config: DemoConfig) -> Path:
    return config.output_dir / LOOKS


def _scenes(pool: str, seed: int, questions: int) -> str:
    """The source of so many questions about scenes of several looks, two about each, that are this seed's alone."""
    count = -(-questions // 2)
    return format_source(pool, seed * count, count, per_scene=2, kinds=LOOK_KINDS, looks=True)
