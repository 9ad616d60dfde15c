"""Rows of many clients: drawn together, joining and leaving, and what becomes of them where something fails."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from serve_help import (
    KnownBatch,
    KnownEngine,
    body,
    echo,
    get,
    known,
    left_open,
    post,
    serving,
)
from waiting import wait_until

from visrl.conversation import Conversation, Message, View
from visrl.engines.base import Sampling
from visrl.prompts import IMAGE
from visrl.serve.admission import PREPARE_S, fitting
from visrl.serve.backend import Loaded
from visrl.serve.batching import ContinuousBatcher
from visrl.serve.metrics import Metrics
from visrl.serve.requests import PendingRequest, QueuedRequest
from visrl.serve.schemas import Limits


def test_rows_of_many_clients_are_computed_together() -> None:
    with known(lambda _: "abc") as (url, engine, metrics), ThreadPoolExecutor(16) as pool:
        engine.go_on.clear()
        first = pool.submit(post, url, body())
        wait_until(lambda: engine.running)
        others = [pool.submit(post, url, body()) for _ in range(15)]
        wait_until(lambda: metrics.waiting_requests() == len(engine.prepared) - 1 == 15)
        engine.go_on.set()
        assert {reply.result().status_code for reply in [first, *others]} == {200}
    assert [len(batch) for batch in engine.batches] == [1, 15]


def test_pictures_are_made_ready_while_a_batch_runs() -> None:
    with known(lambda _: "abc") as (url, engine, _), ThreadPoolExecutor(4) as pool:
        engine.go_on.clear()
        first = pool.submit(post, url, body())
        wait_until(lambda: engine.running)
        others = [pool.submit(post, url, body(n=2)) for _ in range(2)]
        wait_until(lambda: len(engine.prepared) == 5)
        engine.go_on.set()
        assert all(reply.result().status_code == 200 for reply in (first, *others))
    threads = {name for name, _ in engine.prepared}
    assert len(threads) == 1
    assert not threads & {"engine", "MainThread"}
    assert sum(running > 0 for _, running in engine.prepared) == 4
    assert [len(batch) for batch in engine.batches] == [1, 4]


def test_a_picture_that_cannot_be_made_ready_is_a_400_and_holds_nobody_up() -> None:
    class Picky(KnownEngine):
        def prepare(self, conversation):  # type: ignore[no-untyped-def]
            if "bad" in conversation.messages[0].text:
                raise ValueError("a picture this model cannot take")
            return super().prepare(conversation)

    metrics, engine = Metrics(), Picky(echo, 0.002)
    with serving(ContinuousBatcher(lambda: Loaded(engine), metrics, max_batch=1, max_waiting=4), metrics) as url:
        for _ in range(8):  # as many as would fill every place, were one not given back
            reply = post(url, body("bad"))
            assert (reply.status_code, "cannot take" in reply.text) == (400, True)
        assert post(url, body("good")).status_code == 200
    assert metrics.waiting_requests() == 0
    assert len(engine.batches) == 1


def test_the_further_texts_of_a_request_leave_room_for_the_first_of_others() -> None:
    metrics, engine = Metrics(), KnownEngine(echo, 0.002)
    batcher = ContinuousBatcher(lambda: Loaded(engine), metrics, max_batch=4, max_waiting=40)
    with serving(batcher, metrics) as url, ThreadPoolExecutor(4) as pool:
        engine.go_on.clear()
        many = [pool.submit(post, url, body("many", n=16)) for _ in range(2)]
        wait_until(lambda: len(engine.prepared) == 4 and metrics.waiting_requests() >= 28)
        assert post(url, body("too many", n=16)).status_code == 429
        ready = len(engine.prepared)
        plain = pool.submit(post, url, body("plain"))
        wait_until(lambda: len(engine.prepared) > ready)
        engine.go_on.set()
        assert {reply.result().status_code for reply in (*many, plain)} == {200}
    drawn = [row.conversation.messages[-1].text for batch in engine.batches for row in batch]
    assert next(place for place, text in enumerate(drawn) if "plain" in text) < 6


def test_short_rows_do_not_wait_for_long_ones_and_neither_takes_the_others_room() -> None:
    loop = asyncio.new_event_loop()

    def jobs(*lengths: int) -> list[PendingRequest]:
        row = QueuedRequest(Conversation((Message("user", "?"),)), Sampling(), 0)
        return [PendingRequest(row, loop, loop.create_future(), length=length) for length in lengths]

    def joining(running: list[int], waiting: list[int], most: int = 64) -> list[int]:
        return [job.length for job in fitting(jobs(*running), jobs(*waiting), most)]

    assert joining([], [4000] * 9 + [100] * 9) == [4000] * 4 + [100] * 4
    assert joining([4000] * 4, [4000, 100, 4000, 200]) == [100, 200]
    assert joining([100] * 4, [4000, 4000]) == [4000, 4000]
    assert joining([100] * 5, [4000, 100]) == []  # the long one would make the short ones too wide: it waits for them
    assert joining([100] * 3, [4000, 100, 100]) == [4000, 100]
    assert joining([], [20_000, 20_000, 100]) == [20_000]  # alone any row may be drawn
    assert joining([100] * 3, [100] * 9, most=4) == [100]
    loop.close()


def test_each_client_gets_its_own_answer() -> None:
    with known(echo) as (url, _, _), ThreadPoolExecutor(8) as pool:
        replies = pool.map(lambda number: post(url, body(f"q{number}", pictures=[])).json(), range(40))
    texts = [reply["choices"][0]["message"]["content"] for reply in replies]
    assert texts == [f"q{number}" for number in range(40)]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(stream: bool) -> None:
    def speak(conversation: Conversation) -> str:
        return "x" * 100 if "long" in conversation.messages[-1].text else "short"

    with known(speak) as (url, engine, metrics):
        engine.go_on.clear()
        with left_open(url, body("long", stream=stream)):
            wait_until(lambda: engine.running)
        wait_until(lambda: metrics.in_flight == 0)
        engine.go_on.set()
        assert post(url, body("q")).status_code == 200
    assert len(engine.said[0]) == 1  # the long row was stopped at its next token, not spoken to its end
    assert metrics.cancelled == 1
    assert engine.running == 0


def test_who_leaves_an_idle_engine_before_it_begins_leaves_it_to_others() -> None:
    class Slow(KnownEngine):
        def prepare(self, conversation):  # type: ignore[no-untyped-def]
            time.sleep(4 * PREPARE_S)
            return super().prepare(conversation)

    engine = Slow(echo)
    batcher = ContinuousBatcher(lambda: Loaded(engine), Metrics())
    seen = Conversation((Message("user", f"{IMAGE} with a picture"),), (View("a", Image.new("RGB", (8, 8))),))

    async def run() -> list[str | None]:
        being_prepared = asyncio.ensure_future(batcher.submit(QueuedRequest(seen, Sampling(), 0)))
        while not batcher.queue.preparing:
            await asyncio.sleep(0.001)
        leaves = asyncio.ensure_future(
            batcher.submit(QueuedRequest(Conversation((Message("user", "leaves"),)), Sampling(), 0))
        )
        while not batcher.queue.waiting:  # the engine waits for company now
            await asyncio.sleep(0.001)
        leaves.cancel()
        return [(await being_prepared).text]

    batcher.start()
    wait_until(lambda: batcher.state == "ready")
    try:
        assert None not in asyncio.run(run())
        assert batcher.state == "ready"
    finally:
        batcher.stop()


def test_the_time_of_a_request_is_bounded() -> None:
    with known(lambda _: "x" * 100, limits=Limits(request_s=0.2)) as (url, engine, _):
        engine.go_on.clear()
        reply = post(url, body())
        assert reply.status_code == 504
        assert "0.2 s" in reply.json()["error"]["message"]
        streamed = post(url, body(stream=True))
        assert streamed.status_code == 504  # nothing had been sent yet
        engine.go_on.set()


def test_a_stream_that_takes_too_long_ends_in_an_error() -> None:
    for limit in (1, 8, 64):  # seconds: on a slow machine the shorter ones may be over before a word is sent
        with known(lambda _: "x" * 100, token_s=limit / 20, limits=Limits(request_s=limit)) as (url, _, _):
            streamed = post(url, body(stream=True))
        if streamed.status_code == 200:
            break
    assert streamed.status_code == 200
    assert f"{limit} s" in streamed.text
    assert "[DONE]" not in streamed.text


def test_a_full_queue_is_told_to_come_back() -> None:
    with known(lambda _: "abc", max_batch=1, max_waiting=2) as (url, engine, _), ThreadPoolExecutor(8) as pool:
        engine.go_on.clear()
        first = pool.submit(post, url, body())
        wait_until(lambda: engine.running)
        others = [pool.submit(post, url, body()) for _ in range(7)]
        wait_until(lambda: sum(reply.done() for reply in others) == 5)
        engine.go_on.set()
        replies = [reply.result() for reply in (first, *others)]
    assert Counter(reply.status_code for reply in replies) == {200: 3, 429: 5}
    assert {reply.headers["retry-after"] for reply in replies if reply.status_code == 429} == {"1"}


def test_one_bad_prompt_in_a_batch_fails_alone() -> None:
    class PickyBatch(KnownBatch):
        def add(self, rows):  # type: ignore[no-untyped-def]
            if any("bad" in row.conversation.messages[0].text for row in rows.values()):
                raise ValueError("a prompt this model cannot take")
            return super().add(rows)

    metrics = Metrics()
    engine = KnownEngine(echo, 0.002, PickyBatch)
    batcher = ContinuousBatcher(lambda: Loaded(engine), metrics)
    with serving(batcher, metrics) as url, ThreadPoolExecutor(8) as pool:
        questions = ["bad" if number == 3 else f"q{number}" for number in range(8)]
        replies = list(pool.map(lambda question: post(url, body(question, pictures=[])), questions))
    assert [reply.status_code for reply in replies] == [200, 200, 200, 400, 200, 200, 200, 200]
    assert "cannot take" in replies[3].json()["error"]["message"]


class NarrowBatch(KnownBatch):
    """Says one text at a time only, and no bad one."""

    def step(self):  # type: ignore[no-untyped-def]
        if len(self) > 1 or "bad" in next(iter(self.rows.values())).conversation.messages[0].text:
            raise RuntimeError("out of memory")
        return super().step()


class ClosedBatch(NarrowBatch):
    """Breaks as soon as another row joins."""

    def add(self, rows):  # type: ignore[no-untyped-def]
        joins, ended = len(self) > 0, super().add(rows)
        if joins:
            raise RuntimeError("out of memory")
        return ended


@pytest.mark.parametrize("batch", [NarrowBatch, ClosedBatch])
def test_a_model_that_fails_midway_costs_nobody_an_answer(batch: type[KnownBatch]) -> None:
    """Rows that were being drawn together are drawn again, each by itself; a stream goes on where it was."""

    metrics, engine = Metrics(), KnownEngine(echo, batch=batch)
    with serving(ContinuousBatcher(lambda: Loaded(engine), metrics), metrics) as url, ThreadPoolExecutor(8) as pool:
        engine.go_on.clear()
        first = pool.submit(post, url, body("first", pictures=[]))
        wait_until(lambda: engine.running)
        asked = [
            pool.submit(post, url, body(word, pictures=[], stream=word == "flow")) for word in ("b", "flow", "bad")
        ]
        wait_until(lambda: metrics.waiting_requests() == 3)
        engine.go_on.set()
        first, plain, streamed, bad = [reply.result() for reply in (first, *asked)]
    assert [reply.json()["choices"][0]["message"]["content"] for reply in (first, plain)] == ["first", "b"]
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == "flow"
    assert bad.status_code == 500
    assert "out of memory" in bad.text


def test_too_little_memory_makes_smaller_batches(capfd: pytest.CaptureFixture[str]) -> None:
    class SmallBatch(KnownBatch):
        def step(self):  # type: ignore[no-untyped-def]
            if len(self) > 2 or "huge" in next(iter(self.rows.values())).conversation.messages[0].text:
                raise torch.OutOfMemoryError("out of memory")
            return super().step()

    metrics, engine = Metrics(), KnownEngine(echo, batch=SmallBatch)
    with serving(ContinuousBatcher(lambda: Loaded(engine), metrics), metrics) as url, ThreadPoolExecutor(8) as pool:
        engine.go_on.clear()
        asked = [pool.submit(post, url, body(f"question {n}", pictures=[], stream=n == 7)) for n in range(8)]
        wait_until(lambda: engine.running and metrics.waiting_requests() + engine.running == 8)
        engine.go_on.set()
        replies = [reply.result() for reply in asked]
        assert post(url, body("huge", pictures=[])).status_code == 500
        assert post(url, body("small", pictures=[])).status_code == 200
    texts = [reply.json()["choices"][0]["message"]["content"] for reply in replies[:7]]
    assert texts == [f"question {n}" for n in range(7)]
    assert replies[7].text.endswith("data: [DONE]\n\n")
    assert re.search(r"at most [12] from now on \(max_batch\)", capfd.readouterr().err)


def test_rows_join_and_are_answered_while_others_are_drawn() -> None:
    def speak(conversation: Conversation) -> str:
        return "x" * 4_000 if "long" in conversation.messages[-1].text else "short"

    with known(speak, token_s=0.01) as (url, engine, _):
        with left_open(url, body("long", max_tokens=4_000)):
            wait_until(lambda: engine.running)
            assert [post(url, body("q")).status_code for _ in range(3)] == [200] * 3
            assert engine.said == ["short"] * 3  # the long one goes on
        wait_until(lambda: len(engine.said) == 4)
    assert len(engine.batches) == 4
    assert len(engine.said[3]) < 4_000


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_dies_leaves_nobody_waiting() -> None:
    class BrokenBatch(KnownBatch):
        def step(self):  # type: ignore[no-untyped-def]
            raise RuntimeError("out of memory") if len(self) > 1 else MemoryError("nobody foresaw this")

    metrics, engine = Metrics(), KnownEngine(echo, batch=BrokenBatch)
    with serving(ContinuousBatcher(lambda: Loaded(engine), metrics), metrics) as url, ThreadPoolExecutor(4) as pool:
        engine.go_on.clear()
        replies = [pool.submit(post, url, body(n=2)) for _ in range(4)]
        wait_until(lambda: engine.running and metrics.waiting_requests() + engine.running == 8)
        engine.go_on.set()
        assert [reply.result().status_code for reply in replies] == [503] * 4
        assert get(f"{url}/health").status_code == 503
        assert post(url, body()).status_code == 503
