"""Boxes, crop windows and box text: what must hold for every codec, size and aspect ratio."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visrl.box import Box, BoxError, clamp, corner_fault, crop_window, enclosing, iou, padding, with_sides_moved
from visrl.codecs import BOX_SPACES, CODECS, Codec, self_test

SIZES = st.tuples(st.integers(28, 8192), st.integers(28, 8192))
EVERY_CODEC = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)


@st.composite
def boxes(draw: st.DrawFn, min_width: float = 1e-6, min_height: float = 1e-6) -> Box:
    width = draw(st.floats(min(1.0, min_width), 1.0))
    height = draw(st.floats(min(1.0, min_height), 1.0))
    x0, y0 = draw(st.floats(0, 1 - width)), draw(st.floats(0, 1 - height))
    return Box(x0, y0, min(1.0, x0 + width), min(1.0, y0 + height))


@EVERY_CODEC
@settings(max_examples=150, deadline=None)
@given(data=st.data(), original=SIZES, processed=SIZES)
def test_text_keeps_every_corner_within_a_line_and_a_half_of_the_grid(codec, data, original, processed):
    box = data.draw(boxes())
    read = codec.parse(codec.format(box, original, processed), original, processed)
    unit_x, unit_y = codec.unit(original, processed)
    for meant, got, unit in zip(box.as_list(), read.as_list(), (unit_x, unit_y) * 2, strict=True):
        assert abs(meant - got) <= 1.501 * unit  # half by rounding, one where it must be widened


@EVERY_CODEC
@settings(max_examples=150, deadline=None)
@given(data=st.data(), original=SIZES, processed=SIZES)
def test_text_of_a_box_of_a_hundred_lines_keeps_iou_98(codec, data, original, processed):
    # 100 lines a side: each corner moves by half a line at most, so IoU ≥ (99 / 100)² = 0.9801.
    unit_x, unit_y = codec.unit(original, processed)
    box = data.draw(boxes(100 * unit_x, 100 * unit_y))
    if 100 * max(unit_x, unit_y) > 1:  # no such box: the whole picture is the largest there is
        box = Box(0.0, 0.0, 1.0, 1.0)
        if codec.name == "viscot" and 100 * max(unit_x, unit_y) > 2:
            return
    assert iou(box, codec.parse(codec.format(box, original, processed), original, processed)) >= 0.98


@EVERY_CODEC
@settings(max_examples=60, deadline=None)
@given(side=st.integers(28, 8192), aspect=st.floats(1 / 8, 8))
def test_self_test_passes_at_every_usual_size(codec, side, aspect):
    original = (side, max(28, round(side * aspect)))
    processed = (max(28, original[0] // 28 * 28), max(28, original[1] // 28 * 28))
    assert self_test(codec, original, processed, "exact") >= 0.98


def test_self_test_refuses_a_codec_that_swaps_the_axes():
    honest = CODECS["paligemma"]
    wrong = Codec(honest.name, honest.template, honest.pattern, honest.separator, honest.scales, digits=4)
    with pytest.raises(BoxError, match="paligemma"):
        self_test(wrong, (1000, 400), (448, 448))


def test_self_test_refuses_a_padded_square_too_coarse_for_the_picture():
    with pytest.raises(BoxError, match="viscot"):
        self_test(CODECS["viscot"], (28, 8000), (28, 8000))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("visrl", "[0.250, 0.500, 0.750, 1.000]"),
        ("viscot", "[0.250, 0.500, 0.750, 0.750]"),  # 200 × 100 padded by 50 above and below
        ("qwen2_vl", "<|box_start|>(250,500),(750,1000)<|box_end|>"),
        ("qwen2_5_vl", '{"bbox_2d": [56, 56, 168, 112]}'),
        ("qwen3_vl", '{"bbox_2d": [250, 500, 750, 1000]}'),
        ("internvl", "<ref>region</ref><box>[[250, 500, 750, 1000]]</box>"),
        ("minicpm", "<box>250 500 750 1000</box>"),
        ("paligemma", "<loc0512><loc0256><loc1023><loc0767>"),
    ],
)
def test_each_family_writes_what_it_was_trained_on(name, text):
    box, sizes = Box(0.25, 0.5, 0.75, 1.0), ((200, 100), (224, 112))
    assert CODECS[name].format(box, *sizes) == text
    assert iou(CODECS[name].parse(text, *sizes), box) > 0.99


def test_special_tokens_that_a_decoder_dropped_are_not_missed():
    sizes = ((200, 100), (224, 112))
    assert CODECS["qwen2_vl"].parse("(250,500),(750,1000)", *sizes) == Box(0.25, 0.5, 0.75, 1.0)
    assert CODECS["internvl"].parse("region[[250, 500, 750, 1000]]", *sizes) == Box(0.25, 0.5, 0.75, 1.0)


def test_the_published_row_reads_as_its_pixels():
    # The example row of REFERENCE 2: 391 × 500, pixels [217, 343, 242, 393].
    box = BOX_SPACES["padded_square"].parse("[0.542, 0.686, 0.592, 0.786]", (391, 500), (391, 500))
    assert padding((391, 500)) == (500, 54, 0)
    assert box.to_pixels((391, 500)) == pytest.approx((217, 343, 242, 393), abs=0.5)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("the cat on the left", "no_box"),
        ("", "no_box"),
        ("[0.1, 0.2, 0.3]", "count"),
        ("[0.1, 0.2, 0.3, 0.4, 0.5]", "count"),
        ("[]", "count"),
        ("[0.1, 0.2, nan, 0.4]", "not_a_number"),
        ("[0.1, 0.2, x, 0.4]", "not_a_number"),
        ("[0.6, 0.2, 0.3, 0.4]", "inverted"),
        ("[0.1, 0.2, 0.1, 0.4]", "empty"),
        ("[0.1, 0.2, 0.3, 1.4]", "outside"),
        ("[-0.1, 0.2, 0.3, 0.4]", "outside"),
        ("[0.1, 0.2, 0.3, 0.4] or [0.1, 0.2, 0.3, 0.5]", "more_than_one"),
        ("[" + "9" * 400 + ", 0, 1, 1]", "not_a_number"),
    ],
)
def test_strict_parsing_says_why_it_refuses(text, fault):
    with pytest.raises(BoxError) as refusal:
        CODECS["visrl"].parse(text, (100, 100), (100, 100))
    assert refusal.value.fault == fault


@pytest.mark.parametrize(
    ("text", "box", "note"),
    [
        ("[0.1, 0.2, 0.3, 0.4]", (0.1, 0.2, 0.3, 0.4), None),
        ("[0.3, 0.4, 0.1, 0.2]", (0.1, 0.2, 0.3, 0.4), "swapped"),
        ("[0.1, 0.2, 0.3, 1.25]", (0.1, 0.2, 0.3, 1.0), "0.2500"),
        ("[0.1, 0.2, 0.3, 0.4] and [0.5, 0.5, 0.6, 0.6]", (0.1, 0.2, 0.3, 0.4), "first of 2 boxes"),
        ("it lies at 0.1, 0.2, 0.3, 0.4", (0.1, 0.2, 0.3, 0.4), "not in the form"),
        ("[0.1, 0.2, 0.3, 0.4, 0.5]", (0.1, 0.2, 0.3, 0.4), "first four of 5"),
    ],
)
def test_tolerant_parsing_says_what_it_mended(text, box, note):
    mended = CODECS["visrl"].mend(text, (100, 100), (100, 100))
    assert mended.box == Box(*box)
    assert (note is None and not mended.notes) or note in " ".join(mended.notes)


@pytest.mark.parametrize("text", ["no idea", "[0.1, 0.2]", "[100, 100, 500, 500]", "[0.5, 0.5, 0.5, 0.5]"])
def test_tolerant_parsing_never_guesses_a_scale(text):
    with pytest.raises(BoxError):
        CODECS["visrl"].mend(text, (1000, 1000), (1000, 1000))


@EVERY_CODEC
@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet='[]()<>boxlc_2d":{}., -+0123456789eE\n', max_size=60))
def test_any_text_is_a_box_or_a_reasoned_error(codec, text):
    for read in (codec.parse, codec.mend):
        # Any other exception fails the test.
        with contextlib.suppress(BoxError):
            read(text, (640, 480), (644, 476))


@settings(max_examples=300, deadline=None)
@given(box=boxes(), size=SIZES, rule=st.sampled_from(["exact", "margin", "viscot_square"]))
def test_crop_windows_lie_inside_and_hold_the_box(box, size, rule):
    left, top, right, bottom = crop_window(box, size, rule)
    assert 0 <= left < right <= size[0]
    assert 0 <= top < bottom <= size[1]
    assert right - left >= 28
    assert bottom - top >= 28
    assert max(right - left, bottom - top) / min(right - left, bottom - top) <= max(200, max(size) / min(size))
    x0, y0, x1, y1 = box.to_pixels(size)
    if rule != "viscot_square":
        assert left <= x0 + 1e-3
        assert top <= y0 + 1e-3
        assert right >= x1 - 1e-3
        assert bottom >= y1 - 1e-3


def test_viscot_square_is_at_least_224_pixels_and_shifted_inside():
    assert crop_window(Box.from_pixels((0, 0, 10, 10), (640, 480)), (640, 480), "viscot_square") == (0, 0, 224, 224)
    assert crop_window(Box.from_pixels((600, 400, 640, 480), (640, 480)), (640, 480), "viscot_square") == (
        416,
        256,
        640,
        480,
    )
    wide = crop_window(Box.from_pixels((100, 100, 500, 200), (640, 480)), (640, 480), "viscot_square")
    assert wide == (100, 0, 500, 400)  # shifted down from −50


def test_iou_enclosing_and_clamp_by_hand():
    a, b = Box(0.0, 0.0, 0.5, 0.5), Box(0.25, 0.0, 0.75, 0.5)
    assert iou(a, b) == pytest.approx(1 / 3)
    assert enclosing([a, b]) == Box(0.0, 0.0, 0.75, 0.5)
    clamped = clamp(-0.25, 0.5, 0.5, 1.125)
    assert clamped.box == Box(0.0, 0.5, 0.5, 1.0)
    assert clamped.moved == 0.25
    with pytest.raises(BoxError, match="wholly outside"):
        clamp(1.5, 0.0, 2.0, 1.0)


def test_faults_in_pixels_are_exact():
    assert corner_fault((0, 0, 640, 480), (640, 480)) is None
    assert corner_fault((0, 0, 640.001, 480), (640, 480)) == "outside"
    assert corner_fault((10, 0, 5, 480), (640, 480)) == "inverted"
    assert corner_fault((5, 0, 5, 480), (640, 480)) == "empty"


def test_sides_move_by_shares_of_width_and_height_and_stay_in_the_image():
    box = Box(0.2, 0.4, 0.6, 0.5)
    assert with_sides_moved(box, 0.25, 1.0, -0.5, 0.0).as_list() == pytest.approx([0.1, 0.3, 0.4, 0.5])
    assert with_sides_moved(box, 2.0, 9.0, 2.0, 9.0).as_list() == [0, 0, 1, 1]
    with pytest.raises(BoxError):
        with_sides_moved(box, -0.6, 0.0, -0.6, 0.0)
