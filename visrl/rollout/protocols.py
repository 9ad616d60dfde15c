"""How a question is put to a model in two steps: `visrl` (training, generation, serving) and the published ones.

Conversations only, built from the prompts of prompts.py. Nothing here knows engines, boxes' numbers or scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from visrl.box import CropRule, Size
from visrl.codecs import Codec
from visrl.conversation import Conversation, Message, View, answer_conversation, focus_conversation
from visrl.prompts import IMAGE, refcoco_prompt, viscot_answer_prompt, viscot_box_prompt, without_marks
from visrl.zoom.config import LooksConfig
from visrl.zoom.episode import begin
from visrl.zoom.protocols import (
    VISCOT_TOKENS,
    VISRL_TOKENS,
    ZOOM_PROTOCOLS,
    Fault,
    ZoomProtocol,
    viscot_looks,
    visrl_looks,
)

Plain = Callable[[str, View], Conversation]
Zoom = Callable[[Codec, Size, Size, CropRule], ZoomProtocol]


def plain_conversation(question: str, whole: View) -> Conversation:
    """One turn, image and question, no box: what two steps are to be better than."""
    return Conversation((Message("user", f"{IMAGE}\n{question}"),), (whole,))


def instructed(system: str | None) -> Plain:
    """One turn, the image right before the question, after a system message where there is one: how published
    evaluations ask."""

    def plain(question: str, whole: View) -> Conversation:
        turns = (Message("user", f"{IMAGE}{question}"),)
        return Conversation(((Message("system", system), *turns) if system else turns), (whole,))

    return plain


@dataclass(frozen=True, slots=True)
class LookProtocol:
    """Where to look (`focus`), then what is there (`answer`, of question, whole, box text and crop).

    `crop_rule` None is the checkpoint's own rule. A protocol without `answer` asks for boxes only. `plain` asks in one
    turn. Random and centre boxes are drawn as Visual-CoT's scripts do, or with the size of the true box ("matched"), or
    so where there is a true box ("either"). With `zoom` a model looks as often as it wants to, by the protocol that
    `zoom` makes of the model's codec, the sizes of the image and of what is shown of it, and the crop rule.
    """

    name: str
    focus: Callable[[str, View], Conversation]
    answer: Callable[[str, View, str, View], Conversation] | None
    box_tokens: int
    answer_tokens: int
    crop_rule: CropRule | None = None
    plain: Plain = plain_conversation
    controls: Literal["published", "matched", "either"] = "published"
    zoom: Zoom | None = None


def _one_turn(prompt: Callable[[str], str]) -> Callable[[str, View], Conversation]:
    return lambda question, whole: Conversation((Message("user", prompt(question)),), (whole,))


def _three_turns(question: str, whole: View, box_text: str, detail: View) -> Conversation:
    """Step 2 as published: the question, the box as the model's own turn, and the question again with the crop."""
    turns = (
        Message("user", f"{IMAGE}\n{question}"),
        Message("assistant", without_marks(box_text)),  # a model may write anything
        Message("user", viscot_answer_prompt(question)),
    )
    return Conversation(turns, (whole, detail))


def _single_turn(question: str, whole: View, box_text: str, detail: View) -> Conversation:
    """Step 2 of `visrl`: the box text is not shown again."""
    return answer_conversation(question, whole, detail)


VISRL = LookProtocol("visrl", focus_conversation, _single_turn, VISRL_TOKENS, VISRL_TOKENS, controls="matched")
VISRL_BOXES = LookProtocol("visrl", focus_conversation, None, VISRL_TOKENS, VISRL_TOKENS, controls="matched")


def as_published(system: str | None, answer_tokens: int) -> LookProtocol:
    """The two steps of `visrl` around a benchmark's own wording; in one turn, exactly as it was published."""
    plain = instructed(system)
    return LookProtocol(
        "visrl", focus_conversation, _single_turn, VISRL_TOKENS, answer_tokens, plain=plain, controls="either"
    )


# Protocols of ours that may look as often as they are allowed to, by their names.
SEVERAL_LOOKS = {"visrl": visrl_looks, "viscot": viscot_looks}


def several_looks(protocol: LookProtocol, max_looks: int) -> LookProtocol:
    """`protocol`, one of `SEVERAL_LOOKS`, with 0 to `max_looks` looks in the place of one."""
    looks = SEVERAL_LOOKS[protocol.name]

    def zoom(codec: Codec, original: Size, shown: Size, crop_rule: CropRule) -> ZoomProtocol:
        return looks(codec, original, shown, crop_rule, max_looks)

    return replace(protocol, zoom=zoom)


def public_zoom(name: str, plain: Plain, faults: Sequence[Fault] = ()) -> LookProtocol:
    """A row of `zoom.protocols.ZOOM_PROTOCOLS`, with these faults of its published code; in one turn as `plain` says.

    Raises:
        ValueError: it has no such fault.
    """
    row = ZOOM_PROTOCOLS[name].with_faults(*faults)
    return LookProtocol(
        name,
        lambda question, whole: begin(row, question, whole).conversation,
        _single_turn,
        row.turn_tokens,
        row.turn_tokens,
        "exact",
        plain,
        zoom=lambda codec, original, shown, crop_rule: row,
    )


def protocol_of(config: LooksConfig) -> LookProtocol:
    """The protocol that a config's keys of several looks name: one look by `visrl` where there is none of them."""
    if config.protocol in ZOOM_PROTOCOLS:
        return public_zoom(config.protocol, instructed(None), config.protocol_faults)
    return VISRL if config.max_looks is None else several_looks(VISRL, config.max_looks)


# Visual-CoT (arXiv 2403.16999): at most 128 tokens each, and a square crop of at least 224 pixels.
_TOKENS = (VISCOT_TOKENS, VISCOT_TOKENS)
VISCOT = LookProtocol("viscot", _one_turn(viscot_box_prompt), _three_turns, *_TOKENS, "viscot_square")
VISCOT_BOXES = LookProtocol("viscot-detection", _one_turn(viscot_box_prompt), None, *_TOKENS, "viscot_square")
REFCOCO = LookProtocol("refcoco", _one_turn(refcoco_prompt), None, *_TOKENS, "viscot_square")
