"""The public protocols of several looks, one row each: everything in which they differ.

`ZOOM_PROTOCOLS` is the table. Prompts are those of prompts.json, to the letter; coordinates, windows and replies are
the protocols' own (sources in docs/EVALUATION.md). A new one is a row; its turn reader belongs into calls.py, its
window into windows.py.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Any, Literal

from PIL import Image

from visrl.box import Box, BoxError, Corners, CropRule, Size, Window, crop_window
from visrl.codecs import Codec
from visrl.conversation import crop_key
from visrl.prompts import IMAGE, focus_prompt, viscot_answer_prompt, viscot_box_prompt
from visrl.replies import spoken
from visrl.zoom import calls, windows

MOST_LOOKS = 12  # what the longest of the public protocols allows
VISRL_TOKENS = 64  # of one turn: a box text, or an answer
VISCOT_TOKENS = 128  # likewise, as its scripts have it
Fault = Literal["unmapped_coordinates", "labels_count_turns"]
# What a call that cannot be followed gets: words, the whole picture, or nothing more.
OnFailure = Literal["say", "show_whole", "end"]


@dataclass(frozen=True, slots=True)
class Crop:
    """What an observation may speak of: the crop's size as it is shown, the turn from 0, its number among pictures, and
    the question."""

    size: Size
    turn: int
    number: int
    question: str


def _out_of_range(pictures: int) -> str:
    return "list index out of range"


@dataclass(frozen=True, slots=True)
class ZoomProtocol:
    """How a model looks several times.

    `read` says what a turn asks for, `window` what it means in pixels of the picture it names, `resize` at which size
    that crop is shown, `observe` in which words; `say_error` are the words about a call that cannot be followed, and
    `join` puts several observations of one turn together. `asked` is the question as it stands once it was answered
    with a call, where that is not as it was asked. `any_source`: crops of crops are allowed; else every crop is
    cut from the first picture; `no_source` are the words about a picture that is not there, given how many there are,
    and `crops_are_as_shown` cuts from crops after they were resized. `boxes_in_text` reads boxes that are spoken of and
    never cut. `goes_on`: a turn without a call and without an answer is continued, not ended. `keeps_turns`: what the
    model said stays in the conversation, and an observation is a turn; else observations are added to the question.
    `tool` is the name of the tool that its calls name, with those of its arguments, where they are JSON in tags.
    `last_answers`: the last turn is the answer, whatever it holds. `crop_name` tells the crops of a picture apart,
    `box_of` is the box that a call itself names, where that is not the one of its window, and `whole_call` is the crop
    that "show_whole" shows, where it is not the picture itself once more. `faults` are those of the published code that
    are to be followed.
    """

    name: str
    system: str | None
    ask: Callable[[str], str]
    read: Callable[[str], calls.ZoomTurn]
    window: Callable[..., Window]
    observe: Callable[[Crop], str]
    say_error: Callable[[str], str]
    max_turns: int
    max_pictures: int
    turn_tokens: int
    resize: Callable[[Image.Image], Image.Image] = windows.as_it_is
    on_failure: OnFailure = "say"
    any_source: bool = False
    crops_are_as_shown: bool = False
    no_source: Callable[[int], str] = _out_of_range
    boxes_in_text: Callable[[str], list[Corners]] | None = None
    goes_on: bool = False
    keeps_turns: bool = True
    last_answers: bool = False
    asked: Callable[[str], str] | None = None
    crop_name: Callable[[calls.ZoomCall, Window], str] | None = None
    box_of: Callable[[calls.ZoomCall], Box] | None = None
    whole_call: calls.ZoomCall | None = None
    join: Callable[[list[str]], str] = "".join
    stop: tuple[str, ...] = ()
    prefill: str = ""
    final_prefill: str | None = None
    tool: tuple[str, ...] = ()
    known_faults: tuple[Fault, ...] = ()
    faults: frozenset[Fault] = field(default_factory=frozenset)

    def with_faults(self, *faults: Fault) -> ZoomProtocol:
        """The protocol with these faults of its published code.

        Raises:
            ValueError: it has no such fault.
        """
        for fault in faults:
            if fault not in self.known_faults:
                known = ", ".join(self.known_faults) or "none"
                raise ValueError(f"{self.name} has no fault {fault!r}; known are: {known}")
        return replace(self, faults=frozenset(faults))


@functools.cache
def _prompts() -> dict[str, dict[str, str]]:
    return json.loads(files("visrl.zoom").joinpath("prompts.json").read_text(encoding="utf-8"))


def _prompt(name: str, key: str) -> str:
    return _prompts()[name][key]


def _mini_o3_observation(crop: Crop) -> str:
    return _prompt("mini_o3", "observation").format(action_turn=crop.turn, observation_turn=crop.number)


def _pixel_reasoner_observation(crop: Crop) -> str:
    return _prompt("pixel_reasoner", "observation").format(w=crop.size[0], h=crop.size[1])


def visrl_looks(codec: Codec, original: Size, shown: Size, crop_rule: CropRule, max_looks: int) -> ZoomProtocol:
    """The `visrl` protocol with 0 to `max_looks` looks at an image of the size `original`, shown in the size `shown`:
    a turn that holds a box looks there, every other one answers. The crops stand under the question, one line each, as
    in the two steps of one look; what was written of a box is not shown again."""
    return ZoomProtocol(
        "visrl", None, focus_prompt, observe=lambda crop: f"\n{IMAGE}", turn_tokens=VISRL_TOKENS, keeps_turns=False,
        **_boxes_as_calls(codec, original, shown, crop_rule, max_looks),
    )  # fmt: skip


def viscot_looks(codec: Codec, original: Size, shown: Size, crop_rule: CropRule, max_looks: int) -> ZoomProtocol:
    """The `viscot` protocol likewise: the question with its box sentence; then the question, the box as the model's own
    turn, and the question again with the crop. That is as published; here the turn after a crop may be another box,
    which gets its crop in the same words."""
    return ZoomProtocol(
        "viscot", None, viscot_box_prompt, observe=lambda crop: viscot_answer_prompt(crop.question),
        turn_tokens=VISCOT_TOKENS, asked=lambda question: f"{IMAGE}\n{question}",
        **_boxes_as_calls(codec, original, shown, crop_rule, max_looks),
    )  # fmt: skip


def _boxes_as_calls(codec: Codec, original: Size, shown: Size, crop_rule: CropRule, max_looks: int) -> dict[str, Any]:
    """What a protocol is like in which a turn that holds a box looks there, and every other one answers."""

    def read(text: str) -> calls.ZoomTurn:
        said = spoken(text)
        try:
            box = codec.parse(said, original, shown)
        except BoxError as fault:
            return (
                calls.ZoomTurn(answer=said) if fault.fault == "no_box" else calls.ZoomTurn((calls.BadCall(str(fault)),))
            )
        return calls.ZoomTurn((calls.ZoomCall(tuple(box.as_list())),))

    return {
        "read": read,
        "window": lambda numbers, size, shown: crop_window(Box(*numbers), size, crop_rule),
        "say_error": str,
        "max_turns": max_looks + 1,
        "max_pictures": max_looks + 1,
        "on_failure": "end",
        "last_answers": True,
        "crop_name": lambda call, window: crop_key(Box(*call.numbers), crop_rule),
        "box_of": lambda call: Box(*call.numbers),
        "whole_call": calls.ZoomCall((0, 0, 1, 1)),
    }


_ZOOM_TOOL = ("image_zoom_in_tool", "bbox_2d", "label")


def _table() -> dict[str, ZoomProtocol]:
    deepeyes, focus = _prompts()["deepeyes"], _prompts()["chain_of_focus"]
    tree, vigorl = _prompts()["treevgr"], _prompts()["vigorl"]
    rows = [
        ZoomProtocol(
            "deepeyes", deepeyes["system"], lambda question: f"{IMAGE}{question}{deepeyes['suffix']}",
            calls.deepeyes_turn, windows.deepeyes_window, lambda crop: deepeyes["observation"], str,
            max_turns=5, max_pictures=6, turn_tokens=10_240, tool=_ZOOM_TOOL,
            resize=windows.ShownSize(28, 4 * 28**2, 16384 * 28**2), known_faults=("unmapped_coordinates",),
        ),
        ZoomProtocol(
            "mini_o3", _prompt("mini_o3", "system"), lambda question: f"{IMAGE}\n{question}",
            calls.mini_o3_turn, windows.mini_o3_window, _mini_o3_observation,
            lambda error: _prompt("mini_o3", "error").format(e=error),
            max_turns=12, max_pictures=12, turn_tokens=32_768, any_source=True, resize=windows.within_area,
            stop=("</grounding>",), known_faults=("labels_count_turns",),
        ),
        ZoomProtocol(
            "pixel_reasoner", _prompt("pixel_reasoner", "system"),
            lambda question: f"{IMAGE}{question}{_prompt('pixel_reasoner', 'suffix')}",
            calls.pixel_reasoner_turn, windows.pixel_reasoner_window, _pixel_reasoner_observation,
            lambda error: _prompt("pixel_reasoner", "error").format(e=error),
            max_turns=5, max_pictures=16, turn_tokens=12 * 1024 - 200, any_source=True, crops_are_as_shown=True,
            resize=windows.ShownSize(28, 256 * 28**2, 5120 * 28**2),
            tool=("crop_image_normalized", "bbox_2d", "target_image"),
        ),
        ZoomProtocol(
            "chain_of_focus", focus["system"], lambda question: f"{IMAGE}Question: {question}{focus['suffix']}",
            calls.chain_of_focus_turn, windows.chain_of_focus_window, lambda crop: IMAGE + focus["suffix"], str,
            max_turns=6, max_pictures=6, turn_tokens=512, resize=windows.twice_as_large, on_failure="show_whole",
            tool=_ZOOM_TOOL,
        ),
        ZoomProtocol(
            "treevgr", tree["system"], lambda question: f"{IMAGE}{question}{tree['suffix']}",
            calls.treevgr_turn, windows.deepeyes_window, lambda crop: IMAGE, str,
            max_turns=1, max_pictures=1, turn_tokens=1024, prefill=tree["prefill"], boxes_in_text=calls.boxes_in_text,
        ),
        ZoomProtocol(
            "vigorl", vigorl["system"], lambda question: f"{IMAGE}{question}",
            calls.vigorl_turn, windows.point_window(182), lambda crop: vigorl["observation"], str,
            max_turns=5, max_pictures=5, turn_tokens=1024, resize=windows.to_square(672), goes_on=True,
            stop=("</tool_call>", "</answer>"), final_prefill=vigorl["final_prefill"],
            tool=("search_coordinate", "coordinate"),
        ),
        ZoomProtocol(
            "qwen3vl", _prompt("qwen3vl", "system"), lambda question: f"{IMAGE}{question}",
            calls.qwen3vl_turn, windows.qwen3vl_window, lambda crop: f"<tool_response>\n{IMAGE}\n</tool_response>",
            lambda error: f"<tool_response>\n{error}\n</tool_response>",
            max_turns=10, max_pictures=12, turn_tokens=8192, any_source=True, join="\n".join,
            no_source=lambda pictures: f"Error: Invalid input image {list(range(pictures))}",
            resize=windows.ShownSize(32, 256 * 32**2, 12_845_056), tool=(*_ZOOM_TOOL, "img_idx"),
        ),
    ]  # fmt: skip
    return {row.name: row for row in rows}


ZOOM_PROTOCOLS = _table()
