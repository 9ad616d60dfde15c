"""Admission to the running batch: who may wait, who joins when, and what closing does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
from waiting import PATIENCE_S

from visrl.conversation import Conversation, Message
from visrl.engines.base import Sampling
from visrl.serve import admission
from visrl.serve.admission import JOIN_REQUESTS, AdmissionQueue
from visrl.serve.errors import RequestError
from visrl.serve.requests import PendingRequest, QueuedRequest


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def asked(index: int = 0) -> QueuedRequest:
    return QueuedRequest(Conversation((Message("user", "?"),)), Sampling(), 0, index=index)


def put(queue: AdmissionQueue, loop: asyncio.AbstractEventLoop, count: int = 1) -> list[PendingRequest]:
    found = [PendingRequest(asked(), loop, loop.create_future(), length=10) for _ in range(count)]
    for pending in found:
        queue.admit(pending.queued)
        queue.put(pending)
    return found


def test_the_last_waiting_places_are_for_the_first_choices_of_requests(loop):
    queue = AdmissionQueue(max_batch=4, max_waiting=10)
    put(queue, loop, 8)
    with pytest.raises(RequestError) as refused:
        queue.admit(asked(index=1))
    assert (refused.value.status, refused.value.retry_after_s) == (429, 1)
    queue.admit(asked())
    queue.admit(asked())
    assert len(queue) == 10
    with pytest.raises(RequestError):
        queue.admit(asked())
    queue.give_up()
    queue.admit(asked())


def test_requests_join_a_running_batch_in_groups_or_once_they_have_waited(loop, monkeypatch):
    monkeypatch.setattr(admission, "JOIN_S", PATIENCE_S)  # so that a slow machine does not let them in
    queue = AdmissionQueue(max_batch=64, max_waiting=99)
    running = put(queue, loop, 16)
    assert queue.take([]) == running
    late = put(queue, loop, 4)
    assert queue.take(running) == []  # four are too few to hold sixteen up
    late += put(queue, loop)
    assert queue.take(running) == late
    (one,) = put(queue, loop)
    assert queue.take(running) == []
    one.ready_at -= PATIENCE_S
    assert queue.take(running) == [one]


def test_no_more_join_than_the_batch_has_places(loop):
    queue = AdmissionQueue(max_batch=6, max_waiting=99)
    waiting = put(queue, loop, JOIN_REQUESTS)
    assert queue.take([]) == waiting[:6]
    assert queue.take(waiting[:6]) == []
    assert list(queue.waiting) == waiting[6:]


def test_what_runs_is_taken_back_before_all_others_for_smaller_batches(loop):
    queue = AdmissionQueue(max_batch=4, max_waiting=99)
    running = put(queue, loop, 4)
    queue.take([])
    others = put(queue, loop, 2)
    queue.take_back(running, 2)
    assert list(queue.waiting) == running + others
    assert queue.take([]) == running[:2]


def test_who_leaves_is_taken_by_nobody(loop):
    queue = AdmissionQueue(max_batch=4, max_waiting=99)
    first, second = put(queue, loop, 2)
    queue.withdraw(first)
    assert queue.take([]) == [second]
    queue.withdraw(second)  # it runs already: nothing of the queue's
    assert len(queue) == 0


def test_closing_wakes_an_idle_engine_and_lets_nothing_in(loop):
    queue = AdmissionQueue(max_batch=4, max_waiting=99)
    taken: list[list[PendingRequest]] = []
    engine = threading.Thread(target=lambda: taken.append(queue.take([])))
    engine.start()
    queue.admit(asked())
    queue.close()
    engine.join(PATIENCE_S)
    assert taken == [[]]
    with pytest.raises(RequestError, match="shutting down"):
        queue.put(PendingRequest(asked(), loop, loop.create_future()))
    assert len(queue) == 0


def test_an_idle_engine_waits_for_images_that_are_being_prepared(loop, monkeypatch):
    monkeypatch.setattr(admission, "PREPARE_S", PATIENCE_S)
    queue = AdmissionQueue(max_batch=4, max_waiting=99)
    taken: list[list[PendingRequest]] = []
    engine = threading.Thread(target=lambda: taken.append(queue.take([])))
    with queue.being_prepared():
        first = put(queue, loop)
        engine.start()
        assert not taken
        second = put(queue, loop)
    engine.join(PATIENCE_S)
    assert taken == [first + second]
