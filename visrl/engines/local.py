"""The in-process engine: continuous batching over a prefix-shared KV cache, for a checkpoint and for a live policy.

Prompts about one image form one prefix tree, which is one row of the KV cache; its sequences decode side by side in
that row, each seeing its own path only. The prefix cache of the last batch is kept, so that step 2 of the same
questions prefills nothing but its crops. Greedy texts equal those of the model's plain `generate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from visrl.box import Size
from visrl.codecs import Codec
from visrl.conversation import Conversation
from visrl.engines.base import Completion, Request, Sampling
from visrl.engines.cached import CachedBatch, CachedModel
from visrl.engines.decoding import DecodeBatch, OnToken
from visrl.engines.plain import PlainBatch, PlainModel
from visrl.engines.recompute import RecomputedBatch, try_out
from visrl.engines.stateful import StatefulBatch, StatefulModel
from visrl.models.adapters import Adapter, load_merged, place_adapter, read_adapter
from visrl.models.chain import adapter_chain
from visrl.models.encode import EncodedView, Encoder
from visrl.models.load import Layout, load_encoder, note_dtype, note_plain
from visrl.models.modes import evaluating
from visrl.models.plain_encoder import PlainEncoder
from visrl.models.settings import ModelSettings
from visrl.packing.tree import group_by_image
from visrl.sequences import batched

LONG_TEXT = 4096  # characters


class LocalEngine:
    """Samples from a model in this process: a `DecodingEngine`. Not thread-safe: feed it from one thread.

    The model stays what it is to everybody else: attention and modes are an engine's own for the length of a call.
    """

    def __init__(self, model: torch.nn.Module, encoder: Encoder, *, name: str = "local", batch_size: int = 64) -> None:
        self.model = model
        self.encoder = encoder
        self.name = name
        self.batch_size = batch_size  # trees (images) computed side by side
        self._decoder: PlainModel | StatefulModel | CachedModel
        if isinstance(encoder, PlainEncoder):
            self._decoder = PlainModel(model, encoder)
        else:
            self._decoder = (StatefulModel if encoder.family.recurrent else CachedModel)(model, encoder)
        self._adapter: Adapter | None = None
        self._wrapped: Any = None  # the model as PEFT wraps it, while it has an adapter on it

    @staticmethod
    def load(
        path: str | Path,
        device: str | None = None,
        *,
        adapter: str | Path | Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        settings: ModelSettings | None = None,
        trust_remote_code: bool = False,
        layout: Layout = "auto",
    ) -> LocalEngine:
        """The engine of a checkpoint, with an adapter merged into it where one is given, once a first token was tried;
        on a GPU in bf16 where there is one.

        Raises:
            CheckpointError: nothing there that can be loaded.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
        merged = [read_adapter(one) for one in adapter_chain(path, adapter)]
        encoder = load_encoder(path, settings, trust_remote_code=trust_remote_code, layout=layout)
        model = load_merged(path, merged, device, dtype=dtype, trust_remote_code=trust_remote_code)
        note_dtype(path, dtype)
        note_plain(path, encoder)
        try_out(model, encoder, path)
        return LocalEngine(model, encoder, name=str(path))

    @property
    def codec(self) -> Codec:
        return self.encoder.codec

    @property
    def prefilled_tokens(self) -> int:
        """Prompt tokens computed so far; those that the prefix cache held are not among them."""
        return self._decoder.prefilled_tokens

    def processed_size(self, size: Size, is_crop: bool = False) -> Size:
        """Width and height that the processor gives an image of `size`."""
        return self.encoder.processed_size(size, is_crop)

    def complete(
        self, conversations: Sequence[Conversation], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        """One completion per seed (see `Engine`)."""
        requests = [
            Request(conversation, sampling, seed)
            for conversation, own in zip(conversations, seeds, strict=True)
            for seed in own
        ]
        completions = iter(self.generate(requests))
        return [[next(completions) for _ in own] for own in seeds]

    def generate(self, requests: Sequence[Request], on_token: OnToken | None = None) -> list[Completion]:
        """One completion per request. `on_token(number, read)` is called after every token, `read()` being the text of
        that request so far, and stops it by False.
        """
        done: dict[int, Completion] = {}
        groups = list(group_by_image({n: one.conversation.views for n, one in enumerate(requests)}).values())
        long = [members for members in groups if any(_is_long(requests[n].conversation) for n in members)]
        short = [members for members in groups if members not in long]
        with evaluating(self.model):
            for batch in [*batched(short, self.batch_size), *([members] for members in long)]:
                numbers = [n for members in batch for n in members]
                running = self.begin(on_token)
                done |= running.add({n: requests[n] for n in numbers})
                while len(running):
                    done |= running.step()
        return [done[n] for n in range(len(requests))]

    def begin(self, on_token: OnToken | None = None) -> DecodeBatch:
        """An empty running batch, which requests join and leave between steps; one of an engine is in use at a time."""
        if isinstance(self._decoder, PlainModel):
            return PlainBatch(self._decoder, on_token)
        if isinstance(self._decoder, StatefulModel):
            return StatefulBatch(self._decoder, on_token)
        if self.encoder.family.cacheable:
            return CachedBatch(self._decoder, on_token)
        return RecomputedBatch(self.model, self.encoder, on_token)

    def prepare(self, conversation: Conversation) -> list[EncodedView]:
        """The images of a conversation, ready for the vision tower; may run in another thread than `generate`."""
        return self.encoder.encode_views(conversation.views, alone=len(conversation.views) == 1)

    def keep(self, prepared: Iterable[EncodedView]) -> None:
        """Have what `prepare` gave at hand for the next `generate`."""
        self.encoder.keep(prepared)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens."""
        return self.encoder.decode(list(ids))

    def check_adapter(self, adapter: Adapter) -> None:
        """Make sure that an adapter has its place on this model; may run in another thread than `generate`.

        Raises:
            CheckpointError: it has not.
        """
        with torch.device("meta"):
            skeleton = type(self.model)(deepcopy(self.model.config))
        place_adapter(skeleton, adapter, self.name)

    def use_adapter(self, adapter: Adapter | None) -> None:
        """Have the model compute with an adapter on it, unmerged, or as it is; between two batches.

        Raises:
            CheckpointError: an adapter that has no place on it (see `check_adapter`); the model is of no more use then.
        """
        if adapter is self._adapter:
            return
        self.forget()
        if self._wrapped is not None:
            self._wrapped.unload()
        self._wrapped = None if adapter is None else place_adapter(self.model, adapter, self.name)
        self._adapter = adapter

    def forget(self) -> None:
        """Drop the prefix cache: the model's weights have changed, memory is wanted, or other questions begin."""
        if isinstance(self._decoder, CachedModel):
            self._decoder.prefix = None


def _is_long(conversation: Conversation) -> bool:
    """Whether a conversation decodes by itself: every mask of a batch is as large as that of its longest text."""
    return sum(map(len, conversation.texts())) > LONG_TEXT
