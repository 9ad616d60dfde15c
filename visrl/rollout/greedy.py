"""Greedy rollouts over questions: a model's own box and the controls that bound it, under any protocol.

Nothing here scores: see rewards/ and evaluate/results.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from visrl.box import Box, BoxError, CropRule
from visrl.codecs import Codec
from visrl.conversation import PromptError, View
from visrl.engines.base import Policy, Sampling
from visrl.records import Sample, place_name
from visrl.rollout.controls import matched_control, published_control, require_box
from visrl.rollout.protocols import VISRL, LookProtocol, plain_conversation
from visrl.rollout.rollout import OpenedQuestion, Refusal, answer_all, look_all, open_question
from visrl.rollout.steps import WHOLE, Look, finish, with_box

# "no_box" is one turn of image and question; "no_crop" is the second step, shown the whole image for a crop;
# "other_question" is the second step, shown the crop of the model's own box for another question about the image.
Mode = Literal["own", "no_box", "no_crop", "other_question", "random", "center", "truth"]
CROP_MODES: tuple[Mode, ...] = ("own", "no_crop", "other_question", "random", "center", "truth")
WRITTEN_MODES: tuple[Mode, ...] = ("own", "other_question")  # in which the model writes the box that is looked at


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
) -> list[Look | Refusal]:
    """Both steps at temperature 0, in the order of `samples`; what cannot be asked about is its error
    (see `open_question`).

    A control's box takes the place of step 1; where there can be none, the look holds the error. `others` are the
    other questions of mode "other_question", one for each sample (see `controls.other_questions`).
    """
    assert mode != "other_question" or len(others) == len(samples)
    policy.forget()  # as in `sampled_looks`
    ask = plain_conversation if mode == "no_box" else protocol.focus
    opened = [open_question(policy, sample, ask, root) for sample in samples]
    questions = [question for question in opened if isinstance(question, OpenedQuestion)]
    if mode == "own":
        seeds = [[0]] * len(questions)
        looks = [look for (look,) in look_all(policy, questions, Sampling(max_tokens=protocol.box_tokens), seeds)]
    elif mode == "no_box":
        looks = _answered_at_once(policy, questions, protocol.answer_tokens)
    elif mode == "other_question":
        pairs = [(one, other) for one, other in zip(opened, others, strict=True) if isinstance(one, OpenedQuestion)]
        looks = _looks_of_others(policy, pairs, protocol)
    else:
        looks = [_control_look(question, mode, protocol, policy.codec, seed) for question in questions]
    if protocol.answer is not None and mode != "no_box":
        looks = answer_all(policy, looks, Sampling(max_tokens=protocol.answer_tokens), crop_rule, protocol)
    done = iter(looks)
    return [next(done) if isinstance(question, OpenedQuestion) else question for question in opened]


def _answered_at_once(policy: Policy, questions: Sequence[OpenedQuestion], tokens: int) -> list[Look]:
    """Looks without a box: the answer is that of the first conversation."""
    talks = [question.talk for question in questions]
    completions = policy.complete(talks, Sampling(max_tokens=tokens), [[0]] * len(talks))
    return [
        finish(Look(question.sample.question, question.whole), completion)
        for question, (completion,) in zip(questions, completions, strict=True)
    ]


def _looks_of_others(
    policy: Policy, pairs: Sequence[tuple[OpenedQuestion, Sample]], protocol: LookProtocol
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
    elsewhere = iter(look_all(policy, asked, Sampling(max_tokens=protocol.box_tokens), [[0]] * len(asked)))
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
    if mode == "truth":
        return require_box(sample)
    if mode == "random" or mode == "center":
        if protocol is VISRL:
            return matched_control(mode, sample, seed)
        return published_control(mode, whole.size, f"{sample.source}/{place_name(sample.place)}", seed)
    assert mode == "no_crop", mode
    return WHOLE
