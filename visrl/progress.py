"""What work says: a bar on a terminal or plain lines with time left, notes, and at its end the next command."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Thing = TypeVar("Thing")
LINE_EVERY = 15.0  # seconds between plain lines


def progress(things: Sequence[Thing], what: str, *, units: str = "items") -> Iterator[Thing]:
    """Iterate over `things`, showing how far it is."""
    if sys.stderr.isatty():
        from rich.progress import track  # only for a bar: every verb imports this file before it does anything

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


def reading(what: str, total: int) -> Callable[[int], None]:
    """A function that is told how many of `total` bytes are read, and says so in a line from time to time."""
    started = last = time.monotonic()

    def tell(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= LINE_EVERY:
            left = (now - started) / done * (total - done) if done else 0
            said = f"{done / 1e9:.1f} of {total / 1e9:.1f} GB read, about {left:.0f} s left"
            print(f"{what}: {said}", file=sys.stderr, flush=True)
            last = now

    return tell


def next_command(purpose: str, *words: object) -> str:
    """The line with which a verb ends: what a user types after it."""
    return f"next, {purpose}: {shlex.join(str(word) for word in words)}"


def note(text: str) -> None:
    """Say something that the user should know, beside a verb's output; one of several processes says it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr, flush=True)
