"""Image features kept over steps and epochs where nothing that makes them is trained: the vision tower runs once per
distinct image of a run, as far as memory allows."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from visrl.models.calls import Features, features_input, image_features, takes_features
from visrl.models.encode import EncodedView
from visrl.models.family import Family
from visrl.models.parts import trains_features
from visrl.packing.pack import PackedBatch, moved
from visrl.train.distributed import say


def open_features(model: nn.Module, family: Family, limit: int) -> FeatureCache | None:
    """A cache of `limit` bytes for `model`, or None where its features cannot be kept.

    They are computed each time, then. Where nothing but the installed transformers stands in the way, a line says so.
    """
    if FeatureCache.serves(model, family):
        return FeatureCache(model, family, limit)
    if family.keeps_features and not trains_features(model):
        say(
            f"features of pictures are computed in every step: {family.name} in transformers "
            f"{transformers.__version__} takes none that are ready-made"
        )
    return None


class FeatureCache:
    """Features by image, in main memory, up to a number of bytes. What came first stays: each epoch asks for every
    image once, so that making room for the latest would help none."""

    def __init__(self, model: nn.Module, family: Family, limit: int) -> None:
        assert takes_features(model), f"{family.name} would not look at features in the place of pictures"
        self.model = model
        self.family = family
        self.limit = limit
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self._kept: dict[str, Features] = {}

    @staticmethod
    def serves(model: nn.Module, family: Family) -> bool:
        """Whether features may be kept: nothing that makes them is trained, and the model takes them ready-made."""
        return family.keeps_features and takes_features(model) and not trains_features(model)

    @torch.no_grad()
    def fill(self, packed: PackedBatch, device: torch.device) -> None:
        """Put features, on `device`, in the place of images in every call of `packed`."""
        for call in packed.calls:
            if call.views:
                for name in self.family.takes:
                    call.inputs.pop(name, None)
                call.inputs |= features_input([self._features_of(view, device) for view in call.views])

    def _features_of(self, view: EncodedView, device: torch.device) -> Features:
        kept = self._kept.get(view.key)
        if kept is not None:
            self.hits += 1
            return moved(kept, device)
        self.misses += 1
        features = image_features(self.model, moved(view.inputs, device))
        size = _bytes(features)
        if self.bytes + size <= self.limit:
            self._kept[view.key] = moved(features, "cpu")
            self.bytes += size
        return features


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(part) for part in (value.values() if isinstance(value, dict) else value))
