"""The server's protocol through OpenAI's own client: choices, streams, stops, usage, `:focus`, health and metrics."""

from __future__ import annotations

import base64
import io
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from PIL import Image
from serve_help import (
    NAME,
    KnownEngine,
    body,
    data_url,
    get,
    known,
    picture,
    post,
    serving,
    two_steps,
)
from waiting import PATIENCE_S, wait_until

from visrl.conversation import Conversation
from visrl.serve.backend import Loaded
from visrl.serve.batching import ContinuousBatcher
from visrl.serve.metrics import Metrics
from visrl.serve.requests import QueuedRequest, held_back


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)


def test_a_text_and_its_usage_through_the_openai_client() -> None:
    with known(lambda _: "a tree") as (url, _, _):
        reply = client_of(url).chat.completions.create(**body())
    assert reply.choices[0].message.content == "a tree"
    assert reply.choices[0].finish_reason == "stop"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (7, 6, 13)
    assert reply.model == NAME


def test_a_text_is_read_before_its_end_only_where_something_depends_on_it() -> None:
    with known(lambda _: "a tree") as (url, engine, _):
        post(url, body())
        assert engine.reads == 0
        assert post(url, body(stop="tr")).json()["choices"][0]["message"]["content"] == "a "
        assert engine.reads == len("a tr")


def test_the_conversation_reaches_the_engine_as_it_was_sent() -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "left "}, *body(pictures=None)["messages"][0]["content"]],
        },
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "sure?"},
    ]
    with known() as (url, engine, _):
        assert post(url, body(messages=messages)).status_code == 200
    conversation = engine.batches[0][0].conversation
    assert [(message.role, message.text) for message in conversation.messages] == [
        ("system", "be brief"),
        ("user", "left <image>What is it?"),
        ("assistant", "no"),
        ("user", "sure?"),
    ]
    assert conversation.views[0].image.tobytes() == Image.open(io.BytesIO(picture())).convert("RGB").tobytes()


def test_how_to_draw_is_handed_on() -> None:
    with known() as (url, engine, _):
        post(url, body(temperature=0.5, top_p=0.25, max_tokens=3, seed=11))
        post(url, body(max_completion_tokens=4))
        post(url, body(n=3, seed=11))
    given, short, several = engine.batches[0][0], engine.batches[1][0], engine.batches[2]
    assert (given.sampling.temperature, given.sampling.top_p, given.sampling.max_tokens, given.seed) == (
        0.5,
        0.25,
        3,
        11,
    )
    assert (short.sampling.temperature, short.sampling.max_tokens) == (0.0, 4)
    assert several[0].seed == 11
    assert len({row.seed for row in several}) == 3


def test_n_choices_come_in_order_and_length_is_told() -> None:
    with known(lambda _: "abcdef") as (url, _, _):
        reply = client_of(url).chat.completions.create(**body(n=3, max_tokens=4))
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert [(choice.message.content, choice.finish_reason) for choice in reply.choices] == [("abcd", "length")] * 3
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (7, 12)


def test_a_stream_gives_the_same_text_in_pieces_and_its_usage() -> None:
    with known(lambda _: "häuser", token_s=0.01) as (url, _, _):
        chunks = list(
            client_of(url).chat.completions.create(**body(n=2), stream=True, stream_options={"include_usage": True})
        )
    *pieces, last = chunks
    texts = ["", ""]
    for chunk in pieces:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["häuser", "häuser"]
    assert len(pieces) >= 8
    assert [chunk.choices[0].delta.role for chunk in pieces].count("assistant") == 2
    assert [chunk.choices[0].finish_reason for chunk in pieces].count("stop") == 2
    assert last.usage.completion_tokens == 12


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("stop", "expected"), [("lo w", "hel"), (["zz", "wor"], "hello "), ("d", "hello worl")])
def test_a_stop_text_ends_and_is_never_shown(stop: str | list[str], expected: str, stream: bool) -> None:
    with known(lambda _: "hello world", token_s=0.002) as (url, _, _):
        reply = client_of(url).chat.completions.create(**body(stop=stop), stream=stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in reply) if stream else None
    assert (text if stream else reply.choices[0].message.content) == expected


def test_what_may_become_a_stop_or_a_character_is_held_back() -> None:
    assert held_back("hel", ("lo",)) == 1
    assert held_back("hello", ("lo w",)) == 2
    assert held_back("abc", ()) == 0
    assert held_back("ab\ufffd", ("zz",)) == 1
    row = QueuedRequest(Conversation(()), None, 0, ("lo",))  # type: ignore[arg-type]
    assert [row.see(text) for text in ("h", "hel", "help")] == [(True, "h"), (True, "he"), (True, "help")]
    assert row.see("help lo")[0] is False


# --- :focus ---------------------------------------------------------------------------------------------------------


def test_focus_answers_in_two_steps_within_one_request() -> None:
    with known() as (url, engine, _):
        reply = client_of(url).chat.completions.create(**body() | {"model": f"{NAME}:focus"})
    message = reply.choices[0].message
    assert message.content == "crop 100x50"
    focus = message.model_extra["focus"]
    assert focus["box"] == [50.0, 50.0, 150.0, 100.0]
    assert focus["box_text"] == "[0.250, 0.500, 0.750, 1.000]"
    assert focus["crop_window"] == [50, 50, 150, 100]
    assert focus["image_size"] == [200, 100]
    assert focus["error"] is None
    crop = Image.open(io.BytesIO(base64.b64decode(focus["crop"].split(",")[1])))
    whole = Image.open(io.BytesIO(picture())).convert("RGB")
    assert crop.tobytes() == whole.crop((50, 50, 150, 100)).tobytes()
    first, second = (batch[0].conversation for batch in engine.batches)
    assert first.messages[0].text.startswith("<image>\nWhat is it? Please first provide the bounding box")
    assert second.messages[0].text == first.messages[0].text + "\n<image>"
    assert reply.usage.completion_tokens == len("[0.250, 0.500, 0.750, 1.000]") + len("crop 100x50")


def test_a_turned_picture_is_set_upright_and_boxes_are_of_it() -> None:
    turned, buffer = Image.Exif(), io.BytesIO()
    turned[0x0112] = 6  # a quarter turn
    Image.new("RGB", (200, 100)).save(buffer, "JPEG", exif=turned)
    asked = body(pictures=[data_url(buffer.getvalue(), "jpeg")]) | {"model": f"{NAME}:focus"}
    with known() as (url, _, _):
        focus = post(url, asked).json()["choices"][0]["message"]["focus"]
    assert focus["image_size"] == [100, 200]
    assert focus["box"] == [25.0, 100.0, 75.0, 200.0]


def test_max_tokens_bounds_the_answer_and_not_the_box() -> None:
    with known() as (url, _, _):
        reply = post(url, body(max_tokens=4) | {"model": f"{NAME}:focus"}).json()
    assert reply["choices"][0]["message"]["content"] == "crop"
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["choices"][0]["message"]["focus"]["box"] is not None


def test_focus_streams_the_box_before_the_answer() -> None:
    with known(token_s=0.002) as (url, _, _):
        chunks = list(client_of(url).chat.completions.create(**body() | {"model": f"{NAME}:focus"}, stream=True))
    assert chunks[0].choices[0].delta.model_extra["focus"]["box"] == [50.0, 50.0, 150.0, 100.0]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "crop 100x50"


def test_focus_without_a_readable_box_says_so_and_answers_from_the_whole() -> None:
    with known(lambda talk: "over there" if len(talk.views) == 1 else two_steps(talk)) as (url, _, _):
        message = post(url, body() | {"model": f"{NAME}:focus"}).json()["choices"][0]["message"]
    assert message["content"] == "crop 200x100"
    assert message["focus"]["box"] is None
    assert "over there" in message["focus"]["error"]


def test_a_large_crop_is_shown_smaller_with_its_exact_window() -> None:
    large = data_url(picture((3000, 1500)))
    with known() as (url, _, _):
        focus = post(url, body(pictures=[large]) | {"model": f"{NAME}:focus"}).json()["choices"][0]["message"]["focus"]
    crop = Image.open(io.BytesIO(base64.b64decode(focus["crop"].split(",")[1])))
    assert max(crop.size) == 1024
    assert focus["crop_window"] == [750, 750, 2250, 1500]


def test_whole_is_the_second_step_with_the_whole_picture_for_a_crop() -> None:
    with known() as (url, engine, _):
        message = post(url, body() | {"model": f"{NAME}:whole"}).json()["choices"][0]["message"]
    assert message["content"] == "crop 200x100"
    assert "focus" not in message
    conversation = engine.batches[0][0].conversation
    assert conversation.messages[0].text.endswith("\n<image>")
    assert [view.is_crop for view in conversation.views] == [False, True]


# --- Health, models, metrics ----------------------------------------------------------------------------------------


def test_health_is_503_until_the_model_is_loaded() -> None:
    loaded = threading.Event()
    metrics = Metrics()

    def load() -> Loaded:
        loaded.wait(PATIENCE_S)
        return Loaded(KnownEngine(two_steps))

    batcher = ContinuousBatcher(load, metrics)
    with serving(batcher, metrics, wait=False) as url:
        assert get(f"{url}/health").status_code == 503
        assert get(f"{url}/health").json() == {"status": "loading"}
        early = post(url, body())
        assert (early.status_code, early.headers["retry-after"]) == (503, "2")
        loaded.set()
        wait_until(lambda: get(f"{url}/health").status_code == 200)
        assert post(url, body()).status_code == 200


def test_a_model_that_cannot_be_loaded_is_told() -> None:
    def load() -> Loaded:
        raise ValueError("no weights here")

    batcher = ContinuousBatcher(load, Metrics())
    batcher.start()
    wait_until(lambda: batcher.state != "loading")
    assert batcher.state == "failed"
    assert str(batcher.failure) == "no weights here"
    batcher.stop()


def test_models_are_listed_with_focus() -> None:
    with known() as (url, _, _):
        models = client_of(url).models.list()
        with pytest.raises(openai.NotFoundError, match=f"here, but {NAME}, each with :focus or :whole, too"):
            client_of(url).chat.completions.create(**body() | {"model": "gpt-9"})
    assert [(model.id, model.owned_by) for model in models] == [
        (NAME + suffix, "visrl") for suffix in ("", ":focus", ":whole")
    ]


def test_metrics_count_what_happened() -> None:
    with known(lambda _: "abc") as (url, _, _):
        post(url, body())
        post(url, b"{")
        get(f"{url}/nowhere")
        text = get(f"{url}/metrics").text
    lines = text.splitlines()
    for line in (
        'visrl_requests_total{path="/v1/chat/completions",status="200"} 1',
        'visrl_requests_total{path="/v1/chat/completions",status="400"} 1',
        'visrl_requests_total{path="other",status="404"} 1',
        'visrl_tokens_total{kind="prompt"} 7',
        'visrl_tokens_total{kind="completion"} 3',
        "visrl_request_seconds_count 2",
        "visrl_requests_in_flight 1",
        "visrl_model_ready 1",
    ):
        assert line in lines


def test_stopping_lets_what_runs_finish() -> None:
    with ThreadPoolExecutor(1) as pool:
        with known(lambda _: "x" * 40, token_s=0.01) as (url, engine, _):
            reply = pool.submit(post, url, body())
            wait_until(lambda: engine.running)
        assert reply.result().status_code == 200
        with pytest.raises(httpx.ConnectError):
            post(url, body())
