"""Drawn scenes: images of small tags whose numbers and dots can be read in a crop and not in the whole image.

A scene holds two to four coloured tags, and the question alone says which of them matters: by colour, shape, place,
count or relation. Distractors are all else: the other tags, which carry numbers and dots as readable as the one asked
about, empty outlines of the same shapes, and lines.

A scene is a pure function of its pool, its index and its level (how many tags, and digits of a number, at most). Pools
draw from disjoint seeds, so training, preference, validation and test scenes never meet. The file knows images,
questions and true boxes; it knows no model and no file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image, ImageDraw
from pydantic import BeforeValidator

from visrl.box import Box
from visrl.records import Sample

RENAMED_KINDS = {"edge": "place"}  # names of earlier releases, and what each kind is called now


def check_kind(name: Any) -> Any:
    """`name`, where there is such a kind of question.

    Raises:
        ValueError: there is none; the message says which there are, or what it is called now.
    """
    if name in KINDS:
        return name
    now = RENAMED_KINDS.get(name) if isinstance(name, str) else None
    hint = f"it is called {now!r} now" if now else f"there are {', '.join(KINDS)}"
    raise ValueError(f"no questions of kind {name!r} in drawn scenes; {hint}")


Kind = Annotated[Literal["colour", "shape", "place", "count", "relation"], BeforeValidator(check_kind)]

SIDE = 672  # px: a model that sees the whole scene at 112 px sees a sixth of it, and a 21-px digit at 3.5 px
POOLS = ("train", "preference", "validation", "test")
KINDS: tuple[Kind, ...] = ("colour", "shape", "place", "count", "relation")
COLOURS = {
    "red": (214, 69, 65),
    "blue": (66, 110, 214),
    "yellow": (236, 200, 66),
    "green": (63, 166, 90),
    "purple": (146, 84, 190),
    "orange": (240, 140, 50),
}
SHAPES = ("square", "circle", "diamond")
GLYPH_HEIGHT = 21  # px of a digit in the scene
GLYPH_SCALE = 3  # px per dot of the 5 × 7 digits below
DOT_RADIUS = 3.5  # px
MAX_DOTS = 6
MAX_TAGS = 4
MAX_NUMBERS = 2  # digits of a number on a tag
MAX_OBJECTS = 6  # tags and outlines
INK = (25, 25, 30)

# Our own 5 × 7 digits, a row of dots per string: the same pixels whatever fonts a machine has.
DIGITS = {
    "0": (" ### ", "#   #", "#  ##", "# # #", "##  #", "#   #", " ### "),
    "1": ("  #  ", " ##  ", "  #  ", "  #  ", "  #  ", "  #  ", " ### "),
    "2": (" ### ", "#   #", "    #", "   # ", "  #  ", " #   ", "#####"),
    "3": (" ### ", "#   #", "    #", "  ## ", "    #", "#   #", " ### "),
    "4": ("   # ", "  ## ", " # # ", "#  # ", "#####", "   # ", "   # "),
    "5": ("#####", "#    ", "#### ", "    #", "    #", "#   #", " ### "),
    "6": (" ### ", "#    ", "#    ", "#### ", "#   #", "#   #", " ### "),
    "7": ("#####", "    #", "   # ", "   # ", "  #  ", "  #  ", "  #  "),
    "8": (" ### ", "#   #", "#   #", " ### ", "#   #", "#   #", " ### "),
    "9": (" ### ", "#   #", "#   #", " ####", "    #", "    #", " ### "),
}

PixelBox = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Tag:
    """A coloured shape with a number or with dots on it; all lengths in pixels of the scene."""

    colour: str
    shape: str
    box: PixelBox
    text: str  # the number, or "" where there are dots
    dots: tuple[tuple[float, float], ...]
    content: PixelBox  # the smallest box around the number or the dots

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True, slots=True)
class SceneQuestion:
    """A question with one answer and the tag that must be seen to give it."""

    kind: Kind
    text: str
    answer: str
    target: int  # index of the tag


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything about one image: its tags, from which image, questions, answers and boxes follow exactly."""

    pool: str
    index: int
    max_tags: int
    numbers: int  # digits of a number, at most
    tint: int  # green of the background; red grows from left to right, blue from top to bottom
    lines: tuple[PixelBox, ...]
    tags: tuple[Tag, ...]
    outlines: tuple[tuple[str, PixelBox], ...]  # empty shapes, which no question is about

    @property
    def name(self) -> str:
        return f"{self.pool}{format_level(self.max_tags, self.numbers)}/{self.index}"

    @property
    def ref(self) -> str:
        return f"scene:{self.name}"


# How a name says the pool and the level of its scenes: `test`, `test@2`, `test@4x2`.
LEVEL = rf"(?P<pool>\w+?)(@(?P<tags>[1-{MAX_TAGS}]))?(x(?P<numbers>[1-{MAX_NUMBERS}]))?"


def format_level(max_tags: int = MAX_TAGS, numbers: int = 1) -> str:
    """What a name says of the level of its scenes: nothing for up to four tags with numbers of one digit."""
    if numbers == 1:
        return "" if max_tags == MAX_TAGS else f"@{max_tags}"
    return f"@{max_tags}x{numbers}"


def read_level(match: re.Match[str]) -> tuple[int, int]:
    """`max_tags` and `numbers` as a match of `LEVEL` says them."""
    return int(match["tags"] or MAX_TAGS), int(match["numbers"] or 1)


def parse_ref(ref: str) -> Scene:
    """The scene that `scene:POOL/INDEX` names; `scene:POOL@TAGS/INDEX` is one of at most TAGS tags, and
    `scene:POOL@TAGSx2/INDEX` one with numbers of up to two digits.

    Raises:
        ValueError: no such pool, or not of this form.
    """
    match = re.fullmatch(rf"scene:{LEVEL}/(?P<index>\d{{1,15}})", ref)
    if match is None or match["pool"] not in POOLS:
        raise ValueError(
            f"{ref!r} is no drawn scene; scenes are named scene:POOL/INDEX with POOL in {', '.join(POOLS)}"
        )
    return make_scene(match["pool"], int(match["index"]), *read_level(match))


@lru_cache(maxsize=4096)
def make_scene(pool: str, index: int, max_tags: int = MAX_TAGS, numbers: int = 1) -> Scene:
    """The scene `index` of `pool`; `max_tags` below 4 gives the easier scenes of a curriculum, `numbers` 2 numbers of
    up to two digits, 0 to 99."""
    # One residue class of seeds per pool: no two pools can ever draw from the same seed, at whatever level.
    seed = index * len(POOLS) + POOLS.index(pool)
    rng = np.random.default_rng([0x5CE4E, max_tags + 10 * (numbers - 1), seed])
    count = int(rng.integers(min(2, max_tags), max_tags + 1))
    places = _places(rng, count + int(rng.integers(2, MAX_OBJECTS - count + 1)))
    # Scenes of at most two or three tags draw from as many colours: which tag is meant is learned from few at first.
    palette = list(COLOURS)[:max_tags] if 1 < max_tags < MAX_TAGS else list(COLOURS)
    colours = rng.choice(palette, size=count, replace=False)
    tags = tuple(_tag(rng, place, str(colour), numbers) for place, colour in zip(places, colours, strict=False))
    outlines = tuple((str(rng.choice(SHAPES)), place) for place in places[count:])
    tint = int(rng.integers(205, 250))
    lines = tuple(tuple(float(v) for v in rng.uniform(0, SIDE, size=4)) for _ in range(4))
    return Scene(pool, index, max_tags, numbers, tint, lines, tags, outlines)  # type: ignore[arg-type]


def _places(rng: np.random.Generator, count: int) -> list[PixelBox]:
    """`count` squares that lie apart from each other and inside the scene."""
    while True:
        places: list[PixelBox] = []
        for _ in range(60):
            side = rng.uniform(110, 150)
            x, y = rng.uniform(2, SIDE - side - 2, size=2)
            box = (float(x), float(y), float(x + side), float(y + side))
            if all(box[2] + 8 < p[0] or p[2] + 8 < box[0] or box[3] + 8 < p[1] or p[3] + 8 < box[1] for p in places):
                places.append(box)
            if len(places) == count:
                return places


def _tag(rng: np.random.Generator, box: PixelBox, colour: str, numbers: int) -> Tag:
    shape = str(rng.choice(SHAPES))
    middle = np.array([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]) + rng.uniform(-10, 10, size=2)
    if rng.random() < 0.7:
        text = str(rng.integers(0, 10**numbers))
        width = (len(text) * 6 - 1) * GLYPH_SCALE
        x, y = (int(v) for v in middle - np.array([width, GLYPH_HEIGHT]) / 2)
        return Tag(colour, shape, box, text, (), (x, y, x + width, y + GLYPH_HEIGHT))
    dots = _dots(rng, middle, int(rng.integers(1, MAX_DOTS + 1)))
    xs, ys = [x for x, _ in dots], [y for _, y in dots]
    content = (min(xs) - DOT_RADIUS, min(ys) - DOT_RADIUS, max(xs) + DOT_RADIUS, max(ys) + DOT_RADIUS)
    return Tag(colour, shape, box, "", dots, content)


def _dots(rng: np.random.Generator, middle: np.ndarray, count: int) -> tuple[tuple[float, float], ...]:
    """`count` dots on a 3 × 3 grid around `middle`, 15 px apart."""
    cells = rng.choice(9, size=count, replace=False)
    return tuple((float(middle[0] + (c % 3 - 1) * 15), float(middle[1] + (c // 3 - 1) * 15)) for c in cells)


# --- Questions ------------------------------------------------------------------------------------------------------


def questions_of(scene: Scene) -> list[SceneQuestion]:
    """Every question that has exactly one answer in this scene, in a fixed order."""
    found: list[SceneQuestion] = []
    shapes = [tag.shape for tag in scene.tags]
    for index, tag in enumerate(scene.tags):
        if tag.text:
            found.append(SceneQuestion("colour", f"Which number is on the {tag.colour} tag?", tag.text, index))
            if shapes.count(tag.shape) == 1:
                found.append(SceneQuestion("shape", f"Which number is on the {tag.shape}?", tag.text, index))
        else:
            found.append(
                SceneQuestion("count", f"How many dots are on the {tag.colour} tag?", str(len(tag.dots)), index)
            )
        for side, neighbour in _neighbours(scene, index):
            if scene.tags[neighbour].text:
                text = f"Which number is {side} the {tag.colour} tag?"
                found.append(SceneQuestion("relation", text, scene.tags[neighbour].text, neighbour))
    for side, index in _extremes(scene):
        if scene.tags[index].text:
            found.append(SceneQuestion("place", f"Which number is on the {side} tag?", scene.tags[index].text, index))
    return found


def _neighbours(scene: Scene, index: int) -> Iterator[tuple[str, int]]:
    """The sides on which a tag has exactly one other tag within a quarter turn, and which."""
    x, y = scene.tags[index].center
    sides: dict[str, list[int]] = {"left of": [], "right of": [], "above": [], "below": []}
    for other, tag in enumerate(scene.tags):
        dx, dy = tag.center[0] - x, tag.center[1] - y
        if other != index and abs(dx) > 1.2 * abs(dy):
            sides["left of" if dx < 0 else "right of"].append(other)
        elif other != index and abs(dy) > 1.2 * abs(dx):
            sides["above" if dy < 0 else "below"].append(other)
    # A tag near the diagonal is on no side; then no side of this tag is asked about.
    if sum(len(others) for others in sides.values()) == len(scene.tags) - 1:
        yield from ((side, others[0]) for side, others in sides.items() if len(others) == 1)


def _extremes(scene: Scene) -> Iterator[tuple[str, int]]:
    """The outermost tag of each side, where it stands out by at least 30 px."""
    for side, axis, sign in (("leftmost", 0, 1), ("rightmost", 0, -1), ("top", 1, 1), ("bottom", 1, -1)):
        order = sorted(range(len(scene.tags)), key=lambda i: sign * scene.tags[i].center[axis])
        if len(order) > 1 and abs(scene.tags[order[0]].center[axis] - scene.tags[order[1]].center[axis]) >= 30:
            yield side, order[0]


def true_box(scene: Scene, question: SceneQuestion) -> Box:
    """The focus box of a question: the whole tag."""
    return Box.from_pixels(scene.tags[question.target].box, (SIDE, SIDE))


def close_up(scene: Scene, question: SceneQuestion, zoom: float) -> Box:
    """A box between the question's number or dots alone (`zoom` 0) and the whole tag (1): what a curriculum reads."""
    tag = scene.tags[question.target]
    corners = [c + zoom * (b - c) for c, b in zip(tag.content, tag.box, strict=True)]
    return Box.from_pixels(corners, (SIDE, SIDE))


def scene_samples(
    pool: str,
    start: int,
    count: int,
    *,
    per_scene: int = 1,
    kinds: tuple[Kind, ...] = KINDS,
    with_box: bool = False,
    max_tags: int = MAX_TAGS,
    numbers: int = 1,
) -> list[Sample]:
    """Samples of the scenes `start` … `start + count - 1` of `pool`, up to `per_scene` questions of each, as
    `choose_questions` chooses them. Without `with_box` a sample holds no true box: that is the pool that preferences
    are made from.
    """
    samples = []
    for index in range(start, start + count):
        scene = make_scene(pool, index, max_tags, numbers)
        for question in choose_questions(scene, per_scene, kinds):
            box = true_box(scene, question) if with_box else None
            name = f"{scene.name}:{question.text}"
            samples.append(Sample(name, scene.ref, question.text, question.answer, box, f"scenes-{question.kind}"))
    return samples


def count_scenes(
    pool: str, start: int, questions: int, most: int, *, per_scene: int, kinds: tuple[Kind, ...], max_tags: int
) -> int | None:
    """How many scenes, from `start` on, have `questions` questions for `scene_samples`; None if `most` have not."""
    found = 0
    for count in range(most):
        if found >= questions:
            return count
        of_kinds = sum(one.kind in kinds for one in questions_of(make_scene(pool, start + count, max_tags)))
        found += min(per_scene, of_kinds)
    return most if found >= questions else None


def format_source(
    pool: str, start: int, count: int, *, per_scene: int = 1, kinds: tuple[Kind, ...] = KINDS, max_tags: int = MAX_TAGS
) -> str:
    """The source that names what `scene_samples` gives for the same arguments."""
    of_kinds = "" if kinds == KINDS else f":{','.join(kinds)}"
    each = "" if per_scene == 1 else f"*{per_scene}"
    return f"scenes:{pool}{format_level(max_tags)}{of_kinds}/{start}+{count}{each}"


def choose_questions(scene: Scene, count: int, kinds: tuple[Kind, ...] = KINDS) -> list[SceneQuestion]:
    """Up to `count` questions of a scene, of these kinds; all that there are where they are fewer.

    Questions of different tags come first: no tag is asked about again before every tag has been that has a question
    left. Kinds take turns, from question to question and from scene to scene, so that every kind the scenes allow is
    asked about equally often.
    """
    rng = np.random.default_rng([0xA5C, POOLS.index(scene.pool), scene.index])
    left = [question for question in questions_of(scene) if question.kind in kinds]
    chosen: list[SceneQuestion] = []
    asked: set[int] = set()  # tags of this round
    turn = scene.index
    while left and len(chosen) < count:
        if all(question.target in asked for question in left):
            asked = set()
        of_kind = [one for one in left if one.target not in asked and one.kind == kinds[turn % len(kinds)]]
        turn += 1
        if not of_kind:
            # Give the turn to the next kind, and end when no kind is left at all.
            continue
        chosen.append(of_kind[int(rng.integers(len(of_kind)))])
        asked.add(chosen[-1].target)
        left.remove(chosen[-1])
    return chosen


def find_question(sample_id: str) -> tuple[Scene, SceneQuestion]:
    """Scene and question of a sample's id: what an oracle may look up, and training data does not hold.

    Raises:
        ValueError: the id is not one of a drawn scene.
    """
    name, _, text = sample_id.partition(":")
    scene = parse_ref(f"scene:{name}")
    for question in questions_of(scene):
        if question.text == text:
            return scene, question
    raise ValueError(f"{sample_id!r}: the scene has no such question")


# --- Drawing --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def draw(scene: Scene) -> Image.Image:
    """The image of a scene, 672 × 672 RGB. Do not write into it: images are shared, and the last are kept."""
    return draw_anew(scene)


def draw_anew(scene: Scene) -> Image.Image:
    """`draw` for who shows a scene once: nothing is kept."""
    image = Image.merge("RGB", (*_shading()[:1], Image.new("L", (SIDE, SIDE), scene.tint), *_shading()[1:]))
    pen = ImageDraw.Draw(image)
    faint = (190, scene.tint - 20, 190)
    for line in scene.lines:
        pen.line(line, fill=faint, width=3)
    for shape, box in scene.outlines:
        _draw_shape(pen, shape, box, outline=faint, width=3)
    for tag in scene.tags:
        _draw_tag(pen, tag)
    return image


@lru_cache(maxsize=1)
def _shading() -> tuple[Image.Image, Image.Image]:
    """Red and blue of every background. The shading tells a patch where it is: a tiny vision tower without absolute
    positions finds that out very slowly by itself."""
    ramp = Image.linear_gradient("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR).point(lambda v: 150 + v * 0.4)
    return ramp.rotate(90), ramp


def draw_ref(ref: str) -> Image.Image:
    """The image that `scene:POOL/INDEX` names, and the like (`parse_ref`)."""
    return draw(parse_ref(ref))


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, box: PixelBox, **style: Any) -> None:
    x0, y0, x1, y1 = box
    cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
    if shape == "square":
        pen.rectangle(box, **style)
    elif shape == "circle":
        pen.ellipse(box, **style)
    else:
        pen.polygon([(cx, y0), (x1, cy), (cx, y1), (x0, cy)], **style)


def _draw_tag(pen: ImageDraw.ImageDraw, tag: Tag) -> None:
    _draw_shape(pen, tag.shape, tag.box, fill=COLOURS[tag.colour])
    for x, y in tag.dots:
        pen.ellipse((x - DOT_RADIUS, y - DOT_RADIUS, x + DOT_RADIUS, y + DOT_RADIUS), fill=INK)
    left, top = tag.content[:2]
    for place, digit in enumerate(tag.text):
        for row, dots in enumerate(DIGITS[digit]):
            for column, dot in enumerate(dots):
                if dot == "#":
                    x = left + (place * 6 + column) * GLYPH_SCALE
                    y = top + row * GLYPH_SCALE
                    pen.rectangle((x, y, x + GLYPH_SCALE - 1, y + GLYPH_SCALE - 1), fill=INK)
