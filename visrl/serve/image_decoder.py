"""The other side of `image_decoders.py`: a process that opens one image after another, and can be killed over any.

`python -m visrl.serve.image_decoder FILE_NUMBER` reads jobs from its standard input (two lengths, JSON, the image as
it was sent) and writes replies to its standard output (a length and JSON); pixels lie in the open file of that number,
which both sides map into their memory. It ends when its input does, that is with the server. Memory and processor time
of an image are bounded by the kernel's own limits, so that no decoder needs to be trusted with either.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import mmap
import os
import struct
import sys
import time
from typing import Any

from PIL import Image

from visrl.data_url import DataUrlError, read_data_url
from visrl.images import ImageError, decode_image

JOB = struct.Struct(">QQ")  # bytes of JSON, bytes of data
REPLY = struct.Struct(">Q")
BYTES_A_PIXEL = 48  # a decoder's own, and the copies on the way to RGB
KEPT_BYTES = 4_000_000  # of shared memory between two images
SPARE_BYTES = 300_000_000  # for the file in its encodings, and for what does not grow with the image


def main() -> None:
    """Answer jobs until there are no more."""
    jobs, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints must not be taken for a reply
    Image.init()  # so that no job pays for it, nor is killed over it
    shared = SharedBytes(int(sys.argv[1]))
    own_bytes = _address_space()
    while head := jobs.read(JOB.size):
        length, size = JOB.unpack(head)
        job = json.loads(jobs.read(length))
        _limit(own_bytes, job["max_pixels"], job["cpu_s"])
        reply = json.dumps(_reply(job, jobs.read(size), shared)).encode()
        replies.write(REPLY.pack(len(reply)) + reply)


class SharedBytes:
    """An open file in the memory of two processes, as large as is asked for."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._map: mmap.mmap | None = None

    def first(self, size: int) -> mmap.mmap:
        """A map of at least `size` bytes. A large one is made anew each time, so that it is not kept."""
        if self._map is None or len(self._map) < size or len(self._map) > KEPT_BYTES:
            size = max(size, KEPT_BYTES)
            if os.fstat(self._file).st_size != size:
                os.ftruncate(self._file, size)
            self._map = mmap.mmap(self._file, size)
        return self._map

    def shrink(self) -> None:
        """Give back what a large image took, here and, the file being shorter, on the other side."""
        if self._map is not None and len(self._map) > KEPT_BYTES:
            self._map.close()
            self._map = None
            os.ftruncate(self._file, KEPT_BYTES)


def _reply(job: dict[str, Any], data: bytes, shared: SharedBytes) -> dict[str, Any]:
    """The reply about an image, with its pixels as RGB in `shared`; or the sentence that says why there are none."""
    name = job["name"]
    try:
        if job["is_url"]:
            data = read_data_url(data.decode("utf-8", "surrogatepass"), job["max_bytes"])
        key = hashlib.blake2b(data, digest_size=16).hexdigest()
        image = decode_image(io.BytesIO(data), name, job["max_pixels"], tuple(job["formats"]))
        pixels = image.tobytes()
        shared.first(len(pixels))[: len(pixels)] = pixels
        return {"key": key, "size": image.size}
    except DataUrlError as error:
        return {"error": f"{name} {error}"}
    except ImageError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": f"{name} needs more memory than a picture of {job['max_pixels']:,} pixels may"}


def _limit(own_bytes: int, max_pixels: int, cpu_s: float) -> None:
    """Bound what the next image may take, where the system has such limits."""
    with contextlib.suppress(ImportError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + cpu_s), hard))
        if own_bytes:
            most = own_bytes + SPARE_BYTES + BYTES_A_PIXEL * max_pixels
            resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _address_space() -> int:
    """Bytes of address space that this process has taken; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as counts:
            return int(counts.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


if __name__ == "__main__":
    main()
