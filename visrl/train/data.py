"""What is trained on: samples (SFT), preferences (stages 1 and 2) or a curriculum, as data sets of items."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch.utils.data import Dataset
from transformers import TrainingArguments

from visrl.config import ConfigError
from visrl.conversation import PromptError, open_view
from visrl.data.sources import read_preferences, read_samples
from visrl.images import ImageError
from visrl.models.encode import Encoder
from visrl.records import Picture, Preference, RecordError, Sample, belongs_to
from visrl.rollout.protocols import protocol_of
from visrl.train.config import TrainConfig
from visrl.train.curriculum import Curriculum
from visrl.train.items import Collator, Item, TooLong, TrainingRow
from visrl.train.rows import preference_row, sft_rows


class SftSamples(Dataset[Item]):
    """Samples, those of one image together: the rows of all its questions are one item."""

    def __init__(self, encoder: Encoder, samples: Sequence[Sample], root: str | Path | None = None) -> None:
        groups: dict[str, list[Sample]] = {}
        for sample in samples:
            groups.setdefault(sample.image, []).append(sample)
        self.encoder = encoder
        self.root = root
        self.groups = list(groups.items())

    def __len__(self) -> int:
        return len(self.groups)

    def images(self) -> list[str]:
        """The image of each item."""
        return [image for image, _ in self.groups]

    def without_box(self) -> int:
        """Of how many samples nothing says where to look: they are trained as answers alone."""
        return sum(sample.true_looks is None for _, samples in self.groups for sample in samples)

    def __getitem__(self, index: int) -> Item:
        return self.item(index, self.groups[index][1])

    def item(self, index: int, samples: Sequence[Sample]) -> Item:
        """Item `index` with these of its samples."""
        rows = (row for sample in samples for row in sft_rows(self.encoder, sample, root=self.root))
        return Item(self.groups[index][0], tuple(rows))


class Preferences(Dataset[Item]):
    """Preference rows grouped into items: the rows of a question, which follow each other in the file (`belongs_to`),
    share a step. Stage 1 trains those of step "box", in which a side looks, and stage 2 all.

    With `mismatched` (KTO) each row also holds a response of the next item that has a row of its step, of as many crops
    where there is one: by turns the chosen and the rejected one, as both kinds are outputs of the data.
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

    def images(self) -> list[str]:
        """The image of each item."""
        return [preferences[0].images[0].ref for _, preferences in self.groups]

    def __getitem__(self, index: int) -> Item:
        return self.item(index, self.groups[index][1])

    def item(self, index: int, preferences: Sequence[Preference]) -> Item:
        """Item `index` with these of its preferences."""
        name = self.groups[index][0]
        steps = Counter(preference.step for preference in self.groups[index][1])
        rows = []
        for preference in preferences:
            row = preference_row(self.encoder, preference, self.root, name)
            if steps[preference.step] > 1:  # after other numbers of looks; the key tells rows apart
                row = replace(row, key=f"{row.key} after {len(preference.images) - 1} looks")
            rows.append(self._with_mismatched(index, row, preference) if self.mismatched else row)
        return Item(name, tuple(rows))

    def _with_mismatched(self, index: int, row: TrainingRow, preference: Preference) -> TrainingRow:
        def of_step(crops: int | None = None) -> Iterator[Preference]:
            for further in range(1, len(self.groups)):
                for other in self.groups[(index + further) % len(self.groups)][1]:
                    if other.step == row.step and crops in (None, len(other.images) - 1):
                        yield other

        other = next(of_step(len(preference.images) - 1), None) or next(of_step(), None)
        if other is None:
            raise RecordError(f"{row.key}: KTO needs a second item with a row of its step, and there is none")
        response = other.rejected if index % 2 else other.chosen
        return replace(row, responses=(*row.responses, ("mismatched", response)))


class Questions(Dataset[Sample]):
    """The samples that online reinforcement asks about."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def images(self) -> list[str]:
        """The image of each question."""
        return [sample.image for sample in self.samples]


def build_data(
    config: TrainConfig, encoder: Encoder, arguments: TrainingArguments
) -> tuple[Dataset[Item], Dataset[Item] | None]:
    """The items to train on, and those to validate on (None without `val_size`).

    Raises:
        ConfigError: no data named, none for this stage, or a curriculum where it does not belong.
    """
    if config.curriculum:
        if config.stage != "sft" or config.val_size:
            raise ConfigError("curriculum: only stage sft draws scenes with true boxes, and none to validate on")
        step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        return Curriculum(encoder, config.curriculum, step), None
    if not config.dataset:
        raise ConfigError("dataset: name the data to train on")
    places: dict[str, Any] = {"dataset_dir": config.dataset_dir, "image_root": config.image_root}
    dataset: SftSamples | Preferences
    if config.stage == "sft":
        samples = read_samples(config.dataset, with_box=True, **places)
        dataset = SftSamples(encoder, samples[: config.max_samples], config.image_root)
    else:
        dataset = Preferences(
            encoder,
            read_preferences(config.dataset, **places),
            stage=config.rl_stage,
            root=config.image_root,
            mismatched=config.loss.kl,
        )
        dataset.groups = dataset.groups[: config.max_samples]
    if not len(dataset):
        other = "; preferences over answers are trained with rl_stage=2" if config.stage != "sft" else ""
        raise ConfigError(f"dataset: {config.dataset} holds nothing for {config.stage_name}{other}")
    return split(dataset, config.val_size, arguments.seed) if config.val_size else (dataset, None)


def read_questions(config: TrainConfig, collator: Collator) -> tuple[Questions, str]:
    """The questions of online reinforcement, and a line on those that `drop_unusable` leaves out ("" for none).

    Raises:
        ConfigError: no data named, or no question in them that can be asked.
    """
    if not config.dataset:
        raise ConfigError("dataset: name the questions to train on")
    samples = read_samples(
        config.dataset, with_box=True, dataset_dir=config.dataset_dir, image_root=config.image_root
    )[: config.max_samples]  # fmt: skip
    usable, reasons, protocol = [], [], protocol_of(config)
    for sample in samples if config.drop_unusable else ():
        try:
            whole = open_view(Picture(sample.image, size=sample.size), config.image_root)
            (prompt,) = collator.encoder.encode(protocol.focus(sample.question, whole), [None])
            collator.check_length(prompt, sample.id)
            usable.append(sample)
        except (ImageError, PromptError, TooLong) as error:
            reasons.append(str(error))
    said = f"{len(reasons)} questions that cannot be asked are left out: {'; '.join(reasons[:3])}" if reasons else ""
    questions = Questions(usable if config.drop_unusable else samples)
    if not len(questions):
        raise ConfigError(f"dataset: {config.dataset} holds no question for {config.stage_name} that can be asked")
    return questions, said


def read_rollout_samples(config: TrainConfig) -> list[Sample]:
    """The held-out samples that every evaluation rolls out; none without `rollout_samples`.

    Raises:
        ConfigError: no data named to take them from, or data from which none are to be taken.
    """
    if not config.rollout_samples:
        if config.rollout_dataset is not None:
            raise ConfigError(
                f"rollout_dataset: say by rollout_samples how many questions of {config.rollout_dataset} every "
                "evaluation rolls out, or leave the key out"
            )
        return []
    if config.rollout_dataset is None:
        raise ConfigError("rollout_dataset: name the held-out samples that rollout_samples are taken from")
    places: dict[str, Any] = {"dataset_dir": config.dataset_dir, "image_root": config.image_root}
    return read_samples(config.rollout_dataset, with_box=True, **places)[: config.rollout_samples]


Items = TypeVar("Items", bound="SftSamples | Preferences")


def split(dataset: Items, val_size: float, seed: int) -> tuple[Items, Items]:
    """Items to train on and items to validate on: of all images a share `val_size` (below 1) or so many, all items
    of an image on one side, so that nothing seen in training is validated on.

    Raises:
        ConfigError: nothing would be left to train on.
    """
    images = sorted(set(dataset.images()))
    count = max(1, round(val_size * len(images))) if val_size < 1 else round(val_size)
    if count >= len(images):
        raise ConfigError(f"val_size: {count} pictures to validate on leave none of {len(images)} to train on")
    held_out = set(random.Random(seed).sample(images, count))
    seen = dataset.images()
    sides = [[n for n, image in enumerate(seen) if (image in held_out) == wanted] for wanted in (False, True)]
    return part_of(dataset, sides[0]), part_of(dataset, sides[1])


def part_of(dataset: Items, members: Sequence[int]) -> Items:
    """The items of `dataset` with these numbers, as a data set."""
    part = copy(dataset)
    part.groups = [dataset.groups[number] for number in members]  # type: ignore[assignment]
    return part
