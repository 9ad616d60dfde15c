"""Samples of scenes, and the sources that name them."""

from __future__ import annotations

from visrl.records import Sample
from visrl.scenes.questions import KINDS, Kind, LookKind, choose_questions, questions_of, true_looks
from visrl.scenes.scene import MAX_TAGS, format_level, make_scene


def scene_samples(
    pool: str,
    start: int,
    count: int,
    *,
    per_scene: int = 1,
    kinds: tuple[LookKind, ...] = KINDS,
    with_box: bool = False,
    max_tags: int = MAX_TAGS,
    numbers: int = 1,
    looks: bool = False,
) -> list[Sample]:
    """Samples of the scenes `start` … `start + count - 1` of `pool`, up to `per_scene` questions of each, as
    `choose_questions` chooses them. Without `with_box` a sample holds no true box: that is the pool that preferences
    are made from. Samples of several `looks` hold the true boxes of all of them, and as their box the only one.
    """
    samples = []
    for index in range(start, start + count):
        scene = make_scene(pool, index, max_tags, numbers, looks)
        for question in choose_questions(scene, per_scene, kinds):
            known = true_looks(scene, question) if with_box else None
            box = known[0] if known and len(known) == 1 else None
            samples.append(
                Sample(
                    f"{scene.name}:{question.text}",
                    scene.ref,
                    question.text,
                    question.answer,
                    box,
                    f"scenes-{question.kind}",
                    looks=known if looks else None,
                )
            )
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
