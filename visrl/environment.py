"""`visrl version` and `visrl env`: what is installed and on what machine, for a report of a fault. No secrets."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path

from visrl import __version__

PACKAGES = (
    "torch", "torchvision", "transformers", "accelerate", "peft", "datasets", "tokenizers", "safetensors", "pillow",
    "numpy", "pydantic", "typer", "fastapi", "uvicorn", "openai", "vllm", "deepspeed", "bitsandbytes", "trl",
)  # fmt: skip
# Variables that decide where things lie; none of them holds a secret.
SHOWN = ("HF_HOME", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "API_HOST", "API_PORT")


def version_line() -> str:
    """The version, as `visrl version` and `visrl --version` print it."""
    return f"visrl {__version__}"


def environment_lines() -> list[str]:
    """Versions, machine and paths, a line each; torch is asked what it computes on."""
    lines = [
        version_line(),
        f"Python {platform.python_version()} ({sys.executable})",
        f"{platform.platform()}, {os.cpu_count()} cores",
        f"visrl lies in {Path(__file__).parent}; working folder {Path.cwd()}",
        *_device_lines(),
    ]
    disk = shutil.disk_usage(Path.cwd())
    lines.append(f"{disk.free / 1e9:.1f} GB free of {disk.total / 1e9:.1f} GB where you work")
    lines += [f"{name} {_version(name)}" for name in PACKAGES]
    lines += [f"{name}={os.environ[name]}" for name in SHOWN if os.environ.get(name)]
    return lines


def model_lines(path: str) -> list[str]:
    """What the model of a checkpoint takes, a line each: what shares, what decodes, box codec, end of a turn, and how
    far a small copy of it was from its own calls.

    Raises:
        CheckpointError: no checkpoint there that can be read.
    """
    from visrl.engines.open import ModelConfig, model_settings, open_encoder
    from visrl.models.derive import described

    config = ModelConfig(model_name_or_path=path)
    encoder = open_encoder(config, model_settings(config))
    return [f"{path}: {described(encoder.family, encoder.codec.name)}"]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed"


def _device_lines() -> list[str]:
    import torch

    count = torch.cuda.device_count()
    if not count:
        return ["no GPU: everything runs on the CPU"]
    names = [torch.cuda.get_device_properties(number) for number in range(count)]
    return [f"GPU {number}: {one.name}, {one.total_memory / 1e9:.0f} GB" for number, one in enumerate(names)]
