"""Continuous batching: the loop of the engine's thread, a decode step of every running request at a time.

Between two steps requests join from the admission queue and leave as they end; each is answered at once. Whose client
has left is stopped at its next token. Nothing here knows about HTTP.
"""

from __future__ import annotations

import itertools
import sys

import torch

from visrl.engines.base import Completion
from visrl.engines.decoding import DecodeBatch, DecodingEngine, ReadText
from visrl.serve.admission import AdmissionQueue
from visrl.serve.errors import RequestError, cannot_answer
from visrl.serve.metrics import Metrics
from visrl.serve.requests import PendingRequest

FORGET_ADDS = 8  # an engine that keeps the last images' work must not keep it, and let it grow, for ever


class DecodeLoop:
    """Serves the requests of a queue with an engine; lives in one thread, with the engine."""

    def __init__(self, engine: DecodingEngine, queue: AdmissionQueue, metrics: Metrics) -> None:
        self.engine, self.queue, self.metrics = engine, queue, metrics
        self.running: dict[int, PendingRequest] = {}  # by their numbers in the running batch

    def run(self) -> None:
        """Decode, step after step, until the queue is closed."""
        batch = self.engine.begin(self._on_token)
        numbers = itertools.count()
        added, cores = 0, torch.get_num_threads()
        while (joining := self.queue.take(self.running.values())) or self.running:
            # A core is left to requests that are still being read, opened or prepared.
            elsewhere = self.metrics.in_flight > len(self.running) + len(self.queue.waiting) + len(joining)
            torch.set_num_threads(max(1, cores - 1) if elsewhere else cores)
            if joining and not self.running:
                # Not within `try`: what is decoded must never be another model than was asked for.
                self.engine.use_adapter(joining[0].queued.adapter)
            try:
                if joining:
                    added += 1
                    self._add(batch, {next(numbers): pending for pending in joining})
                if self.running:
                    self.metrics.batch_sizes.add(len(self.running))
                    self._end(batch.step())
            except (ValueError, RuntimeError) as error:
                if len(self.running) == 1:
                    self._fail(next(iter(self.running)), error)
                elif isinstance(error, torch.OutOfMemoryError):
                    self._decode_fewer()
                else:
                    self._decode_alone()
                batch = self.engine.begin(self._on_token)
            if not self.running and added >= FORGET_ADDS:
                self.engine.forget()
                added = 0

    def _add(self, batch: DecodeBatch, joining: dict[int, PendingRequest]) -> None:
        """Let requests join; where they cannot all, one by one.

        Raises:
            ValueError, RuntimeError: the model failed in a way that leaves the batch of no more use.
        """
        self.running |= joining
        self.engine.keep(view for pending in joining.values() for view in pending.prepared)
        for pending in joining.values():
            pending.prepared = ()  # large tensors, which the batch needs but once
        before = len(batch)
        try:
            self._end(batch.add({number: pending.queued.request for number, pending in joining.items()}))
        except (ValueError, RuntimeError) as error:
            if len(batch) != before or isinstance(error, torch.OutOfMemoryError):
                raise
            if len(joining) == 1:
                self._fail(next(iter(joining)), error)
                return
            # One caller's bad prompt must not fail the others.
            for number, pending in joining.items():
                self._add(batch, {number: pending})

    def _decode_fewer(self) -> None:
        """Let all running requests wait again, half as many to be decoded together from now on."""
        count = len(self.running)
        self.queue.take_back(self.running.values(), count // 2)
        self.running.clear()
        print(
            f"Out of memory with {count} rows at once; at most {count // 2} from now on (max_batch).", file=sys.stderr
        )

    def _decode_alone(self) -> None:
        """Decode every running request again, each by itself."""
        for number, pending in dict(self.running).items():
            try:
                batch = self.engine.begin(self._on_token)
                self._end(batch.add({number: pending.queued.request}))
                while len(batch):
                    self._end(batch.step())
            except (ValueError, RuntimeError) as error:
                self._fail(number, error)

    def _fail(self, number: int, error: Exception) -> None:
        """Tell whoever waits for a running request that it has failed."""
        pending = self.running.pop(number)
        pending.post(pending.fail, cannot_answer(error))

    def _on_token(self, number: int, read: ReadText) -> bool:
        """Whether a request is to go on; its client is told of the text so far."""
        pending = self.running[number]
        queued = pending.queued
        if queued.cancelled or self.queue.is_closed:
            return False
        if not queued.is_followed:  # nobody needs the text before its end
            return True
        go_on, visible = queued.see(read())
        if visible is not None and queued.on_text is not None:
            pending.post(queued.on_text, visible)
        return go_on

    def _end(self, ended: dict[int, Completion]) -> None:
        """Give the completions of requests that have ended to whoever waits for them."""
        for number, completion in ended.items():
            pending = self.running.pop(number)
            if completion.text is None:
                pending.post(pending.fail, RequestError(400, completion.error or "the model cannot take this prompt"))
            else:
                pending.post(pending.resolve, completion)
