"""What is said to a model: messages with images in their places. Knows no model and no engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from visrl.box import Box, CropRule, Size
from visrl.errors import UserError
from visrl.images import crop, open_image
from visrl.prompts import IMAGE, looks_prompt
from visrl.records import Message, Picture


class PromptError(UserError, ValueError):
    """A text that cannot be put before a model, such as one that holds the model's control tokens."""


@dataclass(frozen=True, slots=True)
class View:
    """An image as a model is shown it. Views with equal `key` are the same pixels and are computed once."""

    key: str
    image: Image.Image
    is_crop: bool = False  # crops have their own pixel limit

    @property
    def size(self) -> Size:
        return self.image.size


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model made of a tool: `arguments` is the JSON of an object, `id` names it to whoever answers."""

    id: str
    name: str
    arguments: str

    def as_field(self) -> dict[str, Any]:
        """The call in the form of OpenAI's protocol."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, slots=True)
class CallingTurn(Message):
    """What a model said, with the calls that it made at its end."""

    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolTurn(Message):
    """What a tool answered to `call`."""

    call: ToolCall


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages and their images, in the order of their `<image>` marks; the model speaks next. `prefill` are the words
    that its turn opens with already, `tools` the definitions of what it may call, each as JSON.

    Raises:
        PromptError: more or fewer marks than images, as where a question or a reply holds one.
    """

    messages: tuple[Message, ...]
    views: tuple[View, ...] = ()
    prefill: str = ""
    tools: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        marks = sum(message.text.count(IMAGE) for message in self.messages)
        if marks != len(self.views):
            raise PromptError(f"{marks} {IMAGE} marks but {len(self.views)} pictures in one conversation")

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """Every call that was made."""
        return tuple(call for one in self.messages if isinstance(one, CallingTurn) for call in one.calls)

    @property
    def has_tools(self) -> bool:
        """Whether anything of it needs a chat template that shows tools."""
        return bool(self.tools) or any(isinstance(one, CallingTurn | ToolTurn) for one in self.messages)

    def texts(self) -> Iterator[str]:
        """Everything that a model is shown of it as text."""
        yield from (message.text for message in self.messages)
        yield from self.tools
        yield from (text for call in self.calls for text in (call.name, call.arguments))
        yield self.prefill


def image_view(picture: Picture, image: Image.Image) -> View:
    """The view of a whole image that has been opened."""
    return View(picture.ref, image)


def open_view(picture: Picture, root: str | Path | None = None) -> View:
    """The view of a whole image by reference, the annotated way up.

    Raises:
        ImageError: it cannot be opened.
    """
    return image_view(picture, open_image(picture.ref, root, picture.size))


def crop_view(whole: View, picture: Picture, rule: CropRule = "exact") -> View:
    """The view of the crop that `picture` names, cut from the view of its whole."""
    if picture.crop is None:
        raise ValueError(f"{picture.ref} names no crop")
    key = f"{whole.key}#{crop_key(picture.crop, rule)}"
    return View(key, crop(whole.image, picture.crop, rule), is_crop=True)


def crop_key(box: Box, rule: CropRule) -> str:
    """What tells the crop of a box from the other crops of its image."""
    return f"{rule}:{','.join(f'{value:.6f}' for value in box.as_list())}"


def focus_conversation(question: str, whole: View) -> Conversation:
    """Step 1 of the `visrl` protocol: where to look."""
    return looks_conversation(question, whole, ())


def answer_conversation(question: str, whole: View, detail: View) -> Conversation:
    """Step 2 of the `visrl` protocol: the answer, from image and crop in one user turn."""
    return looks_conversation(question, whole, (detail,))


def looks_conversation(question: str, whole: View, crops: Sequence[View]) -> Conversation:
    """A turn of the `visrl` protocol after so many looks: another look or the answer, from image and crops in one user
    turn. What was written of the boxes is not shown again."""
    return Conversation((Message("user", looks_prompt(question, len(crops))),), (whole, *crops))
