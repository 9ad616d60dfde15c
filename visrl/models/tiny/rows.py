"""Rows of the embedded model's pre-training: one picture with all that is asked of it, and what each token should tell.

The picture is the prefix of a row. The questions, and the reading of a crop, are branches behind it: each sees the
prefix and itself, at the positions that it has alone. Nothing here knows weights, or which scenes are shown when.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from visrl.box import Box
from visrl.conversation import View, answer_conversation, focus_conversation, open_view
from visrl.models.encode import EncodedView, Encoder
from visrl.models.family import Grid, join_images
from visrl.records import Picture
from visrl.scenes import COLOURS, SHAPES, SIDE, PixelBox, Scene, SceneQuestion

SIDES = ("leftmost", "rightmost", "top", "bottom")
NAMING = re.compile(rf"\b({'|'.join((*COLOURS, *SHAPES, *SIDES))})\b")
CONTENTS = 17  # what a tag can hold: a digit, or 0 to 6 dots
# Of a coordinate's four tokens the first two digits say where; the opening is always the same, and the third is noise.
COORDINATE_WEIGHTS = (0.1, 1.0, 0.6, 0.05)
CLOSING_WEIGHTS = (0.1, 0.1)  # of the bracket and of the end of the turn
ANSWER_WEIGHTS = (1.0, 0.2)  # of an answer's tokens, and of the end of the turn
SIDE_WORD_WEIGHT = 0.3  # a word like "leftmost" names its tag only after all tags were compared: asked for, but softly
SEEN_SHARE = 0.05  # of an image token that a tag must cover to be read off it


@dataclass(frozen=True, slots=True)
class RowBranch:
    """One branch: a question of a scene, with the box whose text follows it, or the crop from which it is answered.
    With neither it ends at its question mark."""

    question: SceneQuestion
    box: Box | None = None
    crop: View | None = None


@dataclass(slots=True)
class Targets:
    """Tokens of a batch, named by row · T + column, and what each should tell."""

    at: list[int] = field(default_factory=list)
    value: list[object] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)

    def add(self, at: int, value: object, weight: float = 1.0) -> None:
        self.at.append(at)
        self.value.append(value)
        self.weight.append(weight)

    def add_all(self, others: Targets, here: int) -> None:
        """Those of a row that begins at token `here` of the batch."""
        self.at += [here + at for at in others.at]
        self.value += others.value
        self.weight += others.weight


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of tokens [B, T]. `branches` is 0 in the prefix, counts the branches behind it, and is −1 where a row is
    filled up; pictures and crops lie in the order of their tokens."""

    ids: torch.Tensor
    positions: torch.Tensor  # [3, B, T]
    branches: torch.Tensor
    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor  # [images, 3], in patches
    cells: torch.Tensor  # [B, cells]: the picture's tokens
    cover: torch.Tensor  # [B, cells, colours]: the share of them that each colour covers
    tags: Targets  # those that show a tag → its box and shape
    words: Targets  # words that name a tag → its box
    marks: Targets  # question marks → the box of the tag asked about
    boxes: Targets  # the text of boxes → the next token
    reads: Targets  # answers → the next token
    crops: list[tuple[list[int], int]]  # the tokens of a crop → what it says, of `CONTENTS`

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """What is added to attention scores [B, 1, T, T]: 0 from a token to those before it in the prefix and in its
        own branch, the lowest number elsewhere."""
        own = (self.branches[:, None, :] == 0) | (self.branches[:, None, :] == self.branches[:, :, None])
        length = self.ids.shape[1]
        seen = own & torch.ones(length, length, dtype=torch.bool).tril()
        return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


@dataclass(frozen=True, slots=True)
class TokenRun:
    """A part of a row: ids [n] and positions [3, n], and where in it the read-outs look (−1: nowhere)."""

    ids: np.ndarray
    positions: np.ndarray
    picture: int  # the first image token
    mark: int = -1  # the last token of the question
    word: int = -1  # the token of the word that names a tag


class Prompts:
    """Prefixes and questions as an encoder's checkpoint is shown them; each is made once."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.prefix = lru_cache(maxsize=None)(self._prefix)
        self.question = lru_cache(maxsize=None)(self._question)
        self._blank = View("blank", Image.new("RGB", (SIDE, SIDE)))

    def _prefix(self, whole: Grid) -> TokenRun:
        """The picture, up to where a question begins: one token behind it closes it."""
        text, image = self._text("?", whole, None), self.encoder.image_token_id
        ids = np.array(self.encoder.tokenizer(text, add_special_tokens=False).input_ids, dtype=np.int64)
        pictures = np.flatnonzero(ids == image)
        end = int(pictures[-1]) + 2
        return TokenRun(ids[:end], self.encoder.family.positions(ids, image, [whole])[:, :end], int(pictures[0]))

    def _question(self, question: str, whole: Grid, crop: Grid | None) -> TokenRun:
        """What follows the prefix where a question is asked (`crop` None) or is to be answered from a crop.

        Raises:
            ValueError: the question names no tag.
        """
        text, image = self._text(question, whole, crop), self.encoder.image_token_id
        named = NAMING.search(question)
        if named is None:
            raise ValueError(f"{question!r} names no tag by its colour, its shape or its side")
        tokens = self.encoder.tokenizer(text, add_special_tokens=False)
        ids = np.array(tokens.input_ids, dtype=np.int64)
        positions = self.encoder.family.positions(ids, image, [whole] if crop is None else [whole, crop])
        begin, here = len(self.prefix(whole).ids), text.index(question)
        pictures = np.flatnonzero(ids[begin:] == image)
        return TokenRun(
            ids[begin:],
            positions[:, begin:],
            int(pictures[0]) if crop is not None else -1,
            tokens.char_to_token(here + len(question) - 1) - begin,
            tokens.char_to_token(here + named.start()) - begin,
        )

    def _text(self, question: str, whole: Grid, crop: Grid | None) -> str:
        """A prompt with as many image tokens as the pictures have."""
        mark, blank = self.encoder.image_mark, self._blank
        talk = focus_conversation(question, blank) if crop is None else answer_conversation(question, blank, blank)
        opening, *parts = self.encoder.render(talk).split(mark)
        grids = [whole] if crop is None else [whole, crop]
        return opening + "".join(mark * int(np.prod(grid)) + part for grid, part in zip(grids, parts, strict=True))


def batch_of(prompts: Prompts, asked: Sequence[tuple[Scene, Sequence[RowBranch]]]) -> Batch:
    """The batch whose rows are these scenes, each with its branches."""
    views: list[View] = []
    for scene, branches in asked:
        views += [open_view(Picture(scene.ref)), *(one.crop for one in branches if one.crop)]
    encoded = iter(prompts.encoder.encode_views(views))
    rows = []
    for scene, branches in asked:
        row = _Row(prompts, scene, next(encoded))
        for one in branches:
            if one.crop:
                row.add_reading(one.question, next(encoded))
            else:
                row.add_question(one.question, one.box)
        rows.append(row)
    return _joined(rows, prompts.encoder)


class _Row:
    """A picture and its branches, one behind the other."""

    def __init__(self, prompts: Prompts, scene: Scene, whole: EncodedView) -> None:
        self.prompts, self.scene, self.whole = prompts, scene, whole
        prefix = prompts.prefix(whole.grid)
        self.ids, self.positions = [prefix.ids], [prefix.positions]
        self.branches = [np.zeros(len(prefix.ids), dtype=np.int64)]
        self.length = len(prefix.ids)
        self.first_cell = prefix.picture
        self.views = [whole]
        self.words, self.marks, self.boxes, self.reads = Targets(), Targets(), Targets(), Targets()
        self.crops: list[tuple[list[int], int]] = []

    def add_question(self, question: SceneQuestion, box: Box | None) -> None:
        """A question up to its mark, or with the text of a box behind it."""
        asked, encoder = self.prompts.question(question.text, self.whole.grid, None), self.prompts.encoder
        self.marks.add(self.length + asked.mark, self.scene.tags[question.target].box)
        weight = SIDE_WORD_WEIGHT if question.kind == "place" else 1.0
        self.words.add(self.length + asked.word, _named(self.scene, question), weight)
        if box is None:
            end = asked.mark + 1
            self._append(TokenRun(asked.ids[:end], asked.positions[:, :end], -1), [], self.boxes, [])
        else:
            text = encoder.codec.format(box, (SIDE, SIDE), self.whole.size)
            self._append(asked, self._tokens(text), self.boxes, [*COORDINATE_WEIGHTS * 4, *CLOSING_WEIGHTS])

    def add_reading(self, question: SceneQuestion, crop: EncodedView) -> None:
        """A question with a crop, and its answer."""
        asked, tag = self.prompts.question(question.text, self.whole.grid, crop.grid), self.scene.tags[question.target]
        first = self.length + asked.picture
        content = int(tag.text) if tag.text else 10 + len(tag.dots)
        self.crops.append((list(range(first, first + crop.tokens)), content))
        self.views.append(crop)
        said = self._tokens(question.answer)
        self._append(asked, said, self.reads, [ANSWER_WEIGHTS[0]] * (len(said) - 1) + [ANSWER_WEIGHTS[1]])

    def _tokens(self, text: str) -> list[int]:
        """What the model says: a text and the end of its turn."""
        encoder = self.prompts.encoder
        return [*encoder.tokenizer(text, add_special_tokens=False).input_ids, encoder.end_id]

    def _append(self, asked: TokenRun, said: list[int], targets: Targets, weights: Sequence[float]) -> None:
        for n, (token, weight) in enumerate(zip(said, weights, strict=True)):
            targets.add(self.length + len(asked.ids) - 1 + n, token, weight)
        self.ids += [asked.ids, np.array(said, dtype=np.int64)]
        self.positions += [asked.positions, asked.positions[:, -1:] + 1 + np.arange(len(said))]
        self.branches.append(np.full(len(asked.ids) + len(said), self.branches[-1][-1] + 1))
        self.length += len(asked.ids) + len(said)


def _joined(rows: Sequence[_Row], encoder: Encoder) -> Batch:
    length = max(row.length for row in rows)
    ids = torch.full((len(rows), length), encoder.tokenizer.pad_token_id)
    branches = torch.full((len(rows), length), -1)
    positions = torch.zeros((3, len(rows), length), dtype=torch.int64)
    tags, words, marks, boxes, reads = (Targets() for _ in range(5))
    crops, cells, cover = [], [], []
    for n, row in enumerate(rows):
        ids[n, : row.length] = torch.from_numpy(np.concatenate(row.ids))
        branches[n, : row.length] = torch.from_numpy(np.concatenate(row.branches))
        positions[:, n, : row.length] = torch.from_numpy(np.concatenate(row.positions, axis=1))
        here = n * length
        for of_batch, of_row in ((words, row.words), (marks, row.marks), (boxes, row.boxes), (reads, row.reads)):
            of_batch.add_all(of_row, here)
        crops += [([here + place for place in places], content) for places, content in row.crops]
        shares = cell_shares(row.scene, row.whole.grid)
        cells.append([here + row.first_cell + cell for cell in range(shares.shape[1])])
        cover.append(_colour_cover(row.scene, shares))
        for cell, share in zip(cells[-1], shares.T, strict=True):
            if share.max() > SEEN_SHARE:
                shown = row.scene.tags[int(share.argmax())]
                tags.add(cell, (shown.box, SHAPES.index(shown.shape)), float(share.max()) + 0.1)
    images = join_images(encoder.family, [view.inputs for row in rows for view in row.views])
    return Batch(
        ids, positions, branches, images["pixel_values"], images["image_grid_thw"], torch.tensor(cells),
        torch.from_numpy(np.stack(cover)), tags, words, marks, boxes, reads, crops,
    )  # fmt: skip


# --- What a scene says ------------------------------------------------------------------------------------------------


def cell_shares(scene: Scene, grid: Grid) -> np.ndarray:
    """What share of each image token each tag's box covers: [tags, cells], row after row of the picture."""
    _, rows, columns = grid
    boxes = np.array([tag.box for tag in scene.tags]) / SIDE
    across = _overlaps(boxes[:, 0], boxes[:, 2], columns)
    down = _overlaps(boxes[:, 1], boxes[:, 3], rows)
    return (down[:, :, None] * across[:, None, :]).reshape(len(boxes), rows * columns)


def _overlaps(low: np.ndarray, high: np.ndarray, parts: int) -> np.ndarray:
    """What share of each of `parts` equal parts of 0…1 lies between `low` and `high`: [n, parts]."""
    edges = np.arange(parts + 1) / parts
    inside = np.minimum(edges[1:], high[:, None]) - np.maximum(edges[:-1], low[:, None])
    return np.clip(inside, 0, None) * parts


def _colour_cover(scene: Scene, shares: np.ndarray) -> np.ndarray:
    cover = np.zeros((shares.shape[1], len(COLOURS)), dtype=np.float32)
    for tag, share in zip(scene.tags, shares, strict=True):
        cover[:, list(COLOURS).index(tag.colour)] += share.astype(np.float32)
    return cover


def _named(scene: Scene, question: SceneQuestion) -> PixelBox:
    """The box of the tag that a word of the question names: the one asked about, or the one that it lies beside."""
    words = re.findall(r"\w+", question.text)
    return next((tag.box for tag in scene.tags if tag.colour in words), scene.tags[question.target].box)
