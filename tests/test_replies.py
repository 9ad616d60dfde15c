"""What a reply says: thinking is no part of it, an empty one is a wrong answer, and no text breaks a file."""

from __future__ import annotations

import doctest

import pytest
from PIL import Image

from visrl import replies
from visrl.box import Box
from visrl.codecs import CODECS
from visrl.conversation import View
from visrl.engines.base import Completion
from visrl.records import Sample
from visrl.replies import spoken, whole_text
from visrl.rewards.detection import parse_box
from visrl.rewards.results import Result, summarise
from visrl.rollout.greedy import greedy_looks
from visrl.rollout.steps import finish, look_of

WHOLE = View("w", Image.new("RGB", (100, 100)))


class Says:
    """A policy that gives its texts one after another."""

    name = "says"
    codec = CODECS["visrl"]

    def __init__(self, *texts: str | None) -> None:
        self.texts = iter(texts)

    def complete(self, talks, sampling, seeds):
        texts = [next(self.texts) for _ in talks]
        return [[Completion(text, error="lost" if text is None else None)] for text in texts]

    def processed_size(self, size, is_crop=False):
        return size

    def forget(self):
        pass


def test_the_example_of_the_docstring():
    assert doctest.testmod(replies).failed == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<think>\nscore: 0.5? No.\n</think>\n\nscore: 1", "score: 1"),
        ("no marks at all \n", "no marks at all \n"),
        ("4 < 5 and <b>think</b>", "4 < 5 and <b>think</b>"),
        ("the prompt opened it</think>7", "7"),
        ("<think>one</think>7<think>two</think>", "7"),
        ("<think>I write <think> as they do</think>7", "7"),
        ("<think>a</think> b</think> 7", "7"),
        ("<think></think>", ""),
        ("<think>" * 50_000, ""),
        ("[THINK]8?[/THINK]7", "7"),
        ("<thinking>8?</thinking>\n7", "7"),
        ("◁think▷8?◁/think▷7", "7"),
    ],
)
def test_thinking_is_no_part_of_a_reply(text, said):
    assert spoken(text) == said


def test_halves_of_surrogate_pairs_are_replaced_and_whole_characters_kept():
    assert whole_text("a\ud800b\udfff 🙂 é") == "a\ufffdb\ufffd 🙂 é"
    whole_text("\ud83d" * 1000).encode("utf-8")


def test_boxes_and_answers_are_read_outside_of_thinking():
    aloud = "<think>[0.5, 0.5, 0.6, 0.6] or [0.1, 0.1, 0.2, 0.2]?</think> [0.1, 0.1, 0.2, 0.2]"
    look = look_of("?", WHOLE, Completion(aloud), Says.codec, WHOLE.size)
    assert (look.box, look.text) == (Box(0.1, 0.1, 0.2, 0.2), "[0.1, 0.1, 0.2, 0.2]")
    look = finish(look, Completion("<think>eight? no</think>\n7"))
    assert look.answer == "7"
    assert parse_box(aloud, (100, 100), CODECS["visrl"]) == look.box
    cut = look_of("?", WHOLE, Completion("<think>[0.5, 0.5, 0.6, 0.6], or"), Says.codec, WHOLE.size)
    assert (cut.box, cut.text) == (None, "")
    assert "ended inside its thinking" in cut.error


@pytest.mark.parametrize("silence", ["", " ", "\n", "<think>hm</think>"])
def test_an_empty_reply_is_a_wrong_answer_and_not_a_missing_one(silence, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    samples = [Sample(str(n), "a.png", "?", "7", Box(0, 0, 0.5, 0.5), "d") for n in range(3)]
    box = "[0.000, 0.000, 0.500, 0.500]"
    # No box; no reply at all; a box and an empty answer.
    looks = greedy_looks(Says(silence, None, box, silence), samples, root=tmp_path)
    rows = [
        Result(sample, prediction=look.answer, box_text=look.text, box=look.box, error=look.error).eval_row()
        for sample, look in zip(samples, looks, strict=True)
    ]
    assert [(row["hit"], row["exact"], row["error"] is None) for row in rows] == [
        (0, 0, True),
        (None, None, False),
        (1, 0, True),
    ]
    assert rows[0]["unparseable"]
    summary = summarise(rows)
    assert (summary["failed"], summary["columns"]["exact"]["left_out"]["n"]) == (1, 2)
