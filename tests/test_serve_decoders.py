"""Pictures are opened in processes that can be killed: over time, memory, or a sender who has left."""

from __future__ import annotations

import asyncio
import io
import re
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
from PIL import Image
from serve_help import body, data_url, known, left_open, picture, post
from waiting import PATIENCE_S, wait_until

from visrl.images import decode_image
from visrl.serve.errors import RequestError
from visrl.serve.image_decoders import DECODERS, SLOW_DECODERS, ImageDecoders, _is_large
from visrl.serve.schemas import Limits

MAX_PIXELS, MAX_BYTES = 25_000_000, 20_000_000


def processes() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        try:
            if "visrl.serve.image_decoder" in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def opened(data: str | bytes, max_pixels: int = MAX_PIXELS, **options: Any) -> Image.Image:
    return asyncio.run(ImageDecoders(**options).open(data, "picture 1", max_pixels, MAX_BYTES))[1]


@contextmanager
def stuck() -> Iterator[None]:
    """No decoder gets on with anything, as if each had met a picture that takes for ever."""
    asyncio.run(_use_all())
    stopped = processes()
    for process in stopped:
        process.suspend()
    try:
        yield
    finally:
        for process in stopped:
            if process.is_running():
                process.kill()


async def _use_all() -> None:
    """Have as many processes as ever work at once."""
    decoders = ImageDecoders()
    await asyncio.gather(*(decoders.open(picture(), "p", MAX_PIXELS, MAX_BYTES) for _ in range(DECODERS)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP"])
@pytest.mark.parametrize(("size", "large"), [((1500, 2000), False), ((2500, 2000), True)])
def test_large_pictures_are_known_by_their_first_bytes(kind: str, size: tuple[int, int], large: bool) -> None:
    data = picture(size, kind)
    assert _is_large(data) == _is_large(data_url(data)) == large
    assert _is_large(b"?" * 1_000_000)
    assert not _is_large("data:image/png;base64,@@@")


def test_small_pictures_do_not_wait_for_many_large_ones() -> None:
    async def race() -> list[str]:
        decoders, order = ImageDecoders(), []

        async def one(data: bytes, name: str) -> None:
            await decoders.open(data, name, MAX_PIXELS, MAX_BYTES)
            order.append(name)

        large, small = picture((3000, 2000)), picture()
        await asyncio.gather(*(one(large, "large") for _ in range(6)), one(small, "small"))
        return order

    asyncio.run(_use_all())
    assert "small" in asyncio.run(race())[:2]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("size", [(1, 1), (201, 100), (1500, 1200)])
def test_the_pixels_are_those_of_this_process(kind: str, size: tuple[int, int]) -> None:
    data = picture(size, kind)
    expected = decode_image(io.BytesIO(data), "p")
    for given in (data, data_url(data)):
        image = opened(given)
        assert (image.mode, image.size, image.tobytes()) == ("RGB", expected.size, expected.tobytes())


def test_a_large_picture_is_not_seen_through_a_small_one_that_follows() -> None:
    for size in ((3000, 2000), (10, 10), (2000, 3000), (20, 10)):
        assert opened(picture(size)).tobytes() == decode_image(io.BytesIO(picture(size)), "p").tobytes()


def scans(count: int) -> bytes:
    """A progressive JPEG of 24 megapixels with one of its scans repeated: legal by number, and long to decode."""
    plain = io.BytesIO()
    Image.new("L", (4900, 4900), 90).save(plain, "JPEG", progressive=True, quality=90)
    starts = [found.start() for found in re.finditer(b"\xff\xda", plain.getvalue())] + [len(plain.getvalue()) - 2]
    head, scan, end = (plain.getvalue()[: starts[-2]], plain.getvalue()[starts[-2] : starts[-1]], b"\xff\xd9")
    return head + scan * count + end


def test_a_picture_that_takes_too_long_is_its_senders_loss() -> None:
    data = scans(150)
    before = {process.pid for process in processes()}
    with pytest.raises(RequestError, match="takes longer to open than a picture may") as refused:
        opened(data, cpu_s=0.1)
    assert refused.value.status == 400
    assert {process.pid for process in processes()} <= before
    assert opened(picture()).size == (200, 100)


def test_a_decoder_that_dies_is_told_and_replaced() -> None:
    async def run() -> None:
        decoders = ImageDecoders()
        work = asyncio.ensure_future(decoders.open(picture(), "picture 1", MAX_PIXELS, MAX_BYTES))
        await asyncio.sleep(0.1)
        for process in processes():
            process.kill()
        with pytest.raises(RequestError, match="picture 1 brings its decoder down"):
            await work
        wait_until(lambda: not processes(), "an idle decoder that was killed, too, is gone")
        assert (await decoders.open(picture(), "picture 1", MAX_PIXELS, MAX_BYTES))[1].size == (200, 100)

    with stuck():
        asyncio.run(run())


@pytest.mark.skipif(sys.platform != "linux", reason="no bound on memory")
def test_the_memory_of_a_picture_is_bounded() -> None:
    # 3000 × 3000 in a process that may take what 1,000 pixels need: the header is refused before any memory is asked.
    with pytest.raises(RequestError, match="more than 1,000"):
        opened(picture((3000, 3000)), max_pixels=1000)
    program = (
        "from visrl.serve.image_decoder import _address_space, _limit; _limit(_address_space(), 9, 9); bytearray(10**9)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE_S)
    assert "MemoryError" in done.stderr


def test_who_leaves_gives_its_decoder_up() -> None:
    with stuck():
        before = processes()
        with known() as (url, _, metrics):
            for _ in range(DECODERS):
                with left_open(url, body()):
                    wait_until(lambda: metrics.in_flight == 1)
                    time.sleep(0.1)
                wait_until(lambda: metrics.in_flight == 0)
            assert post(url, body()).status_code == 200  # by others, once these are given up
        assert not [process for process in processes() if process in before]


def test_pictures_that_take_long_make_way() -> None:
    async def run() -> None:
        decoders = ImageDecoders()
        asks: list[Callable[[], Coroutine[Any, Any, Any]]] = [
            lambda: decoders.open(picture(), "picture 1", MAX_PIXELS, MAX_BYTES)
        ] * DECODERS
        slow = [asyncio.ensure_future(ask()) for ask in asks]
        await asyncio.sleep(0.1)
        start = time.monotonic()
        assert (await asks[0]())[1].size == (200, 100)
        assert 0.5 < time.monotonic() - start < PATIENCE_S
        assert not any(task.done() for task in slow)
        for task in slow:
            task.cancel()
        assert all(
            isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*slow, return_exceptions=True)
        )
        await asyncio.sleep(1)
        assert decoders._slow_places == SLOW_DECODERS

    with stuck():
        asyncio.run(run())


def test_the_time_of_a_request_holds_for_its_pictures() -> None:
    with stuck(), known(limits=Limits(request_s=0.5)) as (url, _, _):
        assert post(url, body()).status_code == 504
    with known() as (url, _, _), ThreadPoolExecutor(8) as pool:
        replies = [pool.submit(post, url, body(pictures=[data_url(picture((90, 40 + n)))])) for n in range(16)]
        assert {reply.result().status_code for reply in replies} == {200}
