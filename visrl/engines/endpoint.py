"""The engine that asks OpenAI-compatible servers (vLLM, SGLang, ours): conversations become the protocol's messages.

Retries, limits and health live in `client.py`. Nothing here knows about boxes beyond handing the codec on.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from PIL import Image

from visrl.box import Size
from visrl.codecs import CODECS, Codec
from visrl.conversation import Completion, Conversation, Sampling, View
from visrl.engines.client import Ask, Client, Endpoint
from visrl.prompts import IMAGE

OWNER = "visrl"  # what our own server names as the owner of its models
CROP_DETAIL = "low"  # how a crop is marked for our own server, which then keeps it under the crops' pixel limit


class EndpointEngine:
    """An `Engine` over one or many servers.

    `codec` and `processed_size` say how the served model writes boxes; `processed_size` maps a picture's size, and
    whether it is a crop, to the size that the server's processor gives it (it matters only to families that write
    absolute pixels).
    """

    def __init__(
        self,
        endpoint: Endpoint,
        codec: Codec = CODECS["visrl"],
        processed_size: Callable[[Size, bool], Size] = lambda size, is_crop: size,
    ) -> None:
        self.client = Client(endpoint)
        self.name = f"endpoint:{endpoint.model}"
        self.codec = codec
        self._processed_size = processed_size
        self._mark_crops = False

    def check(self) -> None:
        """Make sure that the servers answer and serve the model; call it before the work.

        Raises:
            EndpointError: the first server that does not, with the remedy.
        """
        # Other servers read `detail` in their own ways (OpenAI's makes the picture small), so only ours is told.
        self._mark_crops = self.client.check() == {OWNER}

    def processed_size(self, size: Size, is_crop: bool = False) -> Size:
        """Width and height that the server's processor gives a picture of `size`."""
        return self._processed_size(size, is_crop)

    def complete(
        self, conversations: Sequence[Conversation], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        """One completion per seed, each its own request; a request that failed for good is a completion with `error`.

        Raises:
            ValueError: not one list of seeds per conversation.
        """
        if len(seeds) != len(conversations):
            raise ValueError(f"{len(conversations)} conversations but {len(seeds)} lists of seeds")
        replies = iter(self.client.ask_all(self._asks(conversations, sampling, seeds)))
        return [[next(replies) for _ in own] for own in seeds]

    def forget(self) -> None:
        """Nothing: what a server keeps is its own."""

    def close(self) -> None:
        self.client.close()

    def _asks(
        self, conversations: Sequence[Conversation], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> Iterable[Ask]:
        urls: dict[str, str] = {}
        for conversation, own in zip(conversations, seeds, strict=True):
            # The questions of one picture usually follow each other: what the last one encoded is used again.
            urls = {view.key: urls.get(view.key) or data_url(view.image) for view in conversation.views}
            messages = to_messages(conversation, urls, mark_crops=self._mark_crops)
            for seed in own:
                yield Ask(messages, sampling, seed)


def to_messages(conversation: Conversation, urls: dict[str, str], mark_crops: bool = False) -> list[dict[str, Any]]:
    """The conversation in the protocol's form: each `<image>` mark becomes a picture part at its place.

    `urls` holds the address of each view by its key; text keeps every character around the marks.
    """
    views = iter(conversation.views)
    messages: list[dict[str, Any]] = []
    for message in conversation.messages:
        first, *rest = message.text.split(IMAGE)
        if not rest:
            messages.append({"role": message.role, "content": message.text})
            continue
        parts: list[dict[str, Any]] = [{"type": "text", "text": first}] if first else []
        for text in rest:
            parts.append(_picture_part(next(views), urls, mark_crops))
            if text:
                parts.append({"type": "text", "text": text})
        messages.append({"role": message.role, "content": parts})
    return messages


def _picture_part(view: View, urls: dict[str, str], mark_crops: bool) -> dict[str, Any]:
    picture = {"url": urls[view.key]}
    if mark_crops and view.is_crop:
        picture["detail"] = CROP_DETAIL
    return {"type": "image_url", "image_url": picture}


def data_url(image: Image.Image) -> str:
    """The picture as a PNG data URL: exact pixels, whatever the server does with them."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
