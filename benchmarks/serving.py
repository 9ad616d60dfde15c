"""How the server bears many clients: throughput of 64 at once against one after another, and memory over many requests.

    python benchmarks/serving.py --json serving.json [--model FOLDER] [--clients 64] [--requests 2000]

The server is a process of its own, started as `visrl api` starts it; the client is OpenAI's. The two ways are measured
in turns, so that whatever else the machine does weighs on both.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
from PIL import Image

from visrl.engines.endpoint import data_url
from visrl.models.tiny import CHECKPOINT
from visrl.scenes import draw_ref, scene_samples
from visrl.sequences import batched

ROUNDS = 4  # requests that each of the clients makes, one after another
TOKENS = 32  # of an answer: the length of a box with its brackets, or of a short sentence
SMALL_REQUESTS, LARGE = 40, (5600, 4200)  # of the measurement beside large pictures
PROGRAM = (
    "import sys; from visrl.serve.config import ServeConfig; from visrl.serve.runner import serve; "
    "serve(ServeConfig(model_name_or_path=sys.argv[1], served_model_name='bench'))"
)


@contextlib.contextmanager
def server(model: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A server process on a free port: its address up to `/v1`, and itself."""
    environment = os.environ | {"API_PORT": "0", "API_HOST": "127.0.0.1"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(model)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line.startswith("Serving"):
            raise SystemExit(f"the server did not start: {line}")
        yield f"{line.split()[5]}/v1", psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


def bodies(count: int, model: str) -> list[dict[str, Any]]:
    """Requests about as many different pictures, greedy, answers of at most `TOKENS` tokens."""
    return [
        {
            "model": model,
            "max_tokens": TOKENS,
            "temperature": 0,
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": data_url(draw_ref(sample.image))}},
                        {"type": "text", "text": sample.question},
                    ],
                }
            ],
        }
        for sample in scene_samples("test", 0, count)
    ]


async def ask_all(url: str, asks: list[dict[str, Any]], clients: int) -> tuple[float, int, list[float]]:
    """Seconds for all requests with so many at once, how many failed, and the time each took."""
    waiting, failed, times = iter(asks), 0, []

    async def work(api: openai.AsyncOpenAI) -> None:
        nonlocal failed
        for ask in waiting:
            start = time.perf_counter()
            try:
                await api.chat.completions.create(**ask)
            except openai.OpenAIError:
                failed += 1
            times.append(time.perf_counter() - start)

    async with contextlib.AsyncExitStack() as stack:
        apis = [openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=300) for _ in range(clients)]
        for api in apis:
            await stack.enter_async_context(api)
        start = time.perf_counter()
        await asyncio.gather(*(work(api) for api in apis))
        return time.perf_counter() - start, failed, times


def measure(model: Path, clients: int, requests: int, turns: int) -> dict[str, Any]:
    """All figures of one run."""
    result: dict[str, Any] = {
        "model": str(model.name),
        "clients": clients,
        "answer_tokens": TOKENS,
        "requests_of_each_client": ROUNDS,
        "turns": turns,
        "ways": {},
    }
    with server(model) as (url, process):
        for way, name in (("plain", "bench"), ("focus", "bench:focus")):
            asks = bodies(ROUNDS * clients, name)
            asyncio.run(ask_all(url, asks[:8], 8))  # warm
            alone, together = [], []
            for _ in range(turns):
                alone.append(timed(url, process, asks[:clients], 1))
                together.append(timed(url, process, asks, clients))
            result["ways"][way] = {
                "per_second": {"one after another": middle(alone, 0), "at once": middle(together, 0)},
                "speedup": round(statistics.median(ratios(alone, together, 0)), 2),
                "speedups": ratios(alone, together, 0),
                # The server's own processor time: what else the machine does hardly weighs on it.
                "server_ms": {"one after another": middle(alone, 1), "at once": middle(together, 1)},
                "server_speedups": ratios(together, alone, 1),
                "failed": sum(failed for _, _, failed in alone + together),
            }
        result["beside_large_pictures"] = beside_large_pictures(url)
        result["memory"] = watch_memory(url, process, clients, requests)
    return result


def timed(url: str, process: psutil.Process, asks: list[dict[str, Any]], clients: int) -> tuple[float, float, int]:
    """Requests a second, milliseconds of the server's processor time for each, and how many failed."""
    before = processor_s(process)
    seconds, failed, _ = asyncio.run(ask_all(url, asks, clients))
    return len(asks) / seconds, 1000 * (processor_s(process) - before) / len(asks), failed


def processor_s(process: psutil.Process) -> float:
    """Seconds of processor time that a server and the processes that open its pictures have taken."""
    return sum(sum(one.cpu_times()[:2]) for one in [process, *process.children()])


def middle(runs: list[tuple[float, float, int]], which: int) -> float:
    return round(statistics.median(run[which] for run in runs), 2)


def ratios(below: list[tuple[float, float, int]], above: list[tuple[float, float, int]], which: int) -> list[float]:
    """Turn by turn, one figure of the second runs over that of the first."""
    return [round(b[which] / a[which], 2) for a, b in zip(below, above, strict=True)]


def beside_large_pictures(url: str) -> dict[str, Any]:
    """Milliseconds of one small request after another, alone and while another client sends large pictures."""
    small = bodies(SMALL_REQUESTS, "bench")
    sides = draw_ref("scene:test/0").resize(LARGE)
    large = bodies(1, "bench")[0]
    large["messages"][0]["content"][0]["image_url"]["url"] = jpeg_url(sides)
    times: dict[str, list[float]] = {}
    for name in ("alone", "beside"):
        with background(url, large) if name == "beside" else contextlib.nullcontext():
            _, failed, seconds = asyncio.run(ask_all(url, small, 1))
        if failed:
            raise SystemExit(f"{failed} small requests failed {name}")
        times[name] = sorted(1000 * value for value in seconds)
    return {
        "large_picture": list(LARGE),
        "requests": SMALL_REQUESTS,
        "ms": {name: {"median": round(statistics.median(values)), "worst": round(values[-1])}
               for name, values in times.items()},
    }  # fmt: skip


@contextlib.contextmanager
def background(url: str, ask: dict[str, Any]) -> Iterator[None]:
    """A client that sends `ask` again and again until the end."""
    done = threading.Event()

    def work() -> None:
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300) as api:
            while not done.is_set():
                api.chat.completions.create(**ask)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def jpeg_url(image: Image.Image) -> str:
    """The picture as a JPEG data URL: a large one as PNG is a longer upload than most servers allow."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def watch_memory(url: str, process: psutil.Process, clients: int, requests: int) -> dict[str, Any]:
    """The server's memory in MB after each tenth of many requests, each about another picture."""
    asks = bodies(requests, "bench")
    for ask in asks[::8]:
        ask["model"] = "bench:focus"
    steps = [process.memory_info().rss / 1e6]
    failed, tenth = 0, max(1, len(asks) // 10)
    for part in batched(asks, tenth):
        _, lost, _ = asyncio.run(ask_all(url, part, clients))
        failed += lost
        steps.append(process.memory_info().rss / 1e6)
    return {"requests": len(asks), "failed": failed, "rss_mb": [round(step) for step in steps]}


def main() -> None:
    """Parse, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=CHECKPOINT)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not (given.model / "config.json").is_file():
            from visrl.models.tiny.make import make_tiny

            print(f"{given.model} is not there; measuring a random model of its shape", file=sys.stderr)
            given.model = make_tiny(Path(folder) / "random")
        result = measure(given.model, given.clients, given.requests, given.turns)
    text = json.dumps(result, indent=1)
    print(text)
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
