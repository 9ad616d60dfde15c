"""Which items go through a step together: items that show one image, so that its tokens are computed once for all.

Knows items by their image only.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import Sampler
from transformers import TrainerCallback

from visrl.sequences import batched


class SameImageSampler(Sampler[int]):
    """The items of an epoch in random order, those of one image beside each other in one batch.

    A pure function of seed and epoch. An image with more items than a batch holds fills several.
    """

    def __init__(self, images: Sequence[str], batch_size: int, seed: int) -> None:
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch))

    def set_epoch(self, epoch: int) -> None:
        """Go on with the order of `epoch`."""
        self.epoch = epoch

    def order(self, epoch: int) -> list[int]:
        """The items in the order in which `epoch` takes them."""
        chance = random.Random(f"{self.seed}/{epoch}")
        groups: dict[str, list[int]] = {}
        for number in chance.sample(range(len(self.images)), len(self.images)):
            groups.setdefault(self.images[number], []).append(number)
        return _filled([part for group in groups.values() for part in batched(group, self.batch_size)], self.batch_size)

    def sharing(self) -> int:
        """How many items of the first epoch meet another one of their image in their batch."""
        order, count = self.order(0), 0
        for batch in batched(order, self.batch_size):
            shown = [self.images[number] for number in batch]
            count += sum(shown.count(image) > 1 for image in shown)
        return count


class RepeatedSteps(Sampler[int]):
    """The order of `inner` with the items of every optimisation step `times` times one after another: so many updates
    are made from what was sampled once. The last step of an epoch is filled up with the first items of its order."""

    def __init__(self, inner: Any, step_size: int, times: int) -> None:
        self.inner = inner
        self.step_size = step_size
        self.times = times

    def __len__(self) -> int:
        return -(-len(self.inner) // self.step_size) * self.step_size * self.times

    def __iter__(self) -> Iterator[int]:
        order = list(self.inner)
        steps = batched(order, self.step_size)
        while len(steps[-1]) < self.step_size:
            steps[-1] = steps[-1] + order[: self.step_size - len(steps[-1])]
        return (number for step in steps for _ in range(self.times) for number in step)


class EpochOrder(TrainerCallback):
    """Tells the sampler which epoch begins, a resumed one included."""

    def __init__(self, sampler: SameImageSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))


def _filled(groups: list[list[int]], batch_size: int) -> list[int]:
    """The groups one after another so that each lies in one batch where any order allows: the next group that still
    fits goes into a batch, and one is broken only where none fits."""
    waiting: dict[int, deque[tuple[int, list[int]]]] = {size: deque() for size in range(1, batch_size + 1)}
    for place, group in enumerate(groups):
        waiting[len(group)].append((place, group))
    order: list[int] = []
    while True:
        room = batch_size - len(order) % batch_size
        fitting = [queue for size, queue in waiting.items() if queue and size <= room]
        if fitting:
            order += min(fitting, key=lambda queue: queue[0][0]).popleft()[1]
            continue
        left = [queue for queue in waiting.values() if queue]
        if not left:
            return order
        place, group = min(left, key=lambda queue: queue[0][0]).popleft()
        order += group[:room]
        waiting[len(group) - room].appendleft((place, group[room:]))
