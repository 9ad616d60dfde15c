"""The warm-up's curriculum: drawn scenes in phases, with boxes and crops as honest labels of people are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Dataset

from visrl.box import Box, enclosing, with_sides_moved
from visrl.engines.base import seed_of
from visrl.models.encode import Encoder
from visrl.records import Sample
from visrl.scenes import find_question, scene_samples, true_box
from visrl.train.items import Item, TrainingRow
from visrl.train.rows import sft_rows

if TYPE_CHECKING:
    from visrl.train.config import Phase


class Curriculum(Dataset[Item]):
    """Drawn scenes in the order of a curriculum: a pure function of the index, read in sequence.

    Every scene is seen once. An item is one scene with its questions, so that the image is computed once for all.
    """

    def __init__(self, encoder: Encoder, phases: Sequence[Phase], batch_size: int) -> None:
        self.encoder = encoder
        self.phases = phases
        self.batch_size = batch_size

    def __len__(self) -> int:
        return self.batch_size * sum(phase.steps for phase in self.phases)

    def __getitem__(self, index: int) -> Item:
        left = index
        for phase in self.phases:
            if left < phase.steps * self.batch_size:
                break
            left -= phase.steps * self.batch_size
        samples = self._samples(phase, index)
        return Item(samples[0].image, tuple(self._rows(phase, index, samples)))

    def _samples(self, phase: Phase, index: int) -> list[Sample]:
        """The questions of scene `index`; where it allows none of the phase's kinds, of the next free one."""
        samples: list[Sample] = []
        place = phase.start + index
        while not samples:
            samples = scene_samples(
                "train", place, 1, per_scene=phase.per_scene, kinds=tuple(phase.kinds), with_box=True, looks=phase.looks
            )
            place += len(self)
        return samples

    def _rows(self, phase: Phase, index: int, samples: Sequence[Sample]) -> list[TrainingRow]:
        rows: list[TrainingRow] = []
        for sample in samples:
            chance = np.random.default_rng(seed_of(index, sample.id))
            looks = sample.true_looks if sample.looks is None else _labelled(sample, sample.looks, phase, chance)
            details = looks
            if phase.loose and looks:
                details = _moved(looks, chance, -phase.loose, phase.loose)
            if phase.margin and looks:
                looks = _moved(looks, chance, 0.0, phase.margin)
            labelled = sample.source.removeprefix("scenes-") in phase.boxes
            tasks = phase.tasks if labelled else [task for task in phase.tasks if task == "read"]
            off = details if phase.loose or phase.margin else None
            rows += sft_rows(self.encoder, replace(sample, box=None, looks=looks), tasks, details=off)
        return rows


def _labelled(sample: Sample, looks: tuple[Box, ...], phase: Phase, chance: np.random.Generator) -> tuple[Box, ...]:
    """The looks that a phase teaches for a question of several looks."""
    if not looks and chance.random() >= phase.at_once:
        return (true_box(*find_question(sample.id)),)
    return (enclosing(looks),) if phase.max_looks is not None and len(looks) > phase.max_looks else looks


def _moved(boxes: Sequence[Box], chance: np.random.Generator, low: float, high: float) -> tuple[Box, ...]:
    """`boxes` with each side moved outwards by a share of the box, between `low` and `high`."""
    return tuple(with_sides_moved(box, *chance.uniform(low, high, size=4)) for box in boxes)
