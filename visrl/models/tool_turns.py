"""Conversations in the form that chat templates take, with tools, calls and what tools answered; and whether a template
shows them. It is tried and not read: a template is a program.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from visrl.conversation import CallingTurn, Conversation, PromptError, ToolCall, ToolTurn
from visrl.prompts import IMAGE
from visrl.records import Message
from visrl.zoom.tool_calls import CallReader, WrittenCall

Render = Callable[[list[dict[str, Any]], list[Any]], str]  # of messages and definitions of tools

_TOOL = {
    "type": "function",
    "function": {
        "name": "tried_tool",
        "description": "tried description",
        "parameters": {"type": "object", "properties": {"tried_key": {"type": "string"}}, "required": ["tried_key"]},
    },
}
_CALL = ToolCall("tried", "tried_tool", '{"tried_key": "tried value"}')
_REMEDY = (
    "describe the tools in a system message and read the calls in the text, or serve the checkpoint by the protocol "
    "that it was trained on (protocol: …), which has words for its own tool and for NAME:focus"
)


def as_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """A conversation in the form that chat templates take. Arguments are objects there, and no text."""
    return [_as_message(message) for message in conversation.messages]


def _as_message(message: Message) -> dict[str, Any]:
    made: dict[str, Any] = {"role": message.role, "content": _parts(message.text)}
    if isinstance(message, CallingTurn):
        made["tool_calls"] = [call.as_field() for call in message.calls]
        for call in made["tool_calls"]:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    if isinstance(message, ToolTurn):
        made |= {"tool_call_id": message.call.id, "name": message.call.name}
    return made


def _parts(said: str) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    for number, text in enumerate(said.split(IMAGE)):
        if number:
            parts.append({"type": "image"})
        if text:
            parts.append({"type": "text", "text": text})
    return parts


def tool_fault(render: Render, image_mark: str) -> str | None:
    """Why a chat template cannot be shown tools, or None: a definition, a call and an answer with an image are put
    before it, and looked for in what it writes."""
    talk = (
        Message("user", "tried question"),
        CallingTurn("assistant", "tried thought", (_CALL,)),
        ToolTurn("tool", f"{IMAGE}tried answer", _CALL),
    )
    messages = [_as_message(message) for message in talk]
    try:
        shown, whole = render(messages[:1], [_TOOL]), render(messages, [_TOOL])
    except PromptError as error:
        return f"{error}; {_REMEDY}"
    if any(word not in shown for word in ("tried_tool", "tried description", "tried_key")):
        return f"the chat template of this checkpoint shows no tools; {_REMEDY}"
    said = whole.partition("tried question")[2]
    calls = [one for one in CallReader().finish(said) if isinstance(one, WrittenCall)]
    if calls != [WrittenCall(_CALL.name, _CALL.arguments)]:
        return f"the chat template of this checkpoint writes no calls as JSON between <tool_call> tags; {_REMEDY}"
    answer = said.partition("</tool_call>")[2]
    if answer.count("tried answer") != 1 or answer.count(image_mark) != 1:
        return f"the chat template of this checkpoint shows no images that tools answer with; {_REMEDY}"
    return None
