"""Waiting for a condition instead of for time, so that a slow machine takes longer and fails nothing."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_S = 120  # far beyond what any wait takes on a machine that is merely slow


def wait_until(condition: Callable[[], object], called: str = "it") -> None:
    """Return as soon as `condition()` is true; `called` is how a failure names it."""
    ends = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < ends, f"{called} is still not so after {PATIENCE_S} s"
        time.sleep(0.01)
