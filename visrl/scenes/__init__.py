"""Drawn scenes: images of coloured tags, with questions, answers and true boxes that follow exactly from what is drawn.

A scene holds small tags whose numbers and dots can be read in a crop and not in the whole image; the question alone
says which of them matters. Distractors are all else: the other tags, which carry numbers and dots as readable as the
one asked about, empty outlines of the same shapes, and lines. Scenes of several looks (`POOL@looks`) also hold large
tags, which can be read in the whole image, and small ones that lie apart.

scene       tags and scenes, what they are called, and where everything in them lies
questions   what can be asked of a scene: the answer, and the tags that must be seen to give it
drawing     the image of a scene
samples     samples of scenes, and the sources that name them

A scene is a pure function of its pool, its index and its level. Pools draw from disjoint seeds, so training,
preference, validation and test scenes never meet. The folder knows no model and no file.
"""

from visrl.scenes.drawing import draw, draw_anew, draw_ref
from visrl.scenes.questions import (
    ALL_KINDS,
    KINDS,
    LOOK_KINDS,
    Kind,
    LookKind,
    SceneQuestion,
    check_kind,
    check_level,
    choose_questions,
    close_up,
    find_question,
    questions_of,
    true_box,
    true_looks,
)
from visrl.scenes.samples import count_scenes, format_source, scene_samples
from visrl.scenes.scene import (
    COLOURS,
    DIGITS,
    DOT_RADIUS,
    GLYPH_HEIGHT,
    INK,
    LEVEL,
    LOOKS,
    MAX_NUMBERS,
    MAX_TAGS,
    POOLS,
    SHAPES,
    SIDE,
    PixelBox,
    Scene,
    Tag,
    make_scene,
    parse_ref,
    read_level,
)

__all__ = [
    "ALL_KINDS", "COLOURS", "DIGITS", "DOT_RADIUS", "GLYPH_HEIGHT", "INK", "KINDS", "LEVEL", "LOOKS", "LOOK_KINDS",
    "MAX_NUMBERS", "MAX_TAGS", "POOLS", "SHAPES", "SIDE", "Kind", "LookKind", "PixelBox", "Scene", "SceneQuestion",
    "Tag", "check_kind", "check_level", "choose_questions", "close_up", "count_scenes", "draw", "draw_anew", "draw_ref",
    "find_question", "format_source", "make_scene", "parse_ref", "questions_of", "read_level", "scene_samples",
    "true_box", "true_looks",
]  # fmt: skip
