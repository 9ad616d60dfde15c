"""Loading checkpoints: model, processor and settings, with a clear sentence where that cannot be done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from visrl.box import BoxError
from visrl.codecs import self_test
from visrl.conversation import View
from visrl.models.encode import Encoder
from visrl.models.settings import ModelSettings

# Width and height of the pictures on which boxes must survive before a checkpoint is used: no aspect ratio alike.
TEST_SIZES = ((640, 480), (480, 640), (1000, 400))


class CheckpointError(ValueError):
    """A folder or name that holds no model this program can load; the message says what is missing."""


def load_encoder(
    path: str | Path, settings: ModelSettings | None = None, *, trust_remote_code: bool = False
) -> Encoder:
    """The encoder of a checkpoint, once known boxes have gone through its text and back (see `check_boxes`).

    Raises:
        CheckpointError: no processor there, or one with which boxes would be cropped elsewhere than they were meant.
    """
    check_folder(path)
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: no processor can be loaded ({_first_line(error)})") from error
    encoder = Encoder(processor, config, settings or ModelSettings.load(path))
    try:
        check_boxes(encoder)
    except BoxError as error:
        raise CheckpointError(f"{path}: boxes cannot be trusted here: {error}") from error
    return encoder


def check_boxes(encoder: Encoder) -> None:
    """The start-up self-test: known boxes, written for the size that the processor really gives a picture, must be
    read and cropped as they were meant.

    Raises:
        BoxError: codec, processor and crop rule do not belong together.
    """
    if encoder.codec.in_processed_pixels and not encoder.family.pixel_limits:
        raise BoxError(
            "outside",
            f"the codec {encoder.codec.name!r} writes pixels of the picture as resized, which the processor of "
            f"{encoder.family.name} does not say; its own is box_codec={encoder.family.codec}",
        )
    for size in TEST_SIZES:
        (shown,) = encoder.encode_views([View(f"self-test {size}", Image.new("RGB", size))])
        self_test(encoder.codec, size, encoder.processed_size(size), encoder.settings.crop_rule, shown=shown.size)
    encoder.forget()


def load_model(
    path: str | Path, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False, **options: Any
) -> torch.nn.Module:
    """The model of a checkpoint, safetensors only.

    Raises:
        CheckpointError: no folder, no config, or weights that cannot be read.
    """
    check_folder(path)
    try:
        return AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: the weights cannot be loaded ({_first_line(error)})") from error


def check_folder(path: str | Path) -> None:
    """Refuse early and clearly what is no checkpoint folder; names of a hub pass, loading will tell.

    Raises:
        CheckpointError: a local path without a model in it, or a folder that holds an adapter only.
    """
    folder = Path(path)
    if not folder.exists():
        if str(path).startswith((".", "/", "~")) or str(path).count("/") > 1 or "/" not in str(path):
            raise CheckpointError(f"no model at {path}: there is no such folder")
        return
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8-sig")).get(
            "base_model_name_or_path"
        )
        raise CheckpointError(
            f"{path} holds an adapter without its base model; set model_name_or_path={base} and "
            f"adapter_name_or_path={path}, or merge it first with `visrl export`"
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{path} is no model folder: it has no config.json")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
