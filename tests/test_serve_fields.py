"""What a request may hold: null where the protocol has it, fields honoured, passed on or refused by name."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from serve_help import body, data_url, known, picture, picture_part, post

from visrl.serve.errors import RequestError
from visrl.serve.fields import ANSWERED_WITH, CHANGES_NOTHING, HONOURED_NOWHERE, SAMPLED_WITH, for_the_box
from visrl.serve.schemas import ChatRequest, Limits, read_request

USER = {"role": "user", "content": "What is it?"}


def read(is_passed_on: bool = False, **fields: Any) -> ChatRequest:
    return read_request(json.dumps({"model": "m", "messages": [USER]} | fields).encode(), Limits(), is_passed_on)


def refusal(is_passed_on: bool = False, **fields: Any) -> RequestError:
    with pytest.raises(RequestError) as refused:
        read(is_passed_on, **fields)
    assert refused.value.status == 400
    return refused.value


def test_what_the_protocol_calls_nullable_is() -> None:
    nothing = dict.fromkeys(
        ("n", "stream", "stop", "stream_options", "temperature", "top_p", "max_tokens", "max_completion_tokens", "seed",
         "user", "logit_bias", "response_format", "tools", "tool_choice", "logprobs", "top_logprobs", "metadata",
         "store", "presence_penalty", "frequency_penalty", "modalities", "audio", "prediction", "service_tier",
         "reasoning_effort", "verbosity", "web_search_options", "structured_outputs", "min_tokens"),
    )  # fmt: skip
    asked = read(**nothing)
    assert (asked.n, asked.stream, asked.stops, asked.max_tokens, asked.passed) == (1, False, (), None, {})
    assert read(stream_options={"include_usage": None}).stream_options.include_usage is False


@pytest.mark.parametrize(
    "turn",
    [
        {"content": None},
        {},
        {"content": None, "tool_calls": None, "function_call": None, "refusal": None, "audio": None, "name": None},
        {"content": "", "tool_calls": [], "annotations": [], "reasoning_content": None},
        {"content": None, "focus": {"box": [1, 2, 3, 4]}},
    ],
)
def test_an_assistant_turn_may_say_nothing(turn: dict[str, Any]) -> None:
    with known() as (url, engine, _):
        messages = [USER, {"role": "assistant"} | turn, {"role": "user", "name": None, "content": "Sure?"}]
        assert post(url, body(messages=messages)).status_code == 200
    assert [message.text for message in engine.batches[0][0].conversation.messages] == ["What is it?", "", "Sure?"]


PART = {"type": "text", "text": "x"}


@pytest.mark.parametrize(
    ("messages", "where", "said"),
    [
        ([USER, {"role": "user"}], "messages.1.content", "a user message holds a text or parts"),
        ([{"role": "system", "content": None}, USER], "messages.0.content", "a system message"),
        ([USER, {"role": "user", "content": 5}], "messages.1.content", "array"),
        ([{"role": "user", "content": [PART, 1]}], "messages.0.content.1", "object"),
        ([{"role": "user", "content": [PART, PART, {"type": "audio"}]}], "messages.0.content.2.type", "image_url"),
        ([{"role": "user", "content": [PART, {"type": "text"}]}], "messages.0.content.1", "has no text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content.0", "has no image_url"),
        ([{"role": "user", "content": [PART | {"max_pixels": 9}]}], "messages.0.content.0.max_pixels", "not supported"),
        (
            [USER, {"role": "user", "content": [PART, {"type": "image_url", "image_url": {"url": "u", "detail": 1}}]}],
            "messages.1.content.1.image_url.detail",
            "'original'",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": None}}]}],
            "messages.0.content.0.image_url.url",
            "string",
        ),
        ([USER, {"role": "assistant", "tool_calls": [{"id": "a"}]}], "messages.1.tool_calls.0.function", "required"),
        ([USER, {"role": "function", "content": "7", "name": "f"}], "messages.1.role", "a function message"),
        ([USER, {"role": "root", "content": "x"}], "messages.1.role", "'developer'"),
        ([USER, "x"], "messages.1", "object"),
        ([], "messages", "at least 1"),
        (None, "messages", "array"),
    ],
)  # fmt: skip
def test_the_part_that_is_wrong_is_named(messages: Any, where: str, said: str) -> None:
    refused = refusal(messages=messages)
    assert refused.message.startswith(f"{where}: ")
    assert said in refused.message
    assert refused.param == where


def test_every_detail_of_the_protocol_is_understood() -> None:
    parts = [{"type": "image_url", "image_url": {"url": data_url(picture()), "detail": detail}}
             for detail in ("auto", "low", "high", "original", None)]  # fmt: skip
    with known() as (url, engine, _):
        assert post(url, body(messages=[{"role": "user", "content": parts}])).status_code == 200
    assert [view.is_crop for view in engine.batches[0][0].conversation.views] == [False, True, False, False, False]


# --- Fields that change what is generated -----------------------------------------------------------------------------

ASKING: dict[str, Any] = {
    "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.5, "presence_penalty": 1, "frequency_penalty": -0.5,
    "min_tokens": 6, "ignore_eos": True, "stop_token_ids": [7], "bad_words": ["no"], "logit_bias": {"5": -100},
    "structured_outputs": {"choice": ["yes", "no"]}, "response_format": {"type": "json_object"},
    "chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low", "skip_special_tokens": False,
    "allowed_token_ids": [1, 2], "priority": 1,
}  # fmt: skip
REFUSED: dict[str, Any] = {
    "guided_choice": ["yes", "no"], "guided_json": {}, "guided_regex": "a+", "guided_grammar": "root", "best_of": 2,
    "prediction": {"type": "content", "content": "x"}, "use_beam_search": True, "length_penalty": 2, "echo": True,
    "add_generation_prompt": False, "continue_final_message": True, "documents": [{"text": "x"}],
    "mm_processor_kwargs": {"max_pixels": 100}, "prompt_logprobs": 1, "top_logprobs": 3,
    "truncate_prompt_tokens": 4, "include_stop_str_in_output": True, "logits_processors": ["f"], "verbosity": "low",
    "functions": [{}], "function_call": {"name": "x"}, "modalities": ["audio"],
    "web_search_options": {}, "a_field_of_tomorrow": 1, "Temperature": 1, "maxTokens": 5,
}  # fmt: skip


@pytest.mark.parametrize("name", ASKING)
def test_a_field_of_vllm_is_passed_on_to_it_and_refused_elsewhere(name: str) -> None:
    assert read(True, **{name: ASKING[name]}).passed == {name: ASKING[name]}
    refused = refusal(**{name: ASKING[name]})
    assert refused.message.startswith(f"{name} is not supported")
    assert "infer_backend: vllm" in refused.message
    assert (refused.param, refused.code) == (name, "unsupported_parameter")


@pytest.mark.parametrize("is_passed_on", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_nobody_honours_is_refused_by_name(name: str, is_passed_on: bool) -> None:
    assert refusal(is_passed_on, **{name: REFUSED[name]}).message.startswith(f"{name} is ")


def test_values_that_ask_for_nothing_pass_and_are_not_kept() -> None:
    for name, harmless in (SAMPLED_WITH | ANSWERED_WITH | HONOURED_NOWHERE).items():
        for value in harmless:
            assert read(**{name: value}).passed == {}
    for name in CHANGES_NOTHING:
        assert read(**{name: "anything"}).model_extra == {}
    assert refusal(logprobs=0).param == "logprobs"  # no number is a false


@pytest.mark.parametrize("name", ["logprobs", "return_token_ids"])
def test_tokens_are_told_by_this_process_alone(name: str) -> None:
    assert getattr(read(**{name: True}), name)
    assert refusal(True, **{name: True}).message.startswith(f"{name} is not supported by this request; ask the server")


def test_the_box_of_focus_is_not_drawn_by_the_schema_of_the_answer() -> None:
    given = {"top_k": 5, "structured_outputs": {"regex": "a"}, "min_tokens": 3, "repetition_penalty": 1.2}
    assert for_the_box(given) == {"top_k": 5, "repetition_penalty": 1.2}


def test_a_name_that_is_refused_is_not_repeated_at_length() -> None:
    assert len(refusal(**{"x" * 10_000: 1}).message) < 200


# --- Many items -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "end"),
    [
        (b"1,", b"1]}]}"),
        (b'{"type":"text"},', b"1]}]}"),
        (b'{"type":"text","text":"a"},', b'{"type":"text","text":"a"}]}]}'),
        (b"[],", b"1]}]}"),
        (b"[", b""),
        (b'{"a":', b""),
        (b'"x",', b"1]}]}"),
    ],
)
def test_a_body_of_many_items_is_refused_as_it_comes(unit: bytes, end: bytes) -> None:
    head = b'{"model":"known","messages":[{"role":"user","content":['
    with known() as (url, engine, _):
        start = time.monotonic()
        reply = post(url, head + unit * (4_000_000 // len(unit)) + end)
        assert time.monotonic() - start < 5
        assert reply.status_code == 400
        assert "more than 20,000 values" in reply.json()["error"]["message"]
        assert engine.batches == []


def test_one_fault_is_looked_for_and_not_all() -> None:
    many = [1] * 15_000
    start = time.perf_counter()
    assert refusal(messages=[{"role": "user", "content": many}]).param == "messages.0.content.0"
    assert refusal(messages=many).param == "messages.0"
    assert refusal(stop=many).param == "stop.0"
    assert time.perf_counter() - start < 1


def test_a_conversation_of_many_parts_is_still_one() -> None:
    parts = [{"type": "text", "text": "a"}] * 1000
    with known() as (url, engine, _):
        assert post(url, body(messages=[{"role": "user", "content": [picture_part(), *parts]}])).status_code == 200
    assert engine.batches[0][0].conversation.messages[0].text.endswith("a" * 1000)
