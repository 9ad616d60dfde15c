"""Asking OpenAI-compatible servers many things at once: bounded, patient with faults, failures as values.

The endpoint engine and the judge both speak through here. Nothing here knows about pictures, boxes or crops: messages
are the protocol's own dictionaries.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import openai

from visrl.conversation import Completion, Sampling

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
# What a request says by itself: another value of these would be drawn by other rules than the records tell.
OWN_FIELDS = {"model", "messages", "temperature", "top_p", "max_tokens", "max_completion_tokens", "seed", "n", "stream"}
REST_S = 5.0  # how long a server that failed is asked only if no other is left

Result = TypeVar("Result")


class EndpointError(RuntimeError):
    """A server that cannot be worked with; the message names its address and the remedy."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to ask and how patiently.

    `base_urls` are the servers' addresses up to `/v1`; requests go to the least busy one. The key is read from
    `api_key`, else from `OPENAI_API_KEY`. `timeout_s` bounds one attempt as a whole, not only its silence.
    `extra_body` is added to every request (`top_k`, `chat_template_kwargs` and other things of one server); what a
    request says by itself it may not say otherwise.
    """

    base_urls: tuple[str, ...]
    model: str
    api_key: str | None = None
    concurrency: int = 32
    timeout_s: float = 120.0
    attempts: int = 6
    first_wait_s: float = FIRST_WAIT_S
    max_tokens_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    extra_body: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.base_urls:
            raise EndpointError("no base_url given; name at least one, like http://127.0.0.1:8000/v1")
        if self.concurrency < 1 or self.attempts < 1:
            raise EndpointError("concurrency and attempts must be at least 1")
        own = sorted(OWN_FIELDS & set(self.extra_body))
        if own:
            raise EndpointError(f"extra_body may not hold {', '.join(own)}: every request sets that itself")


@dataclass(frozen=True, slots=True)
class Ask:
    """One request for one text: the protocol's messages and how to draw."""

    messages: list[dict[str, Any]]
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None


@dataclass(slots=True)
class _Server:
    url: str
    api: openai.AsyncOpenAI
    in_flight: int = 0
    rests_until: float = 0.0


class _Failure(Exception):
    """One attempt that failed: its kind for the counts, a sentence, and whether another try may help."""

    def __init__(self, kind: str, sentence: str, retry: bool, wait_s: float | None = None) -> None:
        super().__init__(sentence)
        self.kind, self.retry, self.wait_s = kind, retry, wait_s


class Client:
    """Asks one or many servers. Used from plain code (`ask_all`, `check`) or from one event loop (`ask`), not both.

    `counts` holds how the attempts ended: "ok" and, by kind, what failed ("http 500", "time-out", "connection",
    "garbage"); "gave up" counts the requests that got no text at all.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.counts: Counter[str] = Counter()
        key = endpoint.api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self._servers = [
            _Server(url, openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=endpoint.timeout_s))
            for url in endpoint.base_urls
        ]
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    # --- Plain code ---

    def ask_all(
        self, asks: Iterable[Ask], on_reply: Callable[[int, Completion], None] | None = None
    ) -> list[Completion]:
        """One completion per request, in their order; a failed one holds its error.

        Requests are drawn from `asks` only as slots become free, so that pictures need not all be encoded at once.
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
            await server.api.close()

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

    # --- One request ---

    async def ask(self, ask: Ask) -> Completion:
        """The completion of one request, after as many attempts as the endpoint allows. Never raises for a fault."""
        async with self._slots:
            for attempt in range(1, self.endpoint.attempts + 1):
                try:
                    completion = await self._attempt(ask)
                    self.counts["ok"] += 1
                    return completion
                except _Failure as failure:
                    self.counts[failure.kind] += 1
                    sentence = str(failure)
                    if not failure.retry or attempt == self.endpoint.attempts:
                        break
                    await asyncio.sleep(self._wait(attempt, failure))
        self.counts["gave up"] += 1
        tries = "1 try" if attempt == 1 else f"{attempt} tries"
        return Completion(None, finish_reason="error", error=f"{sentence} (after {tries})")

    def _wait(self, attempt: int, failure: _Failure) -> float:
        if failure.wait_s is not None:
            return min(failure.wait_s, LONGEST_WAIT_S)
        # Half fixed, half jitter: many clients that failed together must not come back together.
        longest = min(self.endpoint.first_wait_s * 2 ** (attempt - 1), LONGEST_WAIT_S)
        return longest * random.uniform(0.5, 1.0)

    async def _attempt(self, ask: Ask) -> Completion:
        now = time.monotonic()
        server = min(self._servers, key=lambda server: (server.rests_until > now, server.in_flight))
        server.in_flight += 1
        try:
            return await asyncio.wait_for(self._send(server, ask), self.endpoint.timeout_s)
        except (TimeoutError, openai.APITimeoutError) as error:
            server.rests_until = time.monotonic() + REST_S
            raise _Failure("time-out", f"{server.url} took longer than {self.endpoint.timeout_s:g} s", True) from error
        except openai.APIStatusError as error:
            retry = error.status_code == 429 or error.status_code >= 500
            if error.status_code >= 500:
                server.rests_until = time.monotonic() + REST_S
            raise _Failure(
                f"http {error.status_code}",
                f"{server.url} answered {error.status_code}: {_short(error.message)}",
                retry,
                _retry_after(error),
            ) from error
        except openai.APIConnectionError as error:
            server.rests_until = time.monotonic() + REST_S
            cause = error.__cause__ or error
            raise _Failure("connection", f"{server.url} cannot be reached: {_short(cause)}", True) from error
        except (openai.APIError, ValueError) as error:
            # A body that is no JSON, or not the protocol's: as likely to pass as a 500.
            raise _Failure("garbage", f"{server.url} sent what is no completion: {_short(error)}", True) from error
        finally:
            server.in_flight -= 1

    async def _send(self, server: _Server, ask: Ask) -> Completion:
        reply = await server.api.chat.completions.create(**self.body(ask), extra_body=self.endpoint.extra_body or None)
        return _read_reply(reply)

    def body(self, ask: Ask) -> dict[str, Any]:
        """The fields of the request, `extra_body` left out."""
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "messages": ask.messages,
            "temperature": ask.sampling.temperature,
            "top_p": ask.sampling.top_p,
            self.endpoint.max_tokens_key: ask.sampling.max_tokens,
        }
        if ask.seed is not None:
            body["seed"] = ask.seed
        return body

    # --- Health ---

    async def check_async(self) -> set[str]:
        """`check` for code that runs in an event loop."""
        owners: set[str] = set()
        for server in self._servers:
            try:
                listed = await asyncio.wait_for(server.api.models.list(), min(self.endpoint.timeout_s, 20.0))
                served = {str(model.id): str(model.owned_by or "") for model in listed.data or []}
            except openai.NotFoundError:
                served = {}  # a server without a model list can still complete
            except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
                raise EndpointError(f"{server.url} refuses the key; set api_key or OPENAI_API_KEY") from error
            except openai.APIStatusError as error:
                raise EndpointError(f"{server.url} is not ready: it answered {error.status_code}; try later") from error
            except (TimeoutError, openai.APIConnectionError) as error:
                cause = _short(error.__cause__ or error)
                raise EndpointError(
                    f"no server answers at {server.url} ({cause}); start one (`visrl api …`) or mend base_url"
                ) from error
            except (openai.APIError, ValueError, AttributeError, TypeError) as error:
                raise EndpointError(
                    f"{server.url} is no OpenAI-compatible server; does base_url end in /v1?"
                ) from error
            if served and self.endpoint.model not in served:
                names = ", ".join(list(served)[:8])
                raise EndpointError(f"{server.url} does not serve {self.endpoint.model!r}; it serves {names}")
            owners.add(served.get(self.endpoint.model, ""))
        return owners


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()
    loop.close()


def _read_reply(reply: Any) -> Completion:
    """The completion in a parsed reply. The SDK does not validate, so every field is looked at here.

    Raises:
        ValueError: it is none.
    """
    choices = getattr(reply, "choices", None)
    if not isinstance(choices, list) or not choices:
        raise ValueError(f"no choices in {_short(reply)!r}")
    message = getattr(choices[0], "message", None)
    text = getattr(message, "content", None)
    finish_reason = getattr(choices[0], "finish_reason", None)
    if text is None and message is not None and finish_reason is not None:
        text = ""  # the protocol's way to say that the model ended without a word (a reasoning model cut short)
    if not isinstance(text, str):
        raise ValueError("the first choice holds no text")
    usage = getattr(reply, "usage", None)
    return Completion(
        text,
        tokens=_count(usage, "completion_tokens"),
        finish_reason="length" if finish_reason == "length" else "stop",
        prompt_tokens=_count(usage, "prompt_tokens"),
    )


def _count(usage: Any, name: str) -> int:
    count = getattr(usage, name, None)
    return count if isinstance(count, int) else 0


def _retry_after(error: openai.APIStatusError) -> float | None:
    """Seconds that the server asks to wait, where it gives a number."""
    try:
        seconds = float(error.response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds < float("inf") else None


def _short(what: object) -> str:
    text = " ".join(str(what).split()) or type(what).__name__
    return text if len(text) <= 200 else text[:200] + "…"
