"""In front of another server: pictures sized on our side, and whatever it sends a reply or a clean error."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from http_server import Handler, Script
from http_server import serving as answering
from PIL import Image
from serve_help import body, data_url, post, serving
from test_serve_local import scene_body

from visrl.conversation import View
from visrl.engines.endpoint import EndpointEngine
from visrl.engines.local import LocalEngine
from visrl.engines.open import ModelConfig, model_settings, open_encoder
from visrl.engines.openai_server import Endpoint
from visrl.models.settings import ModelSettings
from visrl.models.tiny import CHECKPOINT
from visrl.rollout.greedy import greedy_looks
from visrl.scenes import scene_samples
from visrl.serve.config import ServeConfig
from visrl.serve.metrics import Metrics
from visrl.serve.runner import make_backend

LISTED = (200, b'{"data": [{"id": "m", "owned_by": "vllm"}]}')


# --- Sizes ------------------------------------------------------------------------------------------------------------


def test_a_picture_sized_here_is_what_the_processor_makes_of_it():
    encoder = open_encoder(config := ModelConfig(model_name_or_path=str(CHECKPOINT)), model_settings(config))
    bounds = encoder.bounds()
    dice = random.Random(3)
    sizes = [(10, 30), (640, 480), (33, 900), (112, 112)] + [
        (dice.randint(5, 700), dice.randint(5, 700)) for _ in range(20)
    ]
    for number, size in enumerate(sizes):
        image = Image.frombytes("RGB", size, dice.randbytes(size[0] * size[1] * 3))
        for is_crop in (False, True):
            view = View(f"{number}{is_crop}", image, is_crop)
            (whole,) = encoder.encode_views([view])
            sized = encoder.sized(view)
            assert sized.size == whole.size == encoder.processed_size(size, is_crop)
            # A server that knows one pair of limits, those we gave it, changes nothing and sees the same pixels.
            there = encoder._prepare_together({"x": View("x", sized)}, bounds)["x"]
            assert torch.equal(there.inputs["pixel_values"], whole.inputs["pixel_values"])


@pytest.fixture(scope="module")
def one_limit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that knows one pair of limits for all pictures, as vLLM does, and no marks on crops."""
    encoder = open_encoder(config := ModelConfig(model_name_or_path=str(CHECKPOINT)), model_settings(config))
    low, high = encoder.bounds()["shortest_edge"], encoder.bounds()["longest_edge"]
    copy = tmp_path_factory.mktemp("copy") / "m"
    copy.mkdir()
    for file in CHECKPOINT.iterdir():
        if file.is_file() and file.name != "visrl.json":
            (copy / file.name).symlink_to(file)
    ModelSettings(low, high, low, high, codec="visrl").save(copy)
    metrics = Metrics()
    backend = make_backend(ServeConfig(model_name_or_path=str(copy)), metrics)
    with serving(backend, metrics, name="m") as behind:

        def pass_on(handler: Handler, asked: dict[str, Any]) -> None:
            del asked["logit_bias"]  # which tells vLLM what ours does by itself
            reply = httpx.post(f"{behind}/v1/chat/completions", json=asked, timeout=60)
            handler.send(reply.status_code, reply.content, content_type=reply.headers["content-type"])

        with answering(pass_on, LISTED) as server:
            yield server.url


def test_answers_behind_a_server_of_one_limit_are_those_of_this_process(one_limit):
    samples = scene_samples("test", 40, 16)
    local = LocalEngine.load(CHECKPOINT)
    engine = EndpointEngine(Endpoint((one_limit,), "m"), local.codec, local.encoder)
    try:
        engine.check()
        there = greedy_looks(engine, samples)
    finally:
        engine.close()
    here = greedy_looks(local, samples)
    assert [(look.text, look.answer) for look in there] == [(look.text, look.answer) for look in here]


def test_the_server_in_front_of_one_limit_answers_as_the_one_of_this_process(one_limit):
    model = str(CHECKPOINT)
    front = ServeConfig(model_name_or_path=model, infer_backend="vllm", vllm_url=one_limit, vllm_model="m")
    choices = []
    for config in (front, ServeConfig(model_name_or_path=model)):
        metrics = Metrics()
        with serving(make_backend(config, metrics), metrics, name="tiny") as url:
            asked = [scene_body(index, model="tiny:focus", max_tokens=8) for index in range(4)]
            choices.append([post(url, one).json()["choices"] for one in asked])
    assert choices[0] == choices[1]


def test_the_config_decides_over_the_checkpoint_in_both_places(one_limit):
    config = ServeConfig(
        model_name_or_path=str(CHECKPOINT), infer_backend="vllm", vllm_url=one_limit, vllm_model="m",
        image_max_pixels=56 * 56, crop_max_pixels=84 * 84,
    )  # fmt: skip
    backend = make_backend(config, Metrics())
    backend.start()
    try:
        for _ in range(600):
            if backend.state != "loading":
                break
            backend._thread.join(0.1)
        assert backend.state == "ready"
        assert backend.processed_size((640, 480)) == open_encoder(config, model_settings(config)).processed_size(
            (640, 480)
        )
        width, height = backend.processed_size((640, 480))
        assert width * height <= 56 * 56
    finally:
        backend.stop()


# --- Faults -----------------------------------------------------------------------------------------------------------


def event(chunk: Any) -> bytes:
    return b"data: " + (chunk if isinstance(chunk, bytes) else json.dumps(chunk).encode()) + b"\n\n"


def delta(text: Any, reason: Any = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}], **more}


DONE = event(b"[DONE]")
GOOD = event(delta("7")) + event(delta("", "stop")) + DONE

WELL = {  # odd, and a reply all the same: by what is answered
    "whole": (b'{"choices": [{"message": {"content": "7"}, "finish_reason": "stop"}]}', "7"),
    "no end mark": (event(delta("7")) + event(delta("", "stop")), "7"),
    "no finish reason": (event(delta("7")) + DONE, "7"),
    "comments and names": (b": ping\n\nevent: message\nid: 1\nretry: 5\n" + GOOD, "7"),
    "windows lines": (GOOD.replace(b"\n", b"\r\n"), "7"),
    "returns alone": (GOOD.replace(b"\n", b"\r"), "7"),
    "other ends of lines in a text": (
        event('{"choices": [{"delta": {"content": "a\u2028b\u2029c\u0085d"}}]}'.encode()) + DONE,
        "a\u2028b\u2029c\u0085d",
    ),
    "no blank": (GOOD.replace(b"data: ", b"data:"), "7"),
    "null delta": (event({"choices": [{"index": 0, "delta": None, "finish_reason": None}]}) + GOOD, "7"),
    "no choices at times": (event({"choices": []}) + event({"choices": None}) + event({}) + GOOD, "7"),
    "usage of nonsense": (
        event(delta("7", usage={"prompt_tokens": "x"})) + event(delta("", "stop", usage=3)) + DONE,
        "7",
    ),
    "content in parts": (event(delta([{"type": "text", "text": "7"}])) + event(delta(None, "stop")) + DONE, "7"),
    "reasoning": (event({"choices": [{"delta": {"reasoning_content": "8?"}}]}) + GOOD, "7"),
    "other choices": (event({"choices": [{"index": 3, "delta": {"content": "8"}}]}) + GOOD, "7"),
    "half a surrogate": (event(b'{"choices": [{"delta": {"content": "a\\ud800"}}]}') + DONE, "a\ufffd"),
    "nothing said": (event(delta(None, "stop")) + DONE, ""),
}
BADLY = {
    "html": b"<html>hello</html>", "nothing": b"", "blank lines": b"\n\n\n", "null": b"null", "list": b"[]",
    "number": event(1), "text": event("x"), "deep": event(b"[" * 100_000), "cut json": event(b'{"choices": [{"del'),
    "not utf-8": b"\xff\xfe\x00", "only the end": DONE, "no choice": event({"choices": []}) + DONE,
    "no end": event(delta("7")), "error object": event(delta("7")) + event({"error": {"message": "out of memory"}}),
    "error whole": b'{"error": {"message": "overloaded"}}', "choices text": event({"choices": "abc"}),
    "choices object": event({"choices": {"0": 1}}), "choice null": event({"choices": [None]}),
    "choice number": event({"choices": [1]}), "delta text": event({"choices": [{"delta": "x"}]}),
    "delta list": event({"choices": [{"delta": ["x"]}]}), "content number": event(delta(5)),
    "content object": event(delta({"a": 1})), "aborted": event(delta("7")) + event(delta("", "abort")) + DONE,
    "filtered": event(delta("7")) + event(delta("", "content_filter")) + DONE,
    "no event": b"hello\nworld\n\n", "half a stream": GOOD[:9], "long line": b"data: " + b"x" * 200_000,
    "huge text": event(delta("x" * 300_000, "stop")) + DONE,
}  # fmt: skip


def sends(data: bytes, content_type: str = "text/event-stream", status: int = 200) -> Script:
    """A script that sends these bytes to what is asked, and answers the first small question."""

    def script(handler: Handler, asked: dict[str, Any]) -> None:
        if not asked.get("stream"):
            return handler.text("yes")
        return handler.send(status, data, content_type=content_type)

    return script


class Behind:
    """The server behind, whose next replies a test sets."""

    script: Script = staticmethod(sends(GOOD))


@pytest.fixture(scope="module")
def front() -> Iterator[str]:
    with answering(lambda handler, asked: Behind.script(handler, asked), LISTED) as server:
        config = ServeConfig(
            model_name_or_path=str(CHECKPOINT), infer_backend="vllm", vllm_url=server.url, vllm_model="m",
            request_timeout_s=3.0, extra_body={"api_key": "whispered-key"},
        )  # fmt: skip
        metrics = Metrics()
        with serving(make_backend(config, metrics), metrics, name="front") as url:
            yield url


def streamed(url: str, **fields: Any) -> tuple[str, str | None]:
    """The text of a streamed reply and the error that ended it, which ends as its protocol has it."""
    reply = post(url, body("?", model="front", max_tokens=4, stream=True) | fields)
    if reply.status_code != 200:
        return "", reply.json()["error"]["message"]
    events = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    told = [json.loads(one) for one in events if one != "[DONE]"]
    text = "".join(choice["delta"].get("content") or "" for one in told for choice in one.get("choices", []))
    errors = [one["error"]["message"] for one in told if "error" in one]
    assert errors or events[-1] == "[DONE]"
    return text, errors[0] if errors else None


@pytest.mark.parametrize("content_type", ["text/event-stream", "application/json"])
@pytest.mark.parametrize("name", WELL)
def test_odd_streams_are_replies(front, name, content_type):
    data, text = WELL[name]
    Behind.script = sends(data, content_type)
    whole = post(front, body("?", model="front", max_tokens=4))
    assert whole.status_code == 200, whole.text
    assert whole.json()["choices"][0]["message"]["content"] == text
    assert streamed(front) == (text, None)


@pytest.mark.parametrize("name", BADLY)
def test_what_is_no_reply_is_502_or_an_error_event(front, name):
    for content_type in ("text/event-stream", "text/html"):
        Behind.script = sends(BADLY[name], content_type)
        whole = post(front, body("?", model="front", max_tokens=4))
        assert whole.status_code == 502, whole.text
        assert "the model's server http://127.0.0.1" in whole.json()["error"]["message"]
        _, error = streamed(front)
        assert error is not None
        assert len(error) < 500


@pytest.mark.parametrize(("status", "told"), [(400, 400), (413, 413), (422, 422), (429, 429), (401, 502), (404, 502),
                                              (307, 502), (500, 502), (503, 502)])  # fmt: skip
def test_a_refusal_is_passed_on_or_the_servers_own_fault(front, status, told):
    message = b'{"error": {"message": "because of whispered-key"}}'
    Behind.script = sends(message, "application/json", status)
    whole = post(front, body("?", model="front", max_tokens=4))
    assert whole.status_code == told
    assert "whispered" not in whole.text
    assert str(status) in whole.json()["error"]["message"]


def cut_stream(handler: Handler, asked: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream")
    handler.send_header("Content-Length", "5000")
    handler.end_headers()
    handler.wfile.write(event(delta("7")))
    handler.close_connection = True


def not_http(handler: Handler, asked: dict[str, Any]) -> None:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.0\r\n")
    handler.close_connection = True


def test_a_connection_that_breaks_is_a_clean_error_and_the_next_request_is_answered(front):
    for script in (cut_stream, not_http):
        Behind.script = script
        assert post(front, body("?", model="front", max_tokens=4)).status_code == 502
        assert streamed(front)[1] is not None
    Behind.script = sends(GOOD)
    assert streamed(front) == ("7", None)


def test_a_picture_that_the_processor_refuses_is_the_clients_fault(front):
    Behind.script = sends(GOOD)
    Image.new("RGB", (1000, 2)).save(thin := io.BytesIO(), "PNG")
    refused = post(front, body("?", [data_url(thin.getvalue())], model="front"))
    assert (refused.status_code, "error" in refused.json()) == (400, True)
