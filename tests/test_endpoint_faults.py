"""Servers that send anything: every fault is a sentence, bounded, without secrets, and no redirect is followed."""

from __future__ import annotations

import gzip
import json
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from typing import Any

import pytest
from http_server import Handler, Script, listening, serving
from PIL import Image
from pydantic import ValidationError
from test_endpoint import ask, client_of, echo
from typer.testing import CliRunner

from visrl.cli import app
from visrl.config import ConfigError, read_config
from visrl.engines.addresses import server_address
from visrl.engines.open import PolicyConfig, RequestConfig, opened_policy
from visrl.engines.openai_server import Endpoint, EndpointError
from visrl.engines.transport import MOST_BYTES
from visrl.evaluate.config import EvalConfig
from visrl.redact import hidden, secrets_of, without_secrets


def reply_with(**fields: Any) -> Script:
    """A script that sends a completion of which some fields are others."""
    choice = {"index": 0, "message": {"role": "assistant", "content": "7"}, "finish_reason": "stop"}
    body = {"choices": [choice], "usage": {"completion_tokens": 1, "prompt_tokens": 2}} | fields
    return lambda handler, _: handler.send(200, json.dumps(body).encode())


def one_reply(script: Script, **options: Any):
    with serving(script) as server, client_of(server.url, **{"attempts": 1} | options) as client:
        return client.ask_all([ask("a")])[0], server


# --- What is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": ""}, ""),
        ({"content": None, "reasoning_content": "it may be [0.1, 0.1, 0.2, 0.2]"}, ""),
        ({"content": "7", "reasoning": "8?"}, "7"),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "ab"),
        ({"content": [{"type": "thinking", "thinking": "8?"}, {"type": "text", "text": "7"}]}, "7"),
        ({"content": []}, ""),
        ({"content": None, "refusal": "I will not"}, "I will not"),
        ({"content": "a\ud800b"}, "a\ufffdb"),
        ({"content": "🙂"}, "🙂"),
    ],
)
def test_a_reply_is_what_the_model_said(message, text):
    reply, _ = one_reply(reply_with(choices=[{"message": message, "finish_reason": "length"}]))
    assert (reply.text, reply.error, reply.finish_reason) == (text, None, "length")


@pytest.mark.parametrize(
    "fields",
    [
        {"choices": None}, {"choices": {}}, {"choices": "abc"}, {"choices": [None]}, {"choices": [1]},
        {"choices": [{"message": "abc"}]}, {"choices": [{"message": []}]}, {"choices": [{}]},
        {"choices": [{"message": {"content": 1}, "finish_reason": "stop"}]},
        {"choices": [{"message": {"content": [{"type": "image_url"}]}, "finish_reason": "stop"}]},
        {"choices": [{"message": {"content": None}, "finish_reason": "content_filter"}]},
        {"choices": [{"message": {"content": ""}, "finish_reason": "content_filter"}]},
        {"choices": [{"message": {"content": "The nu"}, "finish_reason": "content_filter"}]},
        {"choices": [{"message": {"content": "The nu"}, "finish_reason": "abort"}]},
        {"choices": [{"message": {"content": ""}, "finish_reason": "error"}]},
        {"choices": [{"message": {"content": ""}, "finish_reason": "stop", "error": {"message": "upstream died"}}]},
        {"choices": None, "error": {"message": "overloaded", "code": 429}},
        {"choices": [], "error": "a\ud800"},
    ],
)  # fmt: skip
def test_what_is_no_reply_is_an_error_that_can_be_written(fields):
    reply, _ = one_reply(reply_with(**fields))
    assert reply.text is None
    assert "sent what is no completion" in reply.error
    reply.error.encode("utf-8")


@pytest.mark.parametrize("usage", [None, "x", [], {"completion_tokens": "x", "prompt_tokens": -5}, {"x": 1}])
def test_usage_may_be_missing_or_nonsense(usage):
    reply, _ = one_reply(reply_with(usage=usage))
    assert (reply.text, reply.tokens, reply.prompt_tokens) == ("7", 0, 0)


DEEP = b"[" * 200_000 + b"]" * 200_000
BODIES = {
    "deep": DEEP,
    "deep beside a reply": b'{"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}], "x": ' + DEEP + b"}",
    "long number": b'{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": ' + b"9" * 5000 + b"}}",
    "utf-16": json.dumps({"choices": 1}).encode("utf-16"),
    "not utf-8": b'{"choices": [{"message": {"content": "\xff\xfe"}}]}',
    "html": b"<html>hello</html>",
    "nothing": b"",
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("status", [200, 400, 500])
def test_bodies_that_break_parsers_are_failed_attempts(name, status):
    reply, _ = one_reply(lambda handler, _: handler.send(status, BODIES[name]))
    assert reply.text is None
    assert len(reply.error) < 500


# --- How much ---------------------------------------------------------------------------------------------------------


def endless(handler: Handler, body: object) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    while True:  # until the client leaves, which is a ConnectionError
        handler.wfile.write(b"10000\r\n" + b" " * 65536 + b"\r\n")


def bomb(coding: str) -> Script:
    packer = zlib.compressobj(9, wbits=31 if coding == "gzip" else 15)
    million = b"a" * 1_000_000
    packed = packer.compress(b'{"x": "') + b"".join(packer.compress(million) for _ in range(200)) + packer.flush()
    return lambda handler, _: handler.send(200, packed, Content_Encoding=coding)


@pytest.mark.parametrize("fault", ["endless", "gzip", "deflate"])
def test_a_reply_without_end_is_left_at_its_bound(fault):
    script = endless if fault == "endless" else bomb(fault)
    with serving(script) as server, client_of(server.url, attempts=1, timeout_s=30.0) as client:
        tracemalloc.start()
        try:
            replies = client.ask_all(ask("a") for _ in range(3))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert all("more than 4,000,000 bytes" in reply.error for reply in replies)
    assert peak < 12 * MOST_BYTES
    assert client.counts["garbage"] == 3


def test_packed_replies_are_unpacked_and_unknown_packing_is_named():
    body = json.dumps({"choices": [{"message": {"content": "seven " * 100}, "finish_reason": "stop"}]}).encode()
    packed = {"gzip": gzip.compress(body), "deflate": zlib.compress(body)}
    for coding, data in packed.items():
        reply, _ = one_reply(lambda handler, _, c=coding, d=data: handler.send(200, d, Content_Encoding=c))
        assert reply.text == "seven " * 100
    reply, _ = one_reply(lambda handler, _: handler.send(200, body, Content_Encoding="br"))
    assert "packed as 'br'" in reply.error
    reply, _ = one_reply(lambda handler, _: handler.send(200, b"\x1f\x8bnonsense", Content_Encoding="gzip"))
    assert "cannot be unpacked" in reply.error


def test_a_text_far_beyond_its_limit_is_no_reply():
    reply, _ = one_reply(reply_with(choices=[{"message": {"content": "x" * 500_000}, "finish_reason": "stop"}]))
    assert "far beyond the tokens asked for" in reply.error


@pytest.mark.parametrize(("header", "asks"), [("1e9", 1), ("100000", 1), ("nan", 2), ("-5", 2), ("soon", 2)])
def test_an_absurd_retry_after_is_not_waited_for(header, asks):
    start = time.monotonic()
    reply, server = one_reply(lambda handler, _: handler.send(429, b"{}", retry_after=header), attempts=2)
    assert time.monotonic() - start < 20
    assert len(server.bodies) == asks
    assert "429" in reply.error


# --- Secrets and redirects --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_named_and_not_followed(status):
    with serving(echo) as other:
        location = other.url.replace("http://", "http://name:secretword@") + "/chat/completions"
        reply, server = one_reply(lambda handler, _: handler.send(status, b"", Location=location))
        assert other.bodies == []
    assert len(server.bodies) == 1
    assert "points to http://***@127.0.0.1" in reply.error
    assert "redirects are not followed" in reply.error
    assert "secretword" not in reply.error


def test_no_secret_comes_back_in_rows_or_sentences():
    secrets = {"api_key": "sk-very-secret-key", "extra_body": {"token": "hush-hush", "headers": {"x-a": "whispered"}}}

    def echoes(handler, body):
        told = f"{handler.headers['Authorization']} {body.get('token')} {body.get('headers')} Bearer abcdefghijkl"
        if body["messages"][0]["content"] == "text":
            handler.text(told)
        else:
            handler.send(400, json.dumps({"error": {"message": f"wrong: {told}"}}).encode())

    with serving(echoes) as server:
        url = server.url.replace("http://", "http://user:passw0rd@")
        with client_of(url, attempts=1, **secrets) as client:
            text, error = client.ask_all([ask("text"), ask("error")])
    for said in (text.text, error.error):
        assert "***" in said
        for secret in ("very-secret", "hush-hush", "whispered", "passw0rd"):
            assert secret not in said
    assert "abcdefghijkl" not in error.error  # a key of a well-known form that is not ours


def test_secrets_in_a_config_are_hidden_where_it_is_written():
    config = {
        "policy_url": ["http://user:p@ss/word@host:1/v1"],
        "extra_body": {
            "api_key": "k1",
            "nested": [{"access_token": "k2"}],
            "extra_headers": {"X-Any": "k3"},
            "accessToken": "k4",
            "password": 90210,
            "top_k": 3,
        },
        "max_tokens_key": "max_completion_tokens",
        "api_key_env": "OPENAI_API_KEY",
    }
    shown = json.dumps(without_secrets(config))
    assert all(secret not in shown for secret in ("p@ss", "word@", "k1", "k2", "k3", "k4", "90210"))
    assert "http://***@host:1/v1" in shown
    assert "max_completion_tokens" in shown
    assert "OPENAI_API_KEY" in shown
    assert secrets_of(config["extra_body"]) == {"k1", "k2", "k3", "k4", "90210"}
    assert hidden("say none, 7", {"none", "7"}) == "say none, 7"  # what is no secret


def test_a_config_error_does_not_repeat_a_password():
    with pytest.raises(ConfigError, match=r"policy_url: .*no address") as raised:
        read_config(PolicyConfig, None, ["model_name_or_path=m", "policy_url='http://user:passw0rd@host:99999/v1'"])
    assert "passw0rd" not in str(raised.value)
    with pytest.raises(ConfigError, match=r"holds a \? or #") as raised:
        read_config(PolicyConfig, None, ["model_name_or_path=m", "policy_url=http://h/v1?api_key=passw0rd"])
    assert "passw0rd" not in str(raised.value)


# --- Addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("http://h:8000/v1", "http://h:8000/v1"),
        (" http://h:8000/v1/ \n", "http://h:8000/v1"),
        ("'https://h/v1'", "https://h/v1"),
        ("http://h/v1/chat/completions", "http://h/v1"),
        ("http://h/v1/chat/completions/", "http://h/v1"),
        ("http://h/v1/models", "http://h/v1"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
        ("http://h", "http://h"),
    ],
)
def test_slips_that_mean_one_thing_are_mended(written, read):
    assert server_address(written) == read
    assert Endpoint((written,), "m").base_urls == (read,)


@pytest.mark.parametrize(
    "written",
    [
        "", "h:8000/v1", "localhost:8000", "//h/v1", "http:/h/v1", "ftp://h/v1", "htp://h", "http://", "http:///v1",
        "http://h:0/v1", "http://h:65536/v1", "http://h:abc/v1", "http://h:-1/v1", "http://[::1/v1", "http://]/v1",
        "http://a b/v1", "http://h/v1\0", "http://h\t/v1", "http://xn--/v1", "http://☃.example/v1", "http://\ud800/v1",
        "http://h/v1?key=1", "http://h/v1#x",
    ],
)  # fmt: skip
def test_what_is_no_address_is_a_sentence(written):
    with pytest.raises(EndpointError):
        Endpoint((written,), "m")
    with pytest.raises(ValidationError, match="policy_url"):
        PolicyConfig(model_name_or_path="m", policy_url=written)
    with pytest.raises(ValidationError, match="judge_url"):
        EvalConfig(model_name_or_path="m", dataset="d", output_dir="o", judge_model_name_or_path="j", judge_url=written)


def only_under_v1(handler: Handler) -> None:
    if handler.path == "/v1/models":
        handler.send(*handler.server.models)
    else:
        handler.send(404, b"<html>no such page</html>", content_type="text/html")


class Strict(Handler):
    """Knows no route but the protocol's two."""

    def do_GET(self) -> None:
        only_under_v1(self)

    def do_POST(self) -> None:
        if self.path == "/v1/chat/completions":
            super().do_POST()
        else:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send(404, b"{}")


@contextmanager
def strict(script: Script = echo, models: tuple[int, bytes] = (200, b'{"data": [{"id": "m"}]}')) -> Iterator[Any]:
    with listening(Strict, script=script, models=models, bodies=[], trials=True) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        yield server


def test_a_forgotten_v1_is_tried_and_said(capsys):
    with strict(lambda handler, _: handler.text("7")) as server, client_of(f"{server.url}/") as client:
        client.check()
        (reply,) = client.ask_all([ask("a")])
    assert reply.text == "7"
    assert f"{server.url}/v1 does and is asked instead" in capsys.readouterr().out


def test_a_wrong_path_is_found_out_before_anything_is_asked():
    config = PolicyConfig(model_name_or_path="m", box_codec="visrl", request_attempts=1)
    with strict() as server:
        given = config.model_copy(update={"policy_url": (f"{server.url}/openai",)})
        with pytest.raises(EndpointError, match="a first small question failed"), opened_policy(given):
            pass


def test_https_where_http_is_spoken_is_named():
    with (
        serving(echo) as server,
        client_of(server.url.replace("http:", "https:"), timeout_s=5.0) as client,
        pytest.raises(EndpointError, match="does it speak http://"),
    ):
        client.check()


def test_the_first_choice_is_the_one_that_says_so():
    choices = [{"index": n, "message": {"content": f"text {n}"}, "finish_reason": "stop"} for n in (2, 0, 1)]
    reply, _ = one_reply(reply_with(choices=[None, *choices]))
    assert reply.text == "text 0"


@pytest.mark.parametrize(("after_s", "least_s"), [(1.6, 0.4), (-99, 0.0)])
def test_a_date_to_come_back_at_is_kept(after_s, least_s):
    dates = iter([formatdate(time.time() + after_s, usegmt=True)])

    def busy_once(handler, body):
        date = next(dates, None)
        handler.text("7") if date is None else handler.send(429, b"{}", Retry_After=date)

    start = time.monotonic()
    reply, _ = one_reply(busy_once, attempts=2)
    assert (reply.text, least_s < time.monotonic() - start < least_s + 5) == ("7", True)


# --- Requests as servers take them ------------------------------------------------------------------------------------


def newer(handler: Handler, body: dict[str, Any]) -> None:
    """A server of a model that takes `max_completion_tokens` and its own temperature only."""
    for key, told in (
        ("max_tokens", "Use 'max_completion_tokens' instead."),
        ("temperature", "Only the default (1) value is supported."),
    ):
        if key in body:
            message = f"Unsupported parameter: '{key}' is not supported with this model. {told}"
            return handler.send(400, json.dumps({"error": {"message": message}}).encode())
    return handler.text("score: 1")


def test_the_key_that_mends_a_refusal_is_named_before_the_run():
    config = {"model_name_or_path": "m", "box_codec": "visrl", "request_attempts": 1}
    with serving(newer, trials=True) as server:
        for given, said in (
            ({}, r"max_tokens_key: max_completion_tokens and omit_fields: \[temperature\] it answers"),
            (NEWER[:1], "omit_fields: .temperature"),
        ):
            policy = PolicyConfig(**config, policy_url=server.url, **dict(given))
            with pytest.raises(EndpointError, match=said), opened_policy(policy):
                pass
        with opened_policy(PolicyConfig(**config, policy_url=server.url, **dict(NEWER))):
            pass
    last = server.bodies[-1]
    assert ("max_completion_tokens" in last, "max_tokens" in last, "temperature" in last) == (True, False, False)


NEWER = [("max_tokens_key", "max_completion_tokens"), ("omit_fields", ["temperature"])]


def test_a_judge_of_a_newer_server_is_asked_from_the_command_line(tmp_path):
    row = {"question_id": 1, "question_text": "?", "gt_answer_text": "7", "pred_answer_text": "7"}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    told = ["eval", "judge", "--predictions", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "j.jsonl")]
    with serving(newer, trials=True) as server:
        told += ["--model", "m", "--attempts", "1", "--base-url", server.url]
        failed = CliRunner().invoke(app, told)
        more = ["--max-tokens-key", "max_completion_tokens", "--omit-field", "temperature", "--extra-body", '{"k": 1}']
        done = CliRunner().invoke(app, [*told, *more])
        wrong = CliRunner().invoke(app, [*told, "--extra-body", "[1]"])
    assert (failed.exit_code, "max_tokens_key: max_completion_tokens" in failed.stderr) == (1, True)
    assert (done.exit_code, "1 answers judged: 0 failed, 0 replies" in done.stdout) == (0, True)
    assert server.bodies[-1]["k"] == 1
    assert wrong.exit_code == 2


def test_room_for_thinking_is_added_and_requests_without_servers_are_refused():
    with serving(echo) as server, client_of(server.url, thinking_tokens=1000) as client:
        client.ask_all([ask("a")])
    assert server.bodies[0]["max_tokens"] == 1128
    config = PolicyConfig(model_name_or_path="m", thinking_tokens=5)
    with pytest.raises(ConfigError, match="thinking_tokens: only servers"), opened_policy(config):
        pass
    with pytest.raises(ValidationError, match="judge_request: extra_body: only servers"):
        EvalConfig(model_name_or_path="m", dataset="d", output_dir="o", judge_request={"extra_body": {"k": 1}})
    assert RequestConfig().given() == []


def test_the_key_comes_from_the_variable_that_is_named(monkeypatch):
    monkeypatch.setenv("OTHER_KEY", "sk-of-the-other-server")
    seen = []

    def keeps(handler, body):
        seen.append(handler.headers["Authorization"])
        handler.text("7")

    with serving(keeps) as server, client_of(server.url, api_key=None, api_key_env="OTHER_KEY") as client:
        client.ask_all([ask("a")])
    assert seen == ["Bearer sk-of-the-other-server"]


# --- `visrl ask` ------------------------------------------------------------------------------------------------------


def test_ask_takes_a_server(tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")

    def sees(handler, body):
        pictures = json.dumps(body["messages"]).count('"image_url":')
        handler.text("[0.1, 0.1, 0.5, 0.5]" if pictures == 1 else "1+1=2")

    told = ["ask", "--model", "m", "--image", str(tmp_path / "a.png"), "--out", str(tmp_path / "o.png"), "Is 1+1=2?"]
    with serving(sees) as server:
        done = CliRunner().invoke(app, [*told, f"policy_url={server.url}", "codec=visrl"])
        other = CliRunner().invoke(app, [*told, "--policy-url", server.url, "codec=visrl", "omit_fields=seed"])
    assert done.exit_code == 0, done.output
    assert "m: 1+1=2" in done.stdout
    assert (other.exit_code, "seed" in server.bodies[-1]) == (0, False)
    with serving(lambda handler, _: handler.send(400, b"{}")) as server:
        failed = CliRunner().invoke(app, [*told, f"policy_url={server.url}", "codec=visrl"])
    assert (failed.exit_code, "questions failed (all)" in failed.stderr) == (1, True)
