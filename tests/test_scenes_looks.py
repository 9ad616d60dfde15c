"""Scenes of several looks: what their questions need, that the answers follow from what is drawn, and their names."""

import hashlib
import re
from collections import Counter

import numpy as np
import pytest

from visrl.box import crop_window, iou
from visrl.data.sources import read_samples
from visrl.models.load import load_encoder
from visrl.models.settings import ModelSettings
from visrl.models.tiny import CHECKPOINT
from visrl.records import RecordError
from visrl.scenes import (
    LOOK_KINDS,
    POOLS,
    SIDE,
    choose_questions,
    draw,
    draw_ref,
    find_question,
    make_scene,
    parse_ref,
    questions_of,
    true_box,
    true_looks,
)
from visrl.train.config import Phase
from visrl.train.curriculum import Curriculum

SCENES = [make_scene("validation", index, looks=True) for index in range(120)]
ASKED = [(scene, question) for scene in SCENES for question in questions_of(scene)]


def test_a_name_always_means_the_same_scene_and_its_levels_and_pools_share_none():
    scene = parse_ref("scene:test@looks/5")
    assert (scene, scene.ref) == (make_scene("test", 5, looks=True), "scene:test@looks/5")
    assert draw(scene).tobytes() == draw_ref("scene:test@looks/5").tobytes()
    tags = [(tag.colour, tag.shape, tag.text, len(tag.dots), np.round(tag.box, 2).tolist()) for tag in scene.tags]
    said = repr((tags, [(one.kind, one.text, one.answer, one.targets) for one in questions_of(scene)]))
    assert hashlib.sha256(said.encode()).hexdigest()[:16] == "cd8eae3ab460c447"
    levels = [{"max_tags": 4}, {"numbers": 2}, {"looks": True}]
    places = Counter(make_scene(pool, n, **level).tags[0].box for pool in POOLS for level in levels for n in range(40))
    assert max(places.values()) == 1
    for bad in ("scene:test@looksx2/1", "scene:test@look/1", "scene:test@looks@2/1"):
        with pytest.raises(ValueError, match="is no drawn scene"):
            parse_ref(bad)


def test_a_question_needs_a_look_for_each_small_tag_that_it_is_about():
    needed = {kind: {len(true_looks(*one)) for one in ASKED if one[1].kind == kind} for kind in LOOK_KINDS}
    assert needed == {kind: {1} for kind in LOOK_KINDS} | {"large": {0}, "both": {2}, "compare": {2}, "sum": {2}}
    for scene, question in ASKED:
        tags = [scene.tags[index] for index in question.targets]
        assert [box.to_pixels((SIDE, SIDE)) for box in true_looks(scene, question)] == [
            pytest.approx(tag.box) for tag in tags if tag.scale == 1
        ]  # fmt: skip
        for tag in tags:  # what a glyph or a dot measures at 112 px
            assert tag.box[0] < tag.content[0] < tag.content[2] < tag.box[2]
            assert tag.box[1] < tag.content[1] < tag.content[3] < tag.box[3]


def test_two_tags_that_are_asked_about_together_cannot_be_read_in_one_crop():
    most = ModelSettings.load(CHECKPOINT).crop_max_pixels
    for scene, question in ASKED:
        window = crop_window(true_box(scene, question), (SIDE, SIDE))
        scale = (most / ((window[2] - window[0]) * (window[3] - window[1]))) ** 0.5
        # A digit of a small tag is 21 px high in the scene, and 3.5 px in the whole image at 112 px.
        assert 21 * scale < 7.5 if len(question.targets) == 2 else 21 * scale > 17 or question.kind == "large"


def test_answers_follow_from_the_tags_that_a_question_names():
    for scene, question in ASKED:
        if len(question.targets) < 2:
            continue
        named = re.findall(r"(\w+) tag", question.text)
        first, second = (next(tag for tag in scene.tags if tag.colour == name) for name in named)
        assert [scene.tags[index] for index in question.targets] == [first, second]
        if question.kind == "both":
            assert question.answer == f"{first.text} {second.text}"
        elif question.kind == "compare":
            assert {first.text, second.text} - {question.answer} == {str(min(int(first.text), int(second.text)))}
        else:
            assert int(question.answer) == len(first.dots) + len(second.dots) > 1
    assert all(any(one.kind in ("compare", "sum") for one in questions_of(scene)) for scene in SCENES)
    texts = Counter((scene.name, question.text) for scene, question in ASKED)
    assert max(texts.values()) == 1


def test_a_source_of_several_looks_gives_every_kind_its_turn_and_true_boxes_where_they_are_asked_for():
    samples = read_samples("scenes:test@looks/0+600", with_box=True)
    shares = Counter(sample.source.removeprefix("scenes-") for sample in samples)
    assert set(shares) == set(LOOK_KINDS)
    assert min(shares.values()) > 15
    for sample in samples:
        scene, question = find_question(sample.id)
        assert sample.looks == true_looks(scene, question)
        assert sample.box == (sample.looks[0] if len(sample.looks) == 1 else None)
    assert all(one.looks is None and one.box is None for one in read_samples("scenes:test@looks:sum/0+9"))
    chosen = choose_questions(SCENES[0], 3, ("compare", "sum"))
    assert {one.kind for one in chosen} <= {"compare", "sum"}
    with pytest.raises(RecordError, match="'large' are asked about the scenes of several looks, POOL@looks"):
        read_samples("scenes:test:large/0+9")


# --- The curriculum over them -----------------------------------------------------------------------------------------


def rows_of(**keys):
    encoder = load_encoder(CHECKPOINT)
    curriculum = Curriculum(encoder, [Phase(steps=4, looks=True, per_scene=3, **keys)], batch_size=2)
    rows = [row for index in range(8) for row in curriculum[index].rows]
    looks = Counter(row.key.rpartition("/")[0] for row in rows if row.step == "box")
    answers = [row for row in rows if row.step == "answer"]
    return rows, [
        (find_question(row.key.rpartition("/")[0])[1].kind, looks[row.key.rpartition("/")[0]]) for row in answers
    ]


def test_a_phase_teaches_the_true_looks_or_those_that_its_keys_make_of_them():
    wanted = {kind: 1 for kind in LOOK_KINDS} | {"large": 0, "both": 2, "compare": 2, "sum": 2}
    rows, taught = rows_of(margin=0.3, loose=0.2)
    assert all(wanted[kind] == count for kind, count in taught)
    assert {kind for kind, _ in taught} >= {"large", "compare", "sum"}
    crops = [[view.size for view in row.conversation.views[1:]] for row in rows]
    assert max(map(len, crops)) == 2
    of_large = [{count for _, count in rows_of(kinds=["large"], at_once=share)[1]} for share in (0.0, 0.5, 1.0)]
    assert of_large == [{1}, {0, 1}, {0}]


def test_one_look_for_two_tags_is_the_smallest_box_around_them():
    encoder = load_encoder(CHECKPOINT)
    rows, taught = rows_of(kinds=["compare", "sum"], max_looks=1)
    assert {count for _, count in taught} == {1}
    for row in rows:
        if row.step == "box":
            box = encoder.codec.parse(row.responses[0][1], (SIDE, SIDE), (112, 112))
            assert iou(box, true_box(*find_question(row.key.rpartition("/")[0]))) > 0.98


def test_another_start_shows_other_scenes_and_keys_of_looks_need_their_scenes():
    here, there = ({row.key for row in rows_of(start=start)[0]} for start in (0, 1000))
    assert not here & there
    with pytest.raises(ValueError, match="at_once is about the scenes of several looks: set looks: true"):
        Phase(steps=1, at_once=0.5)
    with pytest.raises(ValueError, match="'sum' are asked about the scenes of several looks"):
        Phase(steps=1, kinds=["sum"])
    assert Phase(steps=1).model_dump().keys().isdisjoint({"looks", "start", "at_once", "max_looks"})
