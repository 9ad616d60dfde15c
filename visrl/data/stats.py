"""What a data set looks like: counts, boxes, images, questions per image, and token lengths under a processor.

Rows are read as a stream; token lengths are taken from a sample of them, drawn by a fixed seed. Knows no page.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from visrl.box import CropRule, Size, crop_window
from visrl.data.formats import Reading, read_format
from visrl.images import ImageError, image_size
from visrl.records import Sample

SAMPLED = 500  # samples whose tokens are counted: the mean is then known to a few per cent
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


class TokenCounter(Protocol):
    """What a model makes of texts and images, in tokens (see models/tokens.py)."""

    @property
    def crop_rule(self) -> CropRule: ...

    def text(self, text: str) -> int: ...

    def picture(self, size: Size, is_crop: bool) -> int | None:
        """The tokens of an image or crop of `size` pixels; None where the model does not take it."""
        ...


@dataclass(slots=True)
class Statistics:
    """The numbers of a data set. A list holds one value per sample or image, in the order they were read."""

    rows: int = 0
    bad: int = 0
    preferences: int = 0
    by_source: Counter[str] = field(default_factory=Counter)
    questions_of: Counter[str] = field(default_factory=Counter)  # by image
    box_area: list[float] = field(default_factory=list)  # fraction of the image
    box_aspect: list[float] = field(default_factory=list)  # width / height in pixels, where the size is known
    picture_aspect: list[float] = field(default_factory=list)
    picture_megapixels: list[float] = field(default_factory=list)
    question_characters: list[int] = field(default_factory=list)
    answer_characters: list[int] = field(default_factory=list)
    picture_tokens: list[int] = field(default_factory=list)
    crop_tokens: list[int] = field(default_factory=list)
    text_tokens: list[int] = field(default_factory=list)
    refused: int = 0  # images and crops among those whose tokens were counted that the model does not take

    def measures(self) -> dict[str, list[float] | list[int]]:
        """Every measure that has values, by its name and unit."""
        named: dict[str, list[float] | list[int]] = {
            "questions per picture": list(self.questions_of.values()),
            "box area, share of picture": self.box_area,
            "box width / height": self.box_aspect,
            "picture width / height": self.picture_aspect,
            "picture, megapixels": self.picture_megapixels,
            "question, characters": self.question_characters,
            "answer, characters": self.answer_characters,
            "picture, tokens": self.picture_tokens,
            "crop, tokens": self.crop_tokens,
            "question and answer, tokens": self.text_tokens,
        }
        return {name: values for name, values in named.items() if values}


def measure(
    source: str,
    inputs: Iterable[str],
    reading: Reading | None = None,
    tokens: TokenCounter | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> Statistics:
    """Read all rows of `inputs` and measure them; with `tokens` also those, of a sample of the rows.

    Raises:
        RecordError: a file is not there or damaged.
    """
    reading = reading or Reading()
    found = Statistics()
    drawn: list[Sample] = []
    rng = random.Random(0)
    for path in inputs:
        for row in read_format(source, path, reading):
            found.rows += 1
            progress(found.rows)
            found.bad += bool(row.fault)
            for record in row.records:
                if not isinstance(record, Sample):
                    found.preferences += 1
                    continue
                _add(found, record, reading)
                seen = found.by_source.total()
                if len(drawn) < SAMPLED:
                    drawn.append(record)
                elif (place := rng.randrange(seen)) < SAMPLED:
                    drawn[place] = record
    if tokens is not None:
        _add_tokens(found, drawn, reading, tokens)
    return found


def quantiles(values: list[float] | list[int]) -> list[float]:
    """The values at `QUANTILES`, by the nearest rank."""
    ordered = sorted(values)
    return [ordered[round(share * (len(ordered) - 1))] for share in QUANTILES]


def as_table(found: Statistics) -> str:
    """The statistics as plain text."""
    head = f"{found.rows:,} rows, {found.bad:,} bad, {len(found.questions_of):,} pictures"
    lines = [head + (f", {found.preferences:,} preferences" if found.preferences else "")]
    lines += [f"  {source or '(no name)'}: {count:,}" for source, count in found.by_source.most_common()]
    if found.refused:
        lines.append(f"  {found.refused:,} of the pictures and crops drawn by lot are none that the model takes")
    measures = found.measures()
    if measures:
        shares = "".join(f"{_share_name(share):>10}" for share in QUANTILES)
        lines.append(f"{'':30}{'n':>9}{'mean':>10}{shares}")
    for name, values in measures.items():
        numbers = [sum(values) / len(values), *quantiles(values)]
        lines.append(f"{name:30}{len(values):>9,}" + "".join(f"{_number(value):>10}" for value in numbers))
    return "\n".join(lines)


def _share_name(share: float) -> str:
    return {0.0: "least", 0.5: "median", 1.0: "most"}.get(share, f"{share:.0%}")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _add(found: Statistics, sample: Sample, reading: Reading) -> None:
    found.by_source[sample.source] += 1
    found.question_characters.append(len(sample.question))
    if sample.answer:
        found.answer_characters.append(len(sample.answer))
    first = sample.image not in found.questions_of
    found.questions_of[sample.image] += 1
    size = sample.size or reading.sizes.annotated(sample.image)
    if size is not None and first:
        found.picture_aspect.append(size[0] / size[1])
        found.picture_megapixels.append(size[0] * size[1] / 1e6)
    for box in sample.true_looks or ():
        found.box_area.append(box.area)
        if size is not None:
            found.box_aspect.append(box.width * size[0] / (box.height * size[1]))


def _add_tokens(found: Statistics, samples: list[Sample], reading: Reading, tokens: TokenCounter) -> None:
    """Tokens of image, crop and text, as training would spend them."""
    for sample in samples:
        found.text_tokens.append(tokens.text(f"{sample.question}\n{sample.answer}"))
        size = sample.size or reading.sizes.annotated(sample.image) or _size(sample.image, reading.sizes.images)
        if size is None:
            continue
        found.refused += not _add_count(found.picture_tokens, tokens.picture(size, is_crop=False))
        for box in sample.true_looks or ():
            left, top, right, bottom = crop_window(box, size, tokens.crop_rule)
            found.refused += not _add_count(
                found.crop_tokens, tokens.picture((right - left, bottom - top), is_crop=True)
            )


def _add_count(counts: list[int], tokens: int | None) -> bool:
    """Add a count of tokens that is known; whether it is."""
    if tokens is not None:
        counts.append(tokens)
    return tokens is not None


def _size(ref: str, images: Path | None) -> Size | None:
    try:
        return image_size(ref, images)
    except ImageError:
        return None
