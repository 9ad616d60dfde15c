"""What can be asked of a scene: every question that has one answer, and the tags that must be seen to give it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator

from visrl.box import Box, enclosing
from visrl.scenes.scene import LOOKS, POOLS, SIDE, Scene, lie_apart, parse_ref

RENAMED_KINDS = {"edge": "place"}  # names of earlier releases, and what each kind is called now


def check_kind(name: Any) -> Any:
    """`name`, where there is such a kind of question.

    Raises:
        ValueError: there is none; the message says which there are, or what it is called now.
    """
    if name in ALL_KINDS:
        return name
    now = RENAMED_KINDS.get(name) if isinstance(name, str) else None
    hint = f"it is called {now!r} now" if now else f"there are {', '.join(ALL_KINDS)}"
    raise ValueError(f"no questions of kind {name!r} in drawn scenes; {hint}")


def check_level(kinds: Iterable[str], looks: bool) -> None:
    """That scenes of a level have questions of these kinds.

    Raises:
        ValueError: they have none of one; the message says which scenes do.
    """
    missing = sorted(set(kinds) - set(KINDS)) if not looks else []
    if missing:
        raise ValueError(f"questions of kind {missing[0]!r} are asked about the scenes of several looks, POOL@{LOOKS}")


Kind = Annotated[Literal["colour", "shape", "place", "count", "relation"], BeforeValidator(check_kind)]
LookKind = Annotated[
    Literal["colour", "shape", "place", "count", "relation", "large", "both", "compare", "sum"],
    BeforeValidator(check_kind),
]

KINDS: tuple[Kind, ...] = ("colour", "shape", "place", "count", "relation")  # of one look
LOOK_KINDS: tuple[LookKind, ...] = ("large", "colour", "shape", "place", "count", "relation", "both", "compare", "sum")
ALL_KINDS: tuple[LookKind, ...] = (*KINDS, "large", "both", "compare", "sum")


@dataclass(frozen=True, slots=True)
class SceneQuestion:
    """A question with one answer and the tags that must be seen to give it."""

    kind: LookKind
    text: str
    answer: str
    target: int  # index of the tag, of the first one where there are several
    also: tuple[int, ...] = ()  # indices of the others

    @property
    def targets(self) -> tuple[int, ...]:
        """The indices of all tags that must be seen, in the order in which the question names them."""
        return (self.target, *self.also)


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
    if scene.looks:
        found = [replace(one, kind="large") if scene.tags[one.target].scale > 1 else one for one in found]
        found += _of_two_tags(scene)
    return found


def _of_two_tags(scene: Scene) -> Iterator[SceneQuestion]:
    """The questions about two small tags that lie apart."""
    small = [index for index, tag in enumerate(scene.tags) if tag.scale == 1]
    for pair in permutations(small, 2):
        first, second = (scene.tags[index] for index in pair)
        if not lie_apart(first.box, second.box):
            continue
        if first.text and second.text:
            text = f"Which numbers are on the {first.colour} tag and the {second.colour} tag?"
            yield SceneQuestion("both", text, f"{first.text} {second.text}", pair[0], pair[1:])
        if first.text and second.text and first.text != second.text:
            text = f"Which number is larger, the one on the {first.colour} tag or on the {second.colour} tag?"
            yield SceneQuestion("compare", text, str(max(int(first.text), int(second.text))), pair[0], pair[1:])
        if first.dots and second.dots:
            text = f"How many dots are on the {first.colour} tag and the {second.colour} tag?"
            yield SceneQuestion("sum", text, str(len(first.dots) + len(second.dots)), pair[0], pair[1:])


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
    """The focus box of a question: the whole tag, or the smallest box around all tags that must be seen."""
    return enclosing(_tag_boxes(scene, question))


def true_looks(scene: Scene, question: SceneQuestion) -> tuple[Box, ...]:
    """Where to look, in the order in which the question names the tags; nowhere if it is about a large one."""
    return () if question.kind == "large" else _tag_boxes(scene, question)


def _tag_boxes(scene: Scene, question: SceneQuestion) -> tuple[Box, ...]:
    return tuple(Box.from_pixels(scene.tags[index].box, (SIDE, SIDE)) for index in question.targets)


def close_up(scene: Scene, question: SceneQuestion, zoom: float) -> Box:
    """A box between the question's number or dots alone (`zoom` 0) and the whole tag (1): what a curriculum reads."""
    tag = scene.tags[question.target]
    corners = [c + zoom * (b - c) for c, b in zip(tag.content, tag.box, strict=True)]
    return Box.from_pixels(corners, (SIDE, SIDE))


def choose_questions(scene: Scene, count: int, kinds: tuple[LookKind, ...] = KINDS) -> list[SceneQuestion]:
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
