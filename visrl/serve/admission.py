"""Admission: which requests may wait (back-pressure), and which of those that wait join the running batch, and when.

A prefill holds up the requests that are being decoded, and costs less for each the more requests share it: so those
that wait join in groups, as soon as enough are there or one has waited long enough. Knows no engine.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

from visrl.serve.connections import RESERVE
from visrl.serve.errors import RequestError
from visrl.serve.requests import PendingRequest, QueuedRequest

GATHER_S = 0.004  # how long the first request of an idle engine waits for company
PREPARE_S = 0.1  # how long it waits for company whose images are being prepared
JOIN_REQUESTS = 8  # so many are worth a prefill of their own while others are being decoded: it costs less for each,
JOIN_SHARE = 4  # the more there are; so is one of so many that are being decoded,
JOIN_S = 0.15  # and one that has waited so long
# Tokens² × requests of one batch: all are padded to the longest, and attention's mask is as large as this. Short ones
# have as much for themselves, so that none waits for long ones.
BATCH_AREA = 64_000_000
SHORT_TOKENS = 1000


class AdmissionQueue:
    """Requests on their way into the running batch. The event loop puts them in, the engine's thread takes them out."""

    def __init__(self, max_batch: int, max_waiting: int) -> None:
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self.waiting: deque[PendingRequest] = deque()
        self.arriving = 0  # admitted, but not waiting for the engine yet
        self.preparing = 0  # of these, the ones whose images are being prepared
        self.is_closed = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        """How many requests wait, for the engine or for their images."""
        return len(self.waiting) + self.arriving

    # --- The event loop's side ---

    def admit(self, request: QueuedRequest) -> None:
        """Give a request one of the waiting places, until `put` or `give_up`.

        Raises:
            RequestError: 429 where too many wait.
        """
        with self._changed:
            if len(self) >= room_of(request, self.max_waiting):
                raise RequestError(429, "too many requests wait already; try again soon", retry_after_s=1)
            self.arriving += 1

    def put(self, pending: PendingRequest) -> None:
        """Let an admitted request wait for the engine.

        Raises:
            RequestError: 503 where the queue is closed.
        """
        with self._changed:
            self.arriving -= 1
            if self.is_closed:
                raise RequestError(503, "the server is shutting down")
            pending.ready_at = time.monotonic()
            self.waiting.append(pending)
            self._changed.notify_all()

    def give_up(self) -> None:
        """Give back the place of an admitted request that never was `put`."""
        with self._changed:
            self.arriving -= 1

    def withdraw(self, pending: PendingRequest) -> None:
        """Take a request out that waits no longer, if it has not joined already."""
        with self._changed:
            if pending in self.waiting:
                self.waiting.remove(pending)

    @contextmanager
    def being_prepared(self) -> Iterator[None]:
        """Count a request as one whose images are being prepared: an idle engine waits for it a little."""
        self.preparing += 1
        try:
            yield
        finally:
            with self._changed:
                self.preparing -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Let nothing join any more."""
        with self._changed:
            self.is_closed = True
            self._changed.notify_all()

    # --- The engine's side ---

    def take(self, running: Collection[PendingRequest]) -> list[PendingRequest]:
        """The requests that join the running ones now, oldest first. Where none runs, waits for some; empty then means
        closed."""
        with self._changed:
            joining: list[PendingRequest] = []
            while not (joining or running or self.is_closed):
                self._changed.wait_for(lambda: self.waiting or self.is_closed)
                self._changed.wait_for(self._is_gathered, GATHER_S)
                self._changed.wait_for(lambda: self._is_gathered() or not self.preparing, PREPARE_S)
                joining = self._joining(running)  # none where whoever waited has left meanwhile
            return joining or (self._joining(running) if self._may_join(running) else [])

    def take_back(self, running: Collection[PendingRequest], max_batch: int) -> None:
        """Let running requests wait again, before all others, for batches of at most `max_batch`."""
        with self._changed:
            self.max_batch = max_batch
            self.waiting.extendleft(reversed(list(running)))

    def drain(self) -> list[PendingRequest]:
        """Close, and take all that wait."""
        with self._changed:
            self.is_closed = True
            left = list(self.waiting)
            self.waiting.clear()
            return left

    def _joining(self, running: Collection[PendingRequest]) -> list[PendingRequest]:
        if self.is_closed:
            return []
        joining = fitting(running, self._of_one_adapter(running), self.max_batch)
        for pending in joining:
            self.waiting.remove(pending)
        return joining

    def _of_one_adapter(self, running: Collection[PendingRequest]) -> list[PendingRequest]:
        """Those that wait for the same adapter as what runs, for a batch has one; none where the one who waits longest
        wants another, so that it gets its turn."""
        first = next(iter(self.waiting), None)
        adapter = next((one.queued.adapter for one in running), first.queued.adapter if first else None)
        if first is not None and first.queued.adapter is not adapter:
            return []
        return [pending for pending in self.waiting if pending.queued.adapter is adapter]

    def _is_gathered(self) -> bool:
        return len(self.waiting) >= min(JOIN_REQUESTS, self.max_batch) or self.is_closed

    def _may_join(self, running: Collection[PendingRequest]) -> bool:
        """Whether enough wait to be worth holding up those that are being decoded."""
        if not self.waiting:
            return False
        enough = min(JOIN_REQUESTS, 1 + len(running) // JOIN_SHARE)
        return len(self.waiting) >= enough or time.monotonic() - self.waiting[0].ready_at >= JOIN_S


def fitting(running: Collection[PendingRequest], waiting: Iterable[PendingRequest], most: int) -> list[PendingRequest]:
    """Of the waiting requests those that join the running ones now, oldest first among the short and among the long."""
    joining: list[PendingRequest] = []
    longest = max((pending.length for pending in running), default=0)
    counts = Counter(pending.length <= SHORT_TOKENS for pending in running)
    full: set[bool] = set()
    for pending in waiting:
        if counts.total() >= most or len(full) == 2:
            break
        is_short = pending.length <= SHORT_TOKENS
        wider = max(longest, pending.length)
        areas = [wider**2 * (counts[kind] + (kind == is_short)) for kind in (True, False)]
        if is_short in full or (counts.total() and max(areas) > BATCH_AREA):
            full.add(is_short)
            longest = wider  # what joins before it shall not keep it out for longer
            continue
        joining.append(pending)
        counts[is_short] += 1
        longest = wider
    return joining


def room_of(request: QueuedRequest, most: int) -> int:
    """How many may wait where `most` may in all: the last places are for the first choices of HTTP requests."""
    return most - most // RESERVE if request.index else most
