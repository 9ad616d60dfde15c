"""What each step of the embedded model's pre-training shows: which scenes, which questions of them, and which crops.

A batch is a pure function of the recipe and the step, so that a run that goes on needs to know no more than its step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from visrl.box import Box, with_sides_moved
from visrl.conversation import crop_view, open_view
from visrl.models.encode import Encoder
from visrl.models.tiny.recipe import PretrainConfig, Stretch
from visrl.models.tiny.rows import Batch, Prompts, RowBranch, batch_of
from visrl.records import Picture
from visrl.scenes import Scene, SceneQuestion, close_up, make_scene, questions_of, true_box

SCENES_OF_A_SEED = 1_000_000  # more than any schedule shows: no two seeds share a scene


class Lessons:
    """The batches of a recipe, for one processor."""

    def __init__(self, recipe: PretrainConfig, encoder: Encoder) -> None:
        self.recipe, self.encoder = recipe, encoder
        self.prompts = Prompts(encoder)

    def batch(self, step: int) -> Batch:
        """What step `step` (from 0) learns from."""
        recipe, phase = self.recipe, self.recipe.phase_at(step)
        chance = np.random.default_rng([recipe.seed, step])
        first = recipe.seed * SCENES_OF_A_SEED + step * recipe.fresh
        window = max(recipe.window, recipe.scenes)
        scenes = [make_scene("train", first + int(n)) for n in chance.choice(window, recipe.scenes, replace=False)]
        return batch_of(self.prompts, [(scene, list(self._draw(scene, phase, chance))) for scene in scenes])

    def quiz(self, pool: str, start: int, count: int) -> Batch:
        """Every question of some scenes, up to its question mark."""
        scenes = [make_scene(pool, index) for index in range(start, start + count)]
        return batch_of(self.prompts, [(scene, [RowBranch(one) for one in questions_of(scene)]) for scene in scenes])

    def _draw(self, scene: Scene, phase: Stretch, chance: np.random.Generator) -> Iterator[RowBranch]:
        """Questions by the shares of their kinds, and one tag to read, whatever is asked of the others."""
        questions = questions_of(scene)
        present = {one.kind for one in questions}
        shares = {kind: share for kind, share in sorted(self.recipe.kinds.items()) if kind in present}
        total = sum(shares.values())
        for _ in range(self.recipe.per_scene if total else 0):
            kind = str(chance.choice(list(shares), p=[share / total for share in shares.values()]))
            question = _one_of([one for one in questions if one.kind == kind], chance)
            yield RowBranch(question, true_box(scene, question) if kind in phase.boxes else None)
        # The number or the dots of any tag can be asked for; those with dots are fewer and harder to read.
        odds = np.array([1.0 if tag.text else 2.0 for tag in scene.tags])
        tag = int(chance.choice(len(scene.tags), p=odds / odds.sum()))
        question = _one_of([one for one in questions if one.target == tag], chance)
        box = crop_box(close_up(scene, question, float(chance.uniform(*phase.zoom))), phase, chance)
        whole = open_view(Picture(scene.ref))
        yield RowBranch(question, crop=crop_view(whole, Picture(scene.ref, box), self.encoder.settings.crop_rule))


def crop_box(box: Box, phase: Stretch, chance: np.random.Generator) -> Box:
    """A crop to read around `box`: squared, and then resized and shifted; or each of its sides moved by itself."""
    if chance.random() >= phase.square:
        return with_sides_moved(box, *chance.uniform(-phase.loose, phase.loose, size=4))
    side = max(box.width, box.height)
    across, down = side / box.width, side / box.height  # of the square, in widths and heights of the box
    grown = chance.uniform(-phase.loose, 2 * phase.loose) / 4
    x, y = chance.uniform(-phase.loose, phase.loose, size=2) / 4
    wider, higher = (across - 1) / 2 + grown * across, (down - 1) / 2 + grown * down
    return with_sides_moved(box, wider - x * across, higher - y * down, wider + x * across, higher + y * down)


def _one_of(questions: Sequence[SceneQuestion], chance: np.random.Generator) -> SceneQuestion:
    return questions[int(chance.integers(len(questions)))]
