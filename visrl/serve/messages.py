"""The messages of a request: texts and images by their places, calls that the model made, and what tools gave."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, FailFast, Field, model_validator

from visrl.prompts import IMAGE
from visrl.serve.strict import Strict, fault
from visrl.serve.tools import Id, MadeCall


class ImageUrl(Strict):
    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


def _as_url(image: Any) -> Any:
    return {"url": image} if isinstance(image, str) else image


def _as_parts(content: Any) -> Any:
    if content is None:
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Part(Strict):
    """A piece of a message: a text or an image."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: Annotated[ImageUrl | None, BeforeValidator(_as_url)] = None
    cache_control: Any = None  # what other services take for advice on caching
    uuid: str | None = None

    @model_validator(mode="after")
    def _holds_what_it_says(self) -> Self:
        if (self.text if self.type == "text" else self.image_url) is None:
            raise fault(f"a part of type {self.type} has no {self.type}")
        return self


class ChatMessage(Strict):
    """One turn. What clients send back of a reply (`refusal`, `focus`, …) is known, and shown to no model."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[Part], FailFast(), BeforeValidator(_as_parts)] = Field(default_factory=list)
    name: str | None = None  # no chat template that is served shows it
    focus: Any = None
    tool_calls: Annotated[list[MadeCall] | None, FailFast()] = None
    tool_call_id: Id | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_shown_to_a_model(cls, given: Any) -> Any:
        role = given.get("role") if isinstance(given, dict) else None
        if role == "function":
            raise fault("a function message is of the protocol before tools; send it as a tool message", "role")
        if role in ("system", "developer", "user", "tool") and given.get("content") is None:
            raise fault(f"a {role} message holds a text or parts", "content")
        if role == "tool" and given.get("tool_call_id") is None:
            raise fault("a tool message names the call that it answers", "tool_call_id")
        return given

    @model_validator(mode="after")
    def _is_of_its_role(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise fault(f"a {self.role} message makes no calls", "tool_calls")
        if self.tool_call_id is not None and self.role != "tool":
            raise fault(f"a {self.role} message answers no call", "tool_call_id")
        return self

    @property
    def text(self) -> str:
        """What it says, each image's mark at its place."""
        return "".join(IMAGE if part.type == "image_url" else part.text or "" for part in self.content)
