"""Training data as items: drawn scenes with a curriculum, samples with boxes (SFT), preferences (stages 1 and 2)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from torch.utils.data import Dataset

from visrl.box import Box
from visrl.config import ConfigError
from visrl.conversation import (
    Conversation,
    Message,
    PromptError,
    View,
    answer_conversation,
    crop_view,
    focus_conversation,
    open_view,
)
from visrl.engines.base import seed_of
from visrl.models.encode import Encoder
from visrl.prompts import IMAGE
from visrl.records import Picture, Preference, RecordError, Sample, belongs_to
from visrl.rollout.protocols import plain_conversation
from visrl.scenes import close_up, find_question, scene_samples
from visrl.train.items import Item, Role, Row

if TYPE_CHECKING:
    from visrl.train.config import Phase, Task


class Curriculum(Dataset[Item]):
    """Drawn scenes in the order of a curriculum: a pure function of the index, read in sequence.

    Every scene is seen once. An item is one scene with its questions, so that the picture is computed once for all.
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
                "train",
                place,
                1,
                per_scene=phase.per_scene,
                kinds=tuple(phase.kinds),
                with_box=True,
                max_tags=phase.max_tags,
            )
            place += len(self)
        return samples

    def _rows(self, phase: Phase, index: int, samples: Sequence[Sample]) -> list[Row]:
        rows: list[Row] = []
        for sample in samples:
            if phase.grid is not None and sample.box is not None:
                sample = replace(sample, box=_on_grid(sample.box, phase.grid))
            detail = None
            chance = np.random.default_rng(seed_of(index, sample.id))
            if phase.close_up is not None:
                low, high = phase.close_up
                detail = close_up(*find_question(sample.id), low + (high - low) * chance.random())
            if phase.loose and sample.box is not None:
                detail = _with_sides_moved(detail or sample.box, -phase.loose, phase.loose, chance)
            if phase.margin and sample.box is not None:
                detail = detail or sample.box
                sample = replace(sample, box=_with_sides_moved(sample.box, -phase.margin, 0.0, chance))
            rows += sft_rows(self.encoder, sample, phase.tasks, detail=detail)
        return rows


def _with_sides_moved(box: Box, outward: float, inward: float, chance: np.random.Generator) -> Box:
    """`box` with each side moved by a chance share of its width or height, between `outward` (below 0) and `inward`."""
    dx0, dy0, dx1, dy1 = chance.uniform(outward, inward, size=4)
    corners = (box.x0 + dx0 * box.width, box.y0 + dy0 * box.height, box.x1 - dx1 * box.width, box.y1 - dy1 * box.height)
    return Box(*(min(1.0, max(0.0, corner)) for corner in corners))


def _on_grid(box: Box, grid: int) -> Box:
    """The smallest box around `box` whose corners are multiples of 1/grid."""
    low = [math.floor(value * grid) / grid for value in (box.x0, box.y0)]
    high = [math.ceil(value * grid) / grid for value in (box.x1, box.y1)]
    return Box(*low, *high)


def sft_rows(
    encoder: Encoder,
    sample: Sample,
    tasks: Sequence[Task] = ("locate", "read"),
    *,
    root: str | Path | None = None,
    detail: Box | None = None,
) -> list[Row]:
    """The rows that a sample with a true box gives: (image, question → box) and (image, question, crop → answer). One
    without a box gives (image, question → answer), asked in the one turn of the evaluation's mode `no_box`: the prompts
    of the two steps ask for a box first, and what answers them without one would unlearn to look.

    "point" gives (image, question → first corner of the box, in tenths): a curriculum's way to where before how large.
    The crop is that of the box as its text says it, so that warm-up and rollout see the same windows; `detail` puts
    another box in its place (a curriculum's close-up).

    Raises:
        ImageError, PromptError: the picture cannot be opened, or the row not be shown to the model.
    """
    name = sample.id
    if sample.box is None and not sample.answer:
        raise PromptError(f"row {name} has neither a box nor an answer: there is nothing to learn from it")
    whole = open_view(Picture(sample.image, size=sample.size), root)
    if sample.box is None:
        talk = plain_conversation(sample.question, whole)
        return [Row(f"{name}/answer", "answer", talk, (("target", sample.answer),))] if "read" in tasks else []
    try:
        processed = encoder.processed_size(whole.size)
    except PromptError as error:
        raise PromptError(f"row {name}, {sample.image[:80]}: {error}") from error
    text = encoder.codec.format(sample.box, whole.size, processed)
    said = encoder.codec.parse(text, whole.size, processed)
    rows = []
    if "locate" in tasks:
        talk = focus_conversation(sample.question, whole)
        rows.append(Row(f"{name}/box", "box", talk, (("target", text),)))
    if "point" in tasks:
        corner = _on_grid(sample.box, 10)
        talk = focus_conversation(sample.question, whole)
        rows.append(Row(f"{name}/point", "box", talk, (("target", f"[{corner.x0:.1f}, {corner.y0:.1f}]"),)))
    if "read" in tasks and sample.answer:
        talk = answer_conversation(sample.question, whole, crop_of(whole, detail or said, encoder))
        rows.append(Row(f"{name}/answer", "answer", talk, (("target", sample.answer),)))
    return rows


def crop_of(whole: View, box: Box, encoder: Encoder) -> View:
    """The crop of `box`, under the checkpoint's own crop rule."""
    return crop_view(whole, Picture(whole.key, box), encoder.settings.crop_rule)


class SftSamples(Dataset[Item]):
    """Samples, those of one picture together: the rows of all its questions are one item."""

    def __init__(self, encoder: Encoder, samples: Sequence[Sample], root: str | Path | None = None) -> None:
        groups: dict[str, list[Sample]] = {}
        for sample in samples:
            groups.setdefault(sample.image, []).append(sample)
        self.encoder = encoder
        self.root = root
        self.groups = list(groups.items())

    def __len__(self) -> int:
        return len(self.groups)

    def pictures(self) -> list[str]:
        """The picture of each item."""
        return [image for image, _ in self.groups]

    def without_box(self) -> int:
        """How many samples have no box: they are trained as answers alone."""
        return sum(sample.box is None for _, samples in self.groups for sample in samples)

    def __getitem__(self, index: int) -> Item:
        return self.item(index, self.groups[index][1])

    def item(self, index: int, samples: Sequence[Sample]) -> Item:
        """Item `index` with these of its samples."""
        rows = (row for sample in samples for row in sft_rows(self.encoder, sample, root=self.root))
        return Item(self.groups[index][0], tuple(rows))


class Preferences(Dataset[Item]):
    """Preference rows grouped into items: both rows of a question, which follow each other in the file (`belongs_to`),
    share a step.

    With `mismatched` (KTO) each row also holds a response of the next item that has a row of its step: by turns the
    chosen and the rejected one, as both kinds are outputs of the data.
    """

    def __init__(
        self,
        encoder: Encoder,
        preferences: Sequence[Preference],
        *,
        stage: int,
        root: str | Path | None = None,
        mismatched: bool = False,
    ) -> None:
        items: list[list[Preference]] = []
        for preference in preferences:
            if items and belongs_to(items[-1], preference):
                items[-1].append(preference)
            else:
                items.append([preference])
        # Numbered before anything is left out: an item's name says which it is, whoever else has its id.
        named = ((f"item {n}, row {item[0].id}", item) for n, item in enumerate(items, start=1))
        wanted = ((name, [one for one in item if stage == 2 or one.step == "box"]) for name, item in named)
        self.mismatched = mismatched
        self.encoder = encoder
        self.root = root
        self.groups = [(name, item) for name, item in wanted if item]

    def __len__(self) -> int:
        return len(self.groups)

    def pictures(self) -> list[str]:
        """The picture of each item."""
        return [preferences[0].images[0].ref for _, preferences in self.groups]

    def __getitem__(self, index: int) -> Item:
        return self.item(index, self.groups[index][1])

    def item(self, index: int, preferences: Sequence[Preference]) -> Item:
        """Item `index` with these of its preferences."""
        name = self.groups[index][0]
        rows = [preference_row(self.encoder, preference, self.root, name) for preference in preferences]
        if self.mismatched:
            rows = [self._with_mismatched(index, row) for row in rows]
        return Item(name, tuple(rows))

    def _with_mismatched(self, index: int, row: Row) -> Row:
        for further in range(1, len(self.groups)):
            for other in self.groups[(index + further) % len(self.groups)][1]:
                if other.step == row.step:
                    response = other.rejected if index % 2 else other.chosen
                    return replace(row, responses=(*row.responses, ("mismatched", response)))
        raise RecordError(f"{row.key}: KTO needs a second item with a row of its step, and there is none")


Items = TypeVar("Items", bound="SftSamples | Preferences")


def split(dataset: Items, val_size: float, seed: int) -> tuple[Items, Items]:
    """Items to train on and items to validate on: of all pictures a share `val_size` (below 1) or so many, all items
    of a picture on one side, so that nothing seen in training is validated on.

    Raises:
        ConfigError: nothing would be left to train on.
    """
    pictures = sorted(set(dataset.pictures()))
    count = max(1, round(val_size * len(pictures))) if val_size < 1 else round(val_size)
    if count >= len(pictures):
        raise ConfigError(f"val_size: {count} pictures to validate on leave none of {len(pictures)} to train on")
    held_out = set(random.Random(seed).sample(pictures, count))
    seen = dataset.pictures()
    sides = [[n for n, picture in enumerate(seen) if (picture in held_out) == wanted] for wanted in (False, True)]
    return part_of(dataset, sides[0]), part_of(dataset, sides[1])


def part_of(dataset: Items, members: Sequence[int]) -> Items:
    """The items of `dataset` with these numbers, as a data set."""
    part = copy(dataset)
    part.groups = [dataset.groups[number] for number in members]  # type: ignore[assignment]
    return part


def preference_row(
    encoder: Encoder, preference: Preference, root: str | Path | None = None, item: str | None = None
) -> Row:
    """The row of one preference: its prompt and pictures with the chosen and the rejected response. `item` is the name
    of its item where it belongs to a data set, whose ids may repeat."""
    whole_picture, *details = preference.images
    whole = open_view(whole_picture, root)
    views = [whole] + [crop_of(whole, detail.crop, encoder) for detail in details if detail.crop]
    talk = Conversation((*preference.context, Message("user", preference.prompt)), tuple(views))
    if preference.context:
        _check_kept(encoder, talk)
    responses: tuple[tuple[Role, str], ...] = (("chosen", preference.chosen), ("rejected", preference.rejected))
    return Row(f"{item or preference.id}/{preference.step}", preference.step, talk, responses, preference.weight)


def _check_kept(encoder: Encoder, talk: Conversation) -> None:
    """That the model's chat template shows the whole conversation: some leave out system messages or earlier turns.

    Raises:
        PromptError: it does not; the message says what is left out.
    """
    shown = encoder.render(talk)
    for message in talk.messages:
        if any(part.strip() not in shown for part in message.text.split(IMAGE)):
            raise PromptError(
                f"the model's chat template leaves out what the {message.role} says before the question: "
                f"{message.text[:60]!r}; take it out of the data, or train another model"
            )
