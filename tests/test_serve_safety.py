"""What a stranger may try on a server that opens pictures, and the 4xx each try gets."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from http_server import Quiet, drip, listening
from serve_help import NAME, body, data_url, get, known, left_open, picture, picture_part, post
from waiting import PATIENCE_S, wait_until

from visrl.config import ConfigError
from visrl.serve.config import ServeConfig
from visrl.serve.errors import RequestError
from visrl.serve.images import FETCHERS, Fetcher, Opener, is_public
from visrl.serve.runner import serve
from visrl.serve.safety import Budget, is_local_name
from visrl.serve.schemas import ImageUrl, Limits

PUBLIC = "93.184.215.14"
# Everything that could be fetched is allowed by name, so that what refuses is never the list alone.
HOSTS = frozenset({"pictures.example", "127.0.0.1", "localhost", "169.254.169.254", "2130706433", "0x7f.1"})


def bomb(width: int = 50_000, height: int = 50_000) -> bytes:
    """A PNG of a few hundred bytes that says it is `width` × `height`."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 100_000, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A sound little PNG with a text chunk that inflates to 200 MB."""
    plain = picture((4, 4))
    data = b"k\0\0" + zlib.compress(b"a" * 200_000_000, 9)
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    return plain[:33] + chunk + plain[33:]


def with_url(url: str) -> dict[str, Any]:
    return body(pictures=[url])


SVG = data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg+xml")
EPS = data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "png")
HOSTILE: dict[str, tuple[Any, int]] = {
    "local file": (with_url("file:///etc/passwd"), 400),
    "local path": (with_url("/etc/passwd"), 400),
    "relative path": (with_url("../../etc/passwd"), 400),
    "drawn scene": (with_url("scene:train/1"), 400),
    "metadata address": (with_url("http://169.254.169.254/latest/meta-data/"), 400),
    "loopback": (with_url("http://127.0.0.1:22/"), 400),
    "loopback in decimal": (with_url("http://2130706433/"), 400),
    "loopback in hexadecimal": (with_url("http://0x7f.1/"), 400),
    "loopback of version 6": (with_url("http://[::1]/a.png"), 400),
    "mapped loopback": (with_url("http://[::ffff:127.0.0.1]/a.png"), 400),
    "a host that is not allowed": (with_url("https://elsewhere.example/a.png"), 400),
    "a port that is not allowed": (with_url("http://pictures.example:22/a.png"), 400),
    "backslash in the host part": (with_url("http://pictures.example\\@127.0.0.1/a.png"), 400),
    "backslash after the host": (with_url("http://127.0.0.1\\.pictures.example/a.png"), 400),
    "user in the host part": (with_url("http://pictures.example@127.0.0.1/a.png"), 400),
    "fragment trick": (with_url("http://127.0.0.1#@pictures.example/"), 400),
    "line break in the address": (with_url("http://pictures.example/a\r\nHost: 127.0.0.1"), 400),
    "tab in the host": (with_url("http://pictures\t.example/"), 400),
    "wide dots in the host": (with_url("http://127\u30020\u30020\u30021/"), 400),
    "ftp": (with_url("ftp://pictures.example/a.png"), 400),
    "gopher": (with_url("gopher://127.0.0.1:6379/_INFO"), 400),
    "javascript": (with_url("javascript:alert(1)"), 400),
    "zip-bomb picture": (with_url(data_url(bomb())), 400),
    "picture a little too large": (with_url(data_url(bomb(8000, 8000))), 400),
    "cut picture": (with_url(data_url(picture()[:200])), 400),
    "no picture at all": (with_url(data_url(b"hello")), 400),
    "empty picture": (with_url("data:image/png;base64,"), 400),
    "svg": (with_url(SVG), 400),
    "postscript called png": (with_url(EPS), 400),
    "bad base64": (with_url("data:image/png;base64,@@@@"), 400),
    "base64 with blanks": (with_url("data:image/png;base64,aGVs bG8="), 400),
    "data URL without base64": (with_url("data:image/png,hello"), 400),
    "data URL of another kind": (with_url("data:text/html;base64,aGVsbG8="), 400),
    "1,000 pictures": (body(pictures=[data_url(picture((4, 4)))] * 1000), 400),
    "10^9 max_tokens": (body(max_tokens=10**9), 400),
    "10^9 max_completion_tokens": (body(max_completion_tokens=10**9), 400),
    "10^30 max_tokens": (body(max_tokens=10**30), 400),
    "no tokens": (body(max_tokens=0), 400),
    "less than no tokens": (body(max_tokens=-5), 400),
    "10^6 choices": (body(n=10**6), 400),
    "temperature below 0": (body(temperature=-1), 400),
    "temperature that is no number": (b'{"model": "known", "messages": [], "temperature": NaN}', 400),
    "infinite top_p": (json.dumps(body()).encode()[:-1] + b', "top_p": Infinity}', 400),
    "seed beyond 64 bits": (body(seed=2**70), 400),
    "1,000 stop texts": (body(stop=["x"] * 1000), 400),
    "stop texts of a megabyte": (body(stop=["x" * 1_000_000]), 400),
    "a megabyte of text": (body("x" * 1_000_000), 400),
    "1,000 messages": (body(messages=[{"role": "user", "content": "x"}] * 1000), 400),
    "broken JSON": (b'{"model": "known", "messages": [', 400),
    "empty body": (b"", 400),
    "JSON that is no object": (b"[1, 2]", 400),
    "deeply nested JSON": (b'{"model": ' + b"[" * 100_000, 400),
    "half a surrogate": (b'{"model": "known", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
    "not UTF-8": (b'{"model": "known", "messages": [{"role": "user", "content": "\xff"}]}', 400),
    "no messages": (body(messages=[]), 400),
    "unknown role": (body(messages=[{"role": "root", "content": "x"}]), 400),
    "unknown part": (body(messages=[{"role": "user", "content": [{"type": "input_audio"}]}]), 400),
    "picture part without a picture": (body(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400),
    "a picture's mark in the text": (body("<image> what?"), 400),
    "tools": (body(tools=[{"type": "function"}]), 400),
    "unknown model": (body() | {"model": "../../etc/passwd"}, 404),
    "a model's name of 100,000 characters": (body() | {"model": "x" * 100_000}, 404),
    "focus without a picture": (body(pictures=[]) | {"model": f"{NAME}:focus"}, 400),
    "focus with two pictures": (body(pictures=[data_url(picture())] * 2) | {"model": f"{NAME}:focus"}, 400),
    "focus without a question": (body(" ") | {"model": f"{NAME}:focus"}, 400),
}


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Any]]:
    """One server for all tries; it must still answer after the last."""
    fetcher = Fetcher(HOSTS, timeout_s=1.0)
    with known(fetcher=fetcher, limits=Limits(body_bytes=4_000_000)) as (url, engine, _):
        yield url, engine
        assert post(url, body()).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_request_is_refused(server: tuple[str, Any], name: str, stream: bool) -> None:
    url, engine = server
    fields, status = HOSTILE[name]
    if stream and isinstance(fields, dict):
        fields = fields | {"stream": True}
    computed = len(engine.batches)
    reply = post(url, fields)
    assert reply.status_code == status, reply.text[:300]
    assert reply.json()["error"]["message"]
    assert "Traceback" not in reply.text
    assert "root:" not in reply.text
    assert len(reply.text) < 1000
    assert " at 0x" not in reply.text  # where things lie in memory is nobody's business
    assert len(engine.batches) == computed


def test_the_gate_refuses_before_it_reads(server: tuple[str, Any]) -> None:
    url, _ = server
    large = post(url, b"x" * 5_000_000)
    assert large.status_code == 413
    chunked = httpx.post(
        f"{url}/v1/chat/completions",
        content=(b"x" * 100_000 for _ in range(60)),
        headers={"Content-Type": "application/json"},
    )
    assert chunked.status_code == 413
    assert post(url, json.dumps(body()).encode(), headers={"Content-Type": "text/plain"}).status_code == 415
    packed = post(url, body(), headers={"Content-Encoding": "gzip"})
    assert (packed.status_code, "Content-Encoding: gzip" in packed.text) == (415, True)
    assert post(url, body(), headers={"Host": "evil.example"}).status_code == 421
    for method in ("GET", "PUT", "OPTIONS", "TRACE"):
        other = httpx.request(method, f"{url}/v1/chat/completions")
        assert (other.status_code, other.headers["allow"]) == (405, "POST")
        assert method in other.json()["error"]["message"]
    for path in ("/page/..%2fapp.py", "/page/app.py", "/page/%2e%2e/%2e%2e/config.py", "/etc/passwd", "/docs"):
        assert get(url + path).status_code == 404


def test_a_length_that_lies_is_refused(server: tuple[str, Any]) -> None:
    url, _ = server
    host, port = url.removeprefix("http://").split(":")
    for stated in ("99999999999999999999", "-5", "1e3"):
        with socket.create_connection((host, int(port)), 5) as raw:
            raw.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                + f"Content-Length: {stated}\r\n\r\n".encode()
            )
            assert raw.recv(100).split(b" ")[1] in (b"400", b"413")


def test_a_key_is_asked_for_everything_but_page_and_health() -> None:
    with known(api_key="sesame") as (url, engine, _):
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Bearer"},
            {"Authorization": "Basic sesame"},
        ):
            assert post(url, body(), headers=headers).status_code == 401
            assert get(f"{url}/v1/models", headers=headers).status_code == 401
            assert get(f"{url}/metrics", headers=headers).status_code == 401
        # Bytes that are no ASCII must not trip the comparison.
        assert post(url, body(), headers={b"Authorization": "Bearer sésame".encode()}).status_code == 401
        assert engine.batches == []
        assert get(f"{url}/health").status_code == 200
        assert get(url).status_code == 200
        assert post(url, body(), headers={"Authorization": "Bearer sesame"}).status_code == 200


def test_bodies_in_work_share_a_budget() -> None:
    budget = Budget(100, "bytes")
    with budget.hold(60):
        with pytest.raises(RequestError, match="try again") as refused:
            budget.hold(60)
        assert refused.value.status == 429
        with budget.hold(40):
            pass
    with budget.hold(100):
        pass
    assert budget.held == 0


def test_pictures_in_work_share_a_budget() -> None:
    with known(limits=Limits(held_pixels=30_000)) as (url, _, _):
        assert post(url, body(pictures=[data_url(picture((200, 100)))])).status_code == 200
        assert post(url, body(pictures=[data_url(picture((200, 200)))])).status_code == 429
        same = data_url(picture((200, 100)))
        assert post(url, body(pictures=[same, same])).status_code == 200  # equal bytes are opened once
        assert post(url, body(pictures=[data_url(picture((200, 100)))])).status_code == 200


def test_pictures_are_held_as_they_are_opened() -> None:
    """A request of several pictures may not have all of them in memory before they are counted."""
    opener = Opener(Limits(), Fetcher())
    budget, asked = Budget(50_000, "pictures"), []

    def hold(pixels: int) -> None:
        asked.append(pixels)
        budget.hold(pixels)

    pictures = [ImageUrl(url=data_url(picture((200, 100 + number)))) for number in (0, 1, 0, 2, 3)]
    try:
        with pytest.raises(RequestError, match="too many pictures"):
            asyncio.run(opener.open(pictures, hold))
    finally:
        opener.close()
    assert asked == [20_000, 20_200, 20_400]  # equal ones once, and the last is not opened at all


def test_the_last_part_of_the_pictures_budget_is_for_small_ones() -> None:
    budget = Budget(100, "pictures", spare=20, small=5)
    with budget.hold(80):
        with pytest.raises(RequestError):
            budget.hold(6)
        with budget.hold(5):
            pass


# --- Fetching, where the operator allows it -------------------------------------------------------------------------


class Origin(Quiet):
    """A host of pictures, some of them traps."""

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Host"]))
        if self.path.startswith("/redirect"):
            self.send_response(302)
            self.send_header("Location", self.server.leads_to)
            self.end_headers()
            return
        if self.path == "/drip":
            drip(self)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"x" * 5_000_000 if self.path == "/large" else picture())


@contextmanager
def origin() -> Iterator[Any]:
    with listening(Origin, asked=[], leads_to="http://127.0.0.1:1/secret") as host:
        yield host


def fetcher_to(host: Any, **options: Any) -> Fetcher:
    """Allows `pictures.example` at the host's port and takes loopback for public: the test's only way to be reached."""
    names = frozenset({f"pictures.example:{host.server_port}"})
    open_to = {"resolve": lambda name, port: ["127.0.0.1"], "is_public": lambda address: True, "timeout_s": 60.0}
    return Fetcher(names, **open_to | options)


def test_an_allowed_host_is_fetched_by_its_checked_address() -> None:
    with origin() as host, known(fetcher=fetcher_to(host)) as (url, engine, _):
        reply = post(url, with_url(f"http://pictures.example:{host.server_port}/a.png?size=2"))
    assert reply.status_code == 200
    assert host.asked == [("/a.png?size=2", f"pictures.example:{host.server_port}")]
    assert engine.batches[0][0].conversation.views[0].size == (200, 100)


@pytest.mark.parametrize(
    ("path", "said", "timeout_s"),
    [("/redirect", "redirects are not followed", 60), ("/large", "larger than", 60), ("/drip", "too late", 0.5)],
)
def test_what_an_allowed_host_may_not_do(path: str, said: str, timeout_s: float) -> None:
    limits = Limits(body_bytes=1_000_000)
    with (
        origin() as host,
        known(fetcher=fetcher_to(host, timeout_s=timeout_s), limits=limits) as (url, engine, _),
    ):
        reply = post(url, with_url(f"http://pictures.example:{host.server_port}{path}"))
    assert reply.status_code == 400
    assert said in reply.json()["error"]["message"]
    assert engine.batches == []


def test_a_redirect_to_loopback_leads_nowhere() -> None:
    with origin() as host, origin() as trap, known(fetcher=fetcher_to(host)) as (url, _, _):
        host.leads_to = f"http://127.0.0.1:{trap.server_port}/a.png"
        assert post(url, with_url(f"http://pictures.example:{host.server_port}/redirect")).status_code == 400
        assert len(host.asked) == 1
        assert trap.asked == []


@pytest.mark.parametrize("addresses", [["10.0.0.5"], [PUBLIC, "127.0.0.1"], ["::1"], ["fe80::1"], []])
def test_a_name_of_a_private_address_is_refused(addresses: list[str]) -> None:
    fetcher = Fetcher(frozenset({"pictures.example"}), resolve=lambda name, port: addresses)
    with known(fetcher=fetcher) as (url, _, _):
        reply = post(url, with_url("http://pictures.example/a.png"))
    assert reply.status_code == 400
    assert "not public" in reply.json()["error"]["message"]


def test_a_name_that_resolves_differently_the_second_time_is_resolved_once() -> None:
    """The first answer is checked and connected to; a second would lead elsewhere, and is never asked for."""
    with origin() as host, origin() as trap:
        answers = iter([["127.0.0.1"], ["127.0.0.2"], ["127.0.0.2"]])
        asked: list[str] = []

        def resolve(name: str, port: int) -> list[str]:
            asked.append(name)
            return next(answers)

        with known(fetcher=fetcher_to(host, resolve=resolve)) as (url, _, _):
            assert post(url, with_url(f"http://pictures.example:{host.server_port}/a.png")).status_code == 200
        assert asked == ["pictures.example"]
        assert len(host.asked) == 1
        assert trap.asked == []


def test_a_name_that_does_not_resolve_is_refused() -> None:
    fetcher = Fetcher(frozenset({"nowhere.invalid", "a" * 64 + ".example"}))
    for name in fetcher.allowed_hosts:
        with pytest.raises(RequestError, match="cannot be resolved"):
            fetcher.fetch(f"http://{name}/a.png", 1000)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        (PUBLIC, True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("2002:5db8:d70e::1", False),
        ("fec0::1", False),
        ("64:ff9b:1::5db8:d70e", False),
        ("64:ff9b::5db8:d70e", True),
        ("64:ff9b::a00:1", False),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", False),
        ("2001:db8::1", False),
        ("3fff::1", False),
        ("3ffe::1", False),
        ("100::1", False),
        ("4000::1", False),
        ("::5db8:d70e", False),
        ("::ffff:93.184.215.14", True),
        ("::ffff:0:10.0.0.1", False),
        ("2606:2800::1%eth0", False),
        ("192.0.0.9", False),
        ("192.88.99.1", False),
        ("198.18.0.1", False),
        ("203.0.113.7", False),
        ("240.0.0.1", False),
        ("0.1.2.3", False),
        ("1.0.0.1", True),
        ("no address", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) is public


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost", True),
        ("localhost:8000", True),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("", False),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("192.168.0.2:8000", False),
    ],
)
def test_which_host_headers_are_local(host: str, local: bool) -> None:
    assert is_local_name(host) is local


# --- Config ---------------------------------------------------------------------------------------------------------


def test_remote_code_is_refused_unless_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="allow_remote_code"):
        serve(ServeConfig(model_name_or_path="m", trust_remote_code=True))


def test_the_defaults_are_closed() -> None:
    config = ServeConfig(model_name_or_path="a/b")
    assert (config.host, config.api_key, config.allowed_image_hosts, config.trust_remote_code) == (
        "127.0.0.1", None, [], False,
    )  # fmt: skip
    assert config.name == "b"


def test_the_environment_wins() -> None:
    config = ServeConfig(model_name_or_path="m", port=1, api_key="file")
    told = config.with_environment({"API_PORT": "8123", "API_HOST": "::1", "API_KEY": "env", "API_MODEL_NAME": "n"})
    assert (told.port, told.host, told.api_key, told.name) == (8123, "::1", "env", "n")
    with pytest.raises(ConfigError, match="API_PORT"):
        config.with_environment({"API_PORT": "eighty"})


def test_a_base64_picture_of_every_common_kind_is_read(server: tuple[str, Any]) -> None:
    url, engine = server
    for kind, name in [("PNG", "png"), ("JPEG", "jpeg"), ("WEBP", "webp"), ("GIF", "gif"), ("BMP", "bmp")]:
        assert post(url, with_url(data_url(picture(kind=kind), name))).status_code == 200
        assert engine.batches[-1][0].conversation.views[0].size == (200, 100)
    bare = {"type": "image_url", "image_url": "data:image/png;base64," + base64.b64encode(picture()).decode()}
    assert post(url, body(messages=[{"role": "user", "content": [bare]}])).status_code == 200
    crop = picture_part() | {"image_url": {"url": data_url(picture()), "detail": "low"}}
    assert post(url, body(messages=[{"role": "user", "content": [picture_part(), crop]}])).status_code == 200
    assert [view.is_crop for view in engine.batches[-1][0].conversation.views] == [False, True]


def test_a_text_that_would_inflate_to_200_mb_is_passed_over_and_the_pixels_are_read(server: tuple[str, Any]) -> None:
    url, engine = server
    began = time.perf_counter()
    assert post(url, with_url(data_url(text_bomb()))).status_code == 200
    assert engine.batches[-1][0].conversation.views[0].size == (4, 4)
    assert time.perf_counter() - began < 5.0


def test_clients_that_leave_do_not_have_more_pictures_opened_at_once() -> None:
    opening: list[str] = []
    go_on = threading.Event()

    def resolve(host: str, port: int) -> list[str]:
        opening.append(host)
        go_on.wait(PATIENCE_S)
        return []

    asked = body(pictures=["http://pictures.example/a.png"])
    with known(fetcher=Fetcher(frozenset({"pictures.example"}), resolve)) as (url, _, metrics):
        for number in range(FETCHERS + 3):
            with left_open(url, asked):
                wait_until(lambda: metrics.in_flight == 1)
                wait_until(lambda: len(opening) == min(number + 1, FETCHERS))  # noqa: B023 (called at once)
                time.sleep(0.05)  # for one more to be opened, were there a place
            wait_until(lambda: metrics.in_flight == 0)
        assert len(opening) == FETCHERS
        go_on.set()
        assert post(url, body()).status_code == 200  # and what they asked for keeps nobody waiting
    assert len(opening) == FETCHERS
