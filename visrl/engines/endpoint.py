"""The engine that asks OpenAI-compatible servers (vLLM, SGLang, ours): conversations become the protocol's messages.

Retries, limits and health live in `client.py`. Nothing here knows about boxes beyond handing the codec on.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from PIL import Image

from visrl.box import Size
from visrl.codecs import CODECS, Codec
from visrl.conversation import CallingTurn, Conversation, Message, ToolTurn, View
from visrl.engines.base import Completion, Sampling
from visrl.engines.client import Client
from visrl.engines.openai_server import Ask, Endpoint, EndpointError
from visrl.engines.started import has_ended
from visrl.prompts import IMAGE

if TYPE_CHECKING:
    from visrl.models.encode import Encoder

OWNER, VLLM = "visrl", "vllm"  # what our own server and vLLM's name as the owner of their models
TRIAL, TRIAL_SIDE, TRIAL_TOKENS = "Say one word.", 56, 16
CROP_DETAIL = "low"  # how a crop is marked for our own server, which then keeps it under the crops' pixel limit


class EndpointEngine:
    """A `Policy` over one or many servers.

    `codec` says how the served model writes boxes. `encoder` is that of its checkpoint, where there is one here:
    images are sent as its processor sizes them, so that no limit of a server's own comes between (a server has one
    for all images, and a crop's is another than a whole one's).
    """

    def __init__(self, endpoint: Endpoint, codec: Codec = CODECS["visrl"], encoder: Encoder | None = None) -> None:
        self.client = Client(endpoint)
        self.name = f"endpoint:{endpoint.model}"
        self.codec = codec
        self.adapter: str | None = None  # that is asked in the place of the model itself
        self._encoder = encoder
        self._mark_crops = False
        self._unsaid: tuple[int, ...] = ()

    def check(self) -> None:
        """Make sure that the servers answer and serve the model; call it before the work.

        Raises:
            EndpointError: the first server that does not, with the remedy.
        """
        # Other servers read `detail` in their own ways (OpenAI's makes the image small), so only ours is told.
        owners = self.client.check()
        self._mark_crops = owners == {OWNER}
        self._unsaid = unsaid_at(owners, self._encoder)
        if not self._mark_crops:  # ours has said by its list that it speaks the protocol, images and all
            self.client.try_out(replace(trial(), unsaid=self._unsaid))

    def processed_size(self, size: Size, is_crop: bool = False) -> Size:
        """Width and height that the server's processor gives an image of `size`."""
        return self._encoder.processed_size(size, is_crop) if self._encoder else size

    def complete(
        self, conversations: Sequence[Conversation], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        """One completion per seed, each its own request; a request that failed for good is a completion with `error`.

        Raises:
            ValueError: not one list of seeds per conversation.
            EndpointError: a server that this process started has ended, so that some requests failed.
        """
        if len(seeds) != len(conversations):
            raise ValueError(f"{len(conversations)} conversations but {len(seeds)} lists of seeds")
        faults = [self._fault(conversation) for conversation in conversations]
        sound = [(talk, own) for talk, own, fault in zip(conversations, seeds, faults, strict=True) if fault is None]
        said = self.client.ask_all(self.asks(sound, sampling))
        ended = [server.shown for server in self.client.servers if has_ended(server.url)]
        if ended and (failed := next((reply.error for reply in said if reply.error), None)):
            raise EndpointError(f"the server at {ended[0]}, which this run started, is no more: {failed}")
        replies = iter(said)
        return [
            [next(replies) if fault is None else refused(fault) for _ in own]
            for own, fault in zip(seeds, faults, strict=True)
        ]

    def _fault(self, conversation: Conversation) -> str | None:
        """Why a conversation cannot be put: an image that the model's processor refuses."""
        try:
            for view in conversation.views:
                self.processed_size(view.size, view.is_crop)
        except ValueError as error:
            return f"the model's processor refuses a picture: {error}"
        return None

    def forget(self) -> None:
        """Nothing: what a server keeps is its own."""

    def close(self) -> None:
        self.client.close()

    def asks(self, conversations: Sequence[tuple[Conversation, Sequence[int]]], sampling: Sampling) -> Iterable[Ask]:
        """The requests for some conversations, each as often as it has seeds."""
        urls: dict[str, str] = {}
        # Where log-probabilities are learned from they stay those of all tokens, which vLLM's would not.
        unsaid = () if sampling.logprobs else self._unsaid
        encoder = None if self._mark_crops else self._encoder  # ours keeps a limit for each kind, and sizes them itself
        for conversation, own in conversations:
            # The questions of one image usually follow each other: what the last one encoded is used again.
            urls = {view.key: urls.get(view.key) or sized_url(view, encoder) for view in conversation.views}
            messages = to_messages(conversation, urls, mark_crops=self._mark_crops)
            for seed in own:
                goes_on = bool(conversation.prefill)
                yield Ask(messages, sampling, seed, self.adapter, unsaid, goes_on, conversation.tools)


def unsaid_at(owners: set[str], encoder: Encoder | None) -> tuple[int, ...]:
    """The tokens that servers of these owners are told not to sample: those that stand for images, as in this process.

    vLLM would sample them. Ours does not, and of other servers it is not known that they take such a field.
    """
    if owners != {VLLM} or encoder is None:
        return ()
    vocabulary = encoder.config.get_text_config().vocab_size
    return tuple(token for token in encoder.image_ids if token < vocabulary)


def refused(fault: str) -> Completion:
    """What is said in the place of a text where the model cannot be shown the prompt."""
    return Completion(None, finish_reason="error", error=fault, refused=True)


def sized_url(view: View, encoder: Encoder | None) -> str:
    """The image of a view as a data URL, as the processor of `encoder` sizes it; as it is without one."""
    return data_url(view.image if encoder is None else encoder.sized(view))


def trial(with_image: bool = True) -> Ask:
    """A small question that any server of a model can answer, about an image or about nothing."""
    view = View("trial", Image.new("RGB", (TRIAL_SIDE, TRIAL_SIDE), "grey"))
    text = f"{IMAGE}\n{TRIAL}" if with_image else TRIAL
    talk = Conversation((Message("user", text),), (view,) if with_image else ())
    return Ask(to_messages(talk, {view.key: data_url(view.image)}), Sampling(max_tokens=TRIAL_TOKENS), seed=0)


def to_messages(conversation: Conversation, urls: dict[str, str], mark_crops: bool = False) -> list[dict[str, Any]]:
    """The conversation in the protocol's form: each `<image>` mark becomes an image part at its place.

    `urls` holds the address of each view by its key; text keeps every character around the marks.
    """
    views = iter(conversation.views)
    messages: list[dict[str, Any]] = []
    for message in conversation.messages:
        first, *rest = message.text.split(IMAGE)
        parts: list[dict[str, Any]] = [{"type": "text", "text": first}] if first else []
        for text in rest:
            parts.append(_image_part(next(views), urls, mark_crops))
            if text:
                parts.append({"type": "text", "text": text})
        made: dict[str, Any] = {"role": message.role, "content": parts if rest else message.text}
        if isinstance(message, CallingTurn):
            made["tool_calls"] = [call.as_field() for call in message.calls]
        if isinstance(message, ToolTurn):
            made["tool_call_id"] = message.call.id
        messages.append(made)
    if conversation.prefill:  # goes on where the model's turn stands: `openai_server` says so in the request
        messages.append({"role": "assistant", "content": conversation.prefill})
    return messages


def _image_part(view: View, urls: dict[str, str], mark_crops: bool) -> dict[str, Any]:
    image = {"url": urls[view.key]}
    if mark_crops and view.is_crop:
        image["detail"] = CROP_DETAIL
    return {"type": "image_url", "image_url": image}


def data_url(image: Image.Image) -> str:
    """The image as a PNG data URL: exact pixels, whatever the server does with them."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
