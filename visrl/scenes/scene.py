"""Tags and scenes: what is in an image, what it is called, and where everything in it lies."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

SIDE = 672  # px: a model that sees the whole scene at 112 px sees a sixth of it, and a 21-px digit at 3.5 px
POOLS = ("train", "preference", "validation", "test")
COLOURS = {
    "red": (214, 69, 65),
    "blue": (66, 110, 214),
    "yellow": (236, 200, 66),
    "green": (63, 166, 90),
    "purple": (146, 84, 190),
    "orange": (240, 140, 50),
}
SHAPES = ("square", "circle", "diamond")
ROOMY_SHAPES = SHAPES[:2]
GLYPH_HEIGHT = 21  # px of a digit in the scene
GLYPH_SCALE = 3  # px per dot of the 5 × 7 digits below
DOT_RADIUS = 3.5  # px
MAX_DOTS = 6
MAX_LOOK_DOTS = 4  # on a tag of a scene of several looks
MAX_TAGS = 4
MAX_NUMBERS = 2  # digits of a number on a tag
MAX_OBJECTS = 6  # tags and outlines
LOOKS = "looks"  # the level of scenes that need no, one or several looks
LARGE = 5  # times as large: a digit of 105 px is one of 17.5 px at 112 px, as in the crop of a small tag
LARGE_SHARE = 0.6  # of the scenes of several looks hold a large tag
APART = 0.3  # share of the image that the smallest box around two tags covers, at least, if they lie apart
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
    scale: int = 1  # of the number or the dots

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


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
    looks: bool = False  # a scene of the level of several looks

    @property
    def name(self) -> str:
        return f"{self.pool}{format_level(self.max_tags, self.numbers, self.looks)}/{self.index}"

    @property
    def ref(self) -> str:
        return f"scene:{self.name}"


# How a name says the pool and the level of its scenes: `test`, `test@2`, `test@4x2`, `test@looks`.
LEVEL = rf"(?P<pool>\w+?)(?:@(?P<looks>{LOOKS})|(?:@(?P<tags>[1-{MAX_TAGS}]))?(?:x(?P<numbers>[1-{MAX_NUMBERS}]))?)"


def format_level(max_tags: int = MAX_TAGS, numbers: int = 1, looks: bool = False) -> str:
    """What a name says of the level of its scenes: nothing for up to four tags with numbers of one digit."""
    if looks:
        return f"@{LOOKS}"
    if numbers == 1:
        return "" if max_tags == MAX_TAGS else f"@{max_tags}"
    return f"@{max_tags}x{numbers}"


def read_level(match: re.Match[str]) -> tuple[int, int, bool]:
    """`max_tags`, `numbers` and `looks` as a match of `LEVEL` says them."""
    return int(match["tags"] or MAX_TAGS), int(match["numbers"] or 1), match["looks"] is not None


def parse_ref(ref: str) -> Scene:
    """The scene that `scene:POOL/INDEX` names; `scene:POOL@TAGS/INDEX` is one of at most TAGS tags,
    `scene:POOL@TAGSx2/INDEX` one with numbers of up to two digits, and `scene:POOL@looks/INDEX` one of several looks.

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
def make_scene(pool: str, index: int, max_tags: int = MAX_TAGS, numbers: int = 1, looks: bool = False) -> Scene:
    """The scene `index` of `pool`; `max_tags` below 4 gives the easier scenes of a curriculum, `numbers` 2 numbers of
    up to two digits, 0 to 99, and `looks` the scenes of several looks."""
    # One residue class of seeds per pool: no two pools can ever draw from the same seed, at whatever level.
    seed = index * len(POOLS) + POOLS.index(pool)
    rng = np.random.default_rng([0x5CE4E, 50 if looks else max_tags + 10 * (numbers - 1), seed])
    if looks:
        tags, spare = _tags_of_looks(rng)
    else:
        count = int(rng.integers(min(2, max_tags), max_tags + 1))
        places = _places(rng, count + int(rng.integers(2, MAX_OBJECTS - count + 1)))
        # Scenes of at most two or three tags draw from as many colours: which tag is meant is learned from few first.
        palette = list(COLOURS)[:max_tags] if 1 < max_tags < MAX_TAGS else list(COLOURS)
        colours = rng.choice(palette, size=count, replace=False)
        tags = tuple(
            _tag(rng, place, str(colour), numbers=numbers) for place, colour in zip(places, colours, strict=False)
        )
        spare = places[count:]
    outlines = tuple((str(rng.choice(SHAPES)), place) for place in spare)
    tint = int(rng.integers(205, 250))
    lines = tuple(tuple(float(v) for v in rng.uniform(0, SIDE, size=4)) for _ in range(4))
    return Scene(pool, index, max_tags, numbers, tint, lines, tags, outlines, looks)  # type: ignore[arg-type]


def _tags_of_looks(rng: np.random.Generator) -> tuple[tuple[Tag, ...], list[PixelBox]]:
    """The tags of a scene of several looks, and places for outlines. The first two tags lie apart and can be compared
    or counted together: both hold a number, not the same, or both dots. The last may be a large one."""
    large = rng.random() < LARGE_SHARE
    small = 2 if large else int(rng.integers(2, MAX_TAGS))
    while True:
        places = _places(rng, small + int(rng.integers(0, 2)), [_place(rng, 300, 340)] if large else [])
        if lie_apart(places[large], places[large + 1]):
            break
    colours = [str(colour) for colour in rng.choice(list(COLOURS), size=small + large, replace=False)]
    of_numbers = bool(rng.random() < 0.5)
    tags: list[Tag] = []
    for place, colour in zip(places[large:], colours[:small], strict=False):
        alike = of_numbers if len(tags) < 2 else None
        tag = _tag(rng, place, colour, max_dots=MAX_LOOK_DOTS, of_number=alike)
        while len(tags) == 1 and tag.text and tag.text == tags[0].text:
            tag = _tag(rng, place, colour, of_number=alike)
        tags.append(tag)
    if large:
        tags.append(_tag(rng, places[0], colours[-1], max_dots=MAX_LOOK_DOTS, scale=LARGE))
    return tuple(tags), places[large + small :]


def lie_apart(one: PixelBox, other: PixelBox) -> bool:
    """Whether no one box around two tags is small enough to read them in its crop."""
    width = max(one[2], other[2]) - min(one[0], other[0])
    height = max(one[3], other[3]) - min(one[1], other[1])
    return width * height >= APART * SIDE**2


def _places(rng: np.random.Generator, count: int, taken: list[PixelBox] | None = None) -> list[PixelBox]:
    """`count` squares that lie apart from each other, and from those that are `taken`, and inside the scene; they come
    after these."""
    taken = taken or []
    while True:
        places = list(taken)
        for _ in range(60):
            box = _place(rng, 110, 150)
            if all(box[2] + 8 < p[0] or p[2] + 8 < box[0] or box[3] + 8 < p[1] or p[3] + 8 < box[1] for p in places):
                places.append(box)
            if len(places) == len(taken) + count:
                return places


def _place(rng: np.random.Generator, smallest: int, largest: int) -> PixelBox:
    side = rng.uniform(smallest, largest)
    x, y = rng.uniform(2, SIDE - side - 2, size=2)
    return float(x), float(y), float(x + side), float(y + side)


def _tag(
    rng: np.random.Generator, box: PixelBox, colour: str, *, numbers: int = 1, max_dots: int = MAX_DOTS,
    of_number: bool | None = None, scale: int = 1,
) -> Tag:  # fmt: skip
    """A tag with a number or with dots, by lot where `of_number` does not say which."""
    # Dots of a large tag would not fit into a diamond.
    shape = str(rng.choice(SHAPES if scale == 1 else ROOMY_SHAPES))
    middle = np.array([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]) + rng.uniform(-10, 10, size=2)
    if rng.random() < 0.7 if of_number is None else of_number:
        text = str(rng.integers(0, 10**numbers))
        width, height = (len(text) * 6 - 1) * GLYPH_SCALE * scale, GLYPH_HEIGHT * scale
        x, y = (int(v) for v in middle - np.array([width, height]) / 2)
        return Tag(colour, shape, box, text, (), (x, y, x + width, y + height), scale)
    dots = _dots(rng, middle, int(rng.integers(1, max_dots + 1)), scale)
    xs, ys, radius = [x for x, _ in dots], [y for _, y in dots], DOT_RADIUS * scale
    content = (min(xs) - radius, min(ys) - radius, max(xs) + radius, max(ys) + radius)
    return Tag(colour, shape, box, "", dots, content, scale)


def _dots(rng: np.random.Generator, middle: np.ndarray, count: int, scale: int) -> tuple[tuple[float, float], ...]:
    """`count` dots on a 3 × 3 grid around `middle`, 15 px apart at `scale` 1."""
    cells, step = rng.choice(9, size=count, replace=False), 15 * scale
    return tuple((float(middle[0] + (c % 3 - 1) * step), float(middle[1] + (c // 3 - 1) * step)) for c in cells)
