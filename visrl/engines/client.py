"""Asking OpenAI-compatible servers many things at once: bounded, patient with faults, failures as values.

The endpoint engine and the judge both speak through here. Nothing here knows about pictures, boxes or crops: messages
are the protocol's own dictionaries.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from typing import Any, Literal, TypeVar, get_args

import openai

from visrl.engines.addresses import server_address, with_version
from visrl.engines.base import Completion, Sampling
from visrl.engines.transport import MOST_BYTES, ReplyError, bounded_client
from visrl.engines.wire import read_reply
from visrl.errors import UserError
from visrl.redact import SHORTEST, bare_address, hidden, secrets_of
from visrl.replies import whole_text

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
LONGEST_ASKED_S = 600.0  # a server that asks to wait for longer has no answer for this run
API_KEY = "OPENAI_API_KEY"  # the variable that holds the key where no other is named
OptionalField = Literal["temperature", "top_p", "seed"]
TokensKey = Literal["max_tokens", "max_completion_tokens"]
# What a request says by itself: another value of these would be drawn by other rules than the records tell.
OWN_FIELDS = {"model", "messages", *get_args(OptionalField), *get_args(TokensKey), "n", "stream"}
REST_S = 5.0  # how long a server that failed is asked only if no other is left
CHARACTERS_PER_TOKEN = 1000  # a reply of more was not drawn under the limit that it was asked with

Result = TypeVar("Result")


class EndpointError(UserError, RuntimeError):
    """A server that cannot be worked with; the message names its address and the remedy."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to ask, how, and how patiently.

    `base_urls` are the servers' addresses up to `/v1`; requests go to the least busy one. The key is read from
    `api_key`, else from the variable `api_key_env`. `timeout_s` bounds one attempt as a whole, not only its silence.
    `extra_body` is added to every request (`top_k`, `chat_template_kwargs` and other things of one server); what a
    request says by itself it may not say otherwise. `omit_fields` are not sent to servers that refuse them, and
    `thinking_tokens` are allowed beside those of the reply itself.
    """

    base_urls: tuple[str, ...]
    model: str
    api_key: str | None = None
    concurrency: int = 32
    timeout_s: float = 120.0
    attempts: int = 6
    first_wait_s: float = FIRST_WAIT_S
    max_tokens_key: TokensKey = "max_tokens"
    omit_fields: tuple[OptionalField, ...] = ()
    thinking_tokens: int = 0
    extra_body: dict[str, Any] = field(default_factory=dict)
    api_key_env: str = API_KEY

    def __post_init__(self) -> None:
        if not self.base_urls:
            raise EndpointError("no base_url given; name at least one, like http://127.0.0.1:8000/v1")
        if self.concurrency < 1 or self.attempts < 1:
            raise EndpointError("concurrency and attempts must be at least 1")
        own = sorted(OWN_FIELDS & set(self.extra_body))
        if own:
            raise EndpointError(
                f"extra_body may not hold {', '.join(own)}: every request sets that itself; "
                "see max_tokens_key, omit_fields and thinking_tokens"
            )
        try:
            object.__setattr__(self, "base_urls", tuple(map(server_address, self.base_urls)))
        except ValueError as error:
            raise EndpointError(str(error)) from error

    @property
    def key(self) -> str:
        """The key that is sent; "none" where there is none."""
        return self.api_key or os.environ.get(self.api_key_env) or "none"

    def secrets(self) -> set[str]:
        """What may be in no file and no sentence."""
        users = {url.partition("://")[2].rpartition("@")[0] for url in self.base_urls}
        passwords = {user.partition(":")[2] for user in users}
        return {self.key, *users, *passwords, *secrets_of(self.extra_body)}


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

    @property
    def shown(self) -> str:
        return bare_address(self.url)

    def move(self, url: str) -> None:
        """Ask at another address from now on."""
        self.url, self.api.base_url = url, url


class _Failure(Exception):
    """One attempt that failed: its kind for the counts, a sentence, and whether another try may help."""

    def __init__(self, kind: str, sentence: str, retry: bool, wait_s: float | None = None) -> None:
        super().__init__(sentence)
        self.kind, self.retry, self.wait_s = kind, retry, wait_s


class Client:
    """Asks one or many servers. Used from plain code (`ask_all`, `check`) or from one event loop (`ask`), not both.

    `counts` holds how the attempts ended: "ok" and, by kind, what failed ("http 500", "time-out", "connection",
    "garbage"); "gave up" counts the requests that got no text at all. Of one reply at most `most_bytes` are read.
    """

    def __init__(self, endpoint: Endpoint, most_bytes: int = MOST_BYTES) -> None:
        self.endpoint, self._most_bytes = endpoint, most_bytes
        self.counts: Counter[str] = Counter()
        self._secrets = endpoint.secrets()
        self._servers = [_Server(url, self._api(url)) for url in endpoint.base_urls]
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    @property
    def first(self) -> _Server:
        """The server at the first address."""
        return self._servers[0]

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
            completion = await self._persist(ask, None, self.counts)
        if completion.error is not None:
            self.counts["gave up"] += 1
        return completion

    async def _persist(self, ask: Ask, server: _Server | None, counts: Counter[str]) -> Completion:
        """Attempts at one request until one succeeds; at `server`, or at the least busy one each time."""
        for attempt in range(1, self.endpoint.attempts + 1):
            try:
                completion = await self._attempt(ask, server)
                counts["ok"] += 1
                return completion
            except _Failure as failure:
                counts[failure.kind] += 1
                sentence = str(failure)
                if not failure.retry or attempt == self.endpoint.attempts:
                    break
                await asyncio.sleep(self._wait(attempt, failure))
        tries = "1 try" if attempt == 1 else f"{attempt} tries"
        return Completion(None, finish_reason="error", error=f"{sentence} (after {tries})")

    def _wait(self, attempt: int, failure: _Failure) -> float:
        if failure.wait_s is not None:
            return min(failure.wait_s, LONGEST_WAIT_S)
        # Half fixed, half jitter: many clients that failed together must not come back together.
        longest = min(self.endpoint.first_wait_s * 2 ** (attempt - 1), LONGEST_WAIT_S)
        return longest * random.uniform(0.5, 1.0)

    async def _attempt(self, ask: Ask, only: _Server | None) -> Completion:
        now = time.monotonic()
        server = only or min(self._servers, key=lambda server: (server.rests_until > now, server.in_flight))
        server.in_flight += 1
        try:
            return await asyncio.wait_for(self._send(server, ask), self.endpoint.timeout_s)
        except (TimeoutError, openai.APITimeoutError) as error:
            server.rests_until = time.monotonic() + REST_S
            raise _Failure(
                "time-out", f"{server.shown} took longer than {self.endpoint.timeout_s:g} s", True
            ) from error
        except openai.APIStatusError as error:
            wait_s = _retry_after(error)
            retry = (error.status_code == 429 or error.status_code >= 500) and (wait_s or 0) <= LONGEST_ASKED_S
            if error.status_code >= 500:
                server.rests_until = time.monotonic() + REST_S
            said = self.refusal(server, error) + ("" if wait_s is None else f"; it asks to wait {wait_s:,.0f} s")
            raise _Failure(f"http {error.status_code}", said, retry, wait_s) from error
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            if isinstance(cause, ReplyError):
                raise _Failure("garbage", f"{server.shown}: {self.told(cause)}", True) from error
            server.rests_until = time.monotonic() + REST_S
            raise _Failure("connection", self._unreached(server, cause), True) from error
        except (openai.APIError, ValueError, RecursionError) as error:
            # A body that is no JSON, or not the protocol's: as likely to pass as a 500.
            raise _Failure("garbage", f"{server.shown} sent what is no completion: {self.told(error)}", True) from error
        finally:
            server.in_flight -= 1

    async def _send(self, server: _Server, ask: Ask) -> Completion:
        raw = await server.api.chat.completions.with_raw_response.create(
            **self.body(ask), extra_body=self.endpoint.extra_body or None
        )
        completion = read_reply(json.loads(raw.content), CHARACTERS_PER_TOKEN * self._tokens(ask))
        if completion.text and any(secret in completion.text for secret in self._secrets if len(secret) >= SHORTEST):
            return replace(completion, text=hidden(completion.text, self._secrets))
        return completion

    def body(self, ask: Ask) -> dict[str, Any]:
        """The fields of the request, `extra_body` left out."""
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "messages": ask.messages,
            "temperature": ask.sampling.temperature,
            "top_p": ask.sampling.top_p,
            self.endpoint.max_tokens_key: self._tokens(ask),
        }
        if ask.seed is not None:
            body["seed"] = ask.seed
        return {name: value for name, value in body.items() if name not in self.endpoint.omit_fields}

    def _tokens(self, ask: Ask) -> int:
        return ask.sampling.max_tokens + self.endpoint.thinking_tokens

    def _api(self, url: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=url,
            api_key=self.endpoint.key,
            max_retries=0,
            timeout=self.endpoint.timeout_s,
            http_client=bounded_client(self.endpoint.timeout_s, self._most_bytes),
        )

    # --- What went wrong, in words ---

    def told(self, what: object) -> str:
        """What a server or a library said, in a line that may be written anywhere."""
        text = hidden(whole_text(" ".join(str(what).split())), self._secrets) or type(what).__name__
        return text if len(text) <= 200 else text[:200] + "…"

    def refusal(self, server: _Server, error: openai.APIStatusError) -> str:
        """A status that is no success, with the key of ours that mends it where one does."""
        status, message = error.status_code, str(error.message)
        said = f"{server.shown} answered {status}"
        if 300 <= status < 400:
            there = self.told(bare_address(error.response.headers.get("location", "nowhere")))
            return f"{said} and points to {there}; redirects are not followed: give the address that is meant"
        return f"{said}: {self.told(message)}{_hint(message, server.url)}"

    def _unreached(self, server: _Server, cause: object) -> str:
        said = f"{server.shown} cannot be reached: {self.told(cause)}"
        if "SSL" in str(cause) or "TLS" in str(cause):
            return f"{said}; does it speak http:// and not https://?"
        return said

    # --- Health ---

    async def check_async(self) -> set[str]:
        """`check` for code that runs in an event loop."""
        return {await self._check_server(server) for server in self._servers}

    async def _check_server(self, server: _Server) -> str:
        """Who owns the model at a server, at its address or where `/v1` was forgotten; "" where it does not say."""
        other = with_version(server.url)
        try:
            served = await self._listed(server)
        except EndpointError:
            if other is None or not await self._moved(server, other):
                raise
            served = await self._listed(server)
        if not served and other is not None and await self._moved(server, other):
            served = await self._listed(server)
        if served and self.endpoint.model not in served:
            names = self.told(", ".join(list(served)[:8]))
            raise EndpointError(f"{server.shown} does not serve {self.endpoint.model!r}; it serves {names}")
        return served.get(self.endpoint.model, "")

    async def _moved(self, server: _Server, other: str) -> bool:
        """Whether there are models at the `other` address, which is then the server's."""
        trial = _Server(other, self._api(other))
        try:
            if not await self._listed(trial):
                return False
        except EndpointError:
            return False
        finally:
            await trial.api.close()
        print(f"{server.shown} lists no models; {trial.shown} does and is asked instead", flush=True)
        server.move(other)
        return True

    async def _listed(self, server: _Server) -> dict[str, str]:
        """The models that a server lists, by name, with who owns them; none where it has no list.

        Raises:
            EndpointError: it does not answer, refuses the key or speaks another protocol.
        """
        try:
            raw = await asyncio.wait_for(server.api.models.with_raw_response.list(), min(self.endpoint.timeout_s, 20.0))
            listed = json.loads(raw.content)
            return {
                str(model["id"]): str(model.get("owned_by") or "")
                for model in (listed["data"] if isinstance(listed, dict) else listed) or []
            }
        except (openai.NotFoundError, openai.APIStatusError) as error:
            if error.status_code in (404, 405):
                return {}  # a server without a model list can still complete
            if error.status_code in (401, 403):
                name = self.endpoint.api_key_env
                raise EndpointError(f"{server.shown} refuses the key; set the variable {name}, or api_key") from error
            wait = "is not ready: it " if error.status_code >= 500 or error.status_code == 429 else ""
            said = self.refusal(server, error).removeprefix(f"{server.shown} ")
            raise EndpointError(f"{server.shown} {wait}{said}" + ("; try later" if wait else "")) from error
        except (TimeoutError, openai.APIConnectionError) as error:
            cause = error.__cause__ or error
            raise EndpointError(
                f"no server answers at {server.shown} ({self._unreached(server, cause).partition(': ')[2]}); "
                "start one (`visrl api …`) or mend base_url"
            ) from error
        except (openai.APIError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
            raise EndpointError(f"{server.shown} is no OpenAI-compatible server; does base_url end in /v1?") from error

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

    async def _all_it_takes(self, server: _Server, ask: Ask, error: str | None) -> str:
        """All keys that a server needs, where it refuses one field after another: each is tried until it answers."""
        keys: dict[str, Any] = {}
        tried = 0
        while error is not None and (remedy := _remedy(error)) is not None:
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


def _remedy(message: str) -> tuple[str, Any] | None:
    """The key of ours, and its value (a name to add to `omit_fields`), that mends what a server complains about."""
    if "max_tokens" in message and "max_completion_tokens" in message:
        return "max_tokens_key", "max_completion_tokens"
    told = message.lower()
    for name in get_args(OptionalField):
        if name in told and any(word in told for word in ("unsupported", "not support", "not permitted", "unknown")):
            return "omit_fields", name
    return None


def _hint(message: str, url: str) -> str:
    """The remedy in words."""
    if remedy := _remedy(message):
        name, value = remedy
        return f"; set {name}: {f'[{value}]' if name == 'omit_fields' else value}"
    if "https" in message.lower() and url.startswith("http://"):
        return "; write https:// where http:// stands"
    return ""


def _retry_after(error: openai.APIStatusError) -> float | None:
    """Seconds that the server asks to wait, where it gives a number or a date."""
    given = error.response.headers.get("retry-after", "")
    try:
        seconds = float(given)
    except ValueError:
        try:
            seconds = max(0.0, parsedate_to_datetime(given).timestamp() - time.time())
        except (ValueError, OverflowError):
            return None
    return seconds if 0 <= seconds < float("inf") else None
