"""The backend in this process: requests of all clients wait in one queue and are decoded by continuous batching.

Loading and decoding have a thread of their own (decode_loop.py). Images are prepared for the model in another, before a
request joins the queue and a bounded number ahead, so that no batch waits for one. A request whose client left is
dropped from the queue, or stopped at its next token. Nothing here knows about HTTP.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import torch

from visrl.box import CropRule, Size
from visrl.codecs import Codec
from visrl.engines.base import Completion
from visrl.models.adapters import Adapter
from visrl.serve.admission import AdmissionQueue
from visrl.serve.backend import Loaded, State
from visrl.serve.decode_loop import DecodeLoop
from visrl.serve.errors import RequestError, cannot_answer
from visrl.serve.metrics import Metrics
from visrl.serve.requests import PendingRequest, QueuedRequest, length_guess

FURTHER_SHARE = 2  # an HTTP request's choices after its first get one over so much of a batch, so that others have room
LARGE_PIXELS = 4_000_000  # of one request's images: such are prepared one at a time, and small ones between them
READY_BATCHES = 2  # requests ready ahead of the engine, in batches: their images lie in memory as tensors


class ContinuousBatcher:
    """Loads an engine in its own thread and keeps it there; a `Backend`."""

    is_passed_on = False

    def __init__(
        self, load: Callable[[], Loaded], metrics: Metrics, *, max_batch: int = 64, max_waiting: int = 256
    ) -> None:
        self._load, self._metrics = load, metrics
        self._loaded: Loaded | None = None
        self._failure: Exception | None = None
        self.queue = AdmissionQueue(max_batch, max_waiting)
        self._ahead = asyncio.Semaphore(READY_BATCHES * max_batch)
        self._further = asyncio.Semaphore(max(1, max_batch // FURTHER_SHARE))
        self._large = asyncio.Semaphore(1)
        self._preparer = ThreadPoolExecutor(1, "pictures", initializer=_use_one_core)
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        metrics.waiting_requests = self.queue.__len__

    @property
    def state(self) -> State:
        if self._failure is not None:
            return "failed"
        if self.queue.is_closed:
            return "stopped"
        return "loading" if self._loaded is None else "ready"

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

    def decode(self, ids: Sequence[int]) -> str:
        return self._ready().engine.decode(ids)

    def check_adapter(self, adapter: Adapter) -> None:
        """Make sure that an adapter has its place on the model.

        Raises:
            CheckpointError: it has not.
            RequestError: 503 without a model.
        """
        self._ready().engine.check_adapter(adapter)

    def _ready(self) -> Loaded:
        if self._loaded is None:
            raise RequestError(503, "the model is still loading; try again soon", retry_after_s=2)
        return self._loaded

    def start(self) -> None:
        """Begin to load; returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """Refuse what waits, stop what runs at its next token, and end the thread."""
        self.queue.close()
        self._preparer.shutdown(wait=False)
        if self._loaded is not None or self._failure is not None:  # loading cannot be stopped, and is not waited for
            self._thread.join()

    async def submit(self, request: QueuedRequest) -> Completion:
        """The completion of one request; cancelling this frees its place.

        Raises:
            RequestError: 429 where too many wait, 400 for a prompt the model cannot take, 503 without a model,
                500 where computing failed.
        """
        loop = asyncio.get_running_loop()
        pending = PendingRequest(request, loop, loop.create_future())
        if self.state != "ready":
            raise RequestError(503, f"the model is not ready ({self.state})", retry_after_s=2)
        self.queue.admit(request)
        has_arrived = False
        try:
            async with self._further if request.index else nullcontext(), self._ahead:
                await self._prepare(pending)
                pending.length = length_guess(request.conversation, [view.tokens for view in pending.prepared])
                has_arrived = True
                self.queue.put(pending)
                return request.finish(await pending.future)
        except asyncio.CancelledError:
            request.cancelled = True
            self._metrics.cancelled += 1
            self.queue.withdraw(pending)
            raise
        finally:
            if not has_arrived:
                self.queue.give_up()

    async def _prepare(self, pending: PendingRequest) -> None:
        """Prepare the images of a request, in the thread for that.

        Raises:
            RequestError: 400 for an image that the model cannot take, 500 where there is no memory for it.
        """
        conversation = pending.queued.conversation
        if not conversation.views:
            return
        is_large = sum(view.size[0] * view.size[1] for view in conversation.views) > LARGE_PIXELS
        prepare = self._ready().engine.prepare
        try:
            with self.queue.being_prepared():
                async with self._large if is_large else nullcontext():
                    pending.prepared = await pending.loop.run_in_executor(self._preparer, prepare, conversation)
        except (ValueError, RuntimeError) as error:
            raise cannot_answer(error) from error

    def _work(self) -> None:
        """The engine's thread."""
        try:
            self._loaded = self._load()
        except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:  # what a bad checkpoint gives
            self._failure = error
            return
        decoding = DecodeLoop(self._loaded.engine, self.queue, self._metrics)
        try:
            decoding.run()
        finally:
            # Reached by `stop`, and by an error nobody foresaw: whoever still waits must be told.
            for pending in [*decoding.running.values(), *self.queue.drain()]:
                pending.post(pending.fail, RequestError(503, "the server is shutting down"))


def _use_one_core() -> None:
    """Have PyTorch compute in this thread alone, whatever the engine's thread does.

    With a team of OpenMP threads here and another there, there are more of them than cores, and OpenMP puts each to
    sleep at the end of every operation: the engine then takes twice as long, even while no image is being prepared.
    """
    torch.set_num_threads(1)
