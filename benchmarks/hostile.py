"""How a good client fares beside hostile ones: its share answered and slowest before, during and after, and memory.

    python benchmarks/hostile.py --json hostile.json [--requests 3000] [--rounds 2] [--attackers 8]

The server is a process of its own with the embedded model. Attackers send what strangers may try, mixed by chance with
a fixed seed; each attack is one request or one connection. A good client asks about a drawn scene all along.
Memory is what is resident of the server's and its decoders'. It is first looked at when everything has been used once:
after good requests about as many pictures as fill the server's cache of them, and hostile ones of every kind. Rounds
after the first say whether it still grows.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import random
import re
import socket
import statistics
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import psutil
from PIL import Image
from serving import ask_all, bodies, server

from visrl.engines.endpoint import data_url
from visrl.models.tiny import CHECKPOINT
from visrl.scenes import draw_ref

NAME = "bench"
PATH = "/v1/chat/completions"
PICTURES, CLIENTS = 256, 32  # good requests, each about another picture, before memory is first looked at
WARM = 200  # hostile ones after them
LINGERING = 24  # connections that stay open, unread or half sent, at a time
GOOD_EVERY_S = 0.2
SETTLE_S = 25.0  # longer than any connection is kept waiting for a client


class Target:
    """The attacked server, and the connections that are left hanging."""

    def __init__(self, url: str) -> None:
        host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
        self.address = (host, int(port))
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()

    def raw(self, data: bytes, wait: bool = True, linger: bool = False) -> None:
        """Send bytes; read what comes, leave at once, or stay without reading."""
        client = socket.socket()
        if linger:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(30)
        with contextlib.suppress(OSError):
            client.connect(self.address)
            client.sendall(data)
            if linger:
                self._keep(client)
                return
            while wait and client.recv(65_536):
                pass
        client.close()

    def post(self, body: Any, **options: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
        self.raw(head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data, **options)

    def _keep(self, client: socket.socket) -> None:
        with self._lock:
            self._open.append(client)
            gone = self._open.pop(0) if len(self._open) > LINGERING else None
        if gone is not None:
            gone.close()

    def let_go(self) -> None:
        for client in self._open:
            client.close()
        self._open.clear()


def asked(*pictures: str, question: str = "Which number is on the red tag?", **fields: Any) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    parts.append({"type": "text", "text": question})
    return {"model": NAME, "max_tokens": 8, "messages": [{"role": "user", "content": parts}]} | fields


@cache
def picture(kind: str) -> str:
    """Pictures that are small, large, noisy, or not what they say, as data URLs."""
    buffer = io.BytesIO()
    if kind == "scene":
        return data_url(draw_ref("scene:test/0"))
    if kind == "large":
        Image.new("RGB", (4800, 4800), (9, 99, 9)).save(buffer, "PNG")
    elif kind == "noise":
        Image.effect_noise((900, 900), 200).convert("RGB").save(buffer, "PNG")
    elif kind == "frames":
        frames = [Image.new("P", (600, 600), number) for number in range(60)]
        frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    elif kind in ("scans", "many scans"):
        side = 4800 if kind == "scans" else 64
        Image.new("L", (side, side), 90).save(buffer, "JPEG", progressive=True)
        data = buffer.getvalue()
        start, end = [found.start() for found in re.finditer(b"\xff\xda", data)][-2:]
        return url_of(data[:start] + data[start:end] * (100 if kind == "scans" else 40_000) + b"\xff\xd9")
    elif kind == "bomb":
        header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
        return url_of(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10**6)))
    elif kind == "cut":
        Image.effect_noise((400, 400), 90).save(buffer, "PNG")
        return url_of(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    return url_of(buffer.getvalue())


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def url_of(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def many(unit: str, size: int) -> bytes:
    head = f'{{"model":"{NAME}","messages":[{{"role":"user","content":[1'
    return (head + unit * (size // len(unit)) + "]}]}").encode()


HEAD = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
FOCUS = {"model": f"{NAME}:focus"}

ATTACKS: dict[str, Callable[[Target, random.Random], None]] = {
    "many bad items": lambda to, chance: to.post(many(chance.choice((",1", ",[]", ',{"type":"text"}')), 1_000_000)),
    "deep nesting": lambda to, chance: to.post(b'{"model":' + b'[{"a":' * 50_000),
    "lone surrogate": lambda to, chance: to.post(b'{"model":"bench","messages":[{"role":"user","content":"\\ud800"}]}'),
    "broken JSON": lambda to, chance: to.post(json.dumps(asked(picture("scene"))).encode()[: chance.randrange(5000)]),
    "escapes": lambda to, chance: to.post(asked(question="\u20ac" * 200_000)),
    "blanks": lambda to, chance: to.post(b" " * 2_000_000 + json.dumps(asked()).encode()),
    "unknown field": lambda to, chance: to.post(asked(guided_choice=["a", "b"])),
    "a field of megabytes": lambda to, chance: to.post(asked(picture("scene"), metadata={"pad": "x" * 3_000_000})),
    "picture bomb": lambda to, chance: to.post(asked(picture("bomb"))),
    "cut picture": lambda to, chance: to.post(asked(picture("cut"))),
    "empty scans": lambda to, chance: to.post(asked(picture("scans")), wait=chance.random() < 0.2),
    "many empty scans": lambda to, chance: to.post(asked(picture("many scans"))),
    "frames": lambda to, chance: to.post(asked(picture("frames"))),
    "large picture, leaves": lambda to, chance: to.post(asked(picture("large")), wait=False),
    "focus, leaves": lambda to, chance: to.post(asked(picture("scene"), n=4) | FOCUS, wait=False),
    "long answer, leaves": lambda to, chance: to.post(
        asked(picture("scene"), max_tokens=4000, stream=True, n=4), wait=False
    ),
    "large reply, not read": lambda to, chance: to.post(
        asked(picture("noise"), n=8, stream=chance.random() < 0.5, temperature=1.5) | FOCUS, linger=True
    ),
    "body that never comes": lambda to, chance: to.raw(HEAD + b"Content-Length: 20000000\r\n\r\n{", linger=True),
    "head that never ends": lambda to, chance: to.raw(HEAD + b"X: " + b"y" * chance.randrange(9000), linger=True),
    "nothing at all": lambda to, chance: to.raw(b"", linger=True),
    "crumbs": lambda to, chance: to.raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 120_000),
    "large head": lambda to, chance: to.raw(HEAD + b"X: " + b"y" * 100_000),
    "many requests at once": lambda to, chance: to.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 40, False),
    "other methods": lambda to, chance: to.raw(
        chance.choice((b"PUT", b"DELETE", b"TRACE", b"PRI")) + b" * HTTP/1.1\r\nHost: localhost\r\n\r\n", False
    ),
    "upgrade": lambda to, chance: to.raw(
        b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n", False
    ),
    "no HTTP": lambda to, chance: to.raw(chance.randbytes(2000), wait=False),
    "elsewhere": lambda to, chance: to.post(asked("http://169.254.169.254/latest/meta-data/")),
    "scenes": lambda to, chance: to.raw(b"GET /page/scene HTTP/1.1\r\nHost: localhost\r\n\r\n", False),
    "text too long": lambda to, chance: to.post(asked(question="x" * 500_000)),
}


class GoodClient(threading.Thread):
    """Asks about a scene again and again, and notes when, how long it took and what came."""

    def __init__(self, target: Target) -> None:
        super().__init__(daemon=True)
        self._url = "http://{}:{}".format(*target.address)
        self._done = threading.Event()
        self.answers: list[tuple[float, float, int]] = []  # when it was asked, seconds, status (0: no answer)
        self.health: list[tuple[float, float, int]] = []

    def run(self) -> None:
        body = asked(picture("scene"))
        while not self._done.wait(GOOD_EVERY_S):
            self.answers.append(timed(lambda: httpx.post(self._url + PATH, json=body, timeout=60).status_code))
            self.health.append(timed(lambda: httpx.get(f"{self._url}/health", timeout=60).status_code))

    def await_answers(self, count: int = 2) -> None:
        """Return when so many more answers have come, health's too."""
        wanted = len(self.health) + count
        while len(self.health) < wanted:
            time.sleep(0.05)

    def finish(self) -> None:
        self._done.set()
        self.join()


def timed(ask: Callable[[], int]) -> tuple[float, float, int]:
    start = time.monotonic()
    try:
        status = ask()
    except httpx.HTTPError:
        status = 0
    return start, time.monotonic() - start, status


def shares(rows: list[tuple[float, float, int]], start: float, end: float) -> dict[str, Any]:
    """How many of the requests asked in a span were answered, and how fast."""
    within = [row for row in rows if start <= row[0] < end]
    seconds = sorted(took for _, took, status in within if status == 200) or [float("nan")]
    return {
        "asked": len(within),
        "answered": sum(status == 200 for *_, status in within),
        "statuses": dict(Counter(status for *_, status in within)),
        "median_s": round(statistics.median(seconds), 3),
        "slowest_s": round(seconds[-1], 3),
    }


def attack(target: Target, count: int, attackers: int, seed: int) -> Counter[str]:
    """So many attacks, each kind in its turn; how often each was made."""
    names = [list(ATTACKS)[number % len(ATTACKS)] for number in range(count)]
    random.Random(seed).shuffle(names)
    with ThreadPoolExecutor(attackers) as pool:
        list(pool.map(lambda pair: ATTACKS[pair[1]](target, random.Random(pair[0])), enumerate(names)))
    return Counter(names)


def memory_mb(process: psutil.Process) -> float:
    """Resident megabytes of a server and the processes that open its pictures."""
    return sum(one.memory_info().rss for one in [process, *process.children()]) / 1e6


@contextlib.contextmanager
def watched(process: psutil.Process) -> Iterator[list[float]]:
    """The memory at every tenth of a second."""
    seen: list[float] = [memory_mb(process)]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            with contextlib.suppress(psutil.NoSuchProcess):
                seen.append(memory_mb(process))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def warm_up(target: Target, url: str, pictures: int, hostile: int, attackers: int) -> None:
    """Have the server use everything that it has once: its cache of pictures is full, its threads are started."""
    asks = bodies(pictures, NAME)
    for ask in asks[::8]:
        ask["model"] = FOCUS["model"]
    asyncio.run(ask_all(url, asks, CLIENTS))
    attack(target, hostile, attackers, seed=1)
    target.let_go()


def measure(requests: int, attackers: int, pictures: int, warm: int, settle_s: float, rounds: int) -> dict[str, Any]:
    """All figures of one run."""
    with server(CHECKPOINT) as (url, process):
        target = Target(url)
        warm_up(target, url, pictures, warm, attackers)
        time.sleep(settle_s)
        good = GoodClient(target)
        good.start()
        begin = time.monotonic()
        time.sleep(settle_s)
        good.await_answers()
        resident = [resident_mb(process)]
        start = end = time.monotonic()
        made: Counter[str] = Counter()
        with watched(process) as seen:
            for number in range(rounds):
                made += attack(target, requests, attackers, seed=2 + number)
                end = time.monotonic()
                target.let_go()
                time.sleep(settle_s)
                resident.append(resident_mb(process))
        good.await_answers()
        good.finish()
        spans = {"before": (begin, start), "during": (start, end), "after": (end, time.monotonic())}
        return {
            "requests": requests,
            "rounds": rounds,
            "attackers": attackers,
            "seconds": round(end - start, 1),
            "kinds": dict(made),
            "good_client": {name: shares(good.answers, *span) for name, span in spans.items()},
            "health": {name: shares(good.health, *span) for name, span in spans.items()},
            # Before, and after each round.
            "memory_mb": {"all": [both for both, _ in resident], "server": [alone for _, alone in resident],
                          "most": round(max(seen))},
        }  # fmt: skip


def resident_mb(process: psutil.Process) -> tuple[int, int]:
    """Of the server with its decoders, and of the server alone."""
    return round(memory_mb(process)), round(process.memory_info().rss / 1e6)


def main() -> None:
    """Parse, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--attackers", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--warm", type=int, default=WARM)
    parser.add_argument("--settle", type=float, default=SETTLE_S)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    figures = measure(given.requests, given.attackers, given.pictures, given.warm, given.settle, given.rounds)
    text = json.dumps(figures, indent=1)
    print(text)
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
