"""One worker thread that owns the engine: requests of all clients wait in one queue and are computed together.

Pictures are made ready in a thread before that, a bounded number ahead, so that no batch waits for one. New rows join
those that are being drawn between two tokens, and each is answered as soon as it ends. A row whose client left is
dropped from the queue, or stopped at its next token. Nothing here knows about HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from visrl.box import CropRule, Size
from visrl.codecs import Codec
from visrl.engines.base import Completion
from visrl.engines.decoding import DecodeBatch, DecodingEngine, ReadText
from visrl.serve.connections import RESERVE
from visrl.serve.errors import RequestError
from visrl.serve.metrics import Metrics
from visrl.serve.requests import QueuedRequest, length_guess

GATHER_S = 0.004  # how long the first row of an idle engine waits for company
PREPARE_S = 0.1  # how long it waits for company whose pictures are being made ready
JOIN_ROWS = 8  # so many rows are worth a prefill of their own while others are being drawn: it costs less for each,
JOIN_SHARE = 4  # the more there are; so is one of so many that are being drawn,
JOIN_S = 0.15  # and one that has waited so long
FURTHER_SHARE = 2  # a request's texts after its first get one over so much of a batch, so that others' first find room
LARGE_PIXELS = 4_000_000  # of one row's pictures: such rows are made ready one at a time, and small ones between them
READY_BATCHES = 2  # rows ready ahead of the engine, in batches: their pictures lie in memory as tensors
FORGET_ADDS = 8  # an engine that keeps the last pictures' work must not keep it, and let it grow, for ever
# Tokens² × rows of one batch: all rows are padded to the longest, and attention's mask is as large as this. Short rows
# have as much for themselves, so that none waits for long ones.
BATCH_AREA = 64_000_000
SHORT_TOKENS = 1000

State = Literal["loading", "ready", "failed", "stopped"]


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine and the crop rule of its checkpoint."""

    engine: DecodingEngine
    crop_rule: CropRule = "exact"


class Backend(Protocol):
    """What the application asks: one row at a time, batched or passed on as the backend likes."""

    @property
    def failure(self) -> Exception | None: ...
    @property
    def state(self) -> State: ...
    @property
    def codec(self) -> Codec: ...
    @property
    def crop_rule(self) -> CropRule: ...
    def processed_size(self, size: Size) -> Size: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    @property
    def is_passed_on(self) -> bool: ...  # whether rows may hold vLLM's own fields
    async def submit(self, row: QueuedRequest) -> Completion: ...


@dataclass(slots=True, eq=False)
class PendingRequest:
    """A row that waits; two jobs are never the same one, whatever they ask."""

    row: QueuedRequest
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Completion]
    prepared: Sequence[Any] = ()  # its pictures, ready for the engine
    ready_at: float = 0.0  # since when it waits for the engine, by `time.monotonic`
    length: int = 0  # a guess at its tokens

    def post(self, action: Callable[..., None], *args: Any) -> None:
        """Run `action` in the event loop; a loop that has closed has nobody left to tell."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(action, *args)

    def resolve(self, completion: Completion) -> None:
        if not self.future.done():
            self.future.set_result(completion)

    def fail(self, error: RequestError) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Batcher:
    """Loads an engine in its own thread and keeps it there; a `Backend`."""

    is_passed_on = False

    def __init__(
        self, load: Callable[[], Loaded], metrics: Metrics, *, max_batch: int = 64, max_waiting: int = 256
    ) -> None:
        self._load, self._metrics = load, metrics
        self._max_batch, self._max_waiting = max_batch, max_waiting
        self._loaded: Loaded | None = None
        self._waiting: deque[PendingRequest] = deque()
        self._running: dict[int, PendingRequest] = {}  # by their numbers; the engine's thread alone touches it
        self._changed = threading.Condition()
        self._arriving = 0  # rows that do not wait for the engine yet
        self._preparing = 0  # of these, the ones whose pictures are being made ready
        self._ahead = asyncio.Semaphore(READY_BATCHES * max_batch)
        self._further = asyncio.Semaphore(max(1, max_batch // FURTHER_SHARE))
        self._large = asyncio.Semaphore(1)
        self._preparer = ThreadPoolExecutor(1, "pictures", initializer=_use_one_core)
        self._state: State = "loading"
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        metrics.waiting_requests = lambda: len(self._waiting) + self._arriving

    @property
    def state(self) -> State:
        return self._state

    @property
    def failure(self) -> Exception | None:
        """Why loading failed, where it did."""
        return self._failure

    @property
    def codec(self) -> Codec:
        return self._ready().engine.codec

    @property
    def crop_rule(self) -> CropRule:
        return self._ready().crop_rule

    def processed_size(self, size: Size) -> Size:
        return self._ready().engine.processed_size(size)

    def _ready(self) -> Loaded:
        if self._loaded is None:
            raise RequestError(503, "the model is still loading; try again soon", retry_after_s=2)
        return self._loaded

    def start(self) -> None:
        """Begin to load; returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """Refuse what waits, stop what runs at its next token, and end the thread."""
        with self._changed:
            self._state = "stopped"
            self._changed.notify_all()
        self._preparer.shutdown(wait=False)
        if self._loaded is not None or self._failure is not None:  # loading cannot be stopped, and is not waited for
            self._thread.join()

    async def submit(self, row: QueuedRequest) -> Completion:
        """The completion of one row; cancelling this frees its place.

        Raises:
            RequestError: 429 where too many wait, 400 for a prompt the model cannot take, 503 without a model,
                500 where computing failed.
        """
        loop = asyncio.get_running_loop()
        job = PendingRequest(row, loop, loop.create_future())
        with self._changed:
            if self._state != "ready":
                raise RequestError(503, f"the model is not ready ({self._state})", retry_after_s=2)
            if len(self._waiting) + self._arriving >= room_of(row, self._max_waiting):
                raise RequestError(429, "too many requests wait already; try again soon", retry_after_s=1)
            self._arriving += 1
        arrived = False
        try:
            async with self._further if row.index else nullcontext(), self._ahead:
                await self._prepare(job)
                with self._changed:
                    self._arriving -= 1
                    arrived = True
                    if self._state != "ready":
                        raise RequestError(503, "the server is shutting down")
                    job.ready_at = time.monotonic()
                    job.length = length_guess(row.conversation, [view.tokens for view in job.prepared])
                    self._waiting.append(job)
                    self._changed.notify_all()
                return row.finish(await job.future)
        except asyncio.CancelledError:
            row.cancelled = True
            self._metrics.cancelled += 1
            with self._changed:
                if job in self._waiting:
                    self._waiting.remove(job)
            raise
        finally:
            if not arrived:
                with self._changed:
                    self._arriving -= 1

    async def _prepare(self, job: PendingRequest) -> None:
        """Make the pictures of a job ready, in the thread for that.

        Raises:
            RequestError: 400 for a picture that the model cannot take, 500 where there is no memory for it.
        """
        conversation = job.row.conversation
        if not conversation.views:
            return
        is_large = sum(view.size[0] * view.size[1] for view in conversation.views) > LARGE_PIXELS
        self._preparing += 1
        try:
            async with self._large if is_large else nullcontext():
                job.prepared = await job.loop.run_in_executor(
                    self._preparer, self._ready().engine.prepare, conversation
                )
        except (ValueError, RuntimeError) as error:
            raise _cannot_answer(error) from error
        finally:
            with self._changed:
                self._preparing -= 1
                self._changed.notify_all()

    # --- The thread ---

    def _work(self) -> None:
        try:
            self._loaded = self._load()
        except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:  # what a bad checkpoint gives
            self._failure, self._state = error, "failed"
            return
        with self._changed:
            if self._state == "loading":
                self._state = "ready"
        try:
            self._serve(self._loaded.engine)
        finally:
            # Reached by `stop`, and by an error nobody foresaw: whoever still waits must be told.
            with self._changed:
                self._state = "stopped"
                left = [*self._running.values(), *self._waiting]
                self._waiting.clear()
            for job in left:
                job.post(job.fail, RequestError(503, "the server is shutting down"))

    def _serve(self, engine: DecodingEngine) -> None:
        """Draw, token after token, until told to stop."""
        batch = engine.begin(self._on_token)
        numbers = itertools.count()
        added, cores = 0, torch.get_num_threads()
        while (fresh := self._next_rows()) or self._running:
            # A core is left to requests that are still being read, opened or made ready.
            elsewhere = self._metrics.in_flight > len(self._running) + len(self._waiting) + len(fresh)
            torch.set_num_threads(max(1, cores - 1) if elsewhere else cores)
            try:
                if fresh:
                    added += 1
                    self._add(engine, batch, {next(numbers): job for job in fresh})
                if self._running:
                    self._metrics.batch_sizes.add(len(self._running))
                    self._end(batch.step())
            except (ValueError, RuntimeError) as error:
                if len(self._running) == 1:
                    self._fail(next(iter(self._running)), error)
                elif isinstance(error, torch.OutOfMemoryError):
                    self._draw_fewer()
                else:
                    self._draw_alone(engine)
                batch = engine.begin(self._on_token)
            if not self._running and added >= FORGET_ADDS:
                engine.forget()
                added = 0

    def _next_rows(self) -> list[PendingRequest]:
        """The rows that join now, oldest first. Where none runs, waits for some; empty then means stopped."""
        with self._changed:
            rows: list[PendingRequest] = []
            while not (rows or self._running or self._state == "stopped"):
                self._changed.wait_for(lambda: self._waiting or self._state == "stopped")
                self._changed.wait_for(self._is_gathered, GATHER_S)
                self._changed.wait_for(lambda: self._is_gathered() or not self._preparing, PREPARE_S)
                rows = self._joining()  # none where whoever waited has left meanwhile
            return rows or (self._joining() if self._may_join() else [])

    def _joining(self) -> list[PendingRequest]:
        """Take the rows out of the queue that join those that run."""
        if self._state == "stopped":
            return []
        rows = fitting(list(self._running.values()), self._waiting, self._max_batch)
        for job in rows:
            self._waiting.remove(job)
        return rows

    def _is_gathered(self) -> bool:
        return len(self._waiting) >= min(JOIN_ROWS, self._max_batch) or self._state == "stopped"

    def _may_join(self) -> bool:
        """Whether rows wait that are worth holding up those that are being drawn."""
        if not self._waiting:
            return False
        enough = min(JOIN_ROWS, 1 + len(self._running) // JOIN_SHARE)
        return len(self._waiting) >= enough or time.monotonic() - self._waiting[0].ready_at >= JOIN_S

    def _add(self, engine: DecodingEngine, batch: DecodeBatch, jobs: dict[int, PendingRequest]) -> None:
        """Let jobs join; where they cannot all, one by one.

        Raises:
            ValueError, RuntimeError: the model failed in a way that leaves the batch of no more use.
        """
        self._running |= jobs
        engine.keep(view for job in jobs.values() for view in job.prepared)
        for job in jobs.values():
            job.prepared = ()  # large tensors, which the batch needs but once
        before = len(batch)
        try:
            self._end(batch.add({number: job.row.request for number, job in jobs.items()}))
        except (ValueError, RuntimeError) as error:
            if len(batch) != before or isinstance(error, torch.OutOfMemoryError):
                raise
            if len(jobs) == 1:
                self._fail(next(iter(jobs)), error)
                return
            # One caller's bad prompt must not fail the others.
            for number, job in jobs.items():
                self._add(engine, batch, {number: job})

    def _draw_fewer(self) -> None:
        """Queue all running rows again, half as many to be drawn together from now on."""
        count = len(self._running)
        with self._changed:
            self._max_batch = count // 2
            self._waiting.extendleft(reversed(self._running.values()))
            self._running.clear()
        print(
            f"Out of memory with {count} rows at once; at most {count // 2} from now on (max_batch).", file=sys.stderr
        )

    def _draw_alone(self, engine: DecodingEngine) -> None:
        """Draw every running row again, each by itself."""
        for number, job in dict(self._running).items():
            try:
                batch = engine.begin(self._on_token)
                self._end(batch.add({number: job.row.request}))
                while len(batch):
                    self._end(batch.step())
            except (ValueError, RuntimeError) as error:
                self._fail(number, error)

    def _fail(self, number: int, error: Exception) -> None:
        """Tell whoever waits for a running row that it has failed."""
        job = self._running.pop(number)
        job.post(job.fail, _cannot_answer(error))

    def _on_token(self, number: int, read: ReadText) -> bool:
        """Whether a row is to go on; its client is told of the text so far."""
        job = self._running[number]
        if job.row.cancelled or self._state != "ready":
            return False
        if not job.row.is_followed:  # nobody needs the text before its end
            return True
        go_on, visible = job.row.see(read())
        if visible is not None and job.row.on_text is not None:
            job.post(job.row.on_text, visible)
        return go_on

    def _end(self, ended: dict[int, Completion]) -> None:
        """Give the completions of rows that have ended to whoever waits for them."""
        for number, completion in ended.items():
            job = self._running.pop(number)
            if completion.text is None:
                job.post(job.fail, RequestError(400, completion.error or "the model cannot take this prompt"))
            else:
                job.post(job.resolve, completion)


def fitting(running: Sequence[PendingRequest], waiting: Iterable[PendingRequest], most: int) -> list[PendingRequest]:
    """Of the waiting rows those that join the running ones now, oldest first among the short and among the long."""
    rows: list[PendingRequest] = []
    longest = max((job.length for job in running), default=0)
    counts = Counter(job.length <= SHORT_TOKENS for job in running)
    full: set[bool] = set()
    for job in waiting:
        if counts.total() >= most or len(full) == 2:
            break
        is_short = job.length <= SHORT_TOKENS
        wider = max(longest, job.length)
        areas = [wider**2 * (counts[kind] + (kind == is_short)) for kind in (True, False)]
        if is_short in full or (counts.total() and max(areas) > BATCH_AREA):
            full.add(is_short)
            longest = wider  # what joins before it shall not keep it out for longer
            continue
        rows.append(job)
        counts[is_short] += 1
        longest = wider
    return rows


def room_of(row: QueuedRequest, most: int) -> int:
    """How many rows may wait where `most` may in all: the last places are for the first texts of requests."""
    return most - most // RESERVE if row.index else most


def _use_one_core() -> None:
    """Have PyTorch compute in this thread alone, whatever the engine's thread does.

    With a team of OpenMP threads here and another there, there are more of them than cores, and OpenMP puts each to
    sleep at the end of every operation: the engine then takes twice as long, even while no picture is being made ready.
    """
    torch.set_num_threads(1)


def _cannot_answer(error: Exception) -> RequestError:
    """A ValueError is the caller's to mend; anything else is ours."""
    return RequestError(400 if isinstance(error, ValueError) else 500, f"the model cannot answer this: {error}")
