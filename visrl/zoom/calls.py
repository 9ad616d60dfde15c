"""What a turn of a model asks for: to look somewhere, to answer, or neither. Text alone; no picture is known here.

Each reader is one protocol's own rule, of which the first, the last or every call of a turn counts, and how much of
broken JSON is forgiven.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from visrl.box import Corners
from visrl.replies import spoken
from visrl.zoom.written import (
    LONGEST_CALL,
    CallError,
    between,
    json_of,
    json_or_literal,
    label_of,
    literal_of,
    named,
    numbers_of,
    picture_number,
)

_GROUNDING_BOX = '<grounding>{"bbox_2d": '
_GROUNDING_SOURCE = re.compile('"source": [\',"]')
_GROUNDING_END = re.compile("[',\"]}</grounding>")
_FOUR = re.compile(r"\[(\d{1,15}),(\d{1,15}),(\d{1,15}),(\d{1,15})\]")  # published without a bound; stops at 4,301
# Tokens of some models that mark calls and thoughts inside a turn: text to everybody, and never an end of a turn.
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")


@dataclass(frozen=True, slots=True)
class ZoomCall:
    """A wish to see a part: `numbers` as they were written (four of a box, two of a point), `source` the number of the
    picture that they lie in (0 the whole one), `label` what is said to be there."""

    numbers: tuple[float, ...]
    source: int = 0
    label: str | None = None


@dataclass(frozen=True, slots=True)
class BadCall:
    """A call that cannot be followed, in the words that the protocol replies with."""

    error: str


@dataclass(frozen=True, slots=True)
class ZoomTurn:
    """What one turn asks for. With an `answer` the episode ends, whatever else the turn holds."""

    calls: tuple[ZoomCall | BadCall, ...] = ()
    answer: str | None = None


def answer_of(text: str) -> str | None:
    """What stands in the first `<answer>` of a turn, or None."""
    found = between(text, "answer")
    return found[0].strip() if found else None


def boxes_in_text(text: str) -> list[Corners]:
    """The boxes that TreeVGR writes as it thinks, as TreeBench's script reads them: `<box>[x0,y0,x1,y1]</box>` of whole
    numbers without spaces, corners in order."""
    boxes: list[Corners] = []
    for written in between(text, "box"):
        if four := _FOUR.match(written.strip()):
            x0, y0, x1, y1 = map(float, four.groups())
            if x0 < x1 and y0 < y1:
                boxes.append((x0, y0, x1, y1))
    return boxes


# --- DeepEyes ---------------------------------------------------------------------------------------------------------


def deepeyes_turn(text: str) -> ZoomTurn:
    """The last call of a turn counts; an answer comes before any call."""
    answer = answer_of(text)
    found = between(text, "tool_call")
    if answer is not None or not found:
        return ZoomTurn(answer=answer)
    return ZoomTurn((_deepeyes_call(found[-1].strip()),))


def _deepeyes_call(said: str) -> ZoomCall | BadCall:
    try:
        name, arguments = named(json_of(said))
    except ValueError as error:
        return BadCall(f"Error: Invalid tool call format: {said}. Error: {error}")
    if name != "image_zoom_in_tool":
        return BadCall(f"Error: Unknown tool name: {name}")
    try:
        return ZoomCall(numbers_of(arguments.get("bbox_2d"), 4), label=label_of(arguments))
    except CallError:
        return BadCall("Error: ZOOM IN ARGUMENTS ARE INVALID")


# --- Mini-o3 ----------------------------------------------------------------------------------------------------------


def mini_o3_turn(text: str) -> ZoomTurn:
    """The last `<grounding>` of a turn counts; only a turn that ends with `</answer>` is an answer."""
    stripped = text.strip()
    answer = answer_of(stripped) if stripped.endswith("</answer>") else None
    if answer is not None or "<grounding>" not in text:
        return ZoomTurn(answer=answer)
    try:
        numbers, source = grounding_of(text[-LONGEST_CALL:])
        return ZoomTurn((ZoomCall(numbers_of(literal_of(numbers), 4), _mini_o3_source(source)),))
    except ValueError as error:
        return ZoomTurn((BadCall(str(error)),))


def grounding_of(text: str) -> tuple[str, str]:
    """The text of the box and of the source in the last `<grounding>`: what its protocol's greedy pattern finds, by
    looking from the end, which takes no longer on text that is made to be slow."""
    ends = [found.start() for found in _GROUNDING_END.finditer(text)]
    start = text.rfind(_GROUNDING_BOX)
    while start >= 0 and ends:
        begin = start + len(_GROUNDING_BOX)
        sources = [found for found in _GROUNDING_SOURCE.finditer(text, begin) if found.end() <= ends[-1]]
        comma = text.rfind(",", begin, sources[-1].start()) if sources else -1
        if comma >= 0:
            return text[begin:comma], text[sources[-1].end() : ends[-1]]
        start = text.rfind(_GROUNDING_BOX, 0, start)
    raise CallError("no box and source could be read between <grounding> and </grounding>")


def _mini_o3_source(said: str) -> int:
    if said == "original_image":
        return 0
    found = re.fullmatch(r"observation_([0-9]{1,4})", said)
    if found is None:
        raise CallError(f"source {said[:40]!r} is neither 'original_image' nor 'observation_i'")
    return int(found.group(1))


# --- Pixel-Reasoner ---------------------------------------------------------------------------------------------------


def pixel_reasoner_turn(text: str) -> ZoomTurn:
    r"""A turn that ends with `</tool_call>` asks, by its last call; every other one answers, in `\boxed{}`."""
    if not text.rstrip().endswith("</tool_call>"):
        return ZoomTurn(answer=_boxed(text))
    found = between(text, "tool_call")
    if not found:
        return ZoomTurn((BadCall("no <tool_call> before </tool_call>"),))
    try:
        name, arguments = named(json_of(found[-1].strip()))
        if name not in ("crop_image_normalized", "crop_image"):  # the prompt says one name, the schema the other
            raise CallError(f"unknown function {name}")
        source = picture_number(arguments.get("target_image", 1), "target_image") - 1
        return ZoomTurn((ZoomCall(numbers_of(arguments.get("bbox_2d"), 4), source),))
    except ValueError as error:
        return ZoomTurn((BadCall(str(error)),))


def _boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{…}`, braces inside it counted, or None."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place].strip()
    return None


# --- Chain-of-Focus, Qwen3-VL, TreeVGR, ViGoRL ------------------------------------------------------------------------


def chain_of_focus_turn(text: str) -> ZoomTurn:
    """The first call counts. What cannot be read is answered with the whole picture, so its words are never said."""
    answer = answer_of(text)
    found = between(text, "tool_call")
    if answer is not None or not found:
        return ZoomTurn(answer=answer)
    try:
        name, arguments = named(json_of(found[0].strip()))
        if name != "image_zoom_in_tool":
            raise CallError(f"unknown function {name}")
        return ZoomTurn((ZoomCall(numbers_of(arguments.get("bbox_2d"), 4), label=label_of(arguments)),))
    except ValueError as error:
        return ZoomTurn((BadCall(str(error)),))


def qwen3vl_turn(text: str) -> ZoomTurn:
    """Every call of a turn counts; a turn without one is the answer, in `<answer>` where it has such tags. What is
    thought aloud is neither."""
    said = spoken(text)
    found = between(said, "tool_call")
    if not found:
        tagged = answer_of(said)
        return ZoomTurn(answer=said.strip() if tagged is None else tagged)
    return ZoomTurn(tuple(_qwen3vl_call(said.strip()) for said in found))


def _qwen3vl_call(said: str) -> ZoomCall | BadCall:
    try:
        name, arguments = named(json_or_literal(said))
        if name != "image_zoom_in_tool":
            raise CallError(f"Tool {name} does not exists.")
        missing = [key for key in ("bbox_2d", "label", "img_idx") if key not in arguments]
        if missing:
            raise CallError(f"{missing[0]!r} is a required property")
        source = picture_number(arguments["img_idx"], "img_idx")
        return ZoomCall(numbers_of(arguments["bbox_2d"], 4), source, label_of(arguments))
    except ValueError as error:
        return BadCall(f"Tool Execution Error {error}")


def treevgr_turn(text: str) -> ZoomTurn:
    """One turn: the answer is in its tags, or else all of it."""
    tagged = answer_of(text)
    return ZoomTurn(answer=text.strip() if tagged is None else tagged)


def vigorl_turn(text: str) -> ZoomTurn:
    """The last call of a turn counts; one that cannot be read counts for nothing, and the model goes on."""
    answer = answer_of(text)
    if answer is not None:
        return ZoomTurn(answer=answer)
    for said in reversed(between(text, "tool_call")):
        try:
            name, arguments = named(json_of(said.strip()))
            if name == "search_coordinate":
                return ZoomTurn((ZoomCall(numbers_of(arguments.get("coordinate"), 2)),))
        except ValueError:
            continue
    return ZoomTurn()
