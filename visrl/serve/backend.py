"""What the application asks of whoever computes: `ContinuousBatcher` here, or `Upstream` in front of vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from visrl.box import CropRule, Size
from visrl.codecs import Codec
from visrl.engines.base import Completion
from visrl.engines.decoding import DecodingEngine
from visrl.models.adapters import Adapter
from visrl.serve.requests import QueuedRequest

State = Literal["loading", "ready", "failed", "stopped"]


class Backend(Protocol):
    """What the application asks: one request at a time, batched or passed on as the backend likes."""

    @property
    def failure(self) -> Exception | None: ...
    @property
    def state(self) -> State: ...
    @property
    def codec(self) -> Codec: ...
    @property
    def crop_rule(self) -> CropRule: ...
    def processed_size(self, size: Size) -> Size: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    @property
    def is_passed_on(self) -> bool: ...  # whether requests may hold vLLM's own fields
    async def submit(self, request: QueuedRequest) -> Completion: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def check_adapter(self, adapter: Adapter) -> None: ...


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine and the crop rule of its checkpoint."""

    engine: DecodingEngine
    crop_rule: CropRule = "exact"
