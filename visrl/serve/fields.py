"""Which fields of a request are honoured, passed on, without meaning here, or refused.

None is ignored that would change what is generated, and one that nobody here knows might.

Names are those of OpenAI's chat completions and of vLLM's extra parameters (vLLM 0.33).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from visrl.serve.errors import RequestError

# Bookkeeping of callers: whatever they hold, the same text is generated.
CHANGES_NOTHING = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "request_id", "session_id", "cache_salt", "stream_interval",
    }
)  # fmt: skip

# What vLLM honours, with the values that ask for nothing. These hold for the box of `:focus` too,
SAMPLED_WITH: dict[str, tuple[Any, ...]] = {
    "top_k": (None, -1, 0),
    "min_p": (None, 0),
    "repetition_penalty": (None, 1),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "chat_template_kwargs": (None, {}),
    "reasoning_effort": (None,),
    "priority": (None, 0),
}
# and these are about the answer alone: a box is not to follow the answer's schema.
ANSWERED_WITH: dict[str, tuple[Any, ...]] = {
    "response_format": (None, {"type": "text"}),
    "structured_outputs": (None,),
    "logit_bias": (None, {}),
    "stop_token_ids": (None, []),
    "min_tokens": (None, 0),
    "ignore_eos": (None, False),
    "bad_words": (None, []),
    "allowed_token_ids": (None,),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "thinking_token_budget": (None,),
    "repetition_detection": (None,),
    "vllm_xargs": (None, {}),
}
# What neither this engine nor this server's replies can honour, whatever serves the model.
HONOURED_NOWHERE: dict[str, tuple[Any, ...]] = {
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "top_logprobs": (None, 0),
    "prompt_logprobs": (None,),
    "logprob_token_ids": (None,),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "moderation": (None,),
    "verbosity": (None,),
    "best_of": (None, 1),
    "use_beam_search": (None, False),
    "length_penalty": (None, 1),
    "early_stopping": (None, False),
    "logits_processors": (None, []),
    "include_stop_str_in_output": (None, False),
    "include_reasoning": (None, True),
    "echo": (None, False),
    "add_special_tokens": (None, False),
    "chat_template": (None,),
    "documents": (None, []),
    "media_io_kwargs": (None, {}),
    "mm_processor_kwargs": (None, {}),  # it would size images otherwise than their boxes are read back at
    "truncate_prompt_tokens": (None,),
    "truncation_side": (None,),
    "watermarking": (None, False),
    "return_tokens_as_token_ids": (None, False),
    "return_prompt_text": (None, False),
    "return_token_offsets": (None, False),
    "return_mm_kwargs": (None, True),
    "routed_experts_prompt_start": (None, 0),
    "kv_transfer_params": (None,),
    "ec_transfer_params": (None,),
}
REMEDIES = {
    "best_of": "ask for several choices with n",
    "functions": "define them in tools",
    "function_call": "say it in tool_choice",
    **dict.fromkeys(
        ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_decoding_backend",
         "guided_whitespace_pattern", "structural_tag"),
        "vLLM has structured_outputs in its place",
    ),
}  # fmt: skip


def passed_on(given: Mapping[str, Any], is_passed_on: bool) -> dict[str, Any]:
    """Of the fields that this server does not read itself, those that its backend is to be given.

    Raises:
        RequestError: 400 for the first that would change what is generated and that nobody here honours.
    """
    kept = {}
    for name, value in given.items():
        if name in CHANGES_NOTHING:
            continue
        by_vllm = SAMPLED_WITH.get(name) or ANSWERED_WITH.get(name)
        if _asks_nothing(value, by_vllm or HONOURED_NOWHERE.get(name, (None,))):
            continue
        if by_vllm is None or not is_passed_on:
            raise _refusal(name, by_vllm is not None)
        kept[name] = value
    return kept


def for_the_box(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Of passed-on fields, those that the first step of `:focus` is sampled with."""
    return {name: value for name, value in fields.items() if name in SAMPLED_WITH}


def _asks_nothing(value: Any, harmless: tuple[Any, ...]) -> bool:
    # True equals 1 and False equals 0 in Python, but not in what they ask for.
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in harmless)


def _refusal(name: str, by_vllm: bool) -> RequestError:
    shown = name if len(name) <= 80 else f"{name[:80]}…"
    known = by_vllm or name in HONOURED_NOWHERE or name in REMEDIES
    said = f"{shown} is not supported by this server" if known else f"{shown} is no field that this server knows"
    remedy = REMEDIES.get(name) or ("it needs infer_backend: vllm" if by_vllm else "leave it out")
    return RequestError(400, f"{said}; {remedy}", "unsupported_parameter", param=shown)
