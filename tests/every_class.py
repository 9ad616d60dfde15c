"""A small random checkpoint of every class of images and text that transformers has, made out of what the class says of
itself, and what becomes of it here: the tree, the plain form, or a sentence. Run as a script, it prints a table of all.

python tests/every_class.py [MODEL_TYPE ...]
"""

from __future__ import annotations

import inspect
import multiprocessing
import re
import resource
import sys
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers as tf
from family_table import MADE, words_of
from tiny_families import template, tokenizer
from tokenizers import AddedToken
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

from visrl.engines.base import Sampling
from visrl.engines.local import LocalEngine
from visrl.errors import UserError
from visrl.models.asked import talks
from visrl.models.folder import first_line
from visrl.models.small import small_model

MOST = 300_000_000  # weights of a model that is tried
MEMORY = 12 << 30  # bytes of address space of a trial
MANY = 8192  # tokens of a vocabulary

# What no mapping of the library names.
PROCESSORS = {
    "glm_ocr": "Glm46VProcessor", "glmga": "Glm46VProcessor", "kosmos-2": "Kosmos2Processor",
    "kosmos-2.5": "Kosmos2_5Processor", "qwen2_5_omni_thinker": "Qwen2_5OmniProcessor",
    "qwen3_omni_moe_thinker": "Qwen3OmniMoeProcessor", "fast_vlm": "LlavaProcessor",
}  # fmt: skip
_OMNI = {
    "feature_extractor": "WhisperFeatureExtractor", "image_processor": "Qwen2VLImageProcessor",
    "video_processor": "Qwen2VLVideoProcessor",
}  # fmt: skip
PARTS = {
    "glm_ocr": {"image_processor": "Glm46VImageProcessor", "video_processor": "Glm46VVideoProcessor"},
    "fast_vlm": {"image_processor": "CLIPImageProcessor"},
    "diffusion_gemma": {
        "feature_extractor": "Gemma4AudioFeatureExtractor", "image_processor": "Gemma4ImageProcessor",
        "video_processor": "Gemma4VideoProcessor",
    },
    "nemotron_h_omni": {"feature_extractor": "ParakeetFeatureExtractor"},
    "qwen2_5_omni_thinker": _OMNI, "qwen3_omni_moe_thinker": _OMNI,
}  # fmt: skip
# Options of image processors, of processors, and what configs say, where the defaults of a class do not fit together.
_OLD_LLAVA = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
IMAGES: dict[str, dict[str, Any]] = {
    "aria": {"max_image_size": 490},
    **{name: {"patch_size": 16} for name in ("lfm3_vl", "minicpmv4_6", "minicpmv4_7", "minicpm_ocr")},
    "video_llama_3": {"patch_size": 16},
    "qwen3_omni_moe_thinker": {"patch_size": 16},
    "llava_next_video": {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "mistral_large4": {"patch_size": 14, "spatial_merge_size": 2},
    "llava_next_video": _OLD_LLAVA,
    "video_llava": _OLD_LLAVA,
    "fast_vlm": _OLD_LLAVA,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "aria": {"vision_config": {"image_size": 980, "patch_size": 14}},
    "janus": {"vision_config": {"projection_dim": 4096}},
    "glm5_next": {"vision_config": {"out_hidden_size": 4096}},
    "glm_ocr": {"vision_config": {"out_hidden_size": 1024}},
    "glmga": {
        "text_config": {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}}
    },
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "deepseek_vl_hybrid": {"vision_config": {"image_size": 384}},
    "step3p7": {"text_config": {"sliding_window": 512}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense"] + ["sparse"] * 31}},
    "qwen4_exp": {"text_config": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 64, "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    }},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 151_652, "vision_end_token_id": 151_653},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 151_652, "vision_end_token_id": 151_653},
}  # fmt: skip
SPECIAL: dict[str, dict[str, str]] = {"fuyu": {"speaker": "|SPEAKER|", "newline": "|NEWLINE|"}}
TOKENS = re.compile(r"(\w+?)_token(?:_id|_index|)")


def first(names: Any) -> str | None:
    """The class out of the row of a mapping, which may be several by back end."""
    if isinstance(names, dict):
        names = names.get("torchvision") or next(iter(names.values()))
    if isinstance(names, tuple | list):
        names = next(name for name in reversed(names) if name)
    return names


def processor_of(name: str, special: Mapping[str, str]) -> Any:
    kind = getattr(tf, PROCESSORS.get(name) or PROCESSOR_MAPPING_NAMES[name])
    words = tokenizer(bos="<s>", eos="</s>", **special)
    parts: dict[str, Any] = {"tokenizer": words}
    wanted = inspect.signature(kind.__init__).parameters
    mappings = {
        "image_processor": IMAGE_PROCESSOR_MAPPING_NAMES, "video_processor": VIDEO_PROCESSOR_MAPPING_NAMES,
        "feature_extractor": FEATURE_EXTRACTOR_MAPPING_NAMES,
    }  # fmt: skip
    for part, mapping in mappings.items():
        found = PARTS.get(name, {}).get(part) or first(mapping.get(name))
        if part in wanted and found:
            parts[part] = getattr(tf, found)(**(IMAGES.get(name, {}) if part == "image_processor" else {}))
    if "qformer_tokenizer" in wanted:
        parts["qformer_tokenizer"] = words
    return kind(**parts, **OPTIONS.get(name, {}))


def whole_processor(name: str) -> Any:
    """A processor whose tokenizer has every token that it names."""
    special = dict(SPECIAL.get(name, {}))
    for _ in range(30):
        try:
            processor = processor_of(name, special)
        except (AttributeError, ValueError) as error:
            missing = re.search(r"(?:no attribute|attribute) '?(\w+?_token)(?:_ids?)?\b", str(error))
            if missing is None or missing[1] in special:
                raise
            special[missing[1]] = f"<{missing[1]}>"
            continue
        known = processor.tokenizer.get_vocab()
        named = {
            key: str(value)
            for key, value in vars(processor).items()
            if re.fullmatch(r"\w+_token", key) and isinstance(value, str | AddedToken)
        }
        absent = {key: value for key, value in named.items() if value not in known and key not in special}
        if not absent:
            break
        special |= absent
    mark = str(getattr(processor, "image_token", None) or "<image>")
    if not getattr(processor, "chat_template", None):
        qwen = "<|vision_start|><|image_pad|><|vision_end|>"
        processor.chat_template = template(qwen if mark in qwen else mark, "<s>")
    return processor


def name_tokens(config: Any, processor: Any) -> None:
    """Give a config, and those in it, the ids that the processor's tokenizer has for what they name."""
    words = processor.tokenizer
    known = words.get_vocab()
    if isinstance(getattr(config, "vocab_size", None), int) and config.vocab_size > MANY:
        config.vocab_size = 1024
    for key, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            name_tokens(value, processor)
        found = re.fullmatch(r"(\w+?)_token_(?:id|index)", key)
        if found is None:
            continue
        own = {
            "bos": "<s>", "eos": "</s>", "pad": words.pad_token, "vision_start": "<|vision_start|>",
            "vision_end": "<|vision_end|>",
        }.get(found[1])  # fmt: skip
        for owner in (processor, words):
            own = own or getattr(owner, f"{found[1]}_token", None)
        if own is not None and str(own) in known:
            setattr(config, key, known[str(own)])
        elif isinstance(value, int) and value >= 1024:
            setattr(config, key, known.get("<|video_pad|>", 0) if "video" in key else 1023)


def small(name: str) -> tuple[Any, Any]:
    """A small random model of a class and a processor for it."""
    processor = whole_processor(name)
    config = getattr(tf, CLASSES[name]).config_class(**CONFIGS.get(name, {}))
    name_tokens(config, processor)
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in small_model(config, narrow=True).parameters())
    if weights > MOST:
        raise ValueError(f"it has {weights:,} weights")
    torch.manual_seed(0)
    return small_model(config, narrow=True), processor


# --- What becomes of it ----------------------------------------------------------------------------------------------


def outcome(name: str, folder: Path) -> str:
    """What a user of a checkpoint is told, after `visrl` has opened it and answered both prompts with it."""
    try:
        model, processor = small(name)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    except Exception as error:
        return f"not built: {type(error).__name__}: {first_line(error)}"
    try:
        engine = LocalEngine.load(folder, "cpu")
        answers = engine.complete(talks(), Sampling(max_tokens=3), [[0], [0]])
    except UserError as error:
        return f"refused: {str(error).removeprefix(f'{folder}: ')}"
    if errors := [answer[0].error for answer in answers if answer[0].error]:
        return f"refused: {errors[0]}"
    family = engine.encoder.family
    return f"plain form: {family.plain}" if family.plain else f"tree: {words_of(family).replace(' | ', ', ')}"


def apart(name: str, seconds: int = 240) -> str:
    """`outcome` in a process of its own, which a crash or a lack of memory ends alone."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_told, args=(name, queue))
    child.start()
    child.join(seconds)
    if child.is_alive():
        child.kill()
        return f"takes more than {seconds} s"
    return f"traceback: the process ended with {child.exitcode}" if queue.empty() else queue.get()


def _told(name: str, queue: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    tf.logging.set_verbosity_error()
    with TemporaryDirectory() as folder:
        try:
            queue.put(outcome(name, Path(folder)))
        except Exception as error:
            traceback.print_exc()
            queue.put(f"traceback: {type(error).__name__}: {first_line(error)}")


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(set(CLASSES) - set(MADE)):
        print(f"| {name} | {apart(name)} |", flush=True)
