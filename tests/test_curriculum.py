"""The warm-up's curriculum over drawn scenes: what each phase asks for, and that an index says everything."""

import numpy as np
import pytest

from visrl.box import Box
from visrl.models.load import load_encoder
from visrl.models.tiny import CHECKPOINT
from visrl.scenes import find_question, true_box
from visrl.train.config import Phase
from visrl.train.curriculum import Curriculum


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(CHECKPOINT)


def phase(**given) -> Phase:
    return Phase(steps=3, kinds=["colour", "count"], **given)


def true_box_of(row) -> Box:
    return true_box(*find_question(row.key.rpartition("/")[0]))


def test_phases_follow_each_other_and_every_scene_is_seen_once(encoder):
    curriculum = Curriculum(encoder, [phase(tasks=["locate"]), phase(tasks=["read"])], batch_size=2)
    assert len(curriculum) == 12
    asked = [{row.key.rpartition("/")[2] for row in curriculum[index].rows} for index in range(12)]
    assert asked == [{"box"}] * 6 + [{"answer"}] * 6
    assert len({curriculum[index].id for index in range(12)}) == 12


def test_an_index_says_everything(encoder):
    def said(curriculum, index):
        rows = curriculum[index].rows
        return [(row.key, row.responses, [view.image.tobytes() for view in row.conversation.views]) for row in rows]

    phases = [phase(tasks=["locate", "read"], loose=0.25, margin=0.5)]
    once, again = (Curriculum(encoder, phases, batch_size=2) for _ in range(2))
    assert [said(again, index) for index in (4, 1)] == [said(once, index) for index in (4, 1)]


def test_loose_crops_differ_from_the_box_and_by_no_more_than_they_may(encoder):
    exact, loose = (
        [row.conversation.views[1].size for i in range(6) for row in Curriculum(encoder, phases, batch_size=2)[i].rows]
        for phases in ([phase(tasks=["read"])], [phase(tasks=["read"], loose=0.25)])
    )
    assert len(exact) == len(loose)
    assert any(a != b for a, b in zip(exact, loose, strict=True))
    for (width, height), (cut_width, cut_height) in zip(exact, loose, strict=True):
        assert 0.5 * width - 2 <= cut_width <= 1.5 * width + 2
        assert 0.5 * height - 2 <= cut_height <= 1.5 * height + 2


def test_a_margin_widens_what_is_located_and_leaves_what_is_read(encoder):
    def rows(**keys):
        curriculum = Curriculum(encoder, [phase(tasks=["locate", "read"], **keys)], batch_size=2)
        return [row for i in range(6) for row in curriculum[i].rows]

    wider = 0
    for exact, drawn in zip(rows(), rows(margin=0.5), strict=True):
        assert exact.key == drawn.key
        if exact.key.endswith("/answer"):
            sizes = [np.array(row.conversation.views[1].size) for row in (exact, drawn)]
            assert np.abs(sizes[0] - sizes[1]).max() <= 2  # three decimals of a box's text
            continue
        box, truth = encoder.codec.parse(drawn.responses[0][1], (672, 672), (112, 112)), true_box_of(drawn)
        sides = (truth.x0 - box.x0, truth.y0 - box.y0, box.x1 - truth.x1, box.y1 - truth.y1)
        for side, length in zip(sides, (truth.width, truth.height) * 2, strict=True):
            assert -0.001 <= side <= 0.5 * length + 0.001
        wider += max(sides) > 0.05
    assert wider > 0


def test_kinds_without_boxes_give_an_answer_to_read_alone(encoder):
    curriculum = Curriculum(encoder, [phase(boxes=["colour"], per_scene=3)], batch_size=2)
    rows = [row for index in range(6) for row in curriculum[index].rows]
    kinds = {name: {find_question(row.key.rpartition("/")[0])[1].kind for row in rows if row.key.endswith(name)}
             for name in ("/box", "/answer")}  # fmt: skip
    assert kinds == {"/box": {"colour"}, "/answer": {"colour", "count"}}
    with pytest.raises(ValueError, match="count: kinds without boxes have answers to read alone"):
        phase(tasks=["locate"], boxes=["colour"])
