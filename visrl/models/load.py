"""Loading checkpoints: model, processor and settings, with a clear sentence where that cannot be done."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from PIL import Image
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging

from visrl.box import BoxError
from visrl.codecs import self_test
from visrl.conversation import View
from visrl.models.calls import forward_arguments
from visrl.models.derive import described
from visrl.models.encode import Encoder, chat_template_of
from visrl.models.families import FAMILIES, SUCCESSORS, family_of, layer_counts, other_program
from visrl.models.family import Family
from visrl.models.folder import CheckpointError, check_folder, first_line, read_object, read_weights
from visrl.models.pixels import PIXEL_LIMITS, has_limits
from visrl.models.plain_encoder import PlainEncoder
from visrl.models.probe import find_family
from visrl.models.prompting import check_processor, check_prompts, check_template
from visrl.models.router import switch_off_router_logits
from visrl.models.settings import ModelSettings
from visrl.models.tree_encoder import TreeEncoder
from visrl.progress import note

# Width and height of the images on which boxes must survive before a checkpoint is used: no aspect ratio alike.
TEST_SIZES = ((640, 480), (480, 640), (1000, 400))
MOST_SIDE, MOST_PIXELS = 8192, 100_000_000  # of an image as a processor makes it
NUMBERED, BUFFERS = re.compile(r"\.\d+\."), ("inv_freq", "position_ids")  # buffers are made anew
PACKED = 16  # at most so many weights in a number of a quantised file
# Under which of these a checkpoint that comes with code may have its model.
REMOTE_CLASSES = ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModel")
Layout = Literal["auto", "tree", "plain"]
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def load_encoder(
    path: str | Path,
    settings: ModelSettings | None = None,
    *,
    trust_remote_code: bool = False,
    layout: Layout = "auto",
) -> Encoder:
    """The encoder of a checkpoint, once both prompts were rendered (see `check_prompts`) and known boxes have gone
    through its text and back (see `check_boxes`). `layout` says whether it is that of prefix trees or of the plain
    form; "auto" leaves it to what the model takes.

    Raises:
        CheckpointError: no model of images and text, no processor or template there, a layout that the model does not
            take, or a processor with which boxes would be cropped elsewhere than they were meant.
    """
    config = load_config(path, trust_remote_code=trust_remote_code)
    settings = settings or ModelSettings.load(path)
    with reading(path, "no processor can be loaded"):
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    with reading(path, "no prompt can be made"):
        check_processor(processor, config)
        check_sizes(processor.image_processor.to_dict(), has_limits(processor.image_processor))
        check_template(chat_template_of(processor) or family_of(config).chat_template)
        family = _family(path, processor, config, layout)
        if not family.plain and (family.untried or (family.found and family.name not in FAMILIES)):
            note(f"{path}: {described(family, settings.codec)}")
        kind = PlainEncoder if family.plain else TreeEncoder
        encoder: Encoder = kind(processor, config, settings, family)
        check_prompts(encoder)
    with reading(path, "boxes cannot be trusted here"):
        check_boxes(encoder)
    return encoder


def _family(path: str | Path, processor: Any, config: Any, layout: Layout) -> Family:
    """The family of a checkpoint's model, laid out as it is asked for.

    Raises:
        CheckpointError: it is to be laid out as trees, and takes none.
    """
    family = find_family(processor, config)
    if layout == "tree" and family.plain:
        raise CheckpointError(f"layout: tree: it takes no prefix tree, because {family.plain}; leave the key out")
    if layout == "plain":
        family = replace(family, plain="layout: plain asks for it")
    if not family.plain:
        return family
    if processor.tokenizer.pad_token_id is None:
        raise CheckpointError(
            "the tokenizer has no token that pads; name one as pad_token in tokenizer_config.json (that which ends a "
            "text will do)"
        )
    return replace(family, takes=tuple(forward_arguments(model_class(path, config))))


def note_plain(path: str | Path, encoder: Encoder) -> None:
    """Say in a line where the rows of a checkpoint's model are computed one by one, why, and what that costs."""
    if encoder.family.plain:
        note(
            f"{path}: plain form, as {encoder.family.plain}: every row is computed by itself, question and pictures "
            "again for each response and each sample, where a prefix tree computes them once for all"
        )


def load_config(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The config of a checkpoint whose model reads images and text.

    Raises:
        CheckpointError: nothing there, a damaged config, or a model of another kind.
    """
    check_folder(path)
    if Path(path).is_dir():  # read by ourselves first: what transformers does not know is told by its name
        check_family(path, read_object(Path(path) / "config.json"), trust_remote_code=trust_remote_code)
    with reading(path, "its config.json cannot be read"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    check_family(path, config.to_dict(), trust_remote_code=trust_remote_code)
    if getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(
            f"{path}: {config.model_type} is an encoder–decoder: it reads prompts and writes replies as two sequences, "
            "and models that do so in one are taken here"
        )
    return config


def check_family(path: str | Path, values: Mapping[str, Any], *, trust_remote_code: bool = False) -> None:
    """Refuse, by what its config.json says, a model that is none of images and text as the installed transformers knows
    them, and one whose class is code of its own that nobody allowed to run.

    Raises:
        CheckpointError: names it, and what to take or to set.
    """
    model_type, shipped = values.get("model_type"), values.get("auto_map") or {}
    if unread := other_program(values):
        raise CheckpointError(f"{path}: {unread}")
    if isinstance(model_type, str) and model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return
    if isinstance(shipped, dict) and any(name in shipped for name in REMOTE_CLASSES):
        if trust_remote_code:
            return
        successor = f"; {SUCCESSORS[model_type]}" if isinstance(model_type, str) and model_type in SUCCESSORS else ""
        raise CheckpointError(
            f"{path}: the class of the model type {model_type!r} is code that comes with the checkpoint, and none of "
            f"transformers {transformers.__version__}. Nothing of it was run; trust_remote_code: true runs it, in the "
            f"plain form{successor}"
        )
    names = sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    near = difflib.get_close_matches(str(model_type), names, 3)
    raise CheckpointError(
        f"{path}: the model type {model_type!r} is not supported: transformers {transformers.__version__} has no "
        f"model of images and text by that name. Of the {len(names)} it has "
        + (f"the nearest are {', '.join(near)}" if near else f"these have entries here: {', '.join(sorted(FAMILIES))}")
    )


def _auto_class(config: Any) -> Any:
    """What loads a model of this config: the library's class of images and text, or the one under which a checkpoint's
    own code has it. Such a config was loaded by trusted code; a library's own is never read by another's class."""
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    shipped = getattr(config, "auto_map", None) or {}
    return getattr(transformers, next(name for name in REMOTE_CLASSES if name in shipped))


def model_class(path: str | Path, config: Any) -> type:
    """The class of a checkpoint's model."""
    auto = _auto_class(config)
    if auto is AutoModelForImageTextToText and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        known: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
        return known[0] if isinstance(known, tuple) else known
    return get_class_from_dynamic_module(config.auto_map[auto.__name__], str(path))


def check_sizes(values: Any, in_pixels: bool, key: str = "") -> None:
    """Refuse an image processor that would make images larger than any memory. With `in_pixels` the limits of a
    size are numbers of pixels, of which the largest only bounds.

    Raises:
        CheckpointError: names the number.
    """
    if isinstance(values, dict | list):
        named = values.items() if isinstance(values, dict) else ((key, value) for value in values)
        for name, value in named:
            check_sizes(value, in_pixels, name)
    elif isinstance(values, int | float) and not key.endswith(("_len", "_length", "_tokens", "_patches")):
        areas = dict(zip(PIXEL_LIMITS, (MOST_PIXELS, math.inf), strict=True)) if in_pixels else {}
        limit = areas.get(key, MOST_SIDE)
        if abs(values) > limit:
            raise CheckpointError(f"the picture processor's {key} is {values}, which no memory holds")


def check_boxes(encoder: Encoder) -> None:
    """The start-up self-test: known boxes, written for the size that the processor really gives an image, must be
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
    """The model of a checkpoint, from safetensors only, every weight of it read and a number.

    Raises:
        CheckpointError: no folder, no config, another family, or weights that cannot be read, are missing, of another
            shape, or no numbers.
    """
    config = load_config(path, trust_remote_code=trust_remote_code)
    check_weights(path, config)
    with reading(path, "the weights cannot be loaded"), quiet():
        loaded: Any = _auto_class(config).from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **options,
        )
    model, found = loaded
    switch_off_router_logits(model.config)
    _check_found(path, found)
    if os.environ.get("LOCAL_RANK", "0") == "0":  # other processes may hold only a part, or nothing yet
        check_finite(f"{path}: the weights", model.state_dict())
    return model


def check_weights(path: str | Path, config: Any) -> None:
    """Hold a folder's weights, by their headers, against the model that its config describes, before memory is taken.

    Raises:
        CheckpointError: files that are missing or damaged, or a model far larger than what they hold.
    """
    weights = read_weights(path)
    if weights is None:
        return
    mismatch = f"{path}: config.json does not belong to these weights: it describes"
    for layers in layer_counts(config):
        if layers > weights.tensors:
            raise CheckpointError(f"{mismatch} {layers} layers, they hold {weights.tensors} tensors")
    with reading(path, "no model can be made of its config.json"), torch.device("meta"), quiet():
        own = type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        model = _auto_class(config).from_config(config, trust_remote_code=own)
        wanted = sum(weight.numel() for weight in model.parameters())
    packed = PACKED if getattr(config, "quantization_config", None) else 1
    if wanted > 2 * packed * weights.numbers:  # what lacks less is listed tensor by tensor
        raise CheckpointError(f"{mismatch} {wanted:,} numbers, they hold {weights.numbers:,}")


def _check_found(path: str | Path, found: dict[str, Any]) -> None:
    """Refuse weights of which the model did not get all; say which were left over."""
    faults = []
    if missing := sorted(found["missing_keys"]):
        faults.append(f"{len(missing)} of the model's weights are not there: {some(missing)}")
    if other := sorted((name, tuple(was), tuple(is_)) for name, was, is_ in found["mismatched_keys"]):
        shapes = [f"{name} is {list(was)}, not {list(is_)}" for name, was, is_ in other]
        faults.append(f"{len(other)} have another shape: {some(shapes)}")
    faults += [first_line(ValueError(message)) for message in found["error_msgs"]]
    if faults:
        raise CheckpointError(f"{path}: the weights do not fit the model: {'; '.join(faults)}")
    left = sorted(found["unexpected_keys"])
    if parts := [name for name in left if NUMBERED.search(name) and not name.endswith(BUFFERS)]:
        raise CheckpointError(
            f"{path}: the weights hold {len(parts)} tensors of layers that config.json does not know: {some(parts)}"
        )
    if left:
        note(f"{path}: {len(left)} tensors have no place in the model and are not used: {some(left)}")


def check_finite(what: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights that are not numbers, such as a training that diverged leaves.

    Raises:
        CheckpointError: counts and names them.
    """
    bad = [name for name, tensor in tensors.items() if not _finite(tensor)]
    if bad:
        raise CheckpointError(f"{what} are not numbers (NaN or infinite) in {len(bad)} tensors: {some(bad)}")


def _finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel() or tensor.element_size() == 1:
        return True
    low, high = tensor.aminmax()  # NaN goes through both; no copy is made
    return bool(torch.isfinite(low) and torch.isfinite(high))


def note_dtype(path: str | Path, dtype: torch.dtype) -> None:
    """Say in a line where a checkpoint is used in another type than it was written in."""
    weights = read_weights(path)
    written = DTYPES.get(weights.dtype) if weights else None
    if written is not None and written != dtype:
        note(f"{path}: written as {_name(written)}, used as {_name(dtype)}; numbers differ a little from training's")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of some names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def reading(path: str | Path, what: str) -> Iterator[None]:
    """Turn whatever a library makes of a damaged file into one sentence.

    Files of a checkpoint are read by code that is not ours, which trusts them: any exception can come of a wrong one
    (tokenizers raises bare `Exception`). The first error stays attached as the cause.
    """
    try:
        yield
    except CheckpointError as error:
        message = str(error)
        raise error if message.startswith(str(path)) else CheckpointError(f"{path}: {message}") from error
    except BoxError as error:
        raise CheckpointError(f"{path}: {what}: {error}") from error
    except Exception as error:
        raise CheckpointError(f"{path}: {what} ({type(error).__name__}: {first_line(error)})") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back transformers' table of what did not fit and its bars: we say it, or refuse it, in a sentence."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
