"""Tiny random models of every family with processors of their own, made in memory: no hub, no files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, processors

from visrl.models.calls import forward_arguments
from visrl.models.plain_encoder import PlainEncoder
from visrl.models.settings import ModelSettings
from visrl.models.tiny.make import CHAT_TEMPLATE, make_tokenizer
from visrl.models.tree_encoder import TreeEncoder

TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
MEAN = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


@cache
def _tokenizer_json() -> str:
    return make_tokenizer()._tokenizer.to_str()


def tokenizer(bos: str | None = None, eos: str = "<|im_end|>", *, adds_bos: bool = False, **named: str) -> Any:
    """Our own byte-level BPE (it merges '.' with a newline) with the special tokens of a family."""
    made = tf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json()), bos_token=bos, eos_token=eos,
        pad_token="<|endoftext|>", extra_special_tokens=named,
    )  # fmt: skip
    if adds_bos:
        pair = (bos, made.bos_token_id)
        made._tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[pair])
    return made


def template(mark: str, start: str = "") -> str:
    """A chat template of the usual form with `mark` in the place of a picture."""
    return start + CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", mark)


def _text(words: Any, **more: Any) -> dict[str, Any]:
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    return {**TEXT, "vocab_size": len(words), **ids, **more}


def _qwen_ids(words: Any) -> dict[str, int]:
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return {f"{key}_token_id": words.convert_tokens_to_ids(f"<|{token}|>") for key, token in names.items()}


def qwen2_vl() -> tuple[Any, Any]:
    words = tokenizer()
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
    config = tf.Qwen2VLConfig(text_config=_text(words, rope_parameters=MROPE), vision_config=vision, **_qwen_ids(words))
    pictures = tf.Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112})
    processor = tf.Qwen2VLProcessor(pictures, words, tf.Qwen2VLVideoProcessor(), chat_template=CHAT_TEMPLATE)
    return tf.Qwen2VLForConditionalGeneration(config), processor


def qwen2_5_vl() -> tuple[Any, Any]:
    words = tokenizer()
    vision = {
        "depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 48,
        "fullatt_block_indexes": [1], "window_size": 56,
    }  # fmt: skip
    text = _text(words, rope_parameters=MROPE)
    config = tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_qwen_ids(words))
    pictures = tf.Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112})
    processor = tf.Qwen2_5_VLProcessor(pictures, words, tf.Qwen2VLVideoProcessor(), chat_template=CHAT_TEMPLATE)
    return tf.Qwen2_5_VLForConditionalGeneration(config), processor


def qwen3_vl() -> tuple[Any, Any]:
    words = tokenizer()
    vision = {
        "depth": 3, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 48,
        "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64,
    }  # fmt: skip
    text = _text(words, rope_parameters={**MROPE, "mrope_interleaved": True}, head_dim=16)
    config = tf.Qwen3VLConfig(text_config=text, vision_config=vision, **_qwen_ids(words))
    pictures = tf.Qwen2VLImageProcessor(
        patch_size=16, size={"shortest_edge": 64 * 64, "longest_edge": 128 * 128}, **MEAN
    )
    processor = tf.Qwen3VLProcessor(pictures, words, tf.Qwen3VLVideoProcessor(), chat_template=CHAT_TEMPLATE)
    return tf.Qwen3VLForConditionalGeneration(config), processor


def _qwen3_5(kind: str, **more: Any) -> tuple[Any, Any]:
    words = tokenizer()
    vision = {
        "depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 48,
        "num_position_embeddings": 64,
    }  # fmt: skip
    text = _text(
        words, rope_parameters={**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0}, head_dim=16,
        layer_types=["linear_attention", "full_attention", "linear_attention", "linear_attention"],
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=8, **more,
    )  # fmt: skip
    config = getattr(tf, f"{kind}Config")(text_config=text, vision_config=vision, **_qwen_ids(words))
    pictures = tf.Qwen2VLImageProcessor(
        patch_size=16, size={"shortest_edge": 64 * 64, "longest_edge": 128 * 128}, **MEAN
    )
    processor = tf.Qwen3VLProcessor(pictures, words, tf.Qwen3VLVideoProcessor(), chat_template=CHAT_TEMPLATE)
    return getattr(tf, f"{kind}ForConditionalGeneration")(config), processor


def qwen3_5() -> tuple[Any, Any]:
    return _qwen3_5("Qwen3_5")


def qwen3_5_moe() -> tuple[Any, Any]:
    sizes = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    return _qwen3_5("Qwen3_5Moe", num_experts=4, num_experts_per_tok=2, **sizes)


def lfm2_vl() -> tuple[Any, Any]:
    words = tokenizer(
        image_token="<image>", image_start_token="<|image_start|>", image_end_token="<|image_end|>",
        image_thumbnail_token="<|img_thumbnail|>",
    )  # fmt: skip
    text = _text(
        words, model_type="lfm2", layer_types=["conv", "full_attention", "conv", "conv"],
        block_auto_adjust_ff_dim=False,
    )  # fmt: skip
    config = tf.Lfm2VlConfig(
        text_config=text, image_token_id=words.image_token_id, projector_hidden_size=48,
        vision_config={"model_type": "siglip2_vision_model", **VISION, "num_patches": 64, "patch_size": 16},
    )  # fmt: skip
    # A picture of 120 × 80 px is cut in tiles, smaller crops are not.
    pictures = tf.Lfm2VlImageProcessor(
        tile_size=64, max_tiles=4, min_image_tokens=4, max_image_tokens=8, max_pixels_tolerance=1.0
    )
    processor = tf.Lfm2VlProcessor(pictures, words, chat_template=template("<image>"))
    return tf.Lfm2VlForConditionalGeneration(config), processor


def _clip(kind: str = "clip_vision_model", size: int = 56) -> dict[str, Any]:
    return {"model_type": kind, **VISION, "image_size": size, "patch_size": 14, "projection_dim": 32}


def llava() -> tuple[Any, Any]:
    words = tokenizer(bos="<s>", eos="</s>", adds_bos=True, image_token="<image>")
    config = tf.LlavaConfig(
        text_config={"model_type": "llama", **_text(words)}, vision_config=_clip(),
        image_token_index=words.image_token_id, image_seq_length=16,
    )  # fmt: skip
    pictures = tf.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    processor = tf.LlavaProcessor(
        pictures, words, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )  # fmt: skip
    return tf.LlavaForConditionalGeneration(config), processor


def llava_next() -> tuple[Any, Any]:
    words = tokenizer(bos="<s>", eos="</s>", adds_bos=True, image_token="<image>")
    grid = [[56, 112], [112, 56], [112, 112]]
    config = tf.LlavaNextConfig(
        text_config={"model_type": "llama", **_text(words)}, vision_config=_clip(), image_grid_pinpoints=grid,
        image_token_index=words.image_token_id,
    )  # fmt: skip
    pictures = tf.LlavaNextImageProcessor(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=grid
    )
    processor = tf.LlavaNextProcessor(
        pictures, words, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )  # fmt: skip
    return tf.LlavaNextForConditionalGeneration(config), processor


def llava_onevision() -> tuple[Any, Any]:
    words = tokenizer(image_token="<image>", video_token="<video>")
    grid = [[56, 112], [112, 56], [112, 112]]
    config = tf.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **_text(words)}, vision_config=_clip("siglip_vision_model"),
        image_grid_pinpoints=grid, image_token_index=words.image_token_id, video_token_index=words.video_token_id,
        vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip
    size = {"height": 56, "width": 56}
    processor = tf.LlavaOnevisionProcessor(
        tf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=grid), words,
        tf.LlavaOnevisionVideoProcessor(size=size), num_image_tokens=16, vision_feature_select_strategy="full",
        chat_template=template("<image>"),
    )  # fmt: skip
    return tf.LlavaOnevisionForConditionalGeneration(config), processor


def internvl() -> tuple[Any, Any]:
    words = tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )  # fmt: skip
    config = tf.InternVLConfig(
        text_config={"model_type": "qwen2", **_text(words)},
        vision_config={**VISION, "image_size": [56, 56], "patch_size": [14, 14]},
        image_token_id=words.context_image_token_id, image_seq_length=4,
    )  # fmt: skip
    pictures = tf.GotOcr2ImageProcessor(size={"height": 56, "width": 56}, crop_to_patches=True, max_patches=4)
    processor = tf.InternVLProcessor(
        pictures, words, tf.InternVLVideoProcessor(), image_seq_length=4, chat_template=template("<IMG_CONTEXT>\n")
    )
    return tf.InternVLForConditionalGeneration(config), processor


def _idefics(kind: str) -> tuple[Any, Any]:
    words = tokenizer(
        bos="<s>", image_token="<image>", fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>", end_of_utterance_token="<end_of_utterance>",
    )  # fmt: skip
    name = "Idefics3" if kind == "idefics3" else "SmolVLM"
    vision = {**VISION, "image_size": 56, "patch_size": 14}
    config = getattr(tf, f"{name}Config")(
        text_config={"model_type": "llama", **_text(words)}, vision_config=vision, scale_factor=2,
        image_token_id=words.image_token_id,
    )  # fmt: skip
    pictures = getattr(tf, f"{name}ImageProcessor")(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    # SmolVLM's own processor wants the package num2words, for videos; what it makes of pictures is Idefics3's.
    processor = tf.Idefics3Processor(pictures, words, image_seq_len=4, chat_template=template("<image>", "<s>"))
    return getattr(tf, f"{name}ForConditionalGeneration")(config), processor


def idefics3() -> tuple[Any, Any]:
    return _idefics("idefics3")


def smolvlm() -> tuple[Any, Any]:
    return _idefics("smolvlm")


def paligemma(text_model: str = "gemma2") -> tuple[Any, Any]:
    """PaliGemma 2; with `text_model` "gemma" the first PaliGemma."""
    words = tokenizer(bos="<bos>", eos="<eos>", image_token="<image>")
    pictures = tf.SiglipImageProcessor(size={"height": 56, "width": 56})
    pictures.image_seq_length = 16
    processor = tf.PaliGemmaProcessor(pictures, words)
    windows = {"sliding_window": 256, "query_pre_attn_scalar": 16} if text_model == "gemma2" else {}
    text = _text(words, model_type=text_model, head_dim=16, **windows)
    config = tf.PaliGemmaConfig(
        text_config=text, vision_config=_clip("siglip_vision_model"), image_token_index=words.image_token_id,
        projection_dim=64, hidden_size=64,
    )  # fmt: skip
    config.vision_config.projection_dim = 64
    return tf.PaliGemmaForConditionalGeneration(config), processor


def gemma3() -> tuple[Any, Any]:
    words = tokenizer(
        bos="<bos>", eos="<eos>", image_token="<image_soft_token>", boi_token="<start_of_image>",
        eoi_token="<end_of_image>", end_of_turn="<end_of_turn>",
    )  # fmt: skip
    text = _text(words, head_dim=16, sliding_window=40, query_pre_attn_scalar=16)
    text["layer_types"] = ["sliding_attention", "full_attention"] * 2
    config = tf.Gemma3Config(
        text_config=text, vision_config={**VISION, "image_size": 56, "patch_size": 14}, mm_tokens_per_image=4,
        boi_token_index=words.boi_token_id, eoi_token_index=words.eoi_token_id, image_token_index=words.image_token_id,
    )  # fmt: skip
    pictures = tf.Gemma3ImageProcessor(size={"height": 56, "width": 56})
    processor = tf.Gemma3Processor(
        pictures, words, image_seq_length=4, chat_template=template("<start_of_image>", "{{ bos_token }}")
    )
    return tf.Gemma3ForConditionalGeneration(config), processor


def mllama() -> tuple[Any, Any]:
    words = tokenizer(bos="<|begin_of_text|>", eos="<|eot_id|>", image_token="<|image|>")
    text = _text(words, cross_attention_layers=[1, 3], rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1,
        "attention_heads": 2, "image_size": 56, "patch_size": 14, "max_num_tiles": 4, "vision_output_dim": 64,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
    }  # fmt: skip
    config = tf.MllamaConfig(text_config=text, vision_config=vision, image_token_index=words.image_token_id)
    pictures = tf.MllamaImageProcessor(size={"height": 56, "width": 56}, max_image_tiles=4)
    processor = tf.MllamaProcessor(pictures, words, chat_template=template("<|image|>", "{{ bos_token }}"))
    return tf.MllamaForConditionalGeneration(config), processor


MAKERS: dict[str, Callable[..., tuple[Any, Any]]] = {
    maker.__name__: maker
    for maker in (
        qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_5, qwen3_5_moe, lfm2_vl, llava, llava_next, llava_onevision, internvl,
        idefics3, smolvlm, paligemma, gemma3, mllama,
    )
}  # fmt: skip


def make(name: str, *options: str) -> tuple[Any, TreeEncoder]:
    """A random model of the family `name` and its encoder; weights loud enough that every token matters."""
    torch.manual_seed(0)
    model, processor = MAKERS[name](*options)
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(torch.randn_like(weights) * 0.1)
    return model.eval(), TreeEncoder(processor, model.config, ModelSettings())


def plain(model: Any, encoder: TreeEncoder) -> PlainEncoder:
    """The encoder of the plain form beside that of trees."""
    family = replace(encoder.family, plain="it is asked for", takes=tuple(forward_arguments(model)))
    return PlainEncoder(encoder.processor, model.config, encoder.settings, family)
