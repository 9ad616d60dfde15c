"""The warm-up's curriculum: drawn scenes in phases, with boxes and crops as honest labels of people are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Dataset

from visrl.box import with_sides_moved
from visrl.engines.base import seed_of
from visrl.models.encode import Encoder
from visrl.records import Sample
from visrl.scenes import scene_samples
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
        place = index
        while not samples:
            samples = scene_samples(
                "train", place, 1, per_scene=phase.per_scene, kinds=tuple(phase.kinds), with_box=True
            )
            place += len(self)
        return samples

    def _rows(self, phase: Phase, index: int, samples: Sequence[Sample]) -> list[TrainingRow]:
        rows: list[TrainingRow] = []
        for sample in samples:
            details = None
            chance = np.random.default_rng(seed_of(index, sample.id))
            if phase.loose and sample.box is not None:
                details = [with_sides_moved(sample.box, *chance.uniform(-phase.loose, phase.loose, size=4))]
            if phase.margin and sample.box is not None:
                details = details or [sample.box]
                sample = replace(sample, box=with_sides_moved(sample.box, *chance.uniform(0.0, phase.margin, size=4)))
            labelled = sample.source.removeprefix("scenes-") in phase.boxes
            tasks = phase.tasks if labelled else [task for task in phase.tasks if task == "read"]
            rows += sft_rows(self.encoder, sample, tasks, details=details)
        return rows
