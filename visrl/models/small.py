"""A small copy of a model's config, on which a trial costs little: few layers, narrow, a short window. What decides how
tokens see each other stays as it is: kinds of layers, head dimensions, rotary sections, image processor.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from visrl.models.router import switch_off_router_logits

LAYERS, KINDS = 2, 3
WINDOW, CHUNK = 24, 32  # tokens, shorter than any prompt of a trial
NARROW = 512  # wider models are made narrow, too
MOST = 400_000_000  # weights of a copy
MANY = 8192  # tokens of a vocabulary, which is cut where there are more
HEADS, WIDE, EXPERTS, CHOSEN, RANK = 2, 64, 4, 2, 32

_DEPTHS = ("num_hidden_layers", "depth", "num_layers", "n_layers", "encoder_layers", "num_global_layers")
_HEADS = ("num_attention_heads", "num_heads", "attention_heads", "n_heads")
_OWN_WIDTHS = ("embed_dim", "hidden_size", "d_model", "width")  # the first that a part has is its own
_WIDTHS = (
    *_OWN_WIDTHS, "out_hidden_size", "projection_dim", "output_dim", "text_hidden_size", "hidden_dim", "n_embd",
    "adapter_in_dim", "adapter_out_dim",
)  # fmt: skip
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk", "num_selected_experts")
_TOKENS = ("token_id", "token_ids", "token_index", "patch_id")
_RANKS = ("q_lora_rank", "kv_lora_rank")

Values = dict[str, Any]


def small_model(config: Any, *, narrow: bool, numbers: torch.Tensor | None = None) -> torch.nn.Module:
    """A random model of the config's class with few layers, in fp32; `narrow` in width, too; see `small_copy`."""
    values = copy.deepcopy(config.to_dict())
    text = _text_values(config, values)
    for part in _parts(values):
        _cut_layers(part, is_text=part is text)
    _cut_windows(text)
    if narrow:
        _make_narrow(values)
    if numbers is not None:
        _renumber(values, text, numbers)
    values.pop("quantization_config", None)
    made = type(config).from_dict(values)
    switch_off_router_logits(made)
    return AutoModelForImageTextToText.from_config(made, dtype=torch.float32)


def small_copy(config: Any, numbers: torch.Tensor | None = None) -> torch.nn.Module:
    """A small random model of a config: with few layers, and narrow where it would still be large; with `numbers`, of
    so few tokens (see `renumbered`).

    Raises:
        ValueError: it would be large all the same.
    """
    narrow = (getattr(config.get_text_config(), "hidden_size", None) or NARROW) > NARROW
    with torch.device("meta"):
        copy = small_model(config, narrow=narrow, numbers=numbers)
    weights = sum(weight.numel() for weight in copy.parameters())
    if weights > MOST:
        raise ValueError(f"a small copy of it would have {weights:,} weights")
    return small_model(config, narrow=narrow, numbers=numbers)


def renumbered(config: Any, ids: Iterable[int]) -> torch.Tensor | None:
    """New numbers for the tokens `ids` and those that a config names, [largest + 1], counted from 0, where the
    vocabulary is large: embeddings and output layer of a copy need no others. None where it is small."""
    if getattr(config.get_text_config(), "vocab_size", 0) <= MANY:
        return None
    named = {one for part in _parts(config.to_dict()) for _, value in _tokens(part) for one in _listed(value)}
    known = sorted({*ids, *(one for one in named if isinstance(one, int) and one >= 0)})
    numbers = torch.zeros(known[-1] + 1, dtype=torch.long)
    numbers[known] = torch.arange(len(known))
    return numbers


def _tokens(part: Values) -> list[tuple[str, Any]]:
    """What a config says of tokens, by names."""
    return [(name, value) for name, value in part.items() if name.endswith(_TOKENS)]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _renumber(values: Values, text: Values, numbers: torch.Tensor) -> None:
    """Give the tokens of a config new numbers, and the text a vocabulary of so many."""
    before = text["vocab_size"]
    for part in _parts(values):
        for name, value in _tokens(part):
            new = [int(numbers[one]) if isinstance(one, int) and one >= 0 else one for one in _listed(value)]
            part[name] = new if isinstance(value, list | tuple) else new[0]
    for part in (values, text):
        for name in ("vocab_size", "vocab_size_per_layer_input"):
            if part.get(name) == before:
                part[name] = int(numbers.max()) + 1


def _parts(values: Values) -> list[Values]:
    """The config and every config in it."""
    inner = [one for name, one in values.items() if isinstance(one, dict) and "model_type" in one]
    return [values, *(part for one in inner for part in _parts(one))]


def _text_values(config: Any, values: Values) -> Values:
    text = config.get_text_config()
    if text is config:
        return values
    for name in config.sub_configs:
        own = getattr(config, name, None)
        if own is text:
            return values[name]
        if own is not None and own.get_text_config() is text:
            return _text_values(own, values[name])
    raise ValueError("the text config is none of its parts")


def _cut_layers(part: Values, *, is_text: bool) -> None:
    """Few layers of a part. Of the text's, one of every kind, twice over: what a token makes of an image in the last
    layer is seen by nobody. Lists by layer follow."""
    name = next((name for name in _DEPTHS if isinstance(part.get(name), int)), None)
    if name is None:
        return
    before = part[name]
    lists = [value for value in part.values() if isinstance(value, list) and len(value) == before]
    kinds = [repr([value[number] for value in lists]) for number in range(before)] if is_text else []
    shown = list(dict.fromkeys(kinds))[:KINDS]
    kept = [kinds.index(kind) for kind in shown] * 2 or list(range(LAYERS))
    dense = part.get("first_k_dense_replace")
    if is_text and isinstance(dense, int) and dense:
        part["first_k_dense_replace"] = 1
        kept = [0, *[dense] * LAYERS] if len(shown) == 1 else kept
    if before <= len(kept):
        return
    for key, value in part.items():
        if isinstance(value, list) and len(value) == before:
            part[key] = [value[number] for number in kept]
        elif isinstance(value, list) and key.endswith(("indexes", "indices", "layers")):
            part[key] = sorted({one % len(kept) if one >= 0 else one for one in value if isinstance(one, int)})
    by_layer = part.get("per_layer_config")
    if isinstance(by_layer, dict):
        said = {int(number): values for number, values in by_layer.items()}
        part["per_layer_config"] = {new: said[old] for new, old in enumerate(kept) if old in said}
    if part.get("num_kv_shared_layers"):  # layers that share come after their like
        part["num_kv_shared_layers"] = len(kept) // 2
    part[name] = len(kept)


def _cut_windows(text: Values) -> None:
    for name, short in (("sliding_window", WINDOW), ("attention_chunk_size", CHUNK)):
        if isinstance(text.get(name), int):
            text[name] = min(text[name], short)


# --- Width ------------------------------------------------------------------------------------------------------------


def _make_narrow(values: Values) -> None:
    """Two heads of their dimension, and what has the width of a part follows it wherever it is said."""
    widths: dict[int, int] = {}
    for part in _parts(values):
        heads = next((name for name in _HEADS if isinstance(part.get(name), int)), None)
        width = next((name for name in _OWN_WIDTHS if isinstance(part.get(name), int)), None)
        if heads is None or width is None or part[heads] <= HEADS:
            continue
        dim = part.get("head_dim") or part[width] // part[heads]
        widths.setdefault(part[width], HEADS * dim)
        merged = part.get("merge_size")  # patches that are handed on side by side
        if isinstance(merged, int):
            widths.setdefault(part[width] * merged**2, HEADS * dim * merged**2)
        grouped = part.get("num_key_value_heads")
        if isinstance(grouped, int):
            part["num_key_value_heads"] = HEADS if grouped == part[heads] else 1
        part[heads] = HEADS
    for part in _parts(values):
        _narrow(part, widths)


def _narrow(part: Values, widths: Mapping[int, int]) -> None:
    keys, values = part.get("linear_num_key_heads"), part.get("linear_num_value_heads")
    if isinstance(keys, int) and isinstance(values, int) and keys > HEADS and values % keys == 0:  # of linear attention
        part |= {"linear_num_key_heads": HEADS, "linear_num_value_heads": HEADS * (values // keys)}
    for key, value in part.items():
        if isinstance(value, bool) or not isinstance(value, int):
            if isinstance(value, list) and "intermediate" in key:
                part[key] = [WIDE] * len(value)
            elif isinstance(value, list) and key in _EXPERTS:
                part[key] = [min(EXPERTS, one) for one in value]
        elif key in _WIDTHS:
            part[key] = widths.get(value, value)
        elif "intermediate" in key or key.endswith("ffn_dim"):
            part[key] = min(WIDE, value)
        elif key in _EXPERTS:
            part[key] = min(EXPERTS, value)
        elif key in _CHOSEN:
            part[key] = min(CHOSEN, value)
        elif key in _RANKS:
            part[key] = min(RANK, value)
        elif key in ("n_group", "topk_group"):
            part[key] = 1
