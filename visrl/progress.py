"""What long work says meanwhile: a bar on a terminal, plain lines with time left elsewhere, and notes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.progress import track

Thing = TypeVar("Thing")
LINE_EVERY = 15.0  # seconds between plain lines


def progress(things: Sequence[Thing], what: str, *, units: str = "items") -> Iterator[Thing]:
    """Iterate over `things`, showing how far it is."""
    if sys.stderr.isatty():
        yield from track(things, description=what)
        return
    started = last = time.monotonic()
    for number, thing in enumerate(things):
        now = time.monotonic()
        if number and now - last >= LINE_EVERY:
            left = (now - started) / number * (len(things) - number)
            print(f"{what}: {number} of {len(things)} {units}, about {left:.0f} s left", file=sys.stderr, flush=True)
            last = now
        yield thing


def note(text: str) -> None:
    """Say something that the user should know, beside a verb's output; one of several processes says it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr, flush=True)
