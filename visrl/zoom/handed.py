"""A zoom tool that the caller executes, in the words that its checkpoint was trained on.

Chat templates of most checkpoints that zoom show no tools: they were trained on a system message, suffixes and
observations of their own (protocols.py). This puts a conversation with calls and what tools gave into these, so that
the model reads what an `Episode` would have shown it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from visrl.conversation import CallingTurn, Conversation, PromptError, ToolTurn, View
from visrl.prompts import IMAGE
from visrl.records import Message
from visrl.zoom.protocols import Crop, ZoomProtocol
from visrl.zoom.tool_calls import BEGIN, END


def worded(protocol: ZoomProtocol, talk: Conversation) -> Conversation:
    """`talk`, which defines the protocol's tool and opens with a question about an image, as the protocol has it.

    Raises:
        PromptError: it opens otherwise, or a tool gave something besides one image or a text.
    """
    first, *later = talk.messages
    if first.role != "user" or not first.text.startswith(IMAGE) or first.text.count(IMAGE) != 1:
        raise PromptError(
            f"with the tool of {protocol.name} a conversation opens with one image and then the question, in a message "
            "of the user's: the system message is the protocol's own"
        )
    system = [Message("system", protocol.system)] if protocol.system else []
    views = iter(talk.views)
    next(views)
    question = first.text.removeprefix(IMAGE)
    messages = [*system, Message("user", protocol.ask(question)), *_later(protocol, question, later, views)]
    return replace(talk, messages=tuple(messages), tools=())


def _later(
    protocol: ZoomProtocol, question: str, messages: Sequence[Message], views: Iterator[View]
) -> Iterator[Message]:
    given: list[str] = []
    turn, pictures = -1, 1
    for message in messages:
        if isinstance(message, ToolTurn):
            if IMAGE not in message.text:
                given.append(protocol.say_error(message.text))
                continue
            if message.text != IMAGE:
                raise PromptError(f"the tool of {protocol.name} gives one image, or a text that says what went wrong")
            given.append(protocol.observe(Crop(next(views).size, turn, pictures, question)))
            pictures += 1
            continue
        if given:
            yield Message("user", protocol.join(given))
            given = []
        if isinstance(message, CallingTurn):
            turn += 1
            calls = [f'{BEGIN}\n{{"name": "{one.name}", "arguments": {one.arguments}}}\n{END}' for one in message.calls]
            yield Message("assistant", message.text + "\n".join(calls))
            continue
        for _ in range(message.text.count(IMAGE)):
            next(views)
        yield message
    if given:
        yield Message("user", protocol.join(given))
