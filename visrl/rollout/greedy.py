"""Rollouts over the questions of an evaluation: a model's own box and the controls that bound it, under any protocol;
greedy, or sampled where several replies to a question are wanted.

Nothing here scores: see rewards/ and evaluate/results.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from visrl.box import Box, BoxError, CropRule
from visrl.codecs import Codec
from visrl.conversation import PromptError, View
from visrl.engines.base import Policy, Sampling, seed_of
from visrl.records import Sample, place_name
from visrl.rollout.controls import matched_control, published_control, require_box
from visrl.rollout.episodes import zoomed_looks
from visrl.rollout.protocols import VISRL, LookProtocol
from visrl.rollout.rollout import OpenedQuestion, Refusal, answer_all, look_all, open_question
from visrl.rollout.steps import WHOLE, Look, finish, with_box

# "no_box" is one turn of image and question; "no_crop" is the second step, shown the whole image for a crop;
# "other_question" is the second step, shown the crop of the model's own box for another question about the image.
# "crop_alone" and "truth_alone" are one turn of question and crop, of the model's own or of the true box, with nothing
# else of the image.
Mode = Literal["own", "no_box", "no_crop", "other_question", "random", "center", "truth", "crop_alone", "truth_alone"]
CROP_MODES: tuple[Mode, ...] = ("own", "no_crop", "other_question", "random", "center", "truth")
# In which the model writes the box that is looked at.
WRITTEN_MODES: tuple[Mode, ...] = ("own", "other_question", "crop_alone")
ALONE_MODES: tuple[Mode, ...] = ("crop_alone", "truth_alone")


def greedy_looks(
    policy: Policy,
    samples: Sequence[Sample],
    *,
    mode: Mode = "own",
    protocol: LookProtocol = VISRL,
    crop_rule: CropRule = "exact",
    root: str | Path | None = None,
    seed: int = 0,
    others: Sequence[Sample] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> list[Look | Refusal]:
    """Both steps at temperature 0, in the order of `samples`; what cannot be asked about is its error
    (see `open_question`). Above temperature 0 every text has a seed of its own, by `seed`, sample and step.

    A control's box takes the place of step 1; where there can be none, the look holds the error. `others` are the
    other questions of mode "other_question", one for each sample (see `controls.other_questions`).
    """
    assert mode != "other_question" or len(others) == len(samples)
    policy.forget()  # as in `sampled_looks`
    draw = _Draw(temperature, top_p, seed)
    ask = protocol.plain if mode == "no_box" else protocol.focus
    opened = [open_question(policy, sample, ask, root) for sample in samples]
    questions = [question for question in opened if isinstance(question, OpenedQuestion)]
    if mode == "own" and protocol.zoom is not None:
        seeds = [draw.seed_of(question.sample, "box") for question in questions]
        sampling = draw.sampling(protocol.answer_tokens)
        groups = zoomed_looks(policy, questions, protocol.zoom, crop_rule, sampling, seeds)
        looks = [look for (look,) in groups]
    elif mode in ("own", "crop_alone"):
        seeds = [draw.seed_of(question.sample, "box") for question in questions]
        looks = [look for (look,) in look_all(policy, questions, draw.sampling(protocol.box_tokens), seeds)]
    elif mode == "no_box":
        looks = _answered_at_once(policy, questions, protocol.answer_tokens, draw)
    elif mode == "other_question":
        pairs = [(one, other) for one, other in zip(opened, others, strict=True) if isinstance(one, OpenedQuestion)]
        looks = _looks_of_others(policy, pairs, protocol, draw)
    else:
        looks = [_control_look(question, mode, protocol, policy.codec, seed) for question in questions]
    if protocol.answer is not None and mode != "no_box" and not (mode == "own" and protocol.zoom):
        if temperature:
            pairs_of = zip(looks, questions, strict=True)
            looks = [replace(look, seed=draw.seed_of(one.sample, "answer")[0]) for look, one in pairs_of]
        shown = _alone(protocol) if mode in ALONE_MODES else protocol
        looks = answer_all(policy, looks, draw.sampling(protocol.answer_tokens), crop_rule, shown)
    done = iter(looks)
    return [next(done) if isinstance(question, OpenedQuestion) else question for question in opened]


@dataclass(frozen=True, slots=True)
class _Draw:
    """How texts are drawn: greedily, or at a temperature and each with its own seed."""

    temperature: float
    top_p: float
    seed: int

    def sampling(self, tokens: int) -> Sampling:
        return Sampling(self.temperature, self.top_p, tokens)

    def seed_of(self, sample: Sample, step: str) -> list[int]:
        return [seed_of(self.seed, *sample.place, step) if self.temperature else 0]


def _alone(protocol: LookProtocol) -> LookProtocol:
    """`protocol` with its answer asked in one turn of the crop and the question."""
    return replace(protocol, answer=lambda question, whole, box_text, detail: protocol.plain(question, detail))


def _answered_at_once(policy: Policy, questions: Sequence[OpenedQuestion], tokens: int, draw: _Draw) -> list[Look]:
    """Looks without a box: the answer is that of the first conversation."""
    talks = [question.talk for question in questions]
    seeds = [draw.seed_of(question.sample, "answer") for question in questions]
    completions = policy.complete(talks, draw.sampling(tokens), seeds)
    return [
        finish(Look(question.sample.question, question.whole, seed=seed), completion)
        for question, (completion,), (seed,) in zip(questions, completions, seeds, strict=True)
    ]


def _looks_of_others(
    policy: Policy, pairs: Sequence[tuple[OpenedQuestion, Sample]], protocol: LookProtocol, draw: _Draw
) -> list[Look]:
    """Looks at each question, with what the model wrote of its box when asked the other one about the same image."""
    looks: list[Look | None] = []
    asked: list[OpenedQuestion] = []
    for question, other in pairs:
        try:
            talk = protocol.focus(other.question, question.whole)
        except PromptError as refused:
            error = f"control: the other question cannot be asked: {refused}"
            looks.append(Look(question.sample.question, question.whole, error=error))
        else:
            asked.append(OpenedQuestion(other, question.whole, question.processed, talk))
            looks.append(None)
    seeds = [draw.seed_of(one.sample, "box") for one in asked]
    elsewhere = iter(look_all(policy, asked, draw.sampling(protocol.box_tokens), seeds))
    return [
        look or replace(next(elsewhere)[0], question=question.sample.question)
        for look, (question, _) in zip(looks, pairs, strict=True)
    ]


def _control_look(question: OpenedQuestion, mode: Mode, protocol: LookProtocol, codec: Codec, seed: int) -> Look:
    """A look with the control's box in place of the model's, its text written as the model would write it."""
    look = Look(question.sample.question, question.whole)
    try:
        box = control_box(question.sample, question.whole, mode, protocol, seed)
        return with_box(look, box, codec, question.processed)
    except BoxError as error:
        return replace(look, error=f"control: {error}")


def control_box(sample: Sample, whole: View, mode: Mode, protocol: LookProtocol = VISRL, seed: int = 0) -> Box:
    """The box of a control mode: published ones are drawn as Visual-CoT does, ours have the true box's size.

    Raises:
        BoxError: the control needs a true box, and the sample has none.
    """
    if mode in ("truth", "truth_alone"):
        return require_box(sample)
    if mode == "random" or mode == "center":
        if protocol.controls == "matched" or (protocol.controls == "either" and sample.box is not None):
            return matched_control(mode, sample, seed)
        return published_control(mode, whole.size, f"{sample.source}/{place_name(sample.place)}", seed)
    assert mode == "no_crop", mode
    return WHOLE
