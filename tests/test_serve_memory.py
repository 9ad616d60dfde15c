"""What requests take of memory is given back, and nothing that was shown once is kept."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from visrl import scenes
from visrl.serve.scenes import _draw_scene

# Four threads each take 50 MB in blocks of 100 kB and free all but every fiftieth of them, as caches do.
PROGRAM = """
import sys, threading
from visrl.serve.memory import give_back, keep_little

def resident():
    with open("/proc/self/statm") as counts:
        return int(counts.read().split()[1]) * 4096 / 1e6

if sys.argv[1] == "little":
    keep_little()
kept = []
together = threading.Barrier(4)

def work():
    blocks = [bytearray(100_000) for _ in range(500)]
    together.wait()
    kept.extend(blocks[::50])
    del blocks
    together.wait()

before = resident()
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
if sys.argv[1] == "little":
    give_back()
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory in its own way")
def test_freed_memory_is_given_back_around_the_blocks_that_stay() -> None:
    grown = {
        way: float(subprocess.run([sys.executable, "-c", PROGRAM, way], capture_output=True, check=True).stdout)
        for way in ("little", "as it is")
    }
    assert grown["little"] < 20  # 4 MB of blocks, and the threads' own
    assert grown["as it is"] > 100  # or else this shows nothing


def test_scenes_of_the_page_are_not_kept() -> None:
    before = scenes.draw.cache_info().currsize
    for _ in range(5):
        _draw_scene()
    assert scenes.draw.cache_info().currsize == before
