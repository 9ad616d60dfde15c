"""What a run of several steps costs: seconds of each step and the most memory. Knows no step."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from visrl.records import write_text


class StepClock:
    """Seconds of each step, by the clock and of the processors (those of its processes too, once they have ended), kept
    on disk, so that a resumed run knows what its finished steps took."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds = _read(path)
        self._cpu_path = path.with_name(f"cpu_{path.name}")
        self.cpu_seconds = _read(self._cpu_path)

    def time(self, step: str, work: Callable[[], Any]) -> None:
        """Do `work` (which skips what is complete) and add its seconds to those of `step`."""
        print(f"== {step}", flush=True)
        started, cpu_started = time.monotonic(), _processor_seconds()
        try:
            work()
        finally:
            for taken, path, seconds in (
                (self.seconds, self.path, time.monotonic() - started),
                (self.cpu_seconds, self._cpu_path, _processor_seconds() - cpu_started),
            ):
                taken[step] = round(taken.get(step, 0.0) + seconds, 1)
                write_text(path, json.dumps(taken, indent=1))


def _read(path: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _processor_seconds() -> float:
    taken = os.times()
    return taken.user + taken.system + taken.children_user + taken.children_system


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
