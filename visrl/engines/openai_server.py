"""One OpenAI-compatible server: where it is (`Endpoint`), what it is asked (`Ask`), one HTTP request to it, and what
went wrong with that in a sentence (`Failure`).

Retries, concurrency and several servers are client.py's. Nothing here knows about images, boxes or crops: messages
are the protocol's own dictionaries.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from typing import Any, Literal, get_args

import openai

from visrl.engines.addresses import server_address
from visrl.engines.base import Completion, Sampling
from visrl.engines.transport import MOST_BYTES, ReplyError, bounded_client
from visrl.engines.wire import read_reply
from visrl.errors import UserError
from visrl.redact import SHORTEST, bare_address, hidden, secrets_of
from visrl.replies import whole_text

FIRST_WAIT_S = 0.5
LONGEST_ASKED_S = 600.0  # a server that asks to wait for longer has no answer for this run
API_KEY = "OPENAI_API_KEY"  # the variable that holds the key where no other is named
OptionalField = Literal["temperature", "top_p", "seed", "logit_bias"]
TokensKey = Literal["max_tokens", "max_completion_tokens"]
# What a request says by itself: another value of these would be sampled by other rules than the records tell.
OWN_FIELDS = {"model", "messages", "temperature", "top_p", "seed", *get_args(TokensKey), "n", "stream"}
NEVER = -100  # the lowest bias of the protocol, which leaves a token e^-100 of its probability
REST_S = 5.0  # how long a server that failed is asked only if no other is left
REFUSING = ("unsupported", "not support", "not yet support", "not permitted", "unknown")  # words of refused fields
LIST_S = 20.0  # a list of models takes no longer
CHARACTERS_PER_TOKEN = 1000  # a reply of more was not sampled under the limit that it was asked with


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
    """One request for one text: the protocol's messages and how to sample. `model` is asked in the place of the
    endpoint's, an adapter of it (see client.py). `unsaid` are tokens that are not to be sampled. With `goes_on`
    the reply goes on where the last message ends, which is the model's own. `tools` are definitions, as JSON, that the
    model is shown; its calls are read here.
    """

    messages: list[dict[str, Any]]
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    model: str | None = None
    unsaid: tuple[int, ...] = ()
    goes_on: bool = False
    tools: tuple[str, ...] = ()


class Failure(Exception):
    """One attempt that failed: its kind for the counts, a sentence, and whether another try may help."""

    def __init__(self, kind: str, sentence: str, retry: bool, wait_s: float | None = None) -> None:
        super().__init__(sentence)
        self.kind, self.retry, self.wait_s = kind, retry, wait_s


class Server:
    """One server of an endpoint, with its connections: lives in one event loop. Of one reply at most `most_bytes` are
    read.
    """

    def __init__(self, endpoint: Endpoint, url: str, most_bytes: int = MOST_BYTES) -> None:
        self.endpoint, self.url = endpoint, url
        self.in_flight = 0
        self.rests_until = 0.0  # by `time.monotonic`: asked only if no other is left
        self._secrets = endpoint.secrets()
        self.api = openai.AsyncOpenAI(
            base_url=url,
            api_key=endpoint.key,
            max_retries=0,
            timeout=endpoint.timeout_s,
            http_client=bounded_client(endpoint.timeout_s, most_bytes),
        )

    @property
    def shown(self) -> str:
        """Its address without what is secret in it."""
        return bare_address(self.url)

    def move(self, url: str) -> None:
        """Ask at another address from now on."""
        self.url, self.api.base_url = url, url

    async def close(self) -> None:
        await self.api.close()

    # --- One request

    async def complete(self, ask: Ask) -> Completion:
        """The completion of one request, in one attempt.

        Raises:
            Failure: it failed; another attempt may help.
        """
        self.in_flight += 1
        try:
            return await asyncio.wait_for(self._send(ask), self.endpoint.timeout_s)
        except (TimeoutError, openai.APITimeoutError) as error:
            self.rests_until = time.monotonic() + REST_S
            raise Failure("time-out", f"{self.shown} took longer than {self.endpoint.timeout_s:g} s", True) from error
        except openai.APIStatusError as error:
            wait_s = _retry_after(error)
            retry = (error.status_code == 429 or error.status_code >= 500) and (wait_s or 0) <= LONGEST_ASKED_S
            if error.status_code >= 500:
                self.rests_until = time.monotonic() + REST_S
            said = self.refusal(error) + ("" if wait_s is None else f"; it asks to wait {wait_s:,.0f} s")
            raise Failure(f"http {error.status_code}", said, retry, wait_s) from error
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            if isinstance(cause, ReplyError):
                raise Failure("garbage", f"{self.shown}: {self.format_fault(cause)}", True) from error
            self.rests_until = time.monotonic() + REST_S
            raise Failure("connection", self.unreached(cause), True) from error
        except (openai.APIError, ValueError, RecursionError) as error:
            # A body that is no JSON, or not the protocol's: as likely to pass as a 500.
            said = f"{self.shown} sent what is no completion: {self.format_fault(error)}"
            raise Failure("garbage", said, True) from error
        finally:
            self.in_flight -= 1

    async def _send(self, ask: Ask) -> Completion:
        extra = self.extra(ask, {"return_token_ids": True} if ask.sampling.logprobs else {})
        raw = await self.api.chat.completions.with_raw_response.create(**self.body(ask), extra_body=extra or None)
        completion = read_reply(json.loads(raw.content), CHARACTERS_PER_TOKEN * self._tokens(ask))
        if completion.text and any(secret in completion.text for secret in self._secrets if len(secret) >= SHORTEST):
            return replace(completion, text=hidden(completion.text, self._secrets))
        return completion

    def body(self, ask: Ask) -> dict[str, Any]:
        """The fields of the request, those of `extra` left out."""
        body: dict[str, Any] = {
            "model": ask.model or self.endpoint.model,
            "messages": ask.messages,
            "temperature": ask.sampling.temperature,
            "top_p": ask.sampling.top_p,
            self.endpoint.max_tokens_key: self._tokens(ask),
        }
        if ask.seed is not None:
            body["seed"] = ask.seed
        if ask.sampling.logprobs:
            body |= {"logprobs": True, "top_logprobs": 0}
        return {name: value for name, value in body.items() if name not in self.endpoint.omit_fields}

    def extra(self, ask: Ask, more: Mapping[str, Any]) -> dict[str, Any]:
        """What is said beside `body`: the endpoint's `extra_body`, `more`, and which tokens are not to be sampled."""
        extra = {**self.endpoint.extra_body, **more}
        asked = extra.get("logit_bias") or {}
        # What is no object is the server's to refuse.
        if ask.unsaid and "logit_bias" not in self.endpoint.omit_fields and isinstance(asked, dict):
            extra["logit_bias"] = {**asked, **dict.fromkeys(map(str, ask.unsaid), NEVER)}
        if ask.goes_on:  # in vLLM's and SGLang's fields
            extra |= {"continue_final_message": True, "add_generation_prompt": False}
        if ask.tools:  # vLLM and SGLang show them with "none", too, and leave the text as it is
            extra |= {"tools": [json.loads(tool) for tool in ask.tools], "tool_choice": "none"}
        return extra

    def _tokens(self, ask: Ask) -> int:
        return ask.sampling.max_tokens + self.endpoint.thinking_tokens

    async def models(self) -> dict[str, str]:
        """The models that the server lists, by name, with who owns them; none where it has no list.

        Raises:
            EndpointError: it does not answer, refuses the key or speaks another protocol.
        """
        try:
            raw = await asyncio.wait_for(self.api.models.with_raw_response.list(), min(self.endpoint.timeout_s, LIST_S))
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
                raise EndpointError(f"{self.shown} refuses the key; set the variable {name}, or api_key") from error
            wait = "is not ready: it " if error.status_code >= 500 or error.status_code == 429 else ""
            said = self.refusal(error).removeprefix(f"{self.shown} ")
            raise EndpointError(f"{self.shown} {wait}{said}" + ("; try later" if wait else "")) from error
        except (TimeoutError, openai.APIConnectionError) as error:
            cause = error.__cause__ or error
            raise EndpointError(
                f"no server answers at {self.shown} ({self.unreached(cause).partition(': ')[2]}); "
                "start one (`visrl api …`) or mend base_url"
            ) from error
        except (openai.APIError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
            raise EndpointError(f"{self.shown} is no OpenAI-compatible server; does base_url end in /v1?") from error

    # --- What went wrong, in words

    def format_fault(self, what: object) -> str:
        """What a server or a library said, in a line that may be written anywhere."""
        text = hidden(whole_text(" ".join(str(what).split())), self._secrets) or type(what).__name__
        return text if len(text) <= 200 else text[:200] + "…"

    def refusal(self, error: openai.APIStatusError) -> str:
        """A status that is no success, with the key of ours that mends it where one does."""
        status, message = error.status_code, str(error.message)
        said = f"{self.shown} answered {status}"
        if 300 <= status < 400:
            there = self.format_fault(bare_address(error.response.headers.get("location", "nowhere")))
            return f"{said} and points to {there}; redirects are not followed: give the address that is meant"
        return f"{said}: {self.format_fault(message)}{_hint(message, self.url)}"

    def unreached(self, cause: object) -> str:
        """What is said of a server that cannot be spoken to."""
        said = f"{self.shown} cannot be reached: {self.format_fault(cause)}"
        if "SSL" in str(cause) or "TLS" in str(cause):
            return f"{said}; does it speak http:// and not https://?"
        return said


def remedy_of(message: str) -> tuple[str, Any] | None:
    """The key of ours, and its value (a name to add to `omit_fields`), that mends what a server complains about."""
    if "max_tokens" in message and "max_completion_tokens" in message:
        return "max_tokens_key", "max_completion_tokens"
    text = message.lower()
    for name in get_args(OptionalField):
        if name in text and any(word in text for word in REFUSING):
            return "omit_fields", name
    return None


def _hint(message: str, url: str) -> str:
    """The remedy in words."""
    if remedy := remedy_of(message):
        name, value = remedy
        return f"; set {name}: {f'[{value}]' if name == 'omit_fields' else value}"
    if "continue_final_message" in message:
        return (
            "; the protocol opens the model's turn, and this server takes none that is begun: ask vLLM's or ours, "
            "or the checkpoint in this process (no policy_url)"
        )
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
