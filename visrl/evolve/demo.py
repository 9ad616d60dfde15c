"""`visrl demo`: the loop of self-evolution on drawn scenes, with the embedded model, on a machine with nothing else.

Beside it several looks are learned, on scenes that need none, one or two (look_lessons.py).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from visrl.config import ConfigError, as_config
from visrl.evolve.config import DemoConfig
from visrl.evolve.look_lessons import check_lessons, learn_looks
from visrl.evolve.loop import run_iterations
from visrl.evolve.training import check_train_configs
from visrl.manifest import claim_folder, hash_checkpoint, hold


def run_demo(config: DemoConfig | str | Path | None = None, /, **keys: Any) -> Path:
    """Run the demo, or what is left of it: iterations of the loop on synthetic scenes, from the embedded model on, and
    with `look_steps` several looks.

    Args:
        config: a `DemoConfig`, the path of a YAML file of its keys, or nothing where `keys` say it all.
        keys: keys of `DemoConfig`, over what `config` says; an unknown one is refused with the nearest known one.

    Returns:
        The path of its report, a page that holds its own images.

    Raises:
        ManifestError: the output folder holds a demo of another config, or another process writes it.
        ConfigError: an unknown key, no model to start from, or no config to train it by.
    """
    import torch

    config = as_config(DemoConfig, config, keys)
    if config.threads:
        torch.set_num_threads(config.threads)
    evolution = config.evolution()
    check_train_configs(evolution)
    start = Path(evolution.model_name_or_path)
    check_lessons(config)
    if not (start / "config.json").is_file():
        raise ConfigError(f"model_name_or_path: no model at {start}")
    identity = config.model_dump(mode="json", exclude={"output_dir", "threads"})
    with hold(config.output_dir):
        claim_folder(config.output_dir, {**identity, "model": hash_checkpoint(start)})
        beside = partial(learn_looks, config) if config.look_steps else None
        return run_iterations(evolution, "demo", shown=config.model_dump(mode="json"), beside=beside)
