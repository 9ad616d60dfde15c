import hashlib
import re

import pytest

from visrl.box import crop_window
from visrl.config import ConfigError, build_config
from visrl.data.sources import read_samples
from visrl.evolve.config import DemoConfig
from visrl.records import RecordError
from visrl.scenes import (
    KINDS,
    POOLS,
    SIDE,
    Scene,
    draw,
    draw_ref,
    find_question,
    make_scene,
    parse_ref,
    questions_of,
    scene_samples,
    true_box,
)
from visrl.train.config import TrainConfig


def test_a_scene_is_a_function_of_its_name():
    assert make_scene("test", 5) == parse_ref("scene:test/5")
    make_scene.cache_clear()
    assert make_scene("test", 5) == make_scene("test", 5)
    assert draw(make_scene("test", 5)).tobytes() == draw_ref("scene:test/5").tobytes()


def test_pools_never_share_a_picture():
    seen = {
        pool: {hashlib.sha256(draw.__wrapped__(make_scene(pool, n)).tobytes()).digest() for n in range(120)}
        for pool in POOLS
    }
    for a in POOLS:
        assert len(seen[a]) == 120
        for b in POOLS:
            assert a == b or not seen[a] & seen[b]


def test_what_a_name_must_look_like():
    for bad in ("scene:train", "scene:other/1", "scene:train/-1", "scene:train@9/1", "scene:train/1x", "train/1"):
        with pytest.raises(ValueError, match="is no drawn scene"):
            parse_ref(bad)
    assert parse_ref("scene:train@2/7").max_tags == 2


def answer_by_pixels(scene: Scene, text: str) -> str | None:
    """An independent reader of the questions, from the tags' places alone; None where the question is not unique."""
    tags = list(scene.tags)
    center = {tag: ((tag.box[0] + tag.box[2]) / 2, (tag.box[1] + tag.box[3]) / 2) for tag in tags}
    if match := re.fullmatch(r"Which number is on the (leftmost|rightmost|top|bottom) tag\?", text):
        axis, sign = {"leftmost": (0, 1), "rightmost": (0, -1), "top": (1, 1), "bottom": (1, -1)}[match[1]]
        return min(tags, key=lambda t: sign * center[t][axis]).text
    if match := re.fullmatch(r"Which number is (left of|right of|above|below) the (\w+) tag\?", text):
        (reference,) = (tag for tag in tags if tag.colour == match[2])
        axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[match[1]]
        x, y = center[reference]
        near = [
            tag
            for tag in tags
            if sign * (center[tag][axis] - (x, y)[axis]) > abs(center[tag][1 - axis] - (x, y)[1 - axis])
        ]
        return near[0].text if len(near) == 1 else None
    match = re.fullmatch(r"(?:Which number is|How many dots are) on the (\w+?)(?: tag)?\?", text)
    assert match, text
    (tag,) = (tag for tag in tags if match[1] in (tag.colour, tag.shape))
    return tag.text or str(len(tag.dots))


def test_every_question_has_one_answer():
    kinds = set()
    for index in range(150):
        scene = make_scene("validation", index)
        for question in questions_of(scene):
            kinds.add(question.kind)
            assert question.answer == answer_by_pixels(scene, question.text)
            assert true_box(scene, question).to_pixels((SIDE, SIDE)) == pytest.approx(scene.tags[question.target].box)
    assert kinds == set(KINDS)


def test_content_lies_inside_its_tag_and_tags_lie_apart():
    for index in range(100):
        scene = make_scene("train", index)
        for tag in scene.tags:
            assert tag.box[0] < tag.content[0] < tag.content[2] < tag.box[2]
            assert tag.box[1] < tag.content[1] < tag.content[3] < tag.box[3]
        for i, a in enumerate(scene.tags):
            for b in scene.tags[i + 1 :]:
                assert a.box[2] < b.box[0] or b.box[2] < a.box[0] or a.box[3] < b.box[1] or b.box[3] < a.box[1]


def test_samples_hold_no_true_box_unless_asked():
    samples = scene_samples("preference", 0, 50, per_scene=3)
    assert len(samples) > 90
    assert all(sample.box is None and sample.raw is None for sample in samples)
    for sample in scene_samples("test", 0, 20, with_box=True):
        scene, question = find_question(sample.id)
        assert sample.box == true_box(scene, question)
        assert crop_window(sample.box, (SIDE, SIDE))[0] >= 0


def test_kinds_are_asked_about_equally_where_scenes_allow():
    samples = scene_samples("test", 0, 500)
    shares = {kind: sum(sample.source == f"scenes-{kind}" for sample in samples) / 500 for kind in KINDS}
    assert min(shares.values()) > 0.08
    assert max(shares.values()) < 0.35


def test_a_kind_under_its_former_name_is_told_its_new_one(tmp_path):
    with pytest.raises(RecordError, match="no questions of kind 'edge' in drawn scenes; it is called 'place' now"):
        read_samples("scenes:test:colour,edge/0+4")
    with pytest.raises(RecordError, match="there are colour, shape, place, count, relation"):
        read_samples("scenes:test:size/0+4")
    given = {"stage": "sft", "model_name_or_path": "m", "output_dir": str(tmp_path / "out")}
    for values in ({"kinds": ["edge"]}, {"kinds": [["edge"]]}):
        with pytest.raises(ConfigError, match=r"kinds.*in drawn scenes; (it is called 'place' now|there are colour)"):
            build_config(DemoConfig, values, "demo.yaml")
        with pytest.raises(ConfigError, match=r"curriculum.*in drawn scenes"):
            build_config(TrainConfig, given | {"curriculum": [{"steps": 1, **values}]}, "sft.yaml")
    assert {sample.source for sample in read_samples("scenes:test:place/0+4")} == {"scenes-place"}
