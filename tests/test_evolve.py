"""Diversity, critic, filter and rollout, each against what the paper says."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visrl.box import Box, iou, overlap
from visrl.codecs import CODECS
from visrl.engines.base import Completion, Sampling
from visrl.engines.local import LocalEngine
from visrl.evolve.pairs import FilterSettings, make_pairs, pick
from visrl.records import Sample, Trajectory, Verdict
from visrl.rewards.critic import SceneOracle
from visrl.rollout.diversity import needs_replacing, random_box_apart
from visrl.rollout.rollout import RolloutSettings, roll_out
from visrl.scenes import find_question, scene_samples, true_box

corner = st.floats(0, 0.95)
side = st.floats(0.02, 1.0)


@st.composite
def boxes(draw):
    x, y = draw(corner), draw(corner)
    return Box(x, y, min(1.0, x + draw(side)), min(1.0, y + draw(side)))


@given(boxes(), boxes(), st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_a_random_box_never_overlaps_the_first(first, like, seed):
    box = random_box_apart(first, like, seed)
    if box is None:
        assert first.width > 0.96
        assert first.height > 0.96
        return
    assert overlap(first, box) < 1e-9
    assert box.width <= like.width + 1e-9
    assert box.height <= like.height + 1e-9
    room_x = max(first.x0, 1 - first.x1) >= like.width
    room_y = max(first.y0, 1 - first.y1) >= like.height
    if room_x or room_y:
        assert (box.width, box.height) == pytest.approx((like.width, like.height))


def test_the_controller_acts_from_iou_02_on():
    first = Box(0, 0, 0.5, 0.5)
    assert needs_replacing(first, first)
    assert not needs_replacing(first, Box(0.5, 0.5, 1, 1))
    second = Box(0, 0, 0.1, 0.5)  # IoU exactly 0.2
    assert iou(first, second) == pytest.approx(0.2)
    assert needs_replacing(first, Box(0, 0, 0.1 + 1e-9, 0.5))
    assert not needs_replacing(first, Box(0, 0, 0.09, 0.5))


sizes = st.tuples(st.integers(56, 3000), st.integers(56, 3000))


@given(boxes(), st.integers(0, 2**32), sizes, st.sampled_from(["visrl", "qwen2_vl", "qwen2_5_vl", "paligemma"]))
@settings(max_examples=300, deadline=None)
def test_a_random_box_is_apart_still_when_it_has_been_written_and_read(first, seed, size, name):
    """At any image size and in any family's text: a codec's grid lines are the same for both boxes."""
    codec, processed = CODECS[name], (28 * max(2, size[0] // 56), 28 * max(2, size[1] // 56))

    def written(box):
        return codec.parse(codec.format(box, size, processed), size, processed)

    first = written(first)
    box = random_box_apart(first, first, seed)
    if box is not None:
        assert overlap(first, written(box)) < 1e-9


def test_random_places_cover_the_picture():
    first, like = Box(0.4, 0.4, 0.6, 0.6), Box(0, 0, 0.2, 0.2)
    centers = np.array([random_box_apart(first, like, seed).center for seed in range(400)])
    for low_x, low_y in itertools.product((0.1, 0.5), repeat=2):
        inside = (np.abs(centers - [low_x + 0.2, low_y + 0.2]) <= 0.2).all(axis=1)
        assert inside.mean() > 0.1


# --- the critic


def whole_shown(size):
    scale = (112 * 112 / (size[0] * size[1])) ** 0.5
    return round(size[0] * scale), round(size[1] * scale)


def judge(sample: Sample, box: Box, answer: str) -> Verdict:
    (verdict,) = SceneOracle(whole_shown).judge([sample], [tried(sample.id, 0, 0, box=box, answer=answer)])
    return verdict


def tried(sample_id, round_, branch, *, box=Box(0, 0, 1, 1), answer="1", text=None):  # noqa: B008
    written = CODECS["visrl"].format(box, (672, 672), (112, 112)) if text is None else text
    return Trajectory(sample_id, round_, branch, written, box, "sampled", answer, "test", 0)


def test_the_oracle_passes_gold_and_fails_what_cannot_be_read():
    rng = np.random.default_rng(0)
    for sample in scene_samples("validation", 0, 60):
        scene, question = find_question(sample.id)
        truth = true_box(scene, question)
        gold = judge(sample, truth, sample.answer)
        assert gold.box_score > 0.8
        assert gold.answer_score == 1.0
        assert judge(sample, Box(0, 0, 1, 1), "99").box_score < 0.2, "the whole picture must not win"
        assert judge(sample, truth, "99").answer_score == 0.0
        apart = random_box_apart(truth, truth, int(rng.integers(2**32)))
        assert judge(sample, apart, sample.answer).box_score < 0.2
        half = Box(truth.x0, truth.y0, truth.x0 + 0.4 * truth.width, truth.y1)
        assert judge(sample, half, sample.answer).box_score < gold.box_score


def test_a_trajectory_without_a_box_gets_no_scores():
    sample = scene_samples("validation", 0, 1)[0]
    failed = Trajectory(sample.id, 0, 0, "garbage", None, "sampled", None, "test", 0, "box: none")
    (verdict,) = SceneOracle(whole_shown).judge([sample], [failed])
    assert (verdict.box_score, verdict.answer_score) == (None, None)


# --- the filter


def judged(*scores):
    return [
        (
            tried("s", n // 2, n % 2, box=Box(0.01 * n, 0, 0.5, 1), answer=str(n)),
            Verdict("s", n // 2, n % 2, box, answer),
        )
        for n, (box, answer) in enumerate(scores)
    ]


def test_winner_and_loser_follow_algorithm_1():
    winner, loser = pick(
        judged((0.8, 0.9), (0.9, 0.9), (1.0, 0.7), (0.1, 0.19), (0.0, 0.1), (0.0, 0.2)), FilterSettings()
    )
    assert (winner[0].answer, loser[0].answer) == ("1", "4")


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ([(0.79, 1.0), (0.0, 0.0)], "no_winner"),
        ([(1.0, 1.0), (0.2, 0.0)], "no_loser"),
        ([(1.0, 0.5), (0.5, 0.0)], "no_winner_no_loser"),
        ([(None, 1.0), (0.5, None)], "nothing_readable"),
        ([], "not_generated"),
    ],
)
def test_a_question_without_both_gives_no_pair_and_its_reason(scores, reason):
    assert pick(judged(*scores), FilterSettings()) == reason


def test_ties_go_to_the_better_answer_then_to_the_first():
    winner, _ = pick(judged((1.0, 0.9), (0.9, 1.0), (0.9, 1.0), (0.0, 0.0)), FilterSettings())
    assert winner[0].answer == "1"


def test_the_released_rule_loses_pairs_that_the_paper_keeps():
    scores = judged((0.3, 1.0), (1.0, 0.9), (0.0, 0.1))
    assert pick(scores, FilterSettings(rule="released")) == "no_winner"
    winner, _ = pick(scores, FilterSettings())
    assert winner[0].answer == "1"
    loser = pick(judged((1.0, 1.0), (0.2, 0.2)), FilterSettings(rule="released"))
    assert not isinstance(loser, str), "the released code takes losers at exactly 0.2"


def test_every_question_is_kept_or_counted():
    samples = [Sample(name, "scene:test/0", "Q?", "1") for name in "abc"]
    tries = [tried("a", 0, 0, answer="1"), tried("a", 0, 1, box=Box(0, 0, 0.1, 0.1), answer="2"), tried("b", 0, 0)]
    verdicts = [Verdict("a", 0, 0, 1.0, 1.0), Verdict("a", 0, 1, 0.0, 0.0), Verdict("b", 0, 0, 1.0, 1.0)]
    result = make_pairs(samples, tries, verdicts)
    assert (result.questions, result.kept, dict(result.dropped)) == (3, 1, {"no_loser": 1, "not_generated": 1})
    box, answer = result.preferences
    assert (box.step, answer.step) == ("box", "answer")
    assert len(box.images) == 1
    assert answer.images[1].crop == tries[0].box, "both answers are given the crop of the chosen box"
    assert box.prompt in answer.prompt


# --- the rollout


def test_a_batch_of_the_same_pictures_starts_anew(tiny):
    policy = LocalEngine.load(tiny)
    samples = scene_samples("preference", 0, 1, per_scene=2)
    rounds = []
    for _ in range(2):
        before = policy.prefilled_tokens
        roll_out(policy, samples, RolloutSettings(rounds=1))
        rounds.append(policy.prefilled_tokens - before)
    assert rounds[0] == rounds[1] > 0  # a resumed run computes what an uninterrupted one does, and nothing piles up


def test_a_rollout_is_a_function_of_seed_and_question(tiny):
    policy = Parrot(LocalEngine.load(tiny))
    samples = scene_samples("preference", 0, 5)
    settings_ = RolloutSettings(rounds=2, seed=3)
    rolled = roll_out(policy, samples, settings_)
    assert [(t.sample_id, t.round, t.branch) for t in rolled] == [
        (s.id, r, b) for s in samples for r in (0, 1) for b in (0, 1)
    ]
    assert roll_out(policy, samples[2:3], settings_) == [t for t in rolled if t.sample_id == samples[2].id]
    replaced = [t for t in rolled if t.origin == "random"]
    assert replaced
    for trajectory in replaced:
        assert trajectory.box is None or trajectory.box_text == CODECS["visrl"].format(
            trajectory.box, (672, 672), (112, 112)
        ), "a random box is written by the codec, as a sampled one is"
    assert any(t.error and t.error.startswith("box:") for t in rolled), "garbage is a record"


class Parrot:
    """A policy whose boxes are written by a script and whose answers come from a real engine."""

    name = "parrot"
    script = ("[0.100, 0.100, 0.300, 0.300]", "[0.110, 0.100, 0.300, 0.300]", "[0.9, 0.9, 0.1, 0.1]", "nothing")

    def __init__(self, engine):
        self.engine = engine
        self.codec = engine.codec
        self.processed_size, self.forget = engine.processed_size, engine.forget

    def complete(self, conversations, sampling, seeds):
        if len(conversations[0].views) == 1:
            return [[Completion(self.script[n % 4]) for n, _ in enumerate(own)] for own in seeds]
        return self.engine.complete(conversations, Sampling(max_tokens=2), seeds)
