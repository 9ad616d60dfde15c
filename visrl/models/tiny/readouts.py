"""Read-outs: linear layers that exist in pre-training alone and ask of hidden states what they should hold.

Where a tag lies is told in soft bins: a coordinate is shared between its two nearest of 21 values, and the read-out
gives a distribution over them. Pure: hidden states and targets in, losses out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from visrl.models.tiny.rows import CONTENTS, Batch, Targets
from visrl.scenes import COLOURS, SHAPES, SIDE

BINS = 21  # of a coordinate: 0, 0.05, … 1


class ReadOuts(nn.Module):
    """Read-outs of a model whose hidden states have `width` numbers; the seed draws their start."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        self.cover = nn.Linear(width, len(COLOURS))  # at an image token: the share of it that each colour covers
        self.shape = nn.Linear(width, len(SHAPES))  # and the shape of the tag that covers most of it
        self.cell = nn.Linear(width, 4 * BINS)  # and that tag's box
        self.word = nn.Linear(width, 4 * BINS)  # at a word that names a tag: that tag's box
        self.mark = nn.Linear(width, 4 * BINS)  # at the question mark: the box of the tag asked about
        self.crop = nn.Linear(width, CONTENTS)  # from the mean of a crop's tokens: its digit, or number of dots
        chance = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0, width**-0.5, generator=chance)
            else:
                nn.init.zeros_(parameter)

    def losses(
        self, batch: Batch, shown: torch.Tensor, at_words: torch.Tensor, at_marks: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The loss of each read-out. Hidden states are [B · T, width]: `shown` those that enter the language model,
        `at_words` and `at_marks` those that the read-outs of words and of question marks look at."""
        return {
            "cover": F.binary_cross_entropy_with_logits(self.cover(shown[batch.cells]), batch.cover),
            **self._tag_losses(batch.tags, shown),
            "word": box_loss(self.word(at_words[batch.words.at]), batch.words.value, batch.words.weight),
            "mark": box_loss(self.mark(at_marks[batch.marks.at]), batch.marks.value, batch.marks.weight),
            **self._crop_loss(batch, shown),
        }

    def _tag_losses(self, tags: Targets, shown: torch.Tensor) -> dict[str, torch.Tensor]:
        boxes, shapes = zip(*tags.value, strict=True)
        hidden, weight = shown[tags.at], torch.tensor(tags.weight)
        told = F.cross_entropy(self.shape(hidden), torch.tensor(shapes), reduction="none")
        return {
            "cell": box_loss(self.cell(hidden), boxes, tags.weight),
            "shape": (told * weight).sum() / weight.sum(),
        }

    def _crop_loss(self, batch: Batch, shown: torch.Tensor) -> dict[str, torch.Tensor]:
        if not batch.crops:
            return {}
        hidden = torch.stack([shown[places].mean(0) for places, _ in batch.crops])
        return {"crop": F.cross_entropy(self.crop(hidden), torch.tensor([content for _, content in batch.crops]))}

    def boxes(self, at_marks: torch.Tensor) -> torch.Tensor:
        """The boxes [n, 4], in fractions, that the question marks with these hidden states [n, width] tell."""
        told = self.mark(at_marks).view(-1, 4, BINS).softmax(-1)
        return told @ torch.linspace(0, 1, BINS)


def soft_bins(values: torch.Tensor) -> torch.Tensor:
    """Fractions [...] as distributions over the bins [..., BINS]: each is shared between its two nearest bins.

    0.06 lies a fifth of the way from bin 1 (0.05) to bin 2 (0.10): 0.8 on the one and 0.2 on the other.
    """
    places = values.clamp(0, 1)[..., None] * (BINS - 1)
    return (1 - (places - torch.arange(BINS)).abs()).clamp(min=0)


def box_loss(logits: torch.Tensor, boxes: Sequence[object], weights: Sequence[float]) -> torch.Tensor:
    """The weighted mean of the cross-entropies of boxes (corners in a scene's pixels) told as logits [n, 4 · BINS]."""
    wanted = soft_bins(torch.tensor(boxes, dtype=torch.float32) / SIDE)
    losses = -(logits.view(-1, 4, BINS).log_softmax(-1) * wanted).sum(-1).mean(-1)
    weight = torch.tensor(weights)
    return (losses * weight).sum() / weight.sum()
