"""Box scoring against an independent oracle: the published rule spelt out anew with torch and torchvision."""

from __future__ import annotations

import random

import pytest
import torch
from torchvision.ops import box_iou

from visrl.rewards.detection import judge_boxes, judge_lmms, read_published_box

KINDS = ("exact", "shifted", "half", "near_half", "inverted", "unparseable", "wrong_convention", "untidy", "bad_truth")
UNPARSEABLE = (
    "", "I cannot see it.", "[0.1, 0.2, 0.3]", "[0.1,0.2,0.3,0.4]", "The box is [0.1, 0.2, 0.3, 0.4]",
    "[0.1, 0.2, x, 0.4]", "(0.1, 0.2), (0.3, 0.4)", "[a, b, c, d]", "[0.1, 0.2, 0.3, 0.4][0.1, 0.2, 0.3, 0.4]",
)  # fmt: skip


def oracle(rows: list[dict]) -> tuple[int, int]:
    """How many rows are correct and how many unparseable, from the rule's description and nothing of ours."""
    correct = unparseable = 0
    for row in rows:
        w, h = row["width"], row["height"]
        side = max(w, h)
        target = list(row["bbox"])
        pad = (side - min(w, h)) // 2
        if w > h:
            target[1] += pad
            target[3] += pad
        elif h > w:
            target[0] += pad
            target[2] += pad
        pieces = row["text"].replace(" .", "").replace("[", "").replace("]", "").split(", ")
        try:
            predicted = [
                float(pieces[0]) * side,
                float(pieces[1]) * side,
                float(pieces[2]) * side,
                float(pieces[3]) * side,
            ]
        except (ValueError, IndexError):
            unparseable += 1
            continue
        correct += bool(box_iou(torch.Tensor([predicted]), torch.Tensor([target]))[0, 0] > 0.5)
    return correct, unparseable


def synthetic(kind: str, rng: random.Random) -> dict:
    """A prediction of one kind for a random picture, as Visual-CoT's script writes it."""
    w, h = rng.choice([(640, 480), (391, 500), (500, 500), (1695, 2200), (333, 1000), (rng.randint(60, 900), 301)])
    x0, y0 = rng.uniform(0, 0.7) * w, rng.uniform(0, 0.7) * h
    bbox = [x0, y0, x0 + rng.uniform(0.05, 0.3) * w, y0 + rng.uniform(0.05, 0.3) * h]
    if rng.random() < 0.5:
        bbox = [int(bbox[0]), int(bbox[1]), int(bbox[2]) + 2, int(bbox[3]) + 2]
    if kind == "bad_truth":
        x0, y0, x1, y1 = bbox
        bbox = rng.choice(
            [[x1, y0, x0, y1], [x0, y1, x1, y0], [x0, y0, x0, y1], [x0, y0, x1 + w, y1], [-9, y0, x1, y1]]
        )
    text = predicted_text(kind, bbox, (w, h), rng)
    return {"question_id": 0, "text": text, "bbox": bbox, "height": h, "width": w}


def predicted_text(kind: str, bbox: list[float], size: tuple[int, int], rng: random.Random) -> str:
    w, h = size
    side, pad = max(size), abs(w - h) // 2
    left, top = (pad, 0) if h > w else (0, pad)
    x0, y0, x1, y1 = bbox[0] + left, bbox[1] + top, bbox[2] + left, bbox[3] + top
    if kind == "unparseable":
        return rng.choice(UNPARSEABLE)
    if kind == "wrong_convention":
        four = rng.choice([bbox, [1000 * x0 / w, 1000 * y0 / h, 1000 * x1 / w, 1000 * y1 / h], [x0, x1, y0, y1]])
        return "[" + ", ".join(str(int(value)) for value in four) + "]"
    if kind == "half":  # half the truth: IoU 0.5 exactly, up to what decimals and rounding make of it
        four = rng.choice([(x0, y0, (x0 + x1) / 2, y1), (x0, (y0 + y1) / 2, x1, y1), (x0, y0, 2 * x1 - x0, y1)])
        return "[" + ", ".join(repr(value / side) for value in four) + "]"
    if kind == "near_half":
        four = (x0, y0, x0 + (x1 - x0) * rng.uniform(0.4995, 0.5005), y1)
        return "[" + ", ".join(f"{value / side:.6f}" for value in four) + "]"
    if kind == "inverted":
        four = rng.choice([(x1, y0, x0, y1), (x0, y1, x1, y0), (x1, y1, x0, y0)])
    elif kind == "shifted":
        dx, dy = rng.uniform(-1, 1) * (x1 - x0), rng.uniform(-1, 1) * (y1 - y0)
        four = (x0 + dx, y0 + dy, x1 + dx, y1 + dy)
    else:
        four = (x0, y0, x1, y1)
    text = "[" + ", ".join(f"{value / side:.3f}" for value in four) + "]"
    if kind == "untidy":
        return rng.choice([text + " .", " " + text + "\n", text[1:-1], text.replace("]", ", 0.9]"), text + " extra"])
    return text


@pytest.fixture(scope="module")
def predictions() -> list[dict]:
    rng = random.Random(7)
    rows = [synthetic(KINDS[index % len(KINDS)] if index >= 100 else "half", rng) for index in range(4990)]
    # IoU of exactly one half in every arithmetic, and one step of single precision above it.
    exact = {"question_id": 0, "bbox": [0, 0, 64, 64], "height": 128, "width": 128}
    rows += [{**exact, "text": "[0.0, 0.0, 0.25, 0.5]"}] * 5
    rows += [{**exact, "text": "[0.0, 0.0, 0.2500001, 0.5]"}] * 5
    return rows


def score(rows: list[dict]):
    return judge_boxes(
        [row["text"] for row in rows], [row["bbox"] for row in rows], [(row["width"], row["height"]) for row in rows]
    )


def test_5000_synthetic_predictions_agree_with_the_oracle_to_the_last_digit(predictions):
    assert len(predictions) == 5000
    found = score(predictions)
    correct, unparseable = oracle(predictions)
    assert sum(one.hit_published for one in found) == correct
    assert sum(one.unparseable for one in found) == unparseable
    for row, one in zip(predictions, found, strict=True):
        assert (one.hit_published, one.unparseable) == tuple(map(bool, oracle([row]))), row
    assert 1200 < correct < 2500
    assert unparseable > 500
    assert [one.hit_published for one in found[-10:]] == [False] * 5 + [True] * 5


def test_our_reading_leaves_bad_truth_out_and_nothing_else(predictions):
    found = score(predictions)
    bad = [row for row, one in zip(predictions, found, strict=True) if one.bad_truth]
    assert [one.hit is None for one in found] == [one.iou is None for one in found] == [one.bad_truth for one in found]
    assert len(bad) >= 500
    for row in bad:
        x0, y0, x1, y1 = row["bbox"]
        assert x0 >= x1 or y0 >= y1 or min(x0, y0) < 0 or x1 > row["width"] or y1 > row["height"]


def test_our_reading_takes_one_half_for_one_half():
    rng = random.Random(3)
    for _ in range(300):
        w, h = rng.randint(60, 900), rng.randint(60, 900)
        x0, y0 = rng.uniform(0, 0.5) * w, rng.uniform(0, 0.5) * h
        truth = [x0, y0, x0 + 0.4 * w, y0 + 0.4 * h]
        left, top, side = max(h - w, 0) // 2, max(w - h, 0) // 2, max(w, h)
        half = [(x0 + left) / side, (y0 + top) / side, (x0 + 0.2 * w + left) / side, (truth[3] + top) / side]
        found = one(repr(half), truth, (w, h))
        assert found.iou == pytest.approx(0.5, abs=1e-6)
        assert found.hit == (found.iou > 0.5 + 1e-9)
        more = one(repr([*half[:2], half[2] + 0.001, half[3]]), truth, (w, h))
        assert more.hit


def one(text: str | None, bbox: list[float], size: tuple[int, int]):
    return judge_boxes([text], [bbox], [size])[0]


def test_by_hand_in_a_wide_picture():
    # 640 × 480 lies in a square of 640 with 80 px above: [0, 0, 320, 240] is [0, .125, .5, .5] there.
    right = one("[0.000, 0.125, 0.500, 0.500]", [0, 0, 320, 240], (640, 480))
    assert right.hit_published
    assert right.iou == 1.0
    as_image = one("[0.000, 0.000, 0.500, 0.500]", [0, 0, 320, 240], (640, 480))
    assert as_image.hit_published  # 240 of 320 rows: IoU 0.75 in the square
    assert as_image.iou == 1.0  # what lies in the padding cannot be cropped


def test_an_odd_difference_is_padded_by_whole_pixels():
    # 100 × 103: 3 // 2 = 1 px left. With 1.5 px this box, 1 px wide, would be missed.
    assert one(f"[{1 / 103}, 0.0, {2 / 103}, 1.0]", [0, 0, 1, 103], (100, 103)).hit_published


@pytest.mark.parametrize(
    ("text", "published", "ours"),
    [
        ("[0.1, 0.1, 0.4, 0.4]", True, True),
        ("[0.1, 0.1, 0.4, 0.4] .", True, True),
        ("[0.1,0.1,0.4,0.4]", False, True),
        ("The box is [0.1, 0.1, 0.4, 0.4].", False, True),
        ("0.1, 0.1, 0.4, 0.4", True, False),
        ("[0.1, 0.1, 0.4, 0.4, 0.9]", True, False),
        ("[0.1, 0.1, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9]", True, False),
        ("[0.4, 0.4, 0.1, 0.1]", False, False),
        ("[10, 10, 40, 40]", False, False),
        ("[0, 0, 100, 100]", False, False),
        ("[nan, 0.1, 0.4, 0.4]", False, False),
        ("[1e999, 0.1, 0.4, 0.4]", False, False),
        (None, False, False),
    ],
)
def test_where_the_readings_part(text, published, ours):
    found = one(text, [10, 10, 40, 40], (100, 100))
    assert (found.hit_published, found.hit) == (published, ours)


def test_truth_outside_by_floating_point_noise_is_not_bad():
    assert not one("[0.0, 0.0, 1.0, 1.0]", [0, 0, 640.0000000001, 640], (640, 640)).bad_truth
    assert one("[0.0, 0.0, 1.0, 1.0]", [0, 0, 640.01, 640], (640, 640)).bad_truth


def test_published_parsing_to_the_letter():
    assert read_published_box("[0.1, 0.2, 0.3, 0.4] .") == [0.1, 0.2, 0.3, 0.4]
    assert read_published_box("1 .5, 0.2, 0.3, 0.4") == [15.0, 0.2, 0.3, 0.4]  # " ." goes wherever it stands
    assert read_published_box("[1, 2, 3, 4, five]") == [1, 2, 3, 4]
    assert read_published_box("[1, 2, 3]") is None
    assert read_published_box("[1;2;3;4]") is None


def test_lmms_eval_counts_one_half_as_right_and_four_zeros_as_unparsed():
    truth = [0.0, 0.0, 0.5, 0.5]
    half = judge_lmms([0.0, 0.0, 0.25, 0.5], truth, "[0.0, 0.0, 0.25, 0.5]")
    assert (half.hit_published, half.hit, half.iou) == (True, False, 0.5)
    lost = judge_lmms([0, 0, 0, 0], truth, "no box")
    assert (lost.hit_published, lost.hit, lost.unparseable) == (False, False, True)
    unlogged = judge_lmms([0.0, 0.0, 0.5, 0.5], truth, None)
    assert (unlogged.hit_published, unlogged.iou) == (True, 1.0)
    assert judge_lmms([0, 0, 0, 0], [0.2, 0.2, 0.2, 0.2], None).bad_truth
