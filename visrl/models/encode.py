"""From conversations to token ids and pixels: chat template, tokenizer and image processor of a checkpoint, and the one
way in which any text or image reaches a model.

Training, decoding and serving all encode through here, so one conversation gives one token sequence everywhere. An
`Encoder` is one of two: that of prefix trees (tree_encoder.py), which makes each image ready by itself, or that of the
plain form (plain_encoder.py), which leaves whole rows to the checkpoint's own processor.
"""

from __future__ import annotations

import json
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image
from torchvision.transforms.v2.functional import InterpolationMode, resize

from visrl.box import Size
from visrl.codecs import CODECS, Codec
from visrl.conversation import Conversation, PromptError, View
from visrl.models.families import context_of, image_token
from visrl.models.family import Family, Grid, ImageInputs, PixelRange
from visrl.models.pixels import PIXEL_LIMITS, covering_limits, limited_size
from visrl.models.settings import ModelSettings
from visrl.models.tool_turns import as_messages, tool_fault
from visrl.prompts import IMAGE
from visrl.replies import whole_text
from visrl.zoom.calls import TAGS

MAX_TOKENS = 32_768  # of a prompt in this process, where the model's context allows as many: its mask has their square
LONGEST_TOKEN = 64  # characters a token stands for at most, on average over a long text
CACHE_BYTES = 256_000_000  # of preprocessed images that are kept: some ten of a million pixels


@dataclass(frozen=True, slots=True)
class EncodedView:
    """An image ready for the vision tower: its inputs by their names in the model, `grid` in merged tokens. In the
    plain form it is ready for the processor: `image` as it is given to it, and no inputs yet."""

    key: str
    inputs: ImageInputs
    placeholder: str  # the text that stands for the image in a prompt
    tokens: int
    grid: Grid
    size: Size  # width and height in pixels, as processed
    image: Image.Image | None = None

    @property
    def bytes(self) -> int:
        pixels = 0 if self.image is None else 3 * self.image.width * self.image.height
        return pixels + sum(tensor.nbytes for tensor in self.inputs.values())


@dataclass(frozen=True, slots=True)
class TokenPath:
    """One whole token sequence, prompt and response: a path from the root of a prefix tree to a leaf."""

    ids: np.ndarray  # [n]
    positions: np.ndarray  # [d, n]: d is 3 with M-RoPE, else 1
    views: tuple[EncodedView, ...]
    start: int  # of the response
    prompt: str = ""  # as text, before images take their tokens


class Encoder(ABC):
    """Renders, tokenizes and preprocesses for one checkpoint's processor and settings."""

    def __init__(self, processor: Any, config: Any, settings: ModelSettings, family: Family) -> None:
        self.processor = processor
        self.config = config
        self.tokenizer = processor.tokenizer
        self.settings = settings
        self.family: Family = family
        self.codec: Codec = CODECS[settings.codec]
        self.chat_template = chat_template_of(processor) or self.family.chat_template
        self.image_mark = str(processor.image_token)  # what a rendered prompt holds in an image's place
        self.image_token_id = image_token(processor, config, self.family)  # what one feature of an image replaces
        self.image_token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        named = (processor.image_token_ids, getattr(processor, "video_token_ids", ()), [self.image_token_id])
        # What is written in the place of images and videos.
        self.image_ids = sorted({token for ids in named for token in ids if isinstance(token, int)})
        self.end_of_turn = self.family.end_of_turn or self.tokenizer.eos_token
        self.end_id = self.tokenizer.convert_tokens_to_ids(self.end_of_turn)
        # Tokens of box text and of calls may be said again, as published protocols do; they can forge nothing.
        own = self.tokenizer.get_added_vocab()
        self.max_tokens = min(context_of(config) or MAX_TOKENS, MAX_TOKENS)  # of a prompt that is to be answered
        self._control = [
            token for token in own if token.startswith("<") and token not in TAGS and not self.codec.writes(token)
        ]
        self.cache_bytes = CACHE_BYTES
        self._views: OrderedDict[str, EncodedView] = OrderedDict()
        self._kept_bytes = 0
        self._lock = threading.Lock()  # of the cache: images may be encoded in one thread and used in another
        self.tokenizing = threading.RLock()  # a tokenizer pads by a state of its own, and is not read meanwhile
        self._bos = _leading_bos(self.tokenizer)

    # --- images

    def encode_views(self, views: Sequence[View], *, alone: bool = True) -> list[EncodedView]:
        """The views, preprocessed in one batch; those seen lately come from a cache. May be called from any thread.

        `alone` says whether a prompt shows one image only, which some families cut otherwise than one among several.

        Raises:
            PromptError: the model's processor takes no image of this form; no image is prepared then.
        """
        mark = "" if alone or not self.family.alone_differs else "#among"
        wanted = {view.key + mark: view for view in views}
        with self._lock:
            known = {key: self._views[key] for key in wanted if key in self._views}
        for is_crop in (False, True):
            group = {key: view for key, view in wanted.items() if key not in known and view.is_crop == is_crop}
            for view in group.values():
                with refusing(view):
                    self.processed_size(view.size, is_crop)
            if group:
                known |= self._prepare(group, is_crop=is_crop, alone=not mark)
        encoded = [known[view.key + mark] for view in views]
        self.keep(encoded)
        return encoded

    def keep(self, encoded: Iterable[EncodedView]) -> None:
        """Put views that were encoded before into the cache, as its newest.

        New ones take the place of the oldest beyond `cache_bytes`. Those of one call stay together whatever their size,
        so that a batch is made ready once.
        """
        with self._lock:
            views = {view.key: view for view in encoded}
            fresh = [view for key, view in views.items() if key not in self._views]
            self._views.update({view.key: view for view in fresh})
            self._kept_bytes += sum(view.bytes for view in fresh)
            for key in views:
                self._views.move_to_end(key)
            while fresh and self._kept_bytes > self.cache_bytes and len(self._views) > len(views):
                self._kept_bytes -= self._views.popitem(last=False)[1].bytes

    def forget(self) -> None:
        """Drop the views kept so far."""
        with self._lock:
            self._views.clear()
            self._kept_bytes = 0

    def processed_size(self, size: Size, is_crop: bool = False) -> Size:
        """Width and height that the processor gives an image of `size`; `size` itself where no text depends on it.

        Raises:
            PromptError: the processor takes no such image, as one that is far too thin.
        """
        if not self.family.pixel_limits:
            return size
        try:
            return limited_size(self.processor.image_processor, size, self.limits(is_crop))
        except ValueError as error:
            raise PromptError(f"a picture of {size[0]} × {size[1]} px: the model's processor says {error}") from error

    def sized(self, view: View) -> Image.Image:
        """The image of a view as the processor resizes it, for one that will do the rest elsewhere.

        An image of this size passes the same processor unchanged, whatever larger limits it has there.
        """
        if not self.family.pixel_limits:
            return self.reduced(view)
        width, height = self.processed_size(view.size, view.is_crop)
        if (width, height) == view.size:
            return view.image
        kind = InterpolationMode[Image.Resampling(self.processor.image_processor.resample).name]
        pixels = torch.from_numpy(np.array(view.image)).permute(2, 0, 1)
        resized = resize(pixels, [height, width], interpolation=kind, antialias=True)
        return Image.fromarray(resized.permute(1, 2, 0).contiguous().numpy())

    def reduced(self, view: View) -> Image.Image:
        """The image of a view, scaled down where it has more pixels than the settings allow it."""
        most = self.settings.crop_max_pixels if view.is_crop else self.settings.image_max_pixels
        width, height = view.size
        if most is None or width * height <= most:
            return view.image
        scale = (most / (width * height)) ** 0.5
        smaller = max(1, int(width * scale)), max(1, int(height * scale))
        return view.image.resize(smaller, Image.Resampling.BICUBIC)

    def bounds(self) -> PixelRange | None:
        """Limits of pixels that leave every image of `sized`, whole or crop, as it is; None where the processor takes
        none."""
        if not self.family.pixel_limits:
            return None
        return covering_limits(self.processor.image_processor, [self.limits(is_crop) for is_crop in (False, True)])

    def limits(self, is_crop: bool = False) -> PixelRange:
        """The smallest and the largest number of pixels of an image, or of a crop, for processors that take both."""
        own = self.processor.image_processor.size
        given = self.settings
        low = given.crop_min_pixels if is_crop else given.image_min_pixels
        high = given.crop_max_pixels if is_crop else given.image_max_pixels
        low, high = (limit or own[name] for limit, name in zip((low, high), PIXEL_LIMITS, strict=True))
        return dict(zip(PIXEL_LIMITS, (min(low, high), high), strict=True))

    @abstractmethod
    def _prepare(self, views: dict[str, View], *, is_crop: bool, alone: bool) -> dict[str, EncodedView]:
        """Views by their keys, prepared; `alone` as in `encode_views`.

        Raises:
            PromptError: the processor takes no image of this form.
        """

    # --- text

    def render(self, conversation: Conversation) -> str:
        """The prompt as text, with one image token per image, up to where the model speaks.

        Raises:
            PromptError: a message holds one of the model's control tokens or half a character, or the chat template
                refuses the conversation.
        """
        self.check_tools(conversation)
        for said in conversation.texts():
            # The mark of an image may itself be a token of the model; the text around it may hold none.
            for part in said.split(IMAGE):
                self._check_text(part)
        text = self._templated(as_messages(conversation), [json.loads(tool) for tool in conversation.tools])
        # Templates of models that always think open the thought themselves.
        is_open = conversation.prefill in TAGS and text.rstrip().endswith(conversation.prefill)
        opening = "" if is_open else conversation.prefill
        return (text if text.startswith(self._bos) else self._bos + text) + opening

    def _templated(self, messages: list[dict[str, Any]], tools: list[Any]) -> str:
        try:
            return self.processor.apply_chat_template(
                messages,
                chat_template=self.chat_template,
                tools=tools or None,
                tokenize=False,
                add_generation_prompt=True,
            )
        except (TemplateError, TypeError) as error:  # the second of a template that expects another form of content
            raise PromptError(f"the model's chat template refuses this conversation: {error}") from error

    def check_tools(self, conversation: Conversation) -> None:
        """Make sure that the chat template shows what a conversation holds of tools.

        Raises:
            PromptError: it leaves something out, or writes it in a form that is not read here.
        """
        if conversation.has_tools and (fault := self._tool_fault) is not None:
            raise PromptError(fault)

    @cached_property
    def _tool_fault(self) -> str | None:
        return tool_fault(self._templated, self.image_mark)

    def _check_text(self, text: str) -> None:
        if any(token in text for token in self._control):
            raise PromptError(f"the text {text[:80]!r} holds a control token of the model; take it out")
        if whole_text(text) != text:
            raise PromptError(f"the text {text[:80]!r} holds half a character (a lone surrogate); take it out")

    def encode(
        self, conversation: Conversation, responses: Sequence[str | None], *, max_tokens: int | None = None
    ) -> list[TokenPath]:
        """One path per response, whole paths tokenized; a response of None gives the prompt alone.

        A path with a response ends with the end of turn. The response starts where its tokens first differ from the
        prompt's, wherever a tokenizer merges across the edge.

        Raises:
            PromptError: what `render` raises, of responses too; an image that the model's processor does not take; a
                path longer than `max_tokens`, before anything of its size is allocated.
        """
        for response in responses:
            self._check_text(response or "")
        views = self.encode_views(conversation.views, alone=len(conversation.views) == 1)
        rendered = self.render(conversation)
        parts = rendered.split(self.image_mark)
        if len(parts) != len(views) + 1:
            raise PromptError(f"{len(parts) - 1} image tokens for {len(views)} pictures")
        prompt = self._expand(parts, views)
        texts = [prompt] + [prompt + response + self.end_of_turn for response in responses if response is not None]
        if max_tokens is not None and (longest := max(map(len, texts))) > LONGEST_TOKEN * max_tokens:
            raise PromptError(f"a text of {longest:,} characters; the model is shown at most {max_tokens:,} tokens")
        tokenised = self._tokenize(texts, views)
        if max_tokens is not None and (longest := max(map(len, tokenised))) > max_tokens:
            raise PromptError(f"a text of {longest:,} tokens; the model is shown at most {max_tokens:,}")
        prompt_ids, answered = tokenised[0], iter(tokenised[1:])
        paths = []
        for response in responses:
            ids = prompt_ids if response is None else next(answered)
            start = len(ids) if response is None else common_prefix(prompt_ids, ids)
            paths.append(TokenPath(ids, self._positions(ids, views), tuple(views), start, rendered))
        return paths

    @abstractmethod
    def _expand(self, parts: Sequence[str], views: Sequence[EncodedView]) -> str:
        """A prompt of these texts with `views` between them, as `_tokenize` takes it."""

    @abstractmethod
    def _tokenize(self, texts: Sequence[str], views: Sequence[EncodedView]) -> list[np.ndarray]:
        """The token ids of each text, all of which show `views`.

        Raises:
            PromptError: the processor refuses them.
        """

    @abstractmethod
    def _positions(self, ids: np.ndarray, views: Sequence[EncodedView]) -> np.ndarray:
        """The positions [d, n] of the tokens of one sequence."""

    def continued(self, prompt: TokenPath, ids: Sequence[int]) -> TokenPath:
        """The path of a prompt and the response that are these very tokens: nothing is tokenized again."""
        whole = np.concatenate([prompt.ids, np.array(ids, dtype=np.int64)])
        return replace(prompt, ids=whole, positions=self._positions(whole, prompt.views), start=len(prompt.ids))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated tokens, control tokens left out."""
        with self.tokenizing:
            return self.tokenizer.decode(ids, skip_special_tokens=True)


@contextmanager
def refusing(view: View) -> Iterator[None]:
    """What a processor says against an image, as an error that names the image."""
    try:
        yield
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        what = error if isinstance(error, PromptError) else f"{view.size[0]} × {view.size[1]} px: {error}"
        raise PromptError(f"{view.key[:80]}: {what}") from error


def chat_template_of(processor: Any) -> str | None:
    """The template of the processor or else of the tokenizer, where fine-tuned folders often keep it."""
    for owner in (processor, processor.tokenizer):
        template = getattr(owner, "chat_template", None)
        if isinstance(template, dict):  # several by name
            template = template.get("default")
        if template:
            return template
    return None


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading entries two arrays share."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length


def _leading_bos(tokenizer: Any) -> str:
    """The token that a tokenizer puts before every text by itself, which chat templates may leave to it."""
    plain, whole = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    return tokenizer.bos_token if len(whole) > len(plain) and whole[0] == tokenizer.bos_token_id else ""
