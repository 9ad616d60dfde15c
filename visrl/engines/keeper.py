"""Keeps a server for as long as the process that asked for it lives: `python keeper.py COMMAND…` (server_process.py).

The keeper heads a process group of its own, runs COMMAND in it, and reads its standard input, of which the asking
process holds the other end. That end closes when the asker dies, however it dies (SIGKILL included), and the keeper
then ends the group. The kernel's parent-death signal would not do: it is sent when the *thread* that started the child
ends. Nothing but the standard library is imported, so that it starts at once and needs little.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

STOP_S = 10.0  # between asking the group to end and killing it
POLL_S = 0.05


def main() -> None:
    """Run the command, end it with whoever holds our standard input, and end as it ended."""
    for asked in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(asked, lambda *_: None)  # the group is signalled as a whole; its keeper goes last
    try:
        server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"{sys.argv[1]} cannot be started: {error.strerror}", file=sys.stderr)
        sys.exit(126)
    threading.Thread(target=_end_with_asker, daemon=True).start()
    status = server.wait()
    _end_others()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -status)
    sys.exit(status)


def _end_others() -> None:
    """End what the command has left behind, as workers of a server that was killed, and wait until it has ended."""
    os.killpg(0, signal.SIGTERM)
    for _ in range(int(STOP_S / POLL_S)):
        if not _others():
            return
        time.sleep(POLL_S)
    for number in _others():
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def _others() -> list[int]:
    """The processes of our group beside us, those aside that have ended; none where the system lists none."""
    found = []
    for number in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if not number.isdecimal() or int(number) == os.getpid():
            continue
        with suppress(OSError), open(f"/proc/{number}/stat", "rb") as file:  # one that ends meanwhile has none
            state, _, group = file.read().rpartition(b")")[2].split()[:3]
            if int(group) == os.getpgrp() and state != b"Z":
                found.append(int(number))
    return found


def _end_with_asker() -> None:
    while os.read(0, 4096):
        pass
    os.killpg(0, signal.SIGTERM)
    threading.Event().wait(STOP_S)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
