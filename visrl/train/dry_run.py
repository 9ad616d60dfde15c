"""What a training would do, before it does it: items, tokens, steps, rows that cannot be used, and memory."""

from __future__ import annotations

import math
import resource
import sys
import tempfile
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset
from transformers import PrinterCallback, TrainingArguments

from visrl.conversation import PromptError
from visrl.images import ImageError
from visrl.packing.pack import PackedBatch
from visrl.progress import progress
from visrl.sequences import batched
from visrl.train.arguments import training_arguments
from visrl.train.config import TrainConfig
from visrl.train.curriculum import Curriculum
from visrl.train.data import Preferences
from visrl.train.distributed import processes_wanted
from visrl.train.items import Collator, TooLong
from visrl.train.reference import reference_logps
from visrl.train.sampler import SameImageSampler
from visrl.train.trainer import VisrlTrainer

NAMED = 3  # reasons named of each kind of drop
KINDS: dict[str, type[ValueError]] = {
    "over cutoff_len": TooLong,
    "whose picture cannot be opened": ImageError,
    "that this model cannot be shown": PromptError,
}
UNUSABLE = tuple(KINDS.values())


@dataclass
class DatasetScan:
    """What every item of a data set is: its tokens when each is computed once, and when each row is computed by
    itself."""

    tokens: list[int] = field(default_factory=list)
    separate: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)  # kind → what was wrong with each row

    @property
    def rows(self) -> int:
        """How many rows were dropped."""
        return sum(map(len, self.dropped.values()))

    def add(self, packed: PackedBatch) -> None:
        """Count an item."""
        self.tokens.append(packed.tokens)
        self.separate += packed.separate_tokens

    def format_counts(self, dropping: bool) -> str:
        """Counts, in a few lines."""
        total = sum(self.tokens)
        lines = [
            f"{len(self.tokens)} items, {total} tokens computed once each ({self.separate} as separate sequences), "
            f"{max(self.tokens, default=0)} in the longest item"
        ]
        for kind, reasons in self.dropped.items():
            what = "left out" if dropping else "training would stop at them (drop_unusable=true leaves them out)"
            lines.append(f"{len(reasons)} rows {kind}: {what}")
            lines += [f"  {reason}" for reason in reasons[:NAMED]]
            lines += [f"  … and {len(reasons) - NAMED} more"] * (len(reasons) > NAMED)
        return "\n".join(lines)


def scan_dataset(dataset: Any, collator: Collator) -> tuple[DatasetScan, Any]:
    """Encode every item of `dataset` as training would; what was found, and the part of it that can be used: of an item
    with a row that cannot, the others.

    A curriculum cannot leave anything out: its scenes are drawn, and each is as good as the next.
    """
    if isinstance(dataset, Curriculum):
        found = DatasetScan()
        for number in progress(range(len(dataset)), "reading items"):
            found.add(collator([dataset[number]])["batch"].packed)
        return found, dataset
    dropped = DatasetScan()
    if not (isinstance(dataset, Preferences) and dataset.mismatched):
        found, part = _scan_once(dataset, collator, dropped)
        return replace(found, dropped=dropped.dropped), part
    part = copy(dataset)
    part.mismatched = False  # a row is not to blame for the response of another that it is shown with
    found, part = _scan_once(part, collator, dropped)
    part.mismatched = True
    while True:  # whatever leaves changes whose response another row is shown with
        count = dropped.rows
        found, part = _scan_once(part, collator, dropped)
        if dropped.rows == count:
            return replace(found, dropped=dropped.dropped), part


def _scan_once(dataset: Any, collator: Collator, dropped: DatasetScan) -> tuple[DatasetScan, Any]:
    """What the items of `dataset` are, and those that can be used; what cannot is added to `dropped`."""
    found, groups = DatasetScan(), []
    for number in progress(range(len(dataset)), "reading items"):
        name, records = dataset.groups[number]
        try:
            packed = collator([dataset[number]])["batch"].packed
        except UNUSABLE:
            records = _usable(dataset, number, collator, dropped)
            if not records:
                continue
            packed = collator([dataset.item(number, records)])["batch"].packed
        found.add(packed)
        groups.append((name, records))
    part = copy(dataset)
    part.groups = groups
    return found, part


def _usable(dataset: Any, number: int, collator: Collator, dropped: DatasetScan) -> list[Any]:
    """The rows of an item that can be used, each tried by itself; the others are added to `dropped`."""
    usable = []
    for record in dataset.groups[number][1]:
        try:
            collator([dataset.item(number, [record])])
        except UNUSABLE as error:
            kind = next(kind for kind, fault in KINDS.items() if isinstance(error, fault))
            dropped.dropped.setdefault(kind, []).append(str(error))
        else:
            usable.append(record)
    return usable


def dry_run(
    dataset: Any,
    found: DatasetScan,
    kind: type[VisrlTrainer],
    *,
    visrl_config: TrainConfig,
    model: nn.Module,
    **common: Any,
) -> None:
    """Print steps and memory of a training by the trainer `kind`. Memory is measured: the heaviest step is taken as it
    would be (twice, as the optimiser holds nothing before the first), on this machine, and what it did is thrown away
    with the process."""
    config = visrl_config
    with tempfile.TemporaryDirectory() as scratch:
        quiet = {
            "output_dir": Path(scratch), "max_steps": 2, "save_strategy": "no", "eval_strategy": "no", "val_size": 0.0,
            "rollout_samples": 0, "load_best_model_at_end": False, "metric_for_best_model": None, "do_eval": False,
            "eval_on_start": False, "logging_strategy": "no", "disable_tqdm": True,
            "train_sampling_strategy": "sequential",
        }  # fmt: skip
        arguments = training_arguments(config.model_copy(update=quiet))
        heaviest = _heaviest_step(dataset, found.tokens, arguments)
        if config.needs_reference:
            reference_logps(
                model, Subset(dataset, heaviest), common["data_collator"],
                batch_size=max(8, arguments.per_device_train_batch_size), cache=Path(scratch, "reference.json"), key="",
                features=common["features"],
            )  # fmt: skip
        trainer = kind(
            model=model, args=arguments, train_dataset=Subset(dataset, heaviest * 2), visrl_config=config, **common
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    where = "a GPU" if arguments.device.type == "cuda" else "the process"
    print(
        f"{_steps(config, len(found.tokens))} steps of {_batch(config)} items\n"
        f"memory of {where}: {peak_bytes(arguments.device) / 1e6:.0f} MB at the peak, measured over the heaviest "
        f"step; {weights / 1e6:.0f} MB of it are weights, {trained / 1e6:.2f} million of which are trained\n"
        "dry run: nothing was written"
    )


def _heaviest_step(dataset: Any, tokens: list[int], arguments: TrainingArguments) -> list[int]:
    """The items of the optimisation step of the first epoch that holds the batch with most tokens, that batch first."""
    size = arguments.train_batch_size
    shuffled = not isinstance(dataset, Curriculum)
    order = SameImageSampler(dataset.images(), size, arguments.seed).order(0) if shuffled else list(range(len(tokens)))
    batches = batched(order, size)
    heavy = max(range(len(batches)), key=lambda n: sum(tokens[item] for item in batches[n]))
    first = heavy - heavy % arguments.gradient_accumulation_steps
    members = batches[first : first + arguments.gradient_accumulation_steps]
    return [
        item
        for batch in (batches[heavy], *(batch for batch in members if batch is not batches[heavy]))
        for item in batch
    ]


def _batch(config: TrainConfig) -> int:
    """Items of an optimisation step, over all processes."""
    given = training_arguments(config)
    return given.train_batch_size * given.gradient_accumulation_steps * processes_wanted(config.processes)


def _steps(config: TrainConfig, items: int) -> int:
    """Optimisation steps, as the trainer counts them."""
    given = training_arguments(config)
    if given.max_steps > 0:
        return given.max_steps
    batches = math.ceil(items / (given.train_batch_size * processes_wanted(config.processes)))
    return math.ceil(given.num_train_epochs * max(1, math.ceil(batches / given.gradient_accumulation_steps)))


def peak_bytes(device: torch.device) -> int:
    """Bytes: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # what getrusage says here begins with the peak of the process that started this one
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
