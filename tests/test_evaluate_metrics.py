"""String metrics by hand, against brute force, and on the published tables' arithmetic."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visrl.evaluate import published
from visrl.rewards import metrics


@pytest.mark.parametrize(
    ("said", "meant", "score"),
    [("Window", "window", 1), (" the  window. ", "The window", 1), ("windows", "window", 0), ("", "window", 0)],
)
def test_exact_match(said, meant, score):
    assert metrics.exact_match(said, [meant]) == score


@pytest.mark.parametrize(
    ("said", "meant", "score"),
    [
        ("105", "100", 1),
        ("105.1", "100", 0),
        ("-95", "-100", 1),
        ("95", "-100", 0),
        ("1,234.5", "1234", 1),
        ("$12", "12", 1),
        ("12 %", "12%", 1),
        ("0", "0", 1),
        ("0.01", "0", 0),
        ("about 100", "100", 0),
        (".5", "0.5", 1),
        ("13/10/2017", "13/10/2017", 1),
        ("", "", 1),
    ],
)
def test_relaxed_numeric(said, meant, score):
    assert metrics.relaxed_numeric(said, [meant]) == score


@pytest.mark.parametrize(
    ("said", "meant", "score"),
    [
        ("window", "window", 1.0),
        ("Windaw", "window", 1 - 1 / 6),
        ("abcd", "abxy", 0.0),  # a normalised distance of exactly 0.5 scores 0
        ("abcde", "abcxy", 0.6),
        ("a window in the wall of the house", "window", 0.0),
        ("", "x", 0.0),
    ],
)
def test_anls(said, meant, score):
    assert metrics.anls(said, [meant]) == pytest.approx(score)


def test_the_best_reference_counts():
    assert metrics.anls("LANCOME", ["nothing", "lancôme"]) == pytest.approx(6 / 7)
    assert metrics.exact_match("no", ["yes", "no"]) == 1


@pytest.mark.parametrize("same", range(11))
def test_vqa_accuracy_equals_leaving_each_person_out(same):
    people = ["yes"] * same + ["no"] * (10 - same)
    expected = sum(
        min(1.0, sum(answer == "yes" for answer in people[:out] + people[out + 1 :]) / 3) for out in range(10)
    )
    assert metrics.vqa_accuracy("Yes.", people) == pytest.approx(expected / 10)


@pytest.mark.parametrize(
    ("said", "meant", "score"),
    [
        ("The two dogs!", "2 dogs", 1),
        ("dont", "don't", 1),
        ("1,000", "1000", 1),
        ("2.5", "25", 0),
        ("U.S.", "u s", 1),
        ("cat", "dog", 0),
    ],
)
def test_vqa_accuracy_with_one_reference(said, meant, score):
    assert metrics.vqa_accuracy(said, [meant]) == score


def naive_distance(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(
        naive_distance(a[1:], b) + 1, naive_distance(a, b[1:]) + 1, naive_distance(a[1:], b[1:]) + (a[0] != b[0])
    )


@given(st.text("abc", max_size=5), st.text("abc", max_size=5))
def test_edit_distance_equals_the_definition(a, b):
    assert metrics.edit_distance(a, b) == naive_distance(a, b)


@given(st.text(max_size=20), st.lists(st.text(max_size=20), min_size=1, max_size=4))
def test_every_metric_accepts_the_truth_and_stays_in_range(text, references):
    for metric in metrics.METRICS.values():
        assert 0 <= metric(text, references) <= 1
        assert metric(references[0], references[:1]) == 1


def test_no_prediction_is_no_wrong_one():
    assert set(metrics.string_scores(None, ["x"]).values()) == {None}
    assert metrics.string_scores("", ["x"])["exact"] == 0
    with pytest.raises(ValueError, match="at least one reference"):
        metrics.string_scores("x", [])


def test_published_tables_are_whole():
    assert sum(published.VISCOT_QUESTIONS.values()) == 8281
    assert len(published.VISCOT_QUESTIONS) == 11
    scores = published.VISCOT_TABLE.scores
    assert len(scores) == 7 * 4
    for base, rows in itertools.groupby(scores, key=lambda name: name.split(", ")[0]):
        means = [scores[row][0] for row in rows]
        assert means == sorted(means), base


def test_averages_as_published_and_as_they_should_be():
    accuracies = {"docvqa": 0.0, "gqa": 0.5, "vsr": 0.25}
    assert published.average(accuracies) == 0.25
    assert published.average_published_detection(accuracies) == 0.375
    assert published.average_published_detection({"docvqa": 0.0}) is None
    assert published.average_published_answers({"gqa": 0.55}) == pytest.approx(0.05)
