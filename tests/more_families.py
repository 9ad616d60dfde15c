"""Tiny random models of families that have no entry, with processors of their own, made in memory: no hub, no files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from tiny_families import MEAN, MROPE, VISION, _clip, _qwen_ids, _text, template, tokenizer

from visrl.models.tiny.make import CHAT_TEMPLATE

SMALL = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
SQUARE = {"height": 56, "width": 56}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


def _end(words: Any, mark: str, end: str = "", start: str = "") -> str:
    """The usual chat template with a mark of images and another end of turns."""
    made = template(mark, start)
    return made.replace("<|im_end|>\n", end) if end else made


def qwen3_vl_moe() -> tuple[Any, Any]:
    words = tokenizer()
    vision = {
        "depth": 3, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 48,
        "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64,
    }  # fmt: skip
    text = _text(words, rope_parameters={**MROPE, "mrope_interleaved": True}, head_dim=16, **MOE)
    config = tf.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **_qwen_ids(words))
    pictures = tf.Qwen2VLImageProcessor(
        patch_size=16, size={"shortest_edge": 64 * 64, "longest_edge": 128 * 128}, **MEAN
    )
    processor = tf.Qwen3VLProcessor(pictures, words, tf.Qwen3VLVideoProcessor(), chat_template=CHAT_TEMPLATE)
    return tf.Qwen3VLMoeForConditionalGeneration(config), processor


def _glm(kind: str, **more: Any) -> tuple[Any, Any]:
    words = tokenizer(
        eos="<|user|>", image_token="<|image|>", video_token="<|video|>", begin="<|begin_of_image|>",
        end="<|end_of_image|>", begin_video="<|begin_of_video|>", end_video="<|end_of_video|>",
    )  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 48,
        "image_size": 112,
    }  # fmt: skip
    text = _text(words, rope_parameters={**MROPE, "partial_rotary_factor": 1.0}, **more)
    ids = {name: words.convert_tokens_to_ids(token) for name, token in (
        ("image_token_id", "<|image|>"), ("video_token_id", "<|video|>"),
        ("image_start_token_id", "<|begin_of_image|>"),
        ("image_end_token_id", "<|end_of_image|>"), ("video_start_token_id", "<|begin_of_video|>"),
        ("video_end_token_id", "<|end_of_video|>"),
    )}  # fmt: skip
    config = getattr(tf, f"{kind}Config")(text_config=text, vision_config=vision, **ids)
    name = "Glm46V" if kind == "Glm46V" else "Glm4v"
    pictures = getattr(tf, f"{name}ImageProcessor")(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112})
    chat = _glm_template("<|begin_of_image|><|image|><|end_of_image|>")
    processor = getattr(tf, f"{name}Processor")(
        pictures, words, getattr(tf, f"{name}VideoProcessor")(), chat_template=chat
    )
    return getattr(tf, f"{kind}ForConditionalGeneration")(config), processor


def _glm_template(mark: str) -> str:
    """A template that leaves the end of a turn to the beginning of the next."""
    return (
        "{% for message in messages %}<|{{ message['role'] }}|>\n"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + mark + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )


def glm4v() -> tuple[Any, Any]:
    return _glm("Glm4v")


def glm46v() -> tuple[Any, Any]:
    return _glm("Glm46V")


def glm4v_moe() -> tuple[Any, Any]:
    return _glm(
        "Glm4vMoe", n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, n_shared_experts=1,
        first_k_dense_replace=1, n_group=1, topk_group=1, head_dim=16,
    )  # fmt: skip


def _pixtral_words() -> Any:
    return tokenizer(
        bos="<s>", eos="</s>", adds_bos=True, image_token="[IMG]", image_break_token="[IMG_BREAK]",
        image_end_token="[IMG_END]",
    )  # fmt: skip


def _pixtral_processor(words: Any, merge: int = 2) -> Any:
    pictures = tf.PixtralImageProcessor(size={"longest_edge": 112}, patch_size=14)
    return tf.PixtralProcessor(
        pictures, words, patch_size=14, spatial_merge_size=merge, chat_template=_end(words, "[IMG]", "</s>", "<s>")
    )


def mistral3() -> tuple[Any, Any]:
    words = _pixtral_words()
    config = tf.Mistral3Config(
        text_config={"model_type": "mistral", **_text(words, head_dim=16, sliding_window=None)},
        vision_config={"model_type": "pixtral", **VISION, "head_dim": 16, "image_size": 112, "patch_size": 14},
        image_token_index=words.image_token_id, spatial_merge_size=2,
    )  # fmt: skip
    return tf.Mistral3ForConditionalGeneration(config), _pixtral_processor(words)


def lighton_ocr() -> tuple[Any, Any]:
    words = _pixtral_words()
    config = tf.LightOnOcrConfig(
        text_config={"model_type": "qwen3", **_text(words, head_dim=16)},
        vision_config={"model_type": "pixtral", **VISION, "head_dim": 16, "image_size": 112, "patch_size": 14},
        image_token_id=words.image_token_id, spatial_merge_size=2,
    )  # fmt: skip
    pictures = tf.PixtralImageProcessor(size={"longest_edge": 112}, patch_size=14)
    processor = tf.LightOnOcrProcessor(
        pictures, words, patch_size=14, spatial_merge_size=2, chat_template=_end(words, "[IMG]", "</s>", "<s>")
    )
    return tf.LightOnOcrForConditionalGeneration(config), processor


def vipllava() -> tuple[Any, Any]:
    words = tokenizer(bos="<s>", eos="</s>", adds_bos=True, image_token="<image>")
    config = tf.VipLlavaConfig(
        text_config={"model_type": "llama", **_text(words)}, vision_config=_clip(),
        image_token_index=words.image_token_id, image_seq_length=16, vision_feature_layers=[-2, -1],
    )  # fmt: skip
    pictures = tf.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=SQUARE)
    processor = tf.LlavaProcessor(
        pictures, words, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )  # fmt: skip
    return tf.VipLlavaForConditionalGeneration(config), processor


def ovis2() -> tuple[Any, Any]:
    names = ("IMG_ATOM", "IMG_START", "IMG_GRID", "IMG_COL", "IMG_ROW", "IMG_END")
    words = tokenizer(image_token="<image>", **{name.lower(): f"<{name}>" for name in names})
    ids = [words.convert_tokens_to_ids(f"<{name}>") for name in names]
    config = tf.Ovis2Config(
        text_config={"model_type": "qwen2", **_text(words)},
        vision_config={**VISION, "image_size": 56, "patch_size": 14, "vocab_size": 32, "hidden_stride": 2},
        image_token_id=ids[0], visual_indicator_token_ids=ids[1:], vocab_size=len(words), hidden_size=64,
    )  # fmt: skip
    pictures = tf.Ovis2ImageProcessor(size=SQUARE, max_patches=4)
    processor = tf.Ovis2Processor(pictures, words, chat_template=template("<image>"), image_seq_length=4)
    return tf.Ovis2ForConditionalGeneration(config), processor


def kimi_k25() -> tuple[Any, Any]:
    words = tokenizer(image_token="<|media_pad|>", video_token="<|kimi_k25_video_placeholder|>")
    text = _text(
        words, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=48,
        n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1, q_lora_rank=24, kv_lora_rank=16,
        qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
    )  # fmt: skip
    config = tf.Kimi_K25Config(
        text_config={"model_type": "deepseek_v3", **text},
        vision_config={**VISION, "patch_size": 14, "pos_emb_height": 8, "pos_emb_width": 8},
        image_token_id=words.image_token_id, video_token_id=words.video_token_id, projection_hidden_size=32,
    )  # fmt: skip
    pictures = tf.Kimi_K25ImageProcessor(max_patches=64, size={"max_height": 8, "max_width": 8})
    processor = tf.Kimi_K25Processor(
        pictures, words, tf.Kimi_K25VideoProcessor(), chat_template=template("<|media_pad|>")
    )
    return tf.Kimi_K25ForConditionalGeneration(config), processor


def _cohere_text(words: Any, window: int) -> dict[str, Any]:
    kinds = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
    return {"model_type": "cohere2", **_text(words, sliding_window=window, layer_types=kinds)}


def aya_vision(window: int = 4096) -> tuple[Any, Any]:
    words = tokenizer(
        bos="<BOS>", image_token="<image>", start="<|START_OF_IMG|>", end="<|END_OF_IMG|>", patch="<|IMG_PATCH|>",
        line="<|IMG_LINE_BREAK|>", tile="TILE", tile_global="TILE_GLOBAL",
    )  # fmt: skip
    config = tf.AyaVisionConfig(
        text_config=_cohere_text(words, window),
        vision_config={**_clip("siglip_vision_model"), "vision_use_head": False},
        image_token_index=words.convert_tokens_to_ids("<|IMG_PATCH|>"), downsample_factor=2,
    )  # fmt: skip
    pictures = tf.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=4)
    processor = tf.AyaVisionProcessor(
        pictures, words, patch_size=14, img_size=56, downsample_factor=2, chat_template=template("<image>", "<BOS>")
    )
    return tf.AyaVisionForConditionalGeneration(config), processor


def cohere2_vision() -> tuple[Any, Any]:
    words = tokenizer(
        bos="<BOS>", image_token="<|IMG_PATCH|>", boi_token="<|START_OF_IMG|>", eoi_token="<|END_OF_IMG|>",
        img_line_break_token="<|IMG_LINE_BREAK|>",
    )  # fmt: skip
    config = tf.Cohere2VisionConfig(
        text_config=_cohere_text(words, 24), vision_config={**_clip("siglip_vision_model"), "vision_use_head": False},
        image_token_id=words.image_token_id, downsample_factor=2, alignment_intermediate_size=48,
    )  # fmt: skip
    pictures = tf.Cohere2VisionImageProcessor(size=SQUARE, max_patches=4, patch_size=2)
    processor = tf.Cohere2VisionProcessor(pictures, words, chat_template=template("<|IMG_PATCH|>", "<BOS>"))
    return tf.Cohere2VisionForConditionalGeneration(config), processor


def deepseek_vl() -> tuple[Any, Any]:
    words = tokenizer(image_token="<image_placeholder>")
    config = tf.DeepseekVLConfig(
        text_config={"model_type": "llama", **_text(words)}, vision_config=_clip("siglip_vision_model"),
        image_token_id=words.image_token_id,
    )  # fmt: skip
    pictures = tf.DeepseekVLImageProcessor(size=SQUARE)
    processor = tf.DeepseekVLProcessor(
        pictures, words, chat_template=template("<image_placeholder>"), num_image_tokens=16
    )
    return tf.DeepseekVLForConditionalGeneration(config), processor


def granite4_vision() -> tuple[Any, Any]:
    words = tokenizer(bos="<s>", eos="</s>", adds_bos=True, image_token="<image>")
    grid = [[56, 112], [112, 56], [112, 112]]
    config = tf.Granite4VisionConfig(
        text_config=_text(words),
        vision_config={**_clip("siglip_vision_model"), "hidden_size": 64, "num_attention_heads": 1},
        qformer_config={"num_hidden_layers": 1, "intermediate_size": 48}, image_grid_pinpoints=grid,
        image_token_index=words.image_token_id, downsample_rate="1/2", deepstack_layer_map=[[0, 0], [1, 1]],
        spatial_vision_layer=-1, spatial_target_layers=[0, 1, 2, 3], vision_feature_select_strategy="full",
    )  # fmt: skip
    pictures = tf.LlavaNextImageProcessor(size={"shortest_edge": 56}, crop_size=SQUARE, image_grid_pinpoints=grid)
    processor = tf.Granite4VisionProcessor(
        pictures, words, patch_size=14, vision_feature_select_strategy="full", downsample_rate="1/2",
        chat_template=template("<image>"),
    )  # fmt: skip
    return tf.Granite4VisionForConditionalGeneration(config), processor


def exaone4_5() -> tuple[Any, Any]:
    words = tokenizer()
    kinds = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
    vision = {
        "depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 48, "fullatt_block_indexes": [1], "window_size": 56,
    }  # fmt: skip
    text = {"model_type": "exaone4", **_text(words, head_dim=16, sliding_window=24, layer_types=kinds)}
    ids = {name: value for name, value in _qwen_ids(words).items() if name in ("image_token_id", "video_token_id")}
    config = tf.Exaone4_5_Config(text_config=text, vision_config=vision, **ids)
    processor = tf.Exaone4_5_Processor(
        tf.Qwen2VLImageProcessor(size=SMALL), words, tf.Qwen2VLVideoProcessor(), chat_template=CHAT_TEMPLATE
    )
    return tf.Exaone4_5_ForConditionalGeneration(config), processor


def _gemma_words() -> Any:
    return tokenizer(
        bos="<bos>", eos="<eos>", image_token="<|image|>", boi_token="<|image>", eoi_token="<image|>",
        audio_token="<|audio|>", boa_token="<|audio>", eoa_token="<audio|>", end="<turn|>",
    )  # fmt: skip


def _gemma_ids(words: Any) -> dict[str, Any]:
    return {
        "boi_token_id": words.boi_token_id, "eoi_token_id": words.eoi_token_id, "image_token_id": words.image_token_id,
        "audio_token_id": words.audio_token_id, "boa_token_id": words.boa_token_id,
        "eoa_token_index": words.eoa_token_id,
    }  # fmt: skip


def gemma4(bidirectional: str | None = None, experts: int = 0) -> tuple[Any, Any]:
    """The E2B kind; with `bidirectional` "vision" images see themselves whole; with `experts` the MoE."""
    words = _gemma_words()
    more: dict[str, Any] = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8}
    if bidirectional:
        more = {"use_bidirectional_attention": "vision", "hidden_size_per_layer_input": 0}
    if experts:
        more |= {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48}
    text = _text(
        words, head_dim=16, global_head_dim=16, sliding_window=9, vocab_size_per_layer_input=len(words) + 8,
        layer_types=["sliding_attention", "full_attention"] * 2, **more,
    )  # fmt: skip
    vision = {
        **VISION, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 8, "pooling_kernel_size": 2,
        "position_embedding_size": 64,
    }  # fmt: skip
    text["vocab_size"] = len(words) + 8
    config = tf.Gemma4Config(text_config=text, vision_config=vision, audio_config=None, **_gemma_ids(words))
    pictures = tf.Gemma4ImageProcessor(patch_size=8, pooling_kernel_size=2, max_soft_tokens=70)
    processor = tf.Gemma4Processor(
        tf.Gemma4AudioFeatureExtractor(), pictures, words, tf.Gemma4VideoProcessor(),
        chat_template=_end(words, "<|image|>", "<turn|>", "<bos>"), image_seq_length=70,
    )  # fmt: skip
    return tf.Gemma4ForConditionalGeneration(config), processor


def gemma4_vision() -> tuple[Any, Any]:
    return gemma4("vision")


def gemma4_moe() -> tuple[Any, Any]:
    return gemma4(experts=4)


def gemma4_unified() -> tuple[Any, Any]:
    words = _gemma_words()
    text = _text(
        words, head_dim=16, global_head_dim=16, sliding_window=9,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    text["vocab_size"] = len(words) + 8
    vision = {
        "patch_size": 8,
        "pooling_kernel_size": 2,
        "mm_embed_dim": 64,
        "mm_posemb_size": 70,
        "output_proj_dims": 64,
    }
    config = tf.Gemma4UnifiedConfig(text_config=text, vision_config=vision, audio_config=None, **_gemma_ids(words))
    pictures = tf.Gemma4UnifiedImageProcessor(patch_size=8, pooling_kernel_size=2, max_soft_tokens=70)
    processor = tf.Gemma4UnifiedProcessor(
        tf.Gemma4UnifiedAudioFeatureExtractor(), pictures, words, tf.Gemma4UnifiedVideoProcessor(),
        chat_template=_end(words, "<|image|>", "<turn|>", "<bos>"), image_seq_length=70,
    )  # fmt: skip
    return tf.Gemma4UnifiedForConditionalGeneration(config), processor


def gemma3n() -> tuple[Any, Any]:
    """Its vision tower is one of timm's, which makes the smallest of its own test models here: 2 × 2 soft tokens."""
    words = _gemma_words()
    size = len(words)
    text = _text(
        words, head_dim=16, sliding_window=9, layer_types=["sliding_attention", "full_attention"] * 2,
        intermediate_size=[64] * 4, activation_sparsity_pattern=[0.5, 0.0, 0.5, 0.0], laurel_rank=8,
        num_kv_shared_layers=2, hidden_size_per_layer_input=8, vocab_size_per_layer_input=size,
    )  # fmt: skip
    vision = {"architecture": "test_efficientnet_gn", "hidden_size": 256, "vocab_offset": size, "vocab_size": 8}
    audio = {
        "hidden_size": 32, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1, "vocab_offset": size + 8,
        "vocab_size": 8, "sscp_conv_channel_size": [8, 4],
    }  # fmt: skip
    config = tf.Gemma3nConfig(
        text_config=text, vision_config=vision, audio_config=audio, vision_soft_tokens_per_image=4,
        image_token_id=words.image_token_id, boi_token_id=words.boi_token_id, eoi_token_id=words.eoi_token_id,
        audio_token_id=words.audio_token_id, boa_token_id=words.boa_token_id, eoa_token_id=words.eoa_token_id,
    )  # fmt: skip
    pictures = tf.SiglipImageProcessor(size={"height": 64, "width": 64})
    processor = tf.Gemma3nProcessor(
        tf.Gemma3nAudioFeatureExtractor(), pictures, words, chat_template=_end(words, "<|image|>", "<turn|>", "<bos>"),
        image_seq_length=4,
    )  # fmt: skip
    return tf.Gemma3nForConditionalGeneration(config), processor


def ernie4_5_vl_moe() -> tuple[Any, Any]:
    words = tokenizer(
        image_token="<|IMAGE_PLACEHOLDER|>", image_start_token="<|IMAGE_START|>", image_end_token="<|IMAGE_END|>",
        video_token="<|VIDEO_PLACEHOLDER|>", video_start_token="<|VIDEO_START|>", video_end_token="<|VIDEO_END|>",
    )  # fmt: skip
    names = (
        "image_token",
        "image_start_token",
        "image_end_token",
        "video_token",
        "video_start_token",
        "video_end_token",
    )
    ids = {f"{name}_id": getattr(words, f"{name}_id") for name in names}
    text = _text(
        words, moe_num_experts=4, moe_k=2, moe_intermediate_size=[48, 32], moe_num_shared_experts=1,
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        rope_parameters={**MROPE, "mrope_section": [3, 3, 2]},
    )  # fmt: skip
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
    config = tf.Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision, **ids)
    mark = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
    processor = tf.Ernie4_5_VLMoeProcessor(
        tf.Ernie4_5_VLMoeImageProcessor(size=SMALL), words, tf.Ernie4_5_VLMoeVideoProcessor(),
        chat_template=template(mark),
    )  # fmt: skip
    return tf.Ernie4_5_VLMoeForConditionalGeneration(config), processor


def molmo2() -> tuple[Any, Any]:
    names = ("im_patch", "im_col", "im_start", "low_res_im_start", "frame_start", "im_end", "frame_end", "im_low")
    words = tokenizer(bos="<|bos|>", image_token="<|image|>", video_token="<|video|>", **{n: f"<{n}>" for n in names})
    ids = {name: words.convert_tokens_to_ids(f"<{name}>") for name in names}
    text = _text(words, head_dim=16, vocab_size=min(ids.values()), additional_vocab_size=64)
    adapter = {
        "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48,
        "text_hidden_size": 64, "vision_feature_layer": [-1, -2],
    }  # fmt: skip
    vision = {
        **VISION, "num_key_value_heads": 2, "head_dim": 16, "image_size": [56, 56], "patch_size": 14,
        "num_position_embeddings": 16,
    }  # fmt: skip
    config = tf.Molmo2Config(
        text_config=text, vision_config=vision, adapter_config=adapter, image_start_token_id=ids["im_start"],
        low_res_image_start_token_id=ids["low_res_im_start"], image_end_token_id=ids["im_end"],
        image_patch_id=ids["im_patch"], frame_start_token_id=ids["frame_start"], frame_end_token_id=ids["frame_end"],
    )  # fmt: skip
    pictures = tf.Molmo2ImageProcessor(size=SQUARE, max_crops=2, patch_size=14, overlap_margins=[1, 1])
    processor = tf.Molmo2Processor(
        pictures, tf.Molmo2VideoProcessor(), words, chat_template=template("<|image|>", "<|bos|>")
    )
    return tf.Molmo2ForConditionalGeneration(config), processor


def llama4() -> tuple[Any, Any]:
    names = {
        "image_token": "<|image|>", "start": "<|image_start|>", "end": "<|image_end|>", "patch": "<|patch|>",
        "tile_x": "<|tile_x_separator|>", "tile_y": "<|tile_y_separator|>",
    }  # fmt: skip
    words = tokenizer(bos="<|begin_of_text|>", eos="<|eot|>", **names)
    text = _text(
        words, head_dim=16, intermediate_size_mlp=48, num_local_experts=4, attention_chunk_size=32,
        no_rope_layers=[1, 0, 1, 0], moe_layers=[1, 3],
        layer_types=["chunked_attention", "full_attention"] * 2,
    )  # fmt: skip
    vision = {
        **VISION, "intermediate_size": 128, "image_size": 56, "patch_size": 14, "vision_output_dim": 48,
        "projector_input_dim": 48, "projector_output_dim": 48,
    }  # fmt: skip
    config = tf.Llama4Config(
        text_config=text, vision_config=vision, image_token_index=words.convert_tokens_to_ids("<|patch|>"),
        boi_token_index=words.convert_tokens_to_ids("<|image_start|>"),
        eoi_token_index=words.convert_tokens_to_ids("<|image_end|>"),
    )  # fmt: skip
    pictures = tf.Llama4ImageProcessor(size=SQUARE, max_patches=4)
    chat = _end(words, "<|image|>", "<|eot|>", "<|begin_of_text|>")
    processor = tf.Llama4Processor(pictures, words, patch_size=14, chat_template=chat)
    return tf.Llama4ForConditionalGeneration(config), processor


def _minicpm(kind: str) -> tuple[Any, Any]:
    """A hybrid whose processor numbers the images of a prompt; 4.7 lays tiles on the canvas of their image."""
    marks = {
        "image_start": "<image>", "image_end": "</image>", "slice_start": "<slice>", "slice_end": "</slice>",
        "image_id_start": "<image_id>", "image_id_end": "</image_id>",
    }  # fmt: skip
    words = tokenizer(
        image_token="<|image_pad|>", video_token="<|video_pad|>", **{f"{key}_token": it for key, it in marks.items()}
    )
    text = _text(
        words, model_type="qwen3_5_text", head_dim=16,
        rope_parameters={**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0},
        layer_types=["linear_attention", "full_attention", "linear_attention", "linear_attention"],
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=8,
    )  # fmt: skip
    ids = {f"{key}_id": words.convert_tokens_to_ids(it) for key, it in list(marks.items())[:4]}
    config = getattr(tf, f"{kind}Config")(
        text_config=text, vision_config={**VISION, "image_size": 56, "patch_size": 14}, insert_layer_id=0,
        image_token_id=words.image_token_id, video_token_id=words.video_token_id,
        **(ids | {"newline_id": words("\n", add_special_tokens=False).input_ids[0]} if kind == "MiniCPMV4_7" else {}),
    )  # fmt: skip
    pictures = tf.MiniCPMV4_6ImageProcessor(patch_size=14, scale_resolution=56, max_slice_nums=4)
    processor = getattr(tf, f"{kind}Processor")(
        pictures, tf.MiniCPMV4_6VideoProcessor(), words, chat_template=template("<|image_pad|>")
    )
    return getattr(tf, f"{kind}ForConditionalGeneration")(config), processor


def minicpmv4_6() -> tuple[Any, Any]:
    return _minicpm("MiniCPMV4_6")


def minicpmv4_7() -> tuple[Any, Any]:
    return _minicpm("MiniCPMV4_7")


MORE: dict[str, Callable[..., tuple[Any, Any]]] = {
    maker.__name__: maker
    for maker in (
        qwen3_vl_moe, glm4v, glm46v, glm4v_moe, mistral3, gemma4, gemma4_vision, gemma4_moe, gemma4_unified,
        gemma3n, molmo2, kimi_k25, ovis2, aya_vision, cohere2_vision, ernie4_5_vl_moe, llama4, granite4_vision,
        deepseek_vl, exaone4_5, lighton_ocr, vipllava, minicpmv4_6, minicpmv4_7,
    )
}  # fmt: skip


def made(name: str) -> tuple[Any, Any]:
    """A random model of a family and its processor; skips the test where this release of transformers has none."""
    torch.manual_seed(0)
    try:
        return MORE[name]()
    except AttributeError as error:
        if error.obj is not tf:
            raise
        pytest.skip(f"transformers {tf.__version__} has no {error.name}")
