"""Looking at temperature 0 under each protocol and mode: what the model is really shown."""

from __future__ import annotations

import pytest
from PIL import Image
from tiny_families import make

from visrl.box import Box
from visrl.codecs import CODECS
from visrl.conversation import View
from visrl.engines.base import Completion
from visrl.engines.local import LocalEngine
from visrl.images import ImageError
from visrl.models.encode import PromptError
from visrl.models.settings import ModelSettings
from visrl.models.tree_encoder import TreeEncoder
from visrl.records import Sample
from visrl.rewards.scored import evaluate_samples
from visrl.rollout.controls import matched_control
from visrl.rollout.greedy import CROP_MODES, greedy_looks
from visrl.rollout.protocols import REFCOCO, VISCOT, VISRL
from visrl.scenes import SIDE, scene_samples


class Listener:
    """A policy that writes what it is told to and remembers what it was shown."""

    name, codec = "listener", CODECS["visrl"]

    def __init__(self, box_text="[0.250, 0.500, 0.500, 0.750]"):
        self.box_text, self.heard = box_text, []

    def processed_size(self, size, is_crop=False):
        return size

    def forget(self):
        pass

    def complete(self, conversations, sampling, seeds):
        self.heard += [(talk, sampling) for talk in conversations]
        return [[Completion(self.box_text if len(talk.views) == 1 else "red")] for talk in conversations]


SAMPLES = scene_samples("validation", 0, 2, with_box=True)
QUESTION = SAMPLES[0].question


def test_given_boxes_skip_the_first_step(tiny):
    looks = greedy_looks(LocalEngine.load(tiny), SAMPLES, mode="truth")
    assert [look.box for look in looks] == [sample.box for sample in SAMPLES]
    assert all(look.answer is not None for look in looks)


def test_the_published_protocol_to_the_letter():
    policy = Listener()
    (look,) = greedy_looks(policy, SAMPLES[:1], protocol=VISCOT, crop_rule="viscot_square")
    (box_talk, box_sampling), (answer_talk, _) = policy.heard
    (box_turn,) = box_talk.messages
    assert box_turn.text == (
        f"<image>\n{QUESTION.lower()}. Please provide the bounding box coordinate of the region that can help you "
        "answer the question better."
    )
    assert (box_sampling.temperature, box_sampling.max_tokens) == (0, 128)
    assert [(turn.role, turn.text) for turn in answer_talk.messages] == [
        ("user", f"<image>\n{QUESTION}"),
        ("assistant", "[0.250, 0.500, 0.500, 0.750]"),
        ("user", f"<image>\nPlease answer the question based on the original image and local detail image.{QUESTION}"),
    ]
    # A square around the box's middle with half-sides of at least 112 pixels.
    assert look.detail.size == (max(224, SIDE // 4),) * 2
    assert look.answer == "red"


def test_a_family_that_writes_boxes_in_tokens_of_its_own_may_say_them_again():
    model, plain = make("qwen2_vl")
    plain.tokenizer.add_tokens(["<|box_start|>", "<|box_end|>"], special_tokens=True)
    encoder = TreeEncoder(plain.processor, model.config, ModelSettings(codec="qwen2_vl"))
    whole = View("w", Image.new("RGB", (64, 64)))
    text = CODECS["qwen2_vl"].format(Box(0.1, 0.2, 0.3, 0.4), whole.size, whole.size)
    assert text in encoder.render(VISCOT.answer(QUESTION, whole, text, whole))
    with pytest.raises(PromptError, match="control token"):
        encoder.render(VISCOT.answer(QUESTION, whole, "<|im_end|>", whole))


def test_refcoco_asks_for_a_box_alone():
    policy = Listener()
    sample = Sample("1", SAMPLES[0].image, "Dish in TOP right corner", "", Box(0, 0, 1, 1), "refcoco")
    (look,) = greedy_looks(policy, [sample], protocol=REFCOCO)
    ((talk, _),) = policy.heard
    assert talk.messages[0].text == (
        "<image>\nLocate the region this sentence describes: dish in top right corner. "
        "Please provide the bounding box coordinates."
    )
    assert look.box == Box(0.25, 0.5, 0.5, 0.75)


@pytest.mark.parametrize("protocol", [VISRL, VISCOT])
@pytest.mark.parametrize("mode", ["random", "center", "truth", "no_crop"])
def test_a_control_box_takes_the_place_of_the_models(mode, protocol):
    policy = Listener("never asked")
    (look,) = greedy_looks(policy, SAMPLES[:1], mode=mode, protocol=protocol)
    ((talk, _),) = policy.heard
    assert talk.views[1].is_crop
    expected = {"truth": SAMPLES[0].box, "no_crop": Box(0, 0, 1, 1)}.get(mode, look.box)
    assert look.box == expected
    # The text that stands for the box in the second turn is written as the model would write it.
    assert CODECS["visrl"].parse(look.text, (SIDE, SIDE), (SIDE, SIDE)).as_list() == pytest.approx(
        look.box.as_list(), abs=6e-4
    )


def test_without_a_box_there_is_one_turn_and_one_picture():
    policy = Listener("blue")
    (look,) = greedy_looks(policy, SAMPLES[:1], mode="no_box", protocol=VISCOT)
    ((talk, _),) = policy.heard
    assert [turn.text for turn in talk.messages] == [f"<image>\n{QUESTION}"]
    assert (look.answer, look.box) == ("blue", None)


def test_what_cannot_be_looked_at_is_a_record_among_the_others(tmp_path):
    missing = Sample("m", "nowhere.png", "What?", "x", Box(0, 0, 1, 1))
    no_truth = Sample("n", SAMPLES[0].image, "What?", "x")
    looks = greedy_looks(Listener(), [SAMPLES[0], missing, no_truth], mode="truth", root=tmp_path)
    assert isinstance(looks[1], ImageError)
    assert (looks[0].error, looks[0].answer) == (None, "red")
    assert looks[2].error.startswith("control: question n has no true box")
    rows = evaluate_samples(Listener(), [missing, SAMPLES[0]], root=tmp_path)
    assert rows[0]["error"].startswith("picture: no picture at")
    assert (rows[0]["correct"], rows[0]["iou"]) == (False, 0.0)


def test_a_matched_control_has_the_true_boxes_size_and_another_place():
    for control in ("random", "center"):
        box = matched_control(control, SAMPLES[0])
        assert (box.width, box.height) == pytest.approx((SAMPLES[0].box.width, SAMPLES[0].box.height))
    assert matched_control("random", SAMPLES[0], seed=1) != matched_control("random", SAMPLES[0], seed=2)


def test_every_mode_with_a_crop_gives_a_row_a_question(tiny):
    engine = LocalEngine.load(tiny)
    for mode in CROP_MODES:
        rows = evaluate_samples(engine, SAMPLES, mode=mode)
        assert [(row["id"], row["mode"]) for row in rows] == [(sample.id, mode) for sample in SAMPLES]
