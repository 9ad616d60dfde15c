"""The two steps by hand, and the three drivers over them: sampled batches, greedy batches, and one HTTP request."""

from __future__ import annotations

import asyncio
from dataclasses import FrozenInstanceError

import pytest
from PIL import Image

from visrl.box import Box
from visrl.codecs import CODECS
from visrl.conversation import Conversation, View, open_view
from visrl.engines.base import Completion, Sampling
from visrl.records import Picture, Sample
from visrl.rollout.greedy import greedy_looks
from visrl.rollout.protocols import VISCOT, VISRL
from visrl.rollout.rollout import RolloutSettings, roll_out, sampled_looks
from visrl.rollout.steps import Look, answer_request, cut, finish, look_of, with_box
from visrl.serve.focus import answer_with_focus
from visrl.serve.requests import QueuedRequest

CODEC = CODECS["visrl"]
BOX_TEXT = "[0.250, 0.500, 0.500, 0.750]"
SAMPLE = Sample("a", "scene:test/0", "What is red?", "x")
WHOLE = open_view(Picture(SAMPLE.image))


class Speaker:
    """A policy and a server's backend in one: it writes `box_text` of one image, and what it was shown of two."""

    name, codec, crop_rule = "speaker", CODEC, "exact"

    def __init__(self, box_text: str = BOX_TEXT) -> None:
        self.box_text = box_text
        self.shown: list[list[str]] = []
        self.given: list[Completion] = []

    def processed_size(self, size, is_crop=False):  # type: ignore[no-untyped-def]
        return size

    def forget(self) -> None:
        pass

    def say(self, talk: Conversation) -> Completion:
        self.shown.append([view.key for view in talk.views])
        text = self.box_text if len(talk.views) == 1 else "{} by {}".format(*talk.views[1].size)
        self.given.append(Completion(text, tokens=len(text), prompt_tokens=7))
        return self.given[-1]

    def complete(self, talks, sampling, seeds):  # type: ignore[no-untyped-def]
        return [[self.say(talk) for _ in own] for talk, own in zip(talks, seeds, strict=True)]

    async def submit(self, request: QueuedRequest) -> Completion:
        return self.say(request.conversation)


def by_hand(speaker: Speaker) -> Look:
    look = look_of(SAMPLE.question, WHOLE, speaker.say(VISRL.focus(SAMPLE.question, WHOLE)), CODEC, WHOLE.size)
    look = cut(look, "exact")
    return finish(look, speaker.say(answer_request(look)))


def served(speaker: Speaker):  # type: ignore[no-untyped-def]
    request = QueuedRequest(Conversation(()), Sampling(), 0)
    return asyncio.run(answer_with_focus(speaker, SAMPLE.question, WHOLE, request))  # type: ignore[arg-type]


def test_every_driver_takes_the_same_two_steps():
    hand, greedy, sampled, server = (Speaker() for _ in range(4))
    look = by_hand(hand)
    assert (look.text, look.box, look.error) == (BOX_TEXT, Box(0.25, 0.5, 0.5, 0.75), None)
    assert greedy_looks(greedy, [SAMPLE]) == [look]
    (looks,) = sampled_looks(sampled, [SAMPLE], RolloutSettings(rounds=1, diversity=False))
    assert [(one.text, one.box, one.answer) for (one,) in looks] == [(look.text, look.box, look.answer)] * 2
    choice = served(server)
    assert (choice.text, choice.focus["box_text"], choice.focus["error"]) == (look.answer, look.text, None)
    assert choice.focus["box"] == list(look.box_pixels)
    assert (choice.prompt_tokens, choice.completion_tokens) == (14, len(BOX_TEXT) + len(look.answer))
    assert hand.shown == greedy.shown == server.shown
    assert sampled.shown == [hand.shown[0]] * 2 + [hand.shown[1]] * 2


def test_without_a_box_generation_has_no_answer_and_serving_answers_from_the_whole_picture():
    rolled, server = Speaker("nothing here"), Speaker("nothing here")
    trajectory, _ = roll_out(rolled, [SAMPLE], RolloutSettings(rounds=1))
    assert (trajectory.box, trajectory.answer, trajectory.box_text) == (None, None, "nothing here")
    assert trajectory.error.startswith("box: no box in")
    assert len(rolled.shown) == 2  # both looks' first steps, and no second
    choice = served(server)
    assert choice.text == "{} by {}".format(*WHOLE.size)
    assert choice.focus["error"] == f"{trajectory.error.removeprefix('box: ')}; the answer is from the whole picture"
    assert (choice.focus["box"], choice.focus["crop_window"]) == (None, [0, 0, *WHOLE.size])


def test_a_look_carries_what_the_engine_gave_for_both_steps():
    speaker = Speaker("<think>left?</think>" + BOX_TEXT)
    look = by_hand(speaker)
    assert look.text == BOX_TEXT
    assert (look.box_completion, look.answer_completion) == tuple(speaker.given)
    given = with_box(Look("?", WHOLE), Box(0, 0, 0.5, 0.5), CODEC, WHOLE.size)
    assert (given.text, given.box_completion) == ("[0.000, 0.000, 0.500, 0.500]", None)


def test_a_step_leaves_the_look_before_it_as_it_was():
    before = look_of("?", WHOLE, Completion(BOX_TEXT), CODEC, WHOLE.size)
    after = finish(cut(before, "exact"), Completion("red"))
    assert (before.detail, before.answer, after.answer) == (None, None, "red")
    with pytest.raises(FrozenInstanceError):
        before.answer = "blue"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("completion", "error"),
    [
        (Completion(None, error="lost"), "engine: lost"),
        (Completion(None), "engine: no text"),
        (Completion(None, error="too long", refused=True), "prompt: too long"),
    ],
)
def test_an_engine_without_a_text_is_an_error_at_either_step(completion, error):
    look = look_of("?", WHOLE, completion, CODEC, WHOLE.size)
    assert (look.error, look.box, look.text) == (error, None, "")
    look = finish(look_of("?", WHOLE, Completion(BOX_TEXT), CODEC, WHOLE.size), completion)
    assert (look.error, look.answer, look.text) == (error, None, BOX_TEXT)


def test_the_second_step_is_the_protocols_own():
    whole = View("w", Image.new("RGB", (200, 200)))
    look = cut(look_of("What?", whole, Completion(BOX_TEXT), CODEC, whole.size), "exact")
    assert [len(answer_request(look, protocol).messages) for protocol in (VISRL, VISCOT)] == [1, 3]
    assert answer_request(look, VISCOT).messages[1].text == BOX_TEXT
    assert look.crop.size == (50, 50)
