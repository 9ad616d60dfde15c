"""What a run of several steps costs: seconds of each step and the most memory. Knows no step."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from visrl.records import write_text


class StepClock:
    """Seconds of each step, kept on disk, so that a resumed run knows what its finished steps took."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def time(self, step: str, work: Callable[[], Any]) -> None:
        """Do `work` (which skips what is complete) and add its seconds to those of `step`."""
        print(f"== {step}", flush=True)
        started = time.monotonic()
        try:
            work()
        finally:
            self.seconds[step] = round(self.seconds.get(step, 0.0) + time.monotonic() - started, 1)
            write_text(self.path, json.dumps(self.seconds, indent=1))


@contextmanager
def peak_memory(path: Path) -> Iterator[None]:
    """Watch this process's resident memory and write its peak, in MB, together with that of earlier tries."""
    stop = threading.Event()
    peak = json.loads(path.read_text(encoding="utf-8"))["mb"] if path.is_file() else 0.0
    process = psutil.Process()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.5):
            peak = max(peak, process.memory_info().rss / 1e6)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        write_text(path, json.dumps({"mb": round(max(peak, process.memory_info().rss / 1e6), 1)}))
