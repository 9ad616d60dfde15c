"""The endpoint client and engine against servers of our own making, sound and faulty, on loopback."""

from __future__ import annotations

import base64
import io
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from http_server import Handler, Script, drip, hang, often_faulty, serving
from PIL import Image

from visrl.box import Box
from visrl.conversation import Conversation, Message, View, answer_conversation, crop_view
from visrl.engines.base import Sampling
from visrl.engines.client import Client
from visrl.engines.endpoint import EndpointEngine
from visrl.engines.openai_server import Ask, Endpoint, EndpointError
from visrl.engines.server_process import free_port
from visrl.models.load import load_encoder
from visrl.models.tiny import CHECKPOINT
from visrl.records import Picture


@contextmanager
def client_of(*urls: str, **options: Any) -> Iterator[Client]:
    client = Client(Endpoint(urls, "m", **{"first_wait_s": 0.01, "timeout_s": 60.0, "api_key": "k"} | options))
    try:
        yield client
    finally:
        client.close()


def ask(text: str, **options: Any) -> Ask:
    return Ask([{"role": "user", "content": text}], **options)


def echo(handler: Handler, body: dict[str, Any]) -> None:
    handler.text(body["messages"][0]["content"])


def test_replies_keep_the_order_of_their_requests() -> None:
    def slower_first(handler: Handler, body: dict[str, Any]) -> None:
        time.sleep(0.05 if body["messages"][0]["content"] == "0" else 0)
        echo(handler, body)

    with serving(slower_first) as server, client_of(server.url) as client:
        replies = client.ask_all(ask(str(number)) for number in range(20))
    assert [reply.text for reply in replies] == [str(number) for number in range(20)]
    assert {(reply.tokens, reply.finish_reason, reply.error) for reply in replies} == {(3, "stop", None)}
    assert client.counts == Counter(ok=20)


def test_extra_fields_may_not_change_what_is_asked() -> None:
    with pytest.raises(EndpointError, match="extra_body may not hold seed, temperature"):
        Endpoint(("http://127.0.0.1:9/v1",), "m", extra_body={"temperature": 2, "top_k": 3, "seed": 1})


def test_the_request_holds_what_was_asked() -> None:
    sampling = Sampling(temperature=0.5, top_p=0.9, max_tokens=7)
    with serving(echo) as server, client_of(server.url, extra_body={"top_k": 3}) as client:
        client.ask_all([ask("a", sampling=sampling, seed=2**62), ask("b")])
    first, second = sorted(server.bodies, key=lambda body: body["messages"][0]["content"])
    assert first == {
        "model": "m",
        "messages": [{"role": "user", "content": "a"}],
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 7,
        "seed": 2**62,
        "top_k": 3,
    }
    assert "seed" not in second


def test_no_more_requests_at_once_than_allowed() -> None:
    three, lock, open_now, most_open = threading.Barrier(3), threading.Lock(), 0, 0

    def in_threes(handler: Handler, body: dict[str, Any]) -> None:
        nonlocal open_now, most_open
        with lock:
            open_now += 1
            most_open = max(most_open, open_now)
        three.wait(60)
        time.sleep(0.01)  # for a fourth, were there one
        with lock:
            open_now -= 1
        echo(handler, body)

    with serving(in_threes) as server, client_of(server.url, concurrency=3) as client:
        replies = client.ask_all(ask(str(number)) for number in range(15))
    assert all(reply.error is None for reply in replies)
    assert most_open == 3


def test_requests_are_made_as_slots_come_free() -> None:
    made, answered, ahead = 0, 0, []

    def asks() -> Iterator[Ask]:
        nonlocal made
        for number in range(30):
            ahead.append(made - answered)
            made += 1
            yield ask(str(number))

    def count(index: int, completion: object) -> None:
        nonlocal answered
        answered += 1

    with serving(echo) as server, client_of(server.url, concurrency=2) as client:
        client.ask_all(asks(), count)
    assert (made, answered) == (30, 30)
    assert max(ahead) <= 2


def test_several_servers_share_the_work() -> None:
    four = threading.Barrier(4)

    def in_fours(handler: Handler, body: dict[str, Any]) -> None:
        four.wait(60)  # each request is with its server before the next ones are sent
        echo(handler, body)

    with serving(in_fours) as one, serving(in_fours) as two, client_of(one.url, two.url, concurrency=4) as client:
        client.ask_all(ask(str(number)) for number in range(40))
    assert len(one.bodies) == len(two.bodies) == 20


def test_a_dead_server_among_living_ones_costs_no_answer() -> None:
    dead = f"http://127.0.0.1:{free_port()}/v1"
    with serving(echo) as server, client_of(dead, server.url) as client:
        replies = client.ask_all(ask(str(number)) for number in range(20))
    assert all(reply.error is None for reply in replies)
    assert client.counts["connection"] >= 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_refusal_is_not_asked_again(status: int) -> None:
    with (
        serving(lambda handler, body: handler.send(status, b'{"error": {"message": "because"}}')) as server,
        client_of(server.url) as client,
    ):
        (reply,) = client.ask_all([ask("a")])
    assert len(server.bodies) == 1
    assert reply.text is None
    assert reply.finish_reason == "error"
    assert str(status) in reply.error
    assert "because" in reply.error
    assert client.counts == Counter({f"http {status}": 1, "gave up": 1})


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_passing_fault_is_asked_again(status: int) -> None:
    def third_time_lucky(handler: Handler, body: dict[str, Any]) -> None:
        if len(handler.server.bodies) < 3:
            handler.send(status, b"{}", content_type="text/plain")
        else:
            echo(handler, body)

    with serving(third_time_lucky) as server, client_of(server.url) as client:
        (reply,) = client.ask_all([ask("a")])
    assert reply.text == "a"
    assert client.counts == Counter({f"http {status}": 2, "ok": 1})


def test_retry_after_is_heeded() -> None:
    def wait_first(handler: Handler, body: dict[str, Any]) -> None:
        if len(handler.server.bodies) == 1:
            handler.send(429, b"{}", retry_after="0.4")
        else:
            echo(handler, body)

    with serving(wait_first) as server, client_of(server.url) as client:
        start = time.monotonic()
        (reply,) = client.ask_all([ask("a")])
    assert reply.text == "a"
    assert time.monotonic() - start >= 0.4


def test_the_attempts_end() -> None:
    with (
        serving(lambda handler, body: handler.send(500, b"{}")) as server,
        client_of(server.url, attempts=3) as client,
    ):
        (reply,) = client.ask_all([ask("a")])
    assert len(server.bodies) == 3
    assert "3 tries" in reply.error
    assert client.counts == Counter({"http 500": 3, "gave up": 1})


@pytest.mark.parametrize("script", [hang, drip])
def test_a_server_that_never_ends_is_left(script: Script) -> None:
    with serving(script) as server, client_of(server.url, attempts=2, timeout_s=0.2) as client:
        (reply,) = client.ask_all([ask("a")])
    assert "0.2 s" in reply.error
    assert client.counts == Counter({"time-out": 2, "gave up": 1})


GARBAGE = [b"", b"<html>oops", b"{", b"[]", b"null", b'{"choices": []}', b'{"choices": [{"message": {}}]}', b"\xff\xfe"]


@pytest.mark.parametrize("content_type", ["application/json", "text/html"])
@pytest.mark.parametrize("body", GARBAGE)
def test_a_garbage_body_is_a_value(body: bytes, content_type: str) -> None:
    with (
        serving(lambda handler, _: handler.send(200, body, content_type=content_type)) as server,
        client_of(server.url, attempts=2) as client,
    ):
        (reply,) = client.ask_all([ask("a")])
    assert reply.text is None
    assert client.counts == Counter({"garbage": 2, "gave up": 1})


def test_a_faulty_server_loses_no_row() -> None:
    """30 % of the calls fail in five ways; every row comes back and every failure is counted."""
    script, sent = often_faulty(echo, hangs=2)
    with serving(script) as server, client_of(server.url, attempts=12, timeout_s=2.0, concurrency=4) as client:
        replies = client.ask_all(ask(str(number)) for number in range(120))
    assert [reply.text for reply in replies] == [str(number) for number in range(120)]
    counts = client.counts
    assert counts["ok"] == 120
    for what in ("http 500", "http 429", "garbage"):
        # Where a machine is slow, a reply of any kind may come too late and be counted as that.
        assert 0 < counts[what] <= sent[what]
    assert counts["connection"] > 0
    assert counts["time-out"] >= sent["time-out"] > 0
    assert sum(counts.values()) >= sum(sent.values())


def test_a_request_that_cannot_be_made_is_no_fault_of_the_server() -> None:
    def asks() -> Iterator[Ask]:
        yield ask("a")
        raise ValueError("a row of ours is broken")

    with serving(echo) as server, client_of(server.url) as client, pytest.raises(ValueError, match="row of ours"):
        client.ask_all(asks())


def test_check_says_what_is_wrong() -> None:
    def check(models: tuple[int, bytes]) -> None:
        with serving(echo, models) as server, client_of(server.url) as client:
            client.check()

    check((200, b'{"data": [{"id": "m"}]}'))
    check((404, b"{}"))  # a server without a model list can still complete
    for models, said in [
        ((200, b'{"data": [{"id": "other"}]}'), "does not serve 'm'; it serves other"),
        ((401, b"{}"), "refuses the key"),
        ((503, b"{}"), "not ready"),
        ((200, b"<html>"), "no OpenAI-compatible server"),
    ]:
        with pytest.raises(EndpointError, match=said):
            check(models)
    with client_of(f"http://127.0.0.1:{free_port()}/v1") as client, pytest.raises(EndpointError, match="start one"):
        client.check()


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(EndpointError, match="base_url"):
        Endpoint((), "m")
    with pytest.raises(EndpointError, match="at least 1"):
        Endpoint(("http://127.0.0.1:1/v1",), "m", attempts=0)


# --- The engine -----------------------------------------------------------------------------------------------------


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(size[0] * size[1] * 3))


def decoded(part: dict[str, Any]) -> Image.Image:
    head, data = part["image_url"]["url"].split(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


@contextmanager
def engine_of(url: str, **options: Any) -> Iterator[EndpointEngine]:
    engine = EndpointEngine(Endpoint((url,), "m", first_wait_s=0.01, timeout_s=60.0, api_key="k", **options))
    try:
        yield engine
    finally:
        engine.close()


def test_a_conversation_becomes_messages_with_exact_pictures_in_their_places() -> None:
    whole, detail = View("whole", picture(1)), View("detail", picture(2), is_crop=True)
    conversation = Conversation(
        (
            Message("system", "be brief"),
            Message("user", "<image>\nfirst"),
            Message("assistant", "[0.1, 0.2, 0.3, 0.4]"),
            Message("user", "before <image> after"),
        ),
        (whole, detail),
    )
    with serving(echo) as server, engine_of(server.url) as engine:
        engine.complete([conversation], Sampling(), [[5]])
    system, first, box, second = server.bodies[0]["messages"]
    assert system == {"role": "system", "content": "be brief"}
    assert box == {"role": "assistant", "content": "[0.1, 0.2, 0.3, 0.4]"}
    assert [part["type"] for part in first["content"]] == ["image_url", "text"]
    assert first["content"][1]["text"] == "\nfirst"
    assert [part.get("text") for part in second["content"]] == ["before ", None, " after"]
    assert decoded(first["content"][0]).tobytes() == whole.image.tobytes()
    assert decoded(second["content"][1]).tobytes() == detail.image.tobytes()
    assert "detail" not in second["content"][1]["image_url"]


def test_crops_are_marked_for_our_own_server_alone() -> None:
    whole = View("w", picture(1))
    conversation = answer_conversation("Q?", whole, crop_view(whole, Picture("w", Box(0.1, 0.1, 0.9, 0.9))))
    details = {}
    for owner in ("visrl", "vllm"):
        listed = json.dumps({"data": [{"id": "m", "owned_by": owner}]}).encode()
        with serving(lambda handler, _: handler.text("x"), (200, listed)) as server, engine_of(server.url) as engine:
            engine.check()
            engine.complete([conversation], Sampling(), [[1]])
        parts = server.bodies[0]["messages"][0]["content"]
        details[owner] = [part["image_url"].get("detail") for part in parts if part["type"] == "image_url"]
    assert details == {"visrl": [None, "low"], "vllm": [None, None]}


def test_vllm_alone_is_told_not_to_sample_what_stands_for_images() -> None:
    """It would. What a config biases besides stays, and a server that refuses the field is mended by a key."""
    encoder = load_encoder(CHECKPOINT)
    pads = {str(token): -100 for token in encoder.image_ids}
    talk = Conversation((Message("user", "Q?"),))

    def asked(
        owner: str, script: Script = lambda handler, _: handler.text("x"), logprobs: bool = False, **given: Any
    ) -> list[Any]:
        listed = json.dumps({"data": [{"id": "m", "owned_by": owner}]}).encode()
        with serving(script, (200, listed), trials=True) as server:
            engine = EndpointEngine(Endpoint((server.url,), "m", attempts=1, **given), encoder.codec, encoder)
            try:
                engine.check()
                engine.complete([talk], Sampling(logprobs=logprobs), [[1]])
            finally:
                engine.close()
        return [body.get("logit_bias") for body in server.bodies]

    def speculative(handler: Handler, body: dict[str, Any]) -> None:
        said = "The min_p and logit_bias sampling parameters are not yet supported with speculative decoding."
        handler.send(400 if "logit_bias" in body else 200, json.dumps({"error": {"message": said}}).encode())

    assert len(pads) == 2
    assert asked("vllm") == [pads, pads]  # the first small question, and ours
    assert asked("vllm", logprobs=True) == [pads, None]  # to be learned from: of all tokens
    assert asked("visrl") == [None]
    assert asked("sglang") == [None, None]
    assert asked("vllm", extra_body={"logit_bias": {"9": 1}}) == [{"9": 1, **pads}] * 2
    assert asked("vllm", omit_fields=("logit_bias",)) == [None, None]
    with pytest.raises(EndpointError, match=r"set omit_fields: \[logit_bias\]"):
        asked("vllm", speculative)


def test_one_completion_per_seed_in_order_with_failures_in_place() -> None:
    def by_seed(handler: Handler, body: dict[str, Any]) -> None:
        if body["seed"] == 12:
            handler.send(400, b'{"error": {"message": "no"}}')
        else:
            handler.text(f"{body['messages'][0]['content']}{body['seed']}")

    conversations = [Conversation((Message("user", text),)) for text in ("a", "b", "c")]
    with serving(by_seed) as server, engine_of(server.url) as engine:
        replies = engine.complete(conversations, Sampling(), [[11, 12], [], [13]])
    assert [[reply.text for reply in row] for row in replies] == [["a11", None], [], ["c13"]]
    assert "400" in replies[0][1].error
    with (
        serving(by_seed) as server,
        engine_of(server.url) as engine,
        pytest.raises(ValueError, match="3 conversations"),
    ):
        engine.complete(conversations, Sampling(), [[1]])
