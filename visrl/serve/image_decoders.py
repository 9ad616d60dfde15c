"""Images opened in processes of their own, a bounded number at once, each of which can be killed.

An image that takes too much time or memory, or that brings its decoder down, is its sender's loss alone. One that
takes long makes way for others; one whose sender left is soon given up. Nothing here knows about HTTP or models.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import signal
import struct
import subprocess
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from tempfile import TemporaryFile
from typing import IO

from PIL import Image

from visrl.serve.errors import RequestError
from visrl.serve.image_decoder import JOB, REPLY, SharedBytes

DECODERS = 2  # images opened at once: each may need its limit of pixels several times over while it is decoded
SLOW_DECODERS = 2  # and so many more that have taken longer than
SLOW_S = 1.0
CPU_S = 10.0  # of processor time for one image; 25 megapixels of the slowest kind take one or two
LARGE_PIXELS = 4_000_000  # images that claim more are opened one at a time, so that small ones find a place
LATE_BYTES = 100_000  # and those of so many bytes that do not say their size at once
HEAD = 4_096  # characters or bytes of an image that are looked at for that
LEFT_S = 0.5  # how long an image whose sender has left may still take
# Pillow's simple raster decoders only; others (EPS, PSD, …) run more code than an image needs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


class ImageDecoders:
    """Opens images for one event loop."""

    def __init__(self, cpu_s: float = CPU_S) -> None:
        self.cpu_s = cpu_s
        self._places = asyncio.Semaphore(DECODERS)
        self._large = asyncio.Semaphore(1)
        self._slow_places = SLOW_DECODERS
        self._threads = ThreadPoolExecutor(DECODERS + SLOW_DECODERS, "decoder")
        self._busy: set[_Process] = set()

    async def open(self, data: str | bytes, name: str, max_pixels: int, max_bytes: int) -> tuple[str, Image.Image]:
        """A key of the image's bytes, and the image as RGB; `data` is a data URL or the file's bytes.

        Raises:
            RequestError: 400 where it is no image within the limits.
        """
        lanes = [self._large, self._places] if _is_large(data) else [self._places]
        with ExitStack() as taken:
            for lane in lanes:
                await lane.acquire()
                taken.callback(lane.release)
            taken = taken.pop_all()
        loop = asyncio.get_running_loop()
        process = _idle_process()
        self._busy.add(process)
        job = {"name": name, "max_pixels": max_pixels, "max_bytes": max_bytes, "cpu_s": self.cpu_s, "formats": FORMATS}
        task = loop.run_in_executor(self._threads, process.decode, job, data)
        is_slow = False
        timer = loop.call_later(SLOW_S, lambda: make_way())

        def make_way() -> None:
            nonlocal is_slow, timer
            if self._slow_places:
                is_slow = True
                self._slow_places -= 1
                taken.close()
            else:
                timer = loop.call_later(SLOW_S, make_way)

        def give_back(done: asyncio.Future[tuple[str, Image.Image]]) -> None:
            timer.cancel()
            self._busy.discard(process)
            if not done.cancelled():
                done.exception()  # who asked may have left
            _give_back(process)
            if is_slow:
                self._slow_places += 1
            taken.close()  # nothing, once it has made way

        task.add_done_callback(give_back)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            loop.call_later(LEFT_S, lambda: None if task.done() else process.kill())
            raise

    def warm(self) -> None:
        """Start as many processes as work at once, so that no first request waits for one."""
        fresh = [_idle_process() for _ in range(DECODERS)]
        for process in fresh:
            process.start()
        _idle.extend(fresh)

    def close(self) -> None:
        """Give up the images that are being opened."""
        for process in list(self._busy):
            process.kill()
        self._threads.shutdown(wait=False)


def _is_large(data: str | bytes) -> bool:
    """Whether an image is to be taken for a large one, by the size that its first bytes claim."""
    if isinstance(data, str):
        start = data.find(",", 0, HEAD) + 1
        try:
            head = base64.b64decode(data[start : start + HEAD])
        except ValueError:
            head = b""
    else:
        head = data[:HEAD]
    for form, places in _CLAIMS:
        if found := form.search(head):
            width, height = struct.unpack(places, found[1])
            return abs(width * height) > LARGE_PIXELS
    return len(data) > LATE_BYTES


_CLAIMS = (  # where an image's size stands, by its format
    (re.compile(rb"\A\x89PNG\r\n\x1a\n.{8}(.{8})", re.DOTALL), ">II"),
    (re.compile(rb"\AGIF8.a(.{4})", re.DOTALL), "<HH"),
    (re.compile(rb"\ABM.{16}(.{8})", re.DOTALL), "<ii"),
    (re.compile(rb"\A\xff\xd8.*?\xff[\xc0-\xc2]\x00[\x0b\x11]\x08(.{4})", re.DOTALL), ">HH"),
)


class _Process:
    """One `image_decoder.py`, started when it is first needed. Each call blocks, and belongs in a thread."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._file = _memory_file()
        self._shared = SharedBytes(self._file.fileno())
        self._is_killed = False

    @property
    def is_alive(self) -> bool:
        return self._process is None or self._process.poll() is None

    def start(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            # A session of its own: Ctrl-C is the server's, which lets requests in work finish.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "visrl.serve.image_decoder", str(self._file.fileno())],
                pass_fds=[self._file.fileno()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | ENVIRONMENT,
            )
        return self._process

    def decode(self, job: dict[str, object], data: str | bytes) -> tuple[str, Image.Image]:
        """The key and the image.

        Raises:
            RequestError: 400 with what `image_decoder.py` says, or that it died over this.
        """
        process = self.start()
        payload = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
        head = json.dumps(job | {"is_url": isinstance(data, str)}).encode()
        try:
            _write(process, JOB.pack(len(head), len(payload)) + head)
            _write(process, payload)
            reply = json.loads(_read(process, *REPLY.unpack(_read(process, REPLY.size))))
        except (OSError, EOFError) as error:
            raise RequestError(400, f"{job['name']} {self._how_it_ended()}") from error
        if "error" in reply:
            raise RequestError(400, reply["error"])
        width, height = reply["size"]
        pixels = self._shared.first(width * height * 3)
        with memoryview(pixels) as whole, whole[: width * height * 3] as used:
            image = Image.frombytes("RGB", (width, height), used)
        self._shared.shrink()
        return reply["key"], image

    def kill(self) -> None:
        """End the process over what it does; its `decode` then raises."""
        self._is_killed = True
        if self._process is not None:
            self._process.kill()

    def end(self) -> int:
        """End it for good, with all it holds; its exit status."""
        if self._process is None:
            self._file.close()
            return 0
        self._process.kill()
        status = self._process.wait()
        for held in (self._process.stdin, self._process.stdout, self._file):
            if held is not None:
                held.close()
        return status

    def _how_it_ended(self) -> str:
        status = self.end()
        if self._is_killed or status == -getattr(signal, "SIGXCPU", 0):
            return "takes longer to open than a picture may"
        return "brings its decoder down"


ENVIRONMENT = {
    # One thread: numerical libraries would take address space for as many as there are cores.
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
    # glibc would give an image's memory back and take it anew each time, which costs as much as decoding a small one.
    "MALLOC_MMAP_THRESHOLD_": "8000000", "MALLOC_TRIM_THRESHOLD_": "16000000",
}  # fmt: skip
# Processes without work, for whoever comes next; they end when their input does, which is with this process.
_idle: deque[_Process] = deque()


def _idle_process() -> _Process:
    while _idle:
        process = _idle.pop()
        if process.is_alive:  # one may have been killed for the memory it holds
            return process
    return _Process()


def _give_back(process: _Process) -> None:
    if process.is_alive and len(_idle) < DECODERS:
        _idle.append(process)
    else:
        process.end()


def _memory_file() -> IO[bytes]:
    """An open file without a name, in memory where the system has such."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("pixels"), "w+b")
    return TemporaryFile()


def _write(process: subprocess.Popen[bytes], data: bytes) -> None:
    assert process.stdin is not None
    left = memoryview(data)
    while left:
        left = left[process.stdin.write(left) :]


def _read(process: subprocess.Popen[bytes], size: int) -> bytearray:
    assert process.stdout is not None
    data = bytearray(size)
    left = memoryview(data)
    while left:
        count = process.stdout.readinto(left)  # type: ignore[attr-defined]  # unbuffered: a raw file
        if not count:
            raise EOFError
        left = left[count:]
    return data
