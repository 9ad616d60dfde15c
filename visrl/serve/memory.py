"""Giving memory back to the system, where the C library is glibc: it keeps what was freed, for each thread apart.

One request with large images needs some hundred megabytes for a moment. By itself glibc would keep them, in heaps of
its own for every thread that ever opened, wrote or computed something, and grow with each new mixture of sizes.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache

# mallopt's names for: bytes beyond which a block is mapped by itself, and given back when it is freed; free bytes
# at the end of a heap beyond which they are given back; and how many heaps there are.
_MMAP_THRESHOLD, _TRIM_THRESHOLD, _ARENA_MAX = -3, -1, -8
LARGE_BYTES = 4_000_000  # a small image is less: mapping its blocks anew each time would cost as much as opening it
SPARE_BYTES = 16_000_000
HEAPS = 1


@cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def keep_little() -> None:
    """Have this process keep little of what it frees; to be called before it starts threads, which take heaps."""
    if (library := _glibc()) is not None:
        library.mallopt(_ARENA_MAX, HEAPS)
        library.mallopt(_MMAP_THRESHOLD, LARGE_BYTES)
        library.mallopt(_TRIM_THRESHOLD, SPARE_BYTES)


def give_back() -> None:
    """Give the free pages between blocks in use back too, which takes some milliseconds."""
    if (library := _glibc()) is not None:
        library.malloc_trim(ctypes.c_size_t(0))
