"""Training items and their collation: conversations with responses in, one packed batch out. Knows no loss.

An item is what belongs together in one optimisation step: the rows of one question, or of all questions of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import torch

from visrl.conversation import Conversation, PromptError
from visrl.models.encode import Encoder, TokenPath
from visrl.packing.lay_out import lay_out
from visrl.packing.pack import BUCKET, PackedBatch
from visrl.records import RecordError, Step

Role = Literal["target", "chosen", "rejected", "mismatched", "sampled"]


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """One conversation with its responses: a target (SFT), or chosen and rejected, and for KTO a response of another
    row. `key` names it in the cache of reference log-probabilities."""

    key: str
    step: Step
    conversation: Conversation
    responses: tuple[tuple[Role, str], ...]
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Item:
    """What is optimised together: the box and the answer row of a question, or all rows of an image."""

    id: str
    rows: tuple[TrainingRow, ...]


@dataclass(frozen=True, slots=True)
class Branch:
    """What a branch of a packed batch is: the role of which row of which item."""

    item: int
    row: str
    step: Step
    role: Role
    weight: float


@dataclass(slots=True)
class TrainingBatch:
    """A packed batch and what its branches are, one for each response; `items` counts whole items, `targets` response
    tokens. An item of stage 2 has four branches: chosen and rejected of its box row and of its answer row."""

    packed: PackedBatch
    branches: list[Branch]
    items: int
    targets: int


class TooLong(RecordError):
    """A sequence over `cutoff_len`."""


def format_row(key: str) -> str:
    """What an error calls the row of a key; that of a preference names its item, for its id may stand for several."""
    return key if key.startswith("item ") else f"row {key}"


def encode_item(encoder: Encoder, number: int, item: Item) -> tuple[list[TokenPath], list[Branch]]:
    """The token paths of an item's responses and what each is.

    Raises:
        PromptError: a row that the model cannot be shown; the message names it.
    """
    paths: list[TokenPath] = []
    branches: list[Branch] = []
    for row in item.rows:
        try:
            paths += encoder.encode(row.conversation, [text for _, text in row.responses])
        except PromptError as error:
            raise PromptError(f"{format_row(row.key)}: {error}") from error
        branches += [Branch(number, row.key, row.step, role, row.weight) for role, _ in row.responses]
    return paths, branches


class Collator:
    """Items → `TrainingBatch`. Items that show the same image share its tokens. With `ends` the last token of each
    response is what is computed, for a reward model.

    Raises:
        TooLong: a sequence of an item is longer than `cutoff` tokens. Nothing is ever cut off.
        PromptError: a row that the model cannot be shown.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        bin_length: int = 512,
        bucket: int = BUCKET,
        cutoff: int | None = None,
        ends: bool = False,
    ) -> None:
        self.encoder = encoder
        self.ends = ends
        self.cutoff = cutoff
        self.bin_length = bin_length
        self.bucket = bucket

    def __call__(self, items: Sequence[Item]) -> dict[str, TrainingBatch]:
        # All images of a batch go through the image processor together.
        with suppress(PromptError):  # the row that shows an image which cannot be used is named below
            self.encoder.encode_views([view for item in items for row in item.rows for view in row.conversation.views])
        encoded = []
        for number, item in enumerate(items):
            encoded.append(encode_item(self.encoder, number, item))
            for path, branch in zip(*encoded[-1], strict=True):
                self.check_length(path, branch.row)
        packed, order = self.pack([paths for paths, _ in encoded])
        branches = [branch for number in order for branch in encoded[number][1]]
        return {"batch": TrainingBatch(packed, branches, len(items), int(packed.target.numel()))}

    def pack(self, items: Sequence[Sequence[TokenPath]]) -> tuple[PackedBatch, list[int]]:
        """The paths of every item packed, and the numbers of the items in the order in which their branches lie."""
        return lay_out(items, self.encoder, bin_length=self.bin_length, bucket=self.bucket, ends=self.ends)

    def check_length(self, path: TokenPath, row: str) -> None:
        """Refuse what is longer than the cutoff: a cut text would lose its answer, or image tokens their features.

        Raises:
            TooLong: `path`, that of `row`, is.
        """
        if self.cutoff is not None and len(path.ids) > self.cutoff:
            raise TooLong(
                f"{format_row(row)}: {len(path.ids)} tokens, {sum(v.tokens for v in path.views)} of them of "
                f"pictures, are over cutoff_len={self.cutoff}; raise it or lower image_max_pixels"
            )


def select(branches: Sequence[Branch], role: Role, device: torch.device | None = None) -> torch.Tensor:
    """Indices of the branches with `role`, in order. Chosen and rejected of one row come out at the same rank."""
    return torch.tensor([n for n, branch in enumerate(branches) if branch.role == role], device=device)
