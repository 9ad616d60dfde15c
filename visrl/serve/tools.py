"""Tools in a request: definitions, which of them is to be called, calls that the model made, and what they gave.

Read and held together here; how a model is shown them is its chat template's business (models/tool_turns.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import Field, model_validator

from visrl.conversation import ToolCall
from visrl.serve.strict import Strict, fault
from visrl.zoom.tool_calls import BEGIN, NAME
from visrl.zoom.written import CallError, json_of

MAX_DEPTH = 20  # of the schema of a tool's parameters
CHOICES = ("none", "auto", "required")
CHOICE_FORM = 'tool_choice is "none", "auto", "required" or {"type": "function", "function": {"name": …}}'

Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
Id = Annotated[str, Field(min_length=1, max_length=200)]


class FunctionDefinition(Strict):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _can_be_honoured(self) -> Self:
        if self.strict:
            raise fault("nothing holds a model to the schema here; leave it out, and check the arguments", "strict")
        if _is_deeper(self.parameters, MAX_DEPTH):
            raise fault(f"nested more than {MAX_DEPTH} deep", "parameters")
        return self


class Tool(Strict):
    """The definition of a tool, as OpenAI's protocol has it."""

    type: Literal["function"]
    function: FunctionDefinition

    @property
    def definition(self) -> str:
        """The definition as a chat template is given it, without what it leaves open."""
        named = {"name": self.function.name, "description": self.function.description}
        given = {**named, "parameters": self.function.parameters}
        function = {key: value for key, value in given.items() if value is not None}
        return json.dumps({"type": "function", "function": function}, ensure_ascii=False)


class CalledFunction(Strict):
    name: Name
    arguments: str

    @model_validator(mode="after")
    def _is_an_object(self) -> Self:
        try:
            read = json_of(self.arguments) if self.arguments.strip() else {}
            json.dumps(read, allow_nan=False)
        except (CallError, ValueError) as error:
            raise fault(f"no JSON: {str(error)[:200]}", "arguments") from error
        if not isinstance(read, dict):
            raise fault("the arguments of a call are a JSON object", "arguments")
        if _is_deeper(read, MAX_DEPTH):
            raise fault(f"nested more than {MAX_DEPTH} deep", "arguments")
        return self


class MadeCall(Strict):
    """A call in a turn of the model's, as a reply gave it."""

    id: Id
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # what clients put streams together by

    @property
    def call(self) -> ToolCall:
        return ToolCall(self.id, self.function.name, self.function.arguments.strip() or "{}")


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether the model is to call: "none", "auto", "required", or the one tool `name`."""

    kind: Literal["none", "auto", "required", "named"] = "auto"
    name: str = ""

    @property
    def opening(self) -> str:
        """The words that the model's turn opens with, where it is to be a call."""
        if self.kind == "required":
            return f'{BEGIN}\n{{"name": "'
        return f'{BEGIN}\n{{"name": "{self.name}", "arguments":' if self.kind == "named" else ""


def read_choice(given: Any) -> ToolChoice | None:
    """What stands in `tool_choice`; None where nothing does."""
    if given is None:
        return None
    if isinstance(given, str) and given in CHOICES:
        return ToolChoice(given)  # type: ignore[arg-type]
    function = given.get("function") if isinstance(given, dict) and set(given) == {"type", "function"} else None
    if isinstance(function, dict) and set(function) == {"name"} and given["type"] == "function":
        name = function["name"]
        if isinstance(name, str) and NAME.fullmatch(name):
            return ToolChoice("named", name)
    raise fault(CHOICE_FORM)


def check_definitions(tools: Sequence[Tool], choice: ToolChoice | None) -> None:
    """Hold definitions and choice against each other."""
    names = [tool.function.name for tool in tools]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise fault(f"a second tool with the name {name}", "tools", number, "function", "name")
    if not tools and choice is not None and choice.kind in ("required", "named"):
        raise fault("there are no tools to choose from; define them in tools", "tool_choice")
    if choice is not None and choice.kind == "named" and choice.name not in names:
        raise fault(f"there is no tool {choice.name} in tools", "tool_choice")


class GivenMessage(Protocol):
    """What is asked of a message here."""

    role: Any
    tool_calls: Any
    tool_call_id: Any


def answered_calls(messages: Sequence[GivenMessage]) -> dict[int, ToolCall]:
    """The calls that tool messages answer, by the places of these messages: right after the calls, each once and in
    their order, for chat templates show no ids."""
    answered: dict[int, ToolCall] = {}
    waiting: list[ToolCall] = []
    known: set[str] = set()
    for place, message in enumerate(messages):
        if message.role == "tool":
            name = message.tool_call_id
            if not waiting or name != waiting[0].id:
                raise fault(_why(name, waiting, known), "messages", place, "tool_call_id")
            answered[place] = waiting.pop(0)
            continue
        if waiting:
            raise fault(f"the call {waiting[0].id[:80]!r} has no tool message yet", "messages", place)
        if message.tool_calls:
            waiting = [made.call for made in message.tool_calls]
            ids = [call.id for call in waiting]
            known = set(ids)
            if len(known) < len(ids):
                raise fault("two calls have the same id", "messages", place, "tool_calls")
    if waiting:
        raise fault(f"the call {waiting[0].id[:80]!r} has no tool message yet", "messages", len(messages) - 1)
    return answered


def _why(name: str, waiting: Sequence[ToolCall], known: set[str]) -> str:
    shown = repr(name[:80])
    if any(call.id == name for call in waiting):
        return f"the call {waiting[0].id[:80]!r} comes before {shown}; answer calls in their order"
    if name in known:
        return f"the call {shown} has an answer already"
    return f"no call {shown} was made in the turn before"


def _is_deeper(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
        ]
        if not level:
            return False
    return True
