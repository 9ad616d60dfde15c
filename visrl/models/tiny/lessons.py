"""Batches of the embedded model's pre-training: drawn scenes as rows of tokens, with what is to be read off each token.

A row is one picture with all that is asked of it: the picture is the prefix, and the questions and the reading of a
crop are branches, each of which sees the prefix and itself. A batch is a pure function of the recipe and the step.
Nothing here knows weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from visrl.box import Box, with_sides_moved
from visrl.conversation import Conversation, View, answer_conversation, crop_view, focus_conversation, open_view
from visrl.models.encode import EncodedView, Encoder
from visrl.models.families import Grid, join_images
from visrl.models.tiny.recipe import PretrainConfig, Stretch
from visrl.records import Picture
from visrl.scenes import (
    COLOURS,
    SHAPES,
    SIDE,
    Scene,
    SceneQuestion,
    close_up,
    make_scene,
    questions_of,
    true_box,
)

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
class Prompt:
    """What follows the picture in a row: ids [n], positions [d, n], and where its question and its crop lie."""

    ids: np.ndarray
    positions: np.ndarray
    mark: int  # the last token of the question
    word: int  # the token of the word that names a tag
    crop: int  # the first image token of the crop, where there is one


@dataclass(slots=True)
class Targets:
    """Tokens of a batch and what is to be told at them; `at` counts through the rows, one after the other."""

    at: list[int] = field(default_factory=list)
    value: list[object] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)

    def add(self, at: int, value: object, weight: float = 1.0) -> None:
        self.at.append(at)
        self.value.append(value)
        self.weight.append(weight)


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of rows [B, T]; every list of targets names its tokens by row · T + column.

    `branches` [B, T] is 0 in the prefix, counts the branches after it and is −1 where a row is filled up.
    """

    ids: torch.Tensor
    positions: torch.Tensor  # [d, B, T]
    branches: torch.Tensor
    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor  # [images, 3], in patches
    cells: torch.Tensor  # [B, cells]: places of the picture's tokens
    cover: torch.Tensor  # [B, cells, colours]: the share that each colour covers
    tags: Targets  # cells that show a tag → (box, shape)
    words: Targets  # → box of the tag that the word names
    marks: Targets  # → box of the tag asked about
    boxes: Targets  # → next token, of the text of a box
    reads: Targets  # → next token, of an answer
    crops: list[tuple[list[int], int]]  # places of a crop's tokens → what the crop says

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """What is added to attention scores [B, 1, T, T]: 0 from a token to those before it in the prefix and in its
        own branch, the lowest number elsewhere."""
        own = (self.branches[:, None, :] == 0) | (self.branches[:, None, :] == self.branches[:, :, None])
        length = self.ids.shape[1]
        seen = own & torch.ones(length, length, dtype=torch.bool).tril()
        return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


@dataclass(frozen=True, slots=True)
class RowBranch:
    """One branch: a question of a scene, and the box or the crop that goes with it."""

    question: SceneQuestion
    box: Box | None = None  # whose text follows the question
    crop: View | None = None  # from which it is answered


class Lessons:
    """The batches of a recipe, for one processor."""

    def __init__(self, recipe: PretrainConfig, encoder: Encoder) -> None:
        self.recipe, self.encoder = recipe, encoder
        self._prompt = lru_cache(maxsize=None)(self._make_prompt)
        self._blank = View("blank", Image.new("RGB", (SIDE, SIDE)))

    def batch(self, step: int) -> Batch:
        """What step `step` (from 0) learns from."""
        recipe, phase = self.recipe, self.recipe.phase_at(step)
        chance = np.random.default_rng([recipe.seed, step])
        # Seeds look at scenes of their own, for as long as a schedule may be.
        first = recipe.seed * 1_000_000 + step * recipe.fresh
        window = max(recipe.window, recipe.scenes)
        scenes = [make_scene("train", first + int(n)) for n in chance.choice(window, recipe.scenes, replace=False)]
        return self.rows_of([(scene, list(self._draw(scene, phase, chance))) for scene in scenes])

    def quiz(self, pool: str, start: int, count: int) -> Batch:
        """Every question of some scenes, up to its question mark."""
        scenes = [make_scene(pool, index) for index in range(start, start + count)]
        return self.rows_of([(scene, [RowBranch(question) for question in questions_of(scene)]) for scene in scenes])

    # --- what is asked

    def _draw(self, scene: Scene, phase: Stretch, chance: np.random.Generator) -> Iterator[RowBranch]:
        questions = questions_of(scene)
        shares = {kind: self.recipe.kinds.get(kind, 0.0) for kind in sorted({one.kind for one in questions})}
        total = sum(shares.values())
        for _ in range(self.recipe.per_scene if total else 0):
            kind = str(chance.choice(list(shares), p=[share / total for share in shares.values()]))
            question = _one_of([one for one in questions if one.kind == kind], chance)
            yield RowBranch(question, true_box(scene, question) if kind in phase.boxes else None)
        # The number or the dots of any tag can be asked for.
        tag = int(chance.integers(len(scene.tags)))
        question = _one_of([one for one in questions if one.target == tag], chance)
        box = _crop_box(close_up(scene, question, float(chance.uniform(*phase.zoom))), phase, chance)
        whole = open_view(Picture(scene.ref))
        yield RowBranch(question, crop=crop_view(whole, Picture(scene.ref, box), self.encoder.settings.crop_rule))

    # --- rows

    def rows_of(self, asked: Sequence[tuple[Scene, Sequence[RowBranch]]]) -> Batch:
        """The batch whose rows are these scenes, each with its branches."""
        views: list[View] = []
        for scene, branches in asked:
            views += [open_view(Picture(scene.ref)), *(one.crop for one in branches if one.crop)]
        encoded = iter(self.encoder.encode_views(views))
        rows = []
        for scene, branches in asked:
            whole = next(encoded)
            rows.append(_Row(self, scene, whole))
            for one in branches:
                rows[-1].add(one, next(encoded) if one.crop else None)
        return _joined(rows, self.encoder)

    def prefix(self, whole: Grid) -> Prompt:
        """The picture, up to where a question begins; the same for every question."""
        return self._prompt("", whole, None)

    def prompt(self, question: str, whole: Grid, crop: Grid | None) -> Prompt:
        """What follows the picture where the question is asked (`crop` None) or answered from a crop."""
        return self._prompt(question, whole, crop)

    def _make_prompt(self, question: str, whole: Grid, crop: Grid | None) -> Prompt:
        encoder, grids = self.encoder, [whole] if crop is None else [whole, crop]
        asked = question or "?"
        talk: Conversation = (
            focus_conversation(asked, self._blank)
            if crop is None
            else answer_conversation(asked, self._blank, self._blank)
        )
        parts = encoder.render(talk).split(encoder.image_mark)
        text = parts[0] + "".join(
            encoder.image_mark * int(np.prod(grid)) + part for grid, part in zip(grids, parts[1:], strict=True)
        )
        tokens = encoder.tokenizer(text, add_special_tokens=False)
        ids = np.array(tokens.input_ids, dtype=np.int64)
        positions = encoder.family.positions(ids, encoder.image_token_id, grids)
        pictures = np.flatnonzero(ids == encoder.image_token_id)
        first = int(pictures[0] + np.prod(whole)) + 1  # past the picture and the token that closes it
        if not question:
            return Prompt(ids[:first], positions[:, :first], 0, 0, int(pictures[0]))
        start = text.index(question)
        named = NAMING.search(question)
        if named is None:
            raise ValueError(f"{question!r} names no tag by its colour, its shape or its side")
        mark = tokens.char_to_token(start + len(question) - 1) - first
        word = tokens.char_to_token(start + named.start()) - first
        place = int(pictures[int(np.prod(whole))]) - first if crop else -1
        return Prompt(ids[first:], positions[:, first:], mark, word, place)


class _Row:
    """A picture and its branches, one after the other."""

    def __init__(self, lessons: Lessons, scene: Scene, whole: EncodedView) -> None:
        self.lessons, self.scene, self.whole = lessons, scene, whole
        prefix = lessons.prefix(whole.grid)
        self.ids, self.positions = [prefix.ids], [prefix.positions]
        self.branches = [np.zeros(len(prefix.ids), dtype=np.int64)]
        self.length = len(prefix.ids)
        self.first_cell = prefix.crop
        self.views = [whole]
        self.words, self.marks, self.boxes, self.reads = Targets(), Targets(), Targets(), Targets()
        self.crops: list[tuple[list[int], int]] = []

    def add(self, one: RowBranch, crop: EncodedView | None) -> None:
        """Put a branch at the end of the row."""
        lessons, encoder, question = self.lessons, self.lessons.encoder, one.question
        prompt = lessons.prompt(question.text, self.whole.grid, crop.grid if crop else None)
        here = self.length
        if crop is not None:
            places = [here + prompt.crop + n for n in range(crop.tokens)]
            tag = self.scene.tags[question.target]
            self.crops.append((places, int(tag.text) if tag.text else 10 + len(tag.dots)))
            self.views.append(crop)
            said = [*encoder.tokenizer(question.answer, add_special_tokens=False).input_ids, encoder.end_id]
            weights = [ANSWER_WEIGHTS[0]] * (len(said) - 1) + [ANSWER_WEIGHTS[1]]
            self._append(prompt, said, self.reads, weights)
            return
        self.marks.add(here + prompt.mark, self.scene.tags[question.target].box)
        soft = question.kind == "place"
        self.words.add(here + prompt.word, _named(self.scene, question), SIDE_WORD_WEIGHT if soft else 1.0)
        if one.box is None:
            self._append(prompt, [], self.boxes, [], prompt.mark + 1)
        else:
            text = encoder.codec.format(one.box, (SIDE, SIDE), self.whole.size)
            said = [*encoder.tokenizer(text, add_special_tokens=False).input_ids, encoder.end_id]
            self._append(prompt, said, self.boxes, [*COORDINATE_WEIGHTS * 4, *CLOSING_WEIGHTS])

    def _append(
        self, prompt: Prompt, said: list[int], targets: Targets, weights: Sequence[float], end: int | None = None
    ) -> None:
        ids, positions = prompt.ids[:end], prompt.positions[:, :end]
        for n, (token, weight) in enumerate(zip(said, weights, strict=True)):
            targets.add(self.length + len(ids) - 1 + n, token, weight)
        following = positions[:, -1:] + 1 + np.arange(len(said))
        self.ids += [ids, np.array(said, dtype=np.int64)]
        self.positions += [positions, following]
        self.branches.append(np.full(len(ids) + len(said), self.branches[-1][-1] + 1))
        self.length += len(ids) + len(said)


def _joined(rows: Sequence[_Row], encoder: Encoder) -> Batch:
    length = max(row.length for row in rows)
    ids = torch.full((len(rows), length), encoder.tokenizer.pad_token_id)
    branches = torch.full((len(rows), length), -1)
    positions = torch.zeros((len(rows[0].positions[0]), len(rows), length), dtype=torch.int64)
    tags, words, marks, boxes, reads = (Targets() for _ in range(5))
    crops, cells, cover = [], [], []
    for n, row in enumerate(rows):
        ids[n, : row.length] = torch.from_numpy(np.concatenate(row.ids))
        branches[n, : row.length] = torch.from_numpy(np.concatenate(row.branches))
        positions[:, n, : row.length] = torch.from_numpy(np.concatenate(row.positions, axis=1))
        here = n * length
        for all_targets, own in ((words, row.words), (marks, row.marks), (boxes, row.boxes), (reads, row.reads)):
            all_targets.at += [here + at for at in own.at]
            all_targets.value += own.value
            all_targets.weight += own.weight
        crops += [([here + place for place in places], content) for places, content in row.crops]
        shares = cell_shares(row.scene, row.whole.grid)
        cells.append([here + row.first_cell + cell for cell in range(shares.shape[1])])
        cover.append(_colour_cover(row.scene, shares))
        for cell, tag in zip(cells[-1], shares.T, strict=True):
            if tag.max() > SEEN_SHARE:
                shown = row.scene.tags[int(tag.argmax())]
                tags.add(cell, (shown.box, SHAPES.index(shown.shape)), float(tag.max()) + 0.1)
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


def _named(scene: Scene, question: SceneQuestion) -> tuple[float, float, float, float]:
    """The box of the tag that a word of the question names: the one asked about, or the one that it lies beside."""
    words = re.findall(r"\w+", question.text)
    return next((tag.box for tag in scene.tags if tag.colour in words), scene.tags[question.target].box)


def _crop_box(box: Box, phase: Stretch, chance: np.random.Generator) -> Box:
    """A crop to read around `box`: squared, and then shifted and resized, or each side moved by itself."""
    if chance.random() >= phase.square:
        return with_sides_moved(box, *chance.uniform(-phase.loose, phase.loose, size=4))
    side = max(box.width, box.height)
    wider, higher = (side / box.width - 1) / 2, (side / box.height - 1) / 2
    grown = chance.uniform(-phase.loose, 2 * phase.loose) / 4
    x, y = chance.uniform(-phase.loose, phase.loose, size=2) / 4
    x, y, across, down = x * side / box.width, y * side / box.height, side / box.width, side / box.height
    return with_sides_moved(
        box,
        wider + grown * across - x,
        higher + grown * down - y,
        wider + grown * across + x,
        higher + grown * down + y,
    )


def _one_of(things: Sequence[SceneQuestion], chance: np.random.Generator) -> SceneQuestion:
    return things[int(chance.integers(len(things)))]
