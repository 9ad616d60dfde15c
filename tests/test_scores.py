"""Reading scores: a number is never cut out of another number, a range or a sentence, and never guessed."""

from __future__ import annotations

import time

import pytest

from visrl.rewards.reply_scores import read_published_score, read_score

READ = {
    # Decimal commas, other digits and marks.
    "score: 0,8": 0.8, "0,8": 0.8, "score: 0,800": 0.8, '{"score": "0,8"}': 0.8, "score：０．８": 0.8, "score: ½": 0.5,
    "score: .5": 0.5, "1e-1": 0.1, "score: 1e-1": 0.1, "1.0.": 1.0, "score: 0.8,": 0.8, "score: +0.8": 0.8,
    # What stands between the word and the number.
    "**Score:** 0.9": 0.9, "Score → 0.8": 0.8, "score => 0.9": 0.9, "score - 0.8": 0.8, "The score is 0.8": 0.8,
    "| Score | 0.8 |": 0.8, "Score:\n\n0.8": 0.8, "<score>0.8</score>": 0.8, "score: <0.8>": 0.8, "score: [0.8]": 0.8,
    "score: \\boxed{0.8}": 0.8, "\\boxed{0.8}": 0.8, "```json\n{\"score\": 0.8}\n```": 0.8, "final_score: 0.8": 0.8,
    # Scales.
    "Score (0-1): 0.9": 0.9, "Score (0–1) = 0.8": 0.8, "Score [0, 1]: 0.8": 0.8, "Score (0 to 10): 8": 0.8,
    "Score (out of 10): 8": 0.8, "Score (max 5): 4": 0.8, "0.8/1": 0.8, "8/10": 0.8, "score: 7.5 / 10.": 0.75,
    "score: (8/10)": 0.8, "score: 0.8 of 1": 0.8, "Score (0-1): 0.8/1": 0.8,
    # What follows is no part of it.
    "score: 0.8\n- 1 mistake": 0.8, "score: 0.8 (80%)": 0.8, "SCORE: 0.75 because 3 of 4 words are right": 0.75,
    "score: 1 point": 1.0, "score: 0.8 for the colour, which is right": 0.8, "score: 1 for 2 of 2": 1.0,
    "score: 0.8 - good": 0.8,
    # Several that agree; thinking.
    "score: 0.8. So the score: 0.80": 0.8, "<think>score: 0.1? 0,2?</think>\nscore: 1": 1.0,
    "so it is 0.4.</think> 0.5": 0.5,
}  # fmt: skip

UNREAD = [
    # Parts of other numbers.
    "score: 1.2.3", "score: 0.8.1", "0.8.1", "score: 0·8", "score: 1,000", "score: 1/2/2024", "score: 1:30",
    "score: 0.8x", "score: 1st", "score: 1e", "score: 1e999", "score1: 0.8", "score: ٠٫٨", "score: ,5", "score: ..5",
    # Ranges, lists, comparisons.
    "score: 0.8-0.9", "score: 0.8–0.9", "score: 0.8 to 0.9", "score: 0.8 or 0.9", "score: 0.8, 0.9", "0.8-0.9",
    "score: 0.8 ± 0.1", "score: between 0 and 1", "Score: 0 to 1 -> 0.7", "score: ~0.8", "score: >0.8", "score: <0.8",
    "score: 1, 3 of 3 are right", "score: 0 .8", "score: 1 0", "score: 0.8 0.9",
    "score: 0.8 for colour, 0.3 for shape", "score: 1 on place; and 0 on number", "score: 1 for one and 0,5 for two",
    # Scales that are not said, or twice.
    "80%", "score: 10%", "score: 1 %", "score: 1 percent", "8", "score: 85", "score: 1 out of ten", "score: 1/ten",
    "score: 1 on a scale of 10", "Score (1-10): 8", "Score (1 is best): 0.8", "Score (0-5): 4/10", "score: 1/0",
    "{'score': 1, 'scale': 10}", "score: 11/10",
    # Not between 0 and 1.
    "-0.5", "score: -0.5", "score: −0.5", "score: 1.01",
    # Sentences and lists about scores.
    "The score.\n1. It is right", "Score:\n1. right\n2. short", "score (1) the colour, (2) the place",
    "The score is 1 if both are the same.", "score: 1 means right", "Overall score: I would say so",
    # Conflicts, and thinking alone.
    "score: 0.8. score: 0.7", "score: 0.8-0.9. score: 0.8", "<think>score: 0.5", "<think>0.5</think>", "",
]  # fmt: skip


@pytest.mark.parametrize("reply", READ)
def test_a_score_is_read_as_a_person_would(reply):
    assert read_score(reply) == pytest.approx(READ[reply])


@pytest.mark.parametrize("reply", UNREAD)
def test_what_is_not_plainly_one_score_is_not_read(reply):
    assert read_score(reply) is None


def test_the_published_reading_stays_to_the_letter():
    assert read_published_score("score: 0,8") == 0.0  # "score: 0" and no more
    assert read_published_score("Score (0-1): 0.9") == 0.0
    assert read_published_score("score: 0.8-0.9") == 0.8
    assert read_published_score("<think>score: 0.5</think> score: 1") == 0.0  # twice


@pytest.mark.parametrize(
    "filling", ["score: ", "score", "1", "0.", "score: 1 ", "score(", "<score>", " ", "1e", "score:1/"]
)
def test_no_reply_keeps_the_reader_busy(filling):
    began = time.perf_counter()
    read_score(filling * (300_000 // len(filling)) + "x")
    assert time.perf_counter() - began < 3.0
