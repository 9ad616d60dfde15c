"""Make the random start of the embedded model: a Qwen2-VL architecture of 2.3 M parameters, tokenizer and processor.

Real transformers classes, written to a folder that `AutoProcessor` and `AutoModelForImageTextToText` load offline.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from visrl.models.settings import ModelSettings
from visrl.prompts import BOX_SENTENCE, FOCUS_SENTENCE, answer_prompt, focus_prompt
from visrl.scenes import make_scene, questions_of

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip

# Qwen2's split; before it, the constant sentences of the prompts and the opening of a coordinate ("[0." and ", 0.") are
# kept whole, so that a prompt is some 12 tokens beside its image and a box 17. A full stop still merges with a
# newline after it, as in Qwen's own tokenizer.
SPLIT = (
    "|".join(f" {re.escape(sentence[:-1])}" for sentence in (FOCUS_SENTENCE, BOX_SENTENCE)) + "|"
    r"\[[01]\.|, [01]\.|"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny(folder: str | Path, *, seed: int = 0, vocabulary: int = 640, **sizes: Any) -> Path:
    """Write a randomly initialised tiny model with its processor to `folder`; `sizes` override the text config's."""
    model, processor, settings = tiny_model(seed=seed, vocabulary=vocabulary, **sizes)
    return save_tiny(folder, model, processor, settings)


def tiny_model(
    *, seed: int = 0, vocabulary: int = 640, **sizes: Any
) -> tuple[Qwen2VLForConditionalGeneration, Qwen2VLProcessor, ModelSettings]:
    """A randomly initialised tiny model, its processor and its settings; `sizes` override the text config's."""
    tokenizer = make_tokenizer(vocabulary)
    # The whole 672-px scene is shown at 112 × 112 (16 tokens), and so is a crop that is about square: sides are rounded
    # down to multiples of 28 px, so that a limit of 112 × 112 would show many of them at 84 × 84.
    shown = 112 * 112
    settings = ModelSettings(
        image_min_pixels=shown, image_max_pixels=shown, crop_min_pixels=100 * 100, crop_max_pixels=126 * 126
    )
    image_processor = Qwen2VLImageProcessor(size={"shortest_edge": shown, "longest_edge": shown})
    processor = Qwen2VLProcessor(image_processor, tokenizer, Qwen2VLVideoProcessor(), chat_template=CHAT_TEMPLATE)
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(tiny_config(tokenizer, **sizes))
    _initialise(model)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, processor, settings


def save_tiny(
    folder: str | Path, model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor, settings: ModelSettings
) -> Path:
    """Write model, processor and settings to `folder`, as transformers and this project load them."""
    folder = Path(folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    settings.save(folder)
    return folder


@torch.no_grad()
def _initialise(model: Qwen2VLForConditionalGeneration) -> None:
    """Weights of standard deviation 1/√fan-in, and random biases of queries and keys.

    The usual 0.02 suits widths of thousands: at a width of 128 every attention starts out uniform, and stays so for
    long. With random biases each head looks from the start at places of its own, and where an object lies can be told.
    What is added to the residual stream of the language model, by attention and MLP of every layer, is the smaller the
    more of it there is.
    """
    additions = 2 * len(model.model.language_model.layers)
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            parameter.normal_(0, 0.08)
        elif parameter.dim() > 1:
            into_stream = name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight", "fc2.weight"))
            parameter.normal_(0, (parameter[0].numel() * (additions if into_stream else 1)) ** -0.5)
        elif name.endswith(("q_proj.bias", "k_proj.bias")):
            parameter.normal_(0, 0.5)
        elif name.endswith("qkv.bias"):
            queries_and_keys = 2 * parameter.numel() // 3
            parameter[:queries_and_keys].normal_(0, 0.5)


def tiny_config(tokenizer: PreTrainedTokenizerFast, **sizes: Any) -> Qwen2VLConfig:
    """A Qwen2-VL of 6 layers of 128 with a vision tower of 3 layers of 128."""
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.pad_token_id,
        **sizes,
    }
    vision: dict[str, Any] = {
        "depth": 3,
        "embed_dim": 128,
        "hidden_size": text["hidden_size"],
        "num_heads": 4,
        "mlp_ratio": 4,
    }
    ids: dict[str, Any] = {
        f"{name}_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in _TOKEN_IDS.items()
    }
    return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)


_TOKEN_IDS = {
    "image_token": "image_pad",
    "video_token": "video_pad",
    "vision_start_token": "vision_start",
    "vision_end_token": "vision_end",
}


def make_tokenizer(vocabulary: int = 640) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of Qwen's form, trained on the prompts and boxes of drawn scenes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=2048
    )


def _texts() -> Iterator[str]:
    """The prompts of every question of some scenes: were some chosen, another way to choose would give other ids."""
    for question in chain.from_iterable(questions_of(make_scene("train", index)) for index in range(2000)):
        yield focus_prompt(question.text).replace("<image>", "")
        yield answer_prompt(question.text).replace("<image>", "")
        yield "[0.123, 0.456, 0.789, 0.012] [1.000, 1.000, 1.000, 1.000]"
        yield "user\nassistant\nsystem\n"


if __name__ == "__main__":
    import sys

    print(make_tiny(sys.argv[1]))
