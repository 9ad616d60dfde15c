"""What is said to a model: messages with pictures in their places, and how an engine answers. Knows no model.

An engine is anything with `complete`: conversations in, sampled texts out. `engines/local.py` runs a checkpoint in this
process and computes shared prefixes once; `engines/endpoint.py` asks any OpenAI-compatible server.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from PIL import Image

from visrl.box import CropRule, Size
from visrl.images import crop, open_image
from visrl.prompts import IMAGE, answer_prompt, focus_prompt
from visrl.records import Message, Picture
from visrl.replies import whole_text


class PromptError(ValueError):
    """A text that cannot be put before a model, such as one that holds the model's control tokens."""


@dataclass(frozen=True, slots=True)
class View:
    """A picture as a model is shown it. Views with equal `key` are the same pixels and are computed once."""

    key: str
    image: Image.Image
    is_crop: bool = False  # crops have their own pixel limit

    @property
    def size(self) -> Size:
        return self.image.size


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages and their pictures, in the order of their `<image>` marks; the model speaks next.

    Raises:
        PromptError: more or fewer marks than pictures, as where a question or a reply holds one.
    """

    messages: tuple[Message, ...]
    views: tuple[View, ...] = ()

    def __post_init__(self) -> None:
        marks = sum(message.text.count(IMAGE) for message in self.messages)
        if marks != len(self.views):
            raise PromptError(f"{marks} {IMAGE} marks but {len(self.views)} pictures in one conversation")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw. Temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 128


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled text, or the error that took its place. Half characters, which a server may send, are mended: what
    is said here is shown to models, sent on and written."""

    text: str | None
    tokens: int = 0
    finish_reason: Literal["stop", "length", "error"] = "stop"
    error: str | None = None
    prompt_tokens: int = 0
    refused: bool = False  # the model cannot be shown this prompt: asking again would end alike

    def __post_init__(self) -> None:
        for name, said in (("text", self.text), ("error", self.error)):
            if said is not None and (mended := whole_text(said)) != said:
                object.__setattr__(self, name, mended)


class Engine(Protocol):
    """Conversations in, sampled texts out."""

    name: str

    def complete(
        self, conversations: Sequence[Conversation], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        """One completion per seed: `seeds[i]` holds those of conversation i. A failure is a record, no exception."""
        ...


def image_view(picture: Picture, image: Image.Image) -> View:
    """The view of a whole picture that has been opened."""
    return View(picture.ref, image)


def open_view(picture: Picture, root: str | Path | None = None) -> View:
    """The view of a whole picture by reference, the annotated way up.

    Raises:
        ImageError: it cannot be opened.
    """
    return image_view(picture, open_image(picture.ref, root, picture.size))


def crop_view(whole: View, picture: Picture, rule: CropRule = "exact") -> View:
    """The view of the crop that `picture` names, cut from the view of its whole."""
    if picture.crop is None:
        raise ValueError(f"{picture.ref} names no crop")
    corners = ",".join(f"{value:.6f}" for value in picture.crop.as_list())
    return View(f"{whole.key}#{rule}:{corners}", crop(whole.image, picture.crop, rule), is_crop=True)


def focus_conversation(question: str, whole: View) -> Conversation:
    """Step 1 of the `visrl` protocol: where to look."""
    return Conversation((Message("user", focus_prompt(question)),), (whole,))


def answer_conversation(question: str, whole: View, detail: View) -> Conversation:
    """Step 2 of the `visrl` protocol: the answer, from picture and crop in one user turn."""
    return Conversation((Message("user", answer_prompt(question)),), (whole, detail))


def seed_of(run_seed: int, *parts: object) -> int:
    """A seed in [0, 2^63) of one draw, from the run's seed and what names the draw (sample id, round, branch, step)."""
    text = "\x1f".join(str(part) for part in (run_seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1
