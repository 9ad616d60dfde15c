"""What the OpenAI chat protocol looks like here: requests read and bounded, replies and chunks built.

Nothing here opens an image, knows a model or touches the network.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

import pydantic
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from visrl.conversation import CallingTurn, Conversation, Message, ToolTurn, View
from visrl.engines.base import Sampling, seed_of
from visrl.prompts import IMAGE
from visrl.serve.errors import RequestError
from visrl.serve.fields import passed_on
from visrl.serve.messages import ChatMessage, ImageUrl
from visrl.serve.strict import Strict
from visrl.serve.tools import Tool, ToolChoice, answered_calls, check_definitions, read_choice
from visrl.zoom.protocols import MOST_LOOKS

FOCUS_SUFFIX = ":focus"
WHOLE_SUFFIX = ":whole"  # the control: the second step alone, with the whole image in place of the crop


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for, and what all of them together may hold."""

    body_bytes: int = 20_000_000
    values: int = 20_000  # in a body: a conversation of images has some hundred
    images: int = 8
    image_pixels: int = 25_000_000
    text_bytes: int = 8_192  # a token is at least a byte, so this bounds the text's tokens too
    messages: int = 64
    max_tokens: int = 4096
    choices: int = 16
    stops: int = 8
    tools: int = 128
    request_s: float = 120.0
    connections: int = 512
    idle_s: float = 15.0  # how long a connection may be without a whole request
    body_s: float = 30.0  # how long a body may take to arrive,
    slow_body_s: float = 5.0  # of which so long, and a second for every
    body_rate: int = 16_000  # bytes that came
    write_s: float = 20.0  # how long a client may take no more of its reply
    held_bytes: int = 400_000_000  # of bodies that came and replies that are not sent
    held_pixels: int = 250_000_000  # opened images of all requests in work: 750 MB


def _as_list(stop: Any) -> Any:
    if stop is None:
        return []
    return [stop] if isinstance(stop, str) else stop


def _or(default: Any) -> BeforeValidator:
    """What null stands for."""
    return BeforeValidator(lambda value: default if value is None else value)


class StreamOptions(Strict):
    include_usage: Annotated[bool, _or(False)] = False
    include_obfuscation: bool | None = None  # padding against eavesdroppers: nothing of a text


class ChatRequest(BaseModel):
    """The body of a chat completion; `extra` fields are kept to see what was asked and cannot be done."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: Annotated[list[ChatMessage], FailFast(), Field(min_length=1)]
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: Annotated[int, _or(1), Field(ge=1)] = 1
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[str], FailFast(), BeforeValidator(_as_list)] = Field(default_factory=list)
    stream: Annotated[bool, _or(False)] = False
    stream_options: StreamOptions | None = None
    logprobs: Annotated[bool, _or(False), pydantic.Strict()] = False
    return_token_ids: Annotated[bool, _or(False), pydantic.Strict()] = False
    max_looks: int | None = Field(None, ge=0, le=MOST_LOOKS)
    add_generation_prompt: Annotated[bool, _or(True), pydantic.Strict()] = True
    continue_final_message: Annotated[bool, _or(False), pydantic.Strict()] = False
    tools: Annotated[list[Tool], FailFast(), _or([])] = Field(default_factory=list)
    tool_choice: Annotated[Any, BeforeValidator(read_choice)] = None
    parallel_tool_calls: Annotated[bool, _or(True), pydantic.Strict()] = True
    _passed: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _tools_belong_together(self) -> Self:
        check_definitions(self.tools, self.tool_choice)
        answered_calls(self.messages)
        return self

    @property
    def choice(self) -> ToolChoice:
        """Whether the model is to call a tool."""
        return self.tool_choice or ToolChoice("auto" if self.tools else "none")

    @property
    def has_tools(self) -> bool:
        """Whether it defines tools, or holds what they gave."""
        return bool(self.tools) or any(message.tool_calls or message.role == "tool" for message in self.messages)

    @property
    def passed(self) -> dict[str, Any]:
        """Fields that the backend is given as they are."""
        return self._passed

    @property
    def suffix(self) -> str:
        """How the model is asked: `:focus`, `:whole`, or "" for the conversation as it is."""
        return next((suffix for suffix in (FOCUS_SUFFIX, WHOLE_SUFFIX) if self.model.endswith(suffix)), "")

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(text for text in self.stop if text)

    def image_urls(self) -> list[ImageUrl]:
        """The images in their order."""
        return [part.image_url for message in self.messages for part in message.content if part.image_url is not None]

    def sampling(self, default: Sampling) -> Sampling:
        """How to sample, with the server's defaults for what is not given."""
        asked = self.max_completion_tokens or self.max_tokens
        return Sampling(
            temperature=default.temperature if self.temperature is None else self.temperature,
            top_p=default.top_p if self.top_p is None else self.top_p,
            max_tokens=asked or default.max_tokens,
            logprobs=self.logprobs,
            prompt_ids=self.return_token_ids,
        )

    def _check_tokens(self, is_passed_on: bool) -> None:
        """Refuse to tell tokens where they are not known, or are of two texts."""
        for name in ("logprobs", "return_token_ids"):
            if not getattr(self, name):
                continue
            if is_passed_on:
                raise _refused(name, "ask the server behind this one, or serve with infer_backend: huggingface")
            if self.stream:
                raise _refused(name, "a stream holds none; leave stream out")
            if self.suffix == FOCUS_SUFFIX:
                raise _refused(name, f"{FOCUS_SUFFIX} samples two texts; take the two steps by yourself")

    def _check_turn(self) -> None:
        """Refuse what is neither a turn of the model's own nor one of its turns that is gone on with, as vLLM does."""
        if not self.continue_final_message:
            if not self.add_generation_prompt:
                raise _refused("add_generation_prompt", "the model speaks next, always, or goes on with its turn")
            return
        if self.add_generation_prompt:
            raise _refused("continue_final_message", "set add_generation_prompt to false beside it")
        last = self.messages[-1]
        if self.suffix or last.role != "assistant" or len(self.messages) < 2:
            raise _refused("continue_final_message", "the last of several messages must be the model's own")
        if any(part.type != "text" for part in last.content):
            raise _refused("continue_final_message", "the model's turn holds a picture")
        if self.choice.opening:
            raise _refused("continue_final_message", "tool_choice opens the model's turn by itself")

    def seeds(self) -> list[int]:
        """One seed per choice; the first is the caller's own, as an engine in this process would be given it."""
        first = secrets.randbits(63) if self.seed is None else self.seed % 2**63
        return [first] + [seed_of(first, "choice", index) for index in range(1, self.n)]


def read_request(body: bytes, limits: Limits, is_passed_on: bool = False) -> ChatRequest:
    """The chat request in a body; with `is_passed_on` the backend honours vLLM's own fields.

    It takes as long as the body is: call it in a thread where that may be much. Only the first fault is looked for.

    Raises:
        RequestError: 400 with what is wrong: no JSON, not the protocol, not supported, or more than the limits allow.
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:80] for part in (*first["loc"], *first.get("ctx", {}).get("at", ())))
        raise RequestError(400, f"{where}: {first['msg']}" if where else first["msg"], param=where or None) from error
    request._passed = passed_on(request.model_extra or {}, is_passed_on)
    request._check_tokens(is_passed_on)
    request._check_turn()
    if request.max_looks is not None and request.suffix != FOCUS_SUFFIX:
        raise RequestError(400, f"max_looks is for models that end in {FOCUS_SUFFIX}", param="max_looks")
    (request.model_extra or {}).clear()  # what means nothing here is not kept either, however large
    _check_limits(request, limits)
    return request


def _refused(name: str, remedy: str) -> RequestError:
    return RequestError(400, f"{name} is not supported by this request; {remedy}", "unsupported_parameter", param=name)


def _check_limits(request: ChatRequest, limits: Limits) -> None:
    texts = [part.text or "" for message in request.messages for part in message.content if part.type == "text"]
    texts += [tool.definition for tool in request.tools]
    for made in (made for message in request.messages for made in message.tool_calls or ()):
        texts += [made.function.name, made.function.arguments]
    tokens = max(request.max_tokens or 0, request.max_completion_tokens or 0)
    for amount, limit, what in (
        (len(request.messages), limits.messages, "messages"),
        (len(request.image_urls()), limits.images, "pictures"),
        (_bytes_of(texts, limits.text_bytes), limits.text_bytes, "bytes of text"),
        (tokens, limits.max_tokens, "max_tokens"),
        (request.n, limits.choices, "choices (n)"),
        (len(request.stops), limits.stops, "stop texts"),
        (len(request.tools), limits.tools, "tools"),
        (_bytes_of(request.stops, limits.text_bytes), limits.text_bytes, "bytes of stop texts"),
    ):
        if amount > limit:
            raise RequestError(400, f"{amount} {what} where this server allows {limit}")
    if any(IMAGE in text for text in texts):
        raise RequestError(400, f"a text may not hold the mark {IMAGE}; put the picture's image_url part in its place")


def _bytes_of(texts: Sequence[str], enough: int) -> int:
    """How many bytes texts are; of more characters than `enough`, the characters: there are no fewer bytes."""
    characters = sum(map(len, texts))
    return characters if characters > enough else sum(len(text.encode()) for text in texts)


def to_conversation(request: ChatRequest, views: list[View]) -> Conversation:
    """The whole conversation, each image's mark at its place."""
    messages: list[Message] = []
    answered = answered_calls(request.messages)
    for place, message in enumerate(request.messages):
        if place in answered:
            messages.append(ToolTurn("tool", message.text, answered[place]))
        elif message.tool_calls:
            calls = tuple(made.call for made in message.tool_calls)
            messages.append(CallingTurn("assistant", message.text, calls))
        else:
            role: Any = "system" if message.role == "developer" else message.role
            messages.append(Message(role, message.text))
    prefill = messages.pop().text if request.continue_final_message else request.choice.opening
    return Conversation(tuple(messages), tuple(views), prefill, tuple(tool.definition for tool in request.tools))


def to_question(request: ChatRequest) -> str:
    """The question of a `:focus` or `:whole` request: the text of the last user message.

    Raises:
        RequestError: 400 where there is none, or not exactly one image in the conversation.
    """
    if request.has_tools:
        said = f"{request.suffix} takes no tools and none of their messages; ask {{}}, which hands calls to you"
        raise RequestError(400, said.format(request.model.removesuffix(request.suffix)[:80]), param="tools")
    if len(request.image_urls()) != 1:
        raise RequestError(400, f"{request.suffix} takes exactly one picture, here are {len(request.image_urls())}")
    last = request.messages[-1]
    question = "\n".join(part.text for part in last.content if part.type == "text" and part.text).strip()
    if last.role != "user" or not question:
        raise RequestError(
            400, f"{request.suffix} answers the last message, which must be the user's and hold a question"
        )
    return question
