"""Greedy rollouts over questions: a model's own box and the controls that bound it, under any protocol.

What is drawn here is scored in results.py; the demo and training curves score it at once (`evaluate_samples`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from visrl.box import Box, BoxError, CropRule, iou
from visrl.conversation import Conversation, Sampling, View
from visrl.evaluate.controls import WHOLE, matched_control, published_control, true_box
from visrl.evaluate.metrics import exact_match
from visrl.evolve.rollout import Look, Policy, Refusal, answer_all, begin, failure, hear, look_at
from visrl.protocols import VISRL, LookProtocol, plain_conversation
from visrl.records import Sample, place_name

# "no_box" is one turn of picture and question; "no_crop" is the second step, shown the whole picture for a crop.
Mode = Literal["own", "no_box", "no_crop", "random", "center", "truth"]
MODES: tuple[Mode, ...] = get_args(Mode)
CROP_MODES: tuple[Mode, ...] = ("own", "no_crop", "random", "center", "truth")
BATCH = 64

EvalRow = dict[str, Any]


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


# --- Scored at once: drawn scenes, and what a training run watches ---------------------------------------------------


def evaluate_samples(
    policy: Policy,
    samples: Sequence[Sample],
    *,
    mode: Mode = "own",
    crop_rule: CropRule = "exact",
    root: str | Path | None = None,
    seed: int = 0,
) -> list[EvalRow]:
    """One row per sample: question, boxes, prediction, whether it is right, IoU, and the error where there was one."""
    rows: list[EvalRow] = []
    for start in range(0, len(samples), BATCH):
        part = samples[start : start + BATCH]
        looks = greedy_looks(policy, part, mode=mode, root=root, crop_rule=crop_rule, seed=seed)
        rows += [eval_row(sample, look, mode) for sample, look in zip(part, looks, strict=True)]
    return rows


def eval_row(sample: Sample, look: Look | Refusal, mode: Mode) -> EvalRow:
    """The record of one question: a look without a box counts IoU 0 and a wrong answer, with its error kept."""
    found = look if isinstance(look, Look) else None
    box, answer = (found.box, found.answer) if found else (None, None)
    return {
        "id": sample.id,
        "kind": sample.source.removeprefix("scenes-"),
        "mode": mode,
        "question": sample.question,
        "answer": sample.answer,
        "image": sample.image,
        "true_box": sample.box.as_list() if sample.box else None,
        "box": box.as_list() if box else None,
        "box_text": found.text if found else "",
        "prediction": answer,
        "correct": answer is not None and exact_match(answer, [sample.answer]) == 1.0,
        "iou": iou(box, sample.box) if box and sample.box else (0.0 if sample.box else None),
        "error": look.error if isinstance(look, Look) else failure(look),
        **({"repeat": sample.repeat} if sample.repeat else {}),
    }


def measures(rows: Sequence[EvalRow]) -> dict[str, float]:
    """What a training run watches: accuracy, parse rate, mean IoU where boxes are known, and their mean as a score."""
    accuracy = float(np.mean([row["correct"] for row in rows]))
    found = {"accuracy": accuracy, "parse_rate": float(np.mean([row["box"] is not None for row in rows]))}
    known = [row["iou"] for row in rows if row["iou"] is not None]
    if known:
        found["iou"] = float(np.mean(known))
        found["iou_50"] = float(np.mean([value > 0.5 for value in known]))
    found["score"] = (accuracy + found.get("iou", accuracy)) / 2
    return found
