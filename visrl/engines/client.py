"""Asking OpenAI-compatible servers many things at once: concurrency, retries with backoff, least busy server first,
failures as values.

The endpoint engine and the judge both speak through here; one HTTP request is openai_server.py's.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from visrl.engines.addresses import with_version
from visrl.engines.base import Completion
from visrl.engines.openai_server import Ask, Endpoint, EndpointError, Failure, Server, remedy_of
from visrl.engines.runtime_lora import adapters_of, load_adapter, unload_adapter
from visrl.engines.started import has_ended
from visrl.engines.transport import MOST_BYTES
from visrl.redact import bare_address

LONGEST_WAIT_S = 30.0  # between two attempts

Result = TypeVar("Result")


class Client:
    """Asks one or many servers. Used from plain code (`ask_all`, `check`) or from one event loop (`ask`), not both.

    `counts` holds how the attempts ended: "ok" and, by kind, what failed ("http 500", "time-out", "connection",
    "garbage"); "gave up" counts the requests that got no text at all. Of one reply at most `most_bytes` are read.
    """

    def __init__(self, endpoint: Endpoint, most_bytes: int = MOST_BYTES) -> None:
        self.endpoint, self._most_bytes = endpoint, most_bytes
        self.counts: Counter[str] = Counter()
        self._servers = [Server(endpoint, url, most_bytes) for url in endpoint.base_urls]
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    @property
    def first(self) -> Server:
        """The server at the first address."""
        return self._servers[0]

    @property
    def servers(self) -> tuple[Server, ...]:
        """All servers, in the order of their addresses."""
        return tuple(self._servers)

    # --- Plain code ---

    def ask_all(
        self, asks: Iterable[Ask], on_reply: Callable[[int, Completion], None] | None = None
    ) -> list[Completion]:
        """One completion per request, in their order; a failed one holds its error.

        Requests are taken from `asks` only as slots become free, so that images need not all be encoded at once.
        `on_reply` is told of each (index, completion) as it comes, from another thread.
        """
        return self._await(self._ask_all(asks, on_reply))

    def check(self) -> set[str]:
        """Make sure that every server answers and serves the model; returns who the servers say owns it.

        Raises:
            EndpointError: the first server that does not, with the remedy.
        """
        return self._await(self.check_async())

    def close(self) -> None:
        """Close the connections and stop the thread behind the plain calls."""
        if self._loop is None or self._thread is None:
            return
        self._await(self._close_servers())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop = self._thread = None

    def _await(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run `work` on this client's own event loop, which works inside notebooks and other loops' threads too."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=_run_loop, args=(self._loop,), name="endpoint", daemon=True)
                self._thread.start()
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    async def _close_servers(self) -> None:
        for server in self._servers:
            await server.close()

    async def _ask_all(
        self, asks: Iterable[Ask], on_reply: Callable[[int, Completion], None] | None
    ) -> list[Completion]:
        replies: dict[int, Completion] = {}
        waiting = enumerate(asks)

        async def work() -> None:
            # One shared iterator and one thread: each worker takes the next request when it is free.
            for index, ask in waiting:
                replies[index] = await self.ask(ask)
                if on_reply is not None:
                    on_reply(index, replies[index])

        workers = [asyncio.ensure_future(work()) for _ in range(self.endpoint.concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
        return [replies[index] for index in range(len(replies))]

    # --- Adapters ---

    def load_adapter(self, name: str, folder: Path) -> None:
        """Have every server hold the LoRA adapter in a folder that all of them see, as a model of that name.

        Raises:
            EndpointError: the first server that does not take it.
        """
        self._await(self._at_every_server(lambda server: load_adapter(server, name, folder)))

    def unload_adapter(self, name: str) -> bool:
        """Have every server forget an adapter; whether any held one of this name.

        Raises:
            EndpointError: the first server that has no such end point, or failed.
        """
        return any(self._await(self._at_every_server(lambda server: unload_adapter(server, name))))

    def adapters(self) -> set[str]:
        """The names of the adapters that any server holds.

        Raises:
            EndpointError: the first server that lists nothing.
        """
        return set().union(*self._await(self._at_every_server(adapters_of)))

    async def _at_every_server(self, work: Callable[[Server], Coroutine[Any, Any, Result]]) -> list[Result]:
        return [await work(server) for server in self._servers]

    # --- One request ---

    async def ask(self, ask: Ask) -> Completion:
        """The completion of one request, after as many attempts as the endpoint allows. Never raises for a fault."""
        async with self._slots:
            completion = await self._persist(ask, None, self.counts)
        if completion.error is not None:
            self.counts["gave up"] += 1
        return completion

    async def _persist(self, ask: Ask, server: Server | None, counts: Counter[str]) -> Completion:
        """Attempts at one request until one succeeds; at `server`, or at the least busy one each time."""
        for attempt in range(1, self.endpoint.attempts + 1):
            asked = server or self._least_busy()
            try:
                completion = await asked.complete(ask)
                counts["ok"] += 1
                return completion
            except Failure as failure:
                counts[failure.kind] += 1
                sentence = str(failure)
                if not failure.retry or attempt == self.endpoint.attempts or has_ended(asked.url):
                    break
                await asyncio.sleep(self._wait(attempt, failure))
        tries = "1 try" if attempt == 1 else f"{attempt} tries"
        return Completion(None, finish_reason="error", error=f"{sentence} (after {tries})")

    def _wait(self, attempt: int, failure: Failure) -> float:
        if failure.wait_s is not None:
            return min(failure.wait_s, LONGEST_WAIT_S)
        # Half fixed, half jitter: many clients that failed together must not come back together.
        longest = min(self.endpoint.first_wait_s * 2 ** (attempt - 1), LONGEST_WAIT_S)
        return longest * random.uniform(0.5, 1.0)

    def _least_busy(self) -> Server:
        now = time.monotonic()
        return min(self._servers, key=lambda server: (server.rests_until > now, server.in_flight))

    # --- Health ---

    async def check_async(self) -> set[str]:
        """`check` for code that runs in an event loop."""
        return {await self._check_server(server) for server in self._servers}

    async def _check_server(self, server: Server) -> str:
        """Who owns the model at a server, at its address or where `/v1` was forgotten; "" where it does not say."""
        other = with_version(server.url)
        try:
            served = await server.models()
        except EndpointError:
            if other is None or not await self._moved(server, other):
                raise
            served = await server.models()
        if not served and other is not None and await self._moved(server, other):
            served = await server.models()
        if served and self.endpoint.model not in served:
            names = server.format_fault(", ".join(list(served)[:8]))
            raise EndpointError(f"{server.shown} does not serve {self.endpoint.model!r}; it serves {names}")
        return served.get(self.endpoint.model, "")

    async def _moved(self, server: Server, other: str) -> bool:
        """Whether there are models at the `other` address, which is then the server's."""
        trial = Server(self.endpoint, other, self._most_bytes)
        try:
            if not await trial.models():
                return False
        except EndpointError:
            return False
        finally:
            await trial.close()
        print(f"{server.shown} lists no models; {trial.shown} does and is asked instead", flush=True)
        server.move(other)
        return True

    def ask_at(self, server: Server, ask: Ask) -> Completion:
        """What one of the servers says to a request that is not counted; a failure is a completion with its error."""
        return self._await(self._persist(ask, server, Counter()))

    def try_out(self, ask: Ask) -> None:
        """Put one real request to every server, before thousands are; it is not counted.

        Raises:
            EndpointError: the first server that does not complete it, with what it said.
        """
        self._await(self._try_out(ask))

    async def _try_out(self, ask: Ask) -> None:
        for server in self._servers:
            completion = await self._persist(ask, server, Counter())
            if completion.error is not None:
                other = with_version(server.url)
                hint = f"; is its address {bare_address(other)}?" if other and "404" in completion.error else ""
                hint = hint or await self._all_it_takes(server, ask, completion.error)
                raise EndpointError(f"a first small question failed, so nothing was asked: {completion.error}{hint}")

    async def _all_it_takes(self, server: Server, ask: Ask, error: str | None) -> str:
        """All keys that a server needs, where it refuses one field after another: each is tried until it answers."""
        keys: dict[str, Any] = {}
        tried = 0
        while error is not None and (remedy := remedy_of(error)) is not None:
            name, value = remedy
            if name == "omit_fields":
                value = (*keys.get(name, self.endpoint.omit_fields), value)
                if len(set(value)) < len(value):
                    return ""  # it complains about what it is not sent
            elif keys.get(name, getattr(self.endpoint, name)) == value:
                return ""
            keys[name] = value
            trial = Client(replace(self.endpoint, base_urls=(server.url,), **keys), self._most_bytes)
            try:
                error = (await trial._persist(ask, trial.first, Counter())).error
            finally:
                await trial._close_servers()
            tried += 1
        if error is not None or tried < 2:
            return ""  # one key, which the sentence names already
        omitted = keys.pop("omit_fields", ())
        shown = [f"{name}: {one}" for name, one in keys.items()]
        shown += [f"omit_fields: [{', '.join(omitted)}]"] if omitted else []
        return f"; with {' and '.join(shown)} it answers"


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()
    loop.close()
