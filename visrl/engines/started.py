"""Servers that this process has started, by address: one that has ended will not come back, and is asked no more."""

from __future__ import annotations

import subprocess

_STARTED: dict[str, subprocess.Popen[bytes]] = {}


def remember(url: str, process: subprocess.Popen[bytes]) -> None:
    """Note that the server at `url` is a process of ours."""
    _STARTED[url] = process


def forget(url: str) -> None:
    """Take back what `remember` has noted."""
    _STARTED.pop(url, None)


def has_ended(url: str) -> bool:
    """Whether the server at `url` was started by this process and has ended since."""
    process = _STARTED.get(url)
    return process is not None and process.poll() is not None
