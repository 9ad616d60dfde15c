"""The vLLM that `make vllm-env` installs: where it lies, how it is started small, and random checkpoints for it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_families import MAKERS

from visrl.engines.server_process import free_port, served, vllm_command
from visrl.models.load import load_encoder
from visrl.models.settings import ModelSettings
from visrl.models.tiny import CHECKPOINT

BIN = Path(os.environ.get("VISRL_VLLM", Path(__file__).parents[1] / ".venv-vllm")) / "bin"
# fp32 and no compilation; a gigabyte of key-value cache and one thread.
ARGUMENTS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
SURROUNDINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip
START_S = 900.0
NAME = "base"  # of the model at the servers that are started here

needs_vllm = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BIN / "vllm").is_file(), reason=f"no vLLM at {BIN}; `make vllm-env` installs one"),
]


def surroundings() -> dict[str, str]:
    """Variables under which `vllm` is the one of that environment, for whatever starts it."""
    return {**SURROUNDINGS, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


@contextmanager
def vllm_on_path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in surroundings().items():
            patch.setenv(name, value)
        yield


@contextmanager
def vllm_serving(model: Path, log: Path, more: Sequence[str] = ()) -> Iterator[str]:
    """The address of a vLLM that serves a checkpoint as `NAME`, with the command line that every verb gives it."""
    port = free_port()
    given = {"served_name": NAME, "max_images": 2, "more": [*ARGUMENTS, *more]}
    with vllm_on_path():
        command = vllm_command(str(model), load_encoder(model), port, **given)
        with served(command, port, NAME, log, START_S) as url:
            yield url


# --- Random checkpoints -----------------------------------------------------------------------------------------------

WIDER = {"hidden_size": 128, "head_dim": 32}  # vLLM has attention on CPUs for heads of 32 and more


def checkpoint(name: str, folder: Path) -> Path:
    """The embedded model ("embedded"), or a random one of a family, written to `folder` as transformers writes it.

    Whole pictures and crops have limits of their own, which no single limit of a server's serves.
    """
    if name == "embedded":
        return CHECKPOINT
    made, processor = MAKERS[name]()
    config = made.config
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.head_dim = WIDER["hidden_size"], WIDER["head_dim"]
    if hasattr(vision, "out_hidden_size"):
        vision.out_hidden_size = WIDER["hidden_size"]
    if sections := text.rope_parameters.get("mrope_section"):
        text.rope_parameters = {**text.rope_parameters, "mrope_section": [2 * part for part in sections]}
    torch.manual_seed(0)
    model = type(made)(config)
    words = processor.tokenizer
    broken = [number for number in range(len(words)) if "\ufffd" in words.decode([number])]
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(torch.randn_like(weights) * 0.1)
        # Half characters are never the likeliest: vLLM leaves those at the end of a text out of it.
        model.lm_head.weight[broken] = 0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    ModelSettings(image_max_pixels=160 * 160, crop_max_pixels=224 * 224).save(folder)
    return folder
