"""Greedy rollouts over questions: a model's own box and the controls that bound it, under any protocol.

Nothing here scores: see rewards/ and evaluate/results.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from visrl.box import Box, BoxError, CropRule
from visrl.conversation import Conversation, View
from visrl.engines.base import Policy, Sampling
from visrl.records import Sample, place_name
from visrl.rollout.controls import WHOLE, matched_control, published_control, true_box
from visrl.rollout.protocols import VISRL, LookProtocol, plain_conversation
from visrl.rollout.rollout import Look, Refusal, answer_all, begin, hear, look_at

# "no_box" is one turn of picture and question; "no_crop" is the second step, shown the whole picture for a crop.
Mode = Literal["own", "no_box", "no_crop", "random", "center", "truth"]
MODES: tuple[Mode, ...] = get_args(Mode)
CROP_MODES: tuple[Mode, ...] = ("own", "no_crop", "random", "center", "truth")


def greedy_looks(
    policy: Policy,
    samples: Sequence[Sample],
    *,
    mode: Mode = "own",
    protocol: LookProtocol = VISRL,
    crop_rule: CropRule = "exact",
    root: str | Path | None = None,
    seed: int = 0,
) -> list[Look | Refusal]:
    """Both steps at temperature 0, in the order of `samples`; what cannot be asked about is its error (see `begin`).

    A control's box takes the place of step 1; where there can be none, the look holds the error.
    """
    policy.forget()  # as in `roll_out`
    ask = plain_conversation if mode == "no_box" else protocol.focus
    begun = [begin(policy, sample, ask, root) for sample in samples]
    pairs = [(sample, *start) for sample, start in zip(samples, begun, strict=True) if isinstance(start, tuple)]
    talks = [talk for _, _, talk in pairs]
    if mode == "own":
        texts = _greedy(policy, talks, protocol.box_tokens)
        looks = [look_at(policy, s.question, w, text) for (s, w, _), text in zip(pairs, texts, strict=True)]
    elif mode == "no_box":
        looks = [Look(sample.question, whole, "", None) for sample, whole, _ in pairs]
        for look, completion in zip(looks, _greedy(policy, talks, protocol.answer_tokens), strict=True):
            hear(look, completion)
    else:
        looks = [_control_look(policy, sample, whole, mode, protocol, seed) for sample, whole, _ in pairs]
    if protocol.answer is not None and mode != "no_box":
        answer_all(policy, looks, Sampling(max_tokens=protocol.answer_tokens), crop_rule, protocol)
    done = iter(looks)
    return [next(done) if isinstance(start, tuple) else start for start in begun]


def _greedy(policy: Policy, talks: Sequence[Conversation], tokens: int) -> list[Any]:
    return [drawn[0] for drawn in policy.complete(talks, Sampling(max_tokens=tokens), [[0]] * len(talks))]


def _control_look(policy: Policy, sample: Sample, whole: View, mode: Mode, protocol: LookProtocol, seed: int) -> Look:
    """A look with the control's box in place of the model's, its text written as the model would write it."""
    try:
        box = control_box(sample, whole, mode, protocol, seed)
        text = policy.codec.format(box, whole.size, policy.processed_size(whole.size))
    except BoxError as error:
        return Look(sample.question, whole, "", None, f"control: {error}")
    return Look(sample.question, whole, text, box)


def control_box(sample: Sample, whole: View, mode: Mode, protocol: LookProtocol = VISRL, seed: int = 0) -> Box:
    """The box of a control mode: published ones are drawn as Visual-CoT does, ours have the true box's size.

    Raises:
        BoxError: the control needs a true box, and the sample has none.
    """
    if mode == "truth":
        return true_box(sample)
    if mode == "random" or mode == "center":
        if protocol is VISRL:
            return matched_control(mode, sample, seed)
        return published_control(mode, whole.size, f"{sample.source}/{place_name(sample.place)}", seed)
    assert mode == "no_crop", mode
    return WHOLE
