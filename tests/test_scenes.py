import hashlib
import re
from collections import Counter

import numpy as np
import pytest

from visrl.box import crop_window
from visrl.config import ConfigError, build_config
from visrl.data.sources import read_samples
from visrl.evolve.config import DemoConfig
from visrl.records import RecordError
from visrl.scenes import (
    DIGITS,
    INK,
    KINDS,
    POOLS,
    SIDE,
    Scene,
    choose_questions,
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


@pytest.mark.parametrize("numbers", [1, 2])
def test_pools_never_share_a_picture(numbers):
    seen = {
        pool: {
            hashlib.sha256(draw.__wrapped__(make_scene(pool, n, numbers=numbers)).tobytes()).digest()
            for n in range(60)
        }
        for pool in POOLS
    }  # fmt: skip
    for a in POOLS:
        assert len(seen[a]) == 60
        for b in POOLS:
            assert a == b or not seen[a] & seen[b]


def test_levels_of_a_pool_share_no_scene_with_each_other_or_with_another_pool():
    levels = [(tags, numbers) for tags in (1, 2, 3, 4) for numbers in (1, 2)]
    places = Counter(make_scene(pool, n, *level).tags[0].box for pool in POOLS for level in levels for n in range(40))
    assert max(places.values()) == 1


# Models are trained and compared on the scenes behind these names.
DRAWN = {
    "scene:test@1/5": "eb2097eb15b72d65",
    "scene:train/0": "5281138dad6d84a8",
    "scene:preference@2/7": "35f3c47fa41b56aa",
    "scene:validation@4x2/3": "92bb6222b8152486",
}


@pytest.mark.parametrize("ref", DRAWN)
def test_a_name_always_means_the_same_scene_and_questions(ref):
    scene = parse_ref(ref)
    tags = [(tag.colour, tag.shape, tag.text, len(tag.dots), np.round(tag.box, 2).tolist()) for tag in scene.tags]
    asked = [(question.kind, question.text, question.answer, question.target) for question in questions_of(scene)]
    said = repr((tags, asked, choose_questions(scene, 1)[0].text, scene.tint, len(scene.outlines)))
    assert hashlib.sha256(said.encode()).hexdigest()[:16] == DRAWN[ref]


def test_what_a_name_must_look_like():
    for bad in ("scene:train", "scene:other/1", "scene:train/-1", "scene:train@9/1", "scene:train/1x", "train/1"):
        with pytest.raises(ValueError, match="is no drawn scene"):
            parse_ref(bad)
    for bad in ("scene:train@4x3/1", "scene:train@4x/1", "scene:train@x2/1"):
        with pytest.raises(ValueError, match="is no drawn scene"):
            parse_ref(bad)
    assert parse_ref("scene:train@2/7").max_tags == 2
    assert parse_ref("scene:train/7") == parse_ref("scene:train@4/7") == parse_ref("scene:train@4x1/7")
    assert parse_ref("scene:train@3x2/7") == make_scene("train", 7, max_tags=3, numbers=2)
    for ref in ("scene:train/7", "scene:train@2/7", "scene:train@4x2/7", "scene:train@1x2/7"):
        assert parse_ref(ref).ref == ref


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


@pytest.mark.parametrize("numbers", [1, 2])
def test_content_lies_inside_its_tag_and_tags_lie_apart(numbers):
    for index in range(100):
        scene = make_scene("train", index, numbers=numbers)
        for tag in scene.tags:
            assert tag.box[0] < tag.content[0] < tag.content[2] < tag.box[2]
            assert tag.box[1] < tag.content[1] < tag.content[3] < tag.box[3]
        for i, a in enumerate(scene.tags):
            for b in scene.tags[i + 1 :]:
                assert a.box[2] < b.box[0] or b.box[2] < a.box[0] or a.box[3] < b.box[1] or b.box[3] < a.box[1]


def read_crop(pixels: np.ndarray) -> str:
    """The number on a crop [height, width, 3] by its ink alone, whose dots are 3 px: digits of 5 × 7 dots."""
    ink = (pixels == INK).all(axis=-1)
    top = int(np.flatnonzero(ink.any(axis=1))[0])
    glyphs = {glyph: digit for digit, glyph in DIGITS.items()}
    found, left = "", 0
    while left + 15 <= ink.shape[1]:
        middles = ink[top + 1 : top + 21 : 3, left + 1 : left + 15 : 3]
        digit = glyphs.get(tuple("".join("#" if dot else " " for dot in row) for row in middles), "")
        found += digit
        left += 15 if digit else 1
    return found


def test_numbers_of_two_digits_are_read_from_the_crop_alone():
    answers = Counter[str]()
    for index in range(60):
        scene = make_scene("test", index, numbers=2)
        pixels = np.asarray(draw.__wrapped__(scene))
        for question in questions_of(scene):
            if question.kind == "colour":
                x0, y0, x1, y1 = crop_window(true_box(scene, question), (SIDE, SIDE))
                assert read_crop(pixels[y0:y1, x0:x1]) == question.answer
                answers[question.answer] += 1
    assert {len(answer) for answer in answers} == {1, 2}
    assert all(str(int(answer)) == answer and int(answer) < 100 for answer in answers)
    assert len(answers) > 40


def test_questions_of_one_picture_look_at_different_tags_first():
    for index in range(200):
        scene = make_scene("preference", index)
        every = choose_questions(scene, 99)
        assert sorted(map(repr, every)) == sorted(map(repr, questions_of(scene)))
        first = choose_questions(scene, 1)
        for count in (1, 2, 3, 4, 5):
            chosen = choose_questions(scene, count)
            assert chosen[:1] == first
            assert len({one.target for one in chosen}) == min(count, len(scene.tags))
        dots = choose_questions(scene, 9, ("count",))
        assert [one.kind for one in dots] == ["count"] * sum(not tag.text for tag in scene.tags)


def test_a_source_names_level_kinds_and_questions_per_picture():
    samples = read_samples("scenes:preference@3x2:colour,count/10+40*2", with_box=True)
    assert samples == scene_samples(
        "preference", 10, 40, per_scene=2, kinds=("colour", "count"), with_box=True, max_tags=3, numbers=2
    )
    assert len(samples) == 80
    for one, other in zip(samples[::2], samples[1::2], strict=True):
        assert one.image == other.image
        assert one.image.startswith("scene:preference@3x2/")
        assert one.box != other.box
    assert read_samples("scenes:test/0+9") == read_samples("scenes:test@4x1/0+9*1") == scene_samples("test", 0, 9)
    for bad in ("scenes:test@5/0+4", "scenes:test@4x3/0+4", "scenes:test/0+4*0", "scenes:test/0", "scenes:test/0+4*"):
        with pytest.raises(RecordError, match="must be of the form scenes:POOL/START"):
            read_samples(bad)


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
