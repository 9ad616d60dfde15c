"""Rows of LLaMA-Factory, ms-swift and LLaVA in one form: who said what, about which images. Knows no record of ours.

Read are conversations as a list of messages (`conversations`, `messages`, or ms-swift's `conversation` of pairs), and
one question with its reply and earlier ones (`instruction`/`input`/`output`, `query`/`response`, each with `history`).
What a row holds and no record has a place for is refused by its name, or named in a note where leaving it out changes
neither question nor answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from visrl.data.info import STEP_COLUMNS, TAGS, DatasetEntry
from visrl.data.native import parse_pictures
from visrl.data.rows import RowFault, check_text, get_text
from visrl.prompts import IMAGE
from visrl.records import Picture

# Our own column: the chosen box in fractions, where its text is not three decimals (a family's own way of writing).
CHOSEN_CROP = "chosen_crop"
MESSAGES = ("messages", "conversations", "conversation")
_MEDIA_MARKS = ("<video>", "<audio>")
_OTHER_MEDIA = ("videos", "video", "audios", "audio")
# Keys of a message that say how much of it is learned, with the values that mean "all of it".
_LOSS = ("loss", "loss_weight", "loss_scale", "weight", "train")
_NEUTRAL = (None, True, 1)
_OWN = {"id", "size", "width", "height", "source", "dataset", "split", "objects", CHOSEN_CROP}
_SWIFT = {"rejected_response", "rejected_messages"}
Role = Literal["system", "user", "assistant"]
# Names of speakers in common use, for rows that no entry describes.
_USUAL_ROLES: dict[str, Role] = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
}  # fmt: skip


class Turn(NamedTuple):
    """One message."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Dialog:
    """A row: a system message (or ""), then user and assistant by turns, and the images in the order of their marks.

    `chosen` and `rejected` are two replies to the last turn, which is then the user's, and the `_step` ones two boxes
    that say where to look first.
    """

    turns: tuple[Turn, ...]
    pictures: tuple[Picture, ...]
    system: str = ""
    chosen: str | None = None
    rejected: str | None = None
    chosen_step: str | None = None
    rejected_step: str | None = None
    weight: float = 1.0
    notes: tuple[str, ...] = ()

    @property
    def is_ranking(self) -> bool:
        return self.rejected is not None or self.rejected_step is not None


def parse_dialog(raw: Any, entry: DatasetEntry) -> Dialog:
    """The dialog of a row.

    Raises:
        RowFault: the row's form, or what it holds and no record has a place for.
    """
    if not isinstance(raw, dict):
        raise RowFault("unparseable", f"a row must be a JSON object, this is {type(raw).__name__}")
    columns = _columns(raw, entry)
    pictures = _pictures(raw, columns)
    _refuse_columns(raw, columns)
    turns = _message_turns(raw, columns, entry) if "messages" in columns else _pair_turns(raw, columns)
    system, turns = _without_system(raw, columns, turns)
    weight = _weight(raw, columns)
    chosen, rejected, turns = _replies(raw, columns, entry, turns)
    steps = (_reply(raw, columns, entry, "chosen_step"), _reply(raw, columns, entry, "rejected_step"))
    dialog = Dialog(tuple(turns), pictures, system, chosen, rejected, *steps, weight, tuple(_notes(raw, columns)))
    _check_order(dialog, entry)
    return _with_marks(dialog)


def _refuse_columns(raw: dict[str, Any], columns: dict[str, str]) -> None:
    """Refuse columns that change what a row means: labels of single replies, tools, videos and sounds."""
    label = columns.get("kto_tag") or "kto_tag"
    for key in (label, "label"):
        if isinstance(raw.get(key), bool) or (key == label and raw.get(key) is not None):
            raise RowFault(
                "label",
                f"{key!r} says whether a reply is good: such rows are no examples to learn; "
                "give two replies to one question as chosen and rejected",
            )
    for key in (columns.get("videos", ""), columns.get("audios", ""), *_OTHER_MEDIA):
        if raw.get(key):
            raise RowFault("media", f"{key!r}: videos and sounds are not read, pictures are")
    for key in (columns.get("tools", ""), "tools"):
        if raw.get(key):
            raise RowFault("tools", f"{key!r}: calls of tools are not read")


def _columns(raw: dict[str, Any], entry: DatasetEntry) -> dict[str, str]:
    """Which of the row's columns holds what: as the entry says, or by the names in common use."""
    if entry.columns:
        columns = dict(entry.columns)
        if columns["images"] not in raw and "image" in raw:
            columns["images"] = "image"  # as LLaVA calls it
    else:
        columns = _usual_columns(raw)
        for key in ("system", "tools", "history", "weight"):
            columns[key] = key
        if entry.ranking or any(key in raw for key in STEP_COLUMNS):
            columns |= {key: key for key in STEP_COLUMNS if key in raw}
    if columns["images"] != "image" and raw.get(columns["images"]) and raw.get("image"):
        raise RowFault("unparseable", f"'image' beside {columns['images']!r}: only one of them can hold the pictures")
    return columns


def _usual_columns(raw: dict[str, Any]) -> dict[str, str]:
    images = {"images": "images" if "images" in raw or "image" not in raw else "image"}
    for name in MESSAGES:
        if name in raw:
            return {"messages": name} | images
    if "query" in raw:
        return {"prompt": "query", "query": "", "response": "response"} | images
    if "instruction" in raw:
        return {"prompt": "instruction", "query": "input", "response": "output"} | images
    raise RowFault(
        "unparseable",
        "a row needs conversations, messages, instruction and output, or query and response",
    )


def _pictures(raw: dict[str, Any], columns: dict[str, str]) -> tuple[Picture, ...]:
    value = raw.get(columns["images"])
    if value is None or value == [] or value == "":
        other = next((key for key in ("image", "images", "image_path", "img_path") if raw.get(key)), None)
        hint = f"; {other!r} may hold it: name it as the column of images in dataset_info.json" if other else ""
        raise RowFault("no_picture", f"the row has no picture{hint}")
    size = raw.get("size")
    if size is None and type(raw.get("width")) is int and type(raw.get("height")) is int:
        size = [raw["width"], raw["height"]]
    if isinstance(value, list):
        value = [_path(each) for each in value]
    return parse_pictures(value, size, columns["images"])


def _path(value: Any) -> Any:
    """An image that ms-swift and `datasets` write as an object of path and bytes, by its path."""
    if isinstance(value, dict) and set(value) <= {"path", "bytes"} and value.get("bytes") is None:
        return value.get("path")
    return value


# --- Turns ------------------------------------------------------------------------------------------------------------


def _message_turns(raw: dict[str, Any], columns: dict[str, str], entry: DatasetEntry) -> list[Turn]:
    key = columns["messages"]
    messages = raw.get(key)
    if not isinstance(messages, list) or not messages:
        raise RowFault("unparseable", f"{key!r} must be a list of messages")
    turns: list[Turn] = []
    for message in messages:
        if isinstance(message, dict) and set(message) == {"human", "assistant"}:  # ms-swift's pairs
            turns += [Turn("user", get_text(message, "human")), Turn("assistant", get_text(message, "assistant"))]
        else:
            turns.append(_message(message, entry, f"message {len(turns) + 1}"))
    return turns


def _message(message: Any, entry: DatasetEntry, where: str) -> Turn:
    """One message by the entry's tags, or by the names in common use where no entry says them."""
    tags, roles = entry.tags, _USUAL_ROLES
    if entry.columns:
        roles = _roles(tags["user_tag"], tags["assistant_tag"], tags["system_tag"])
    elif isinstance(message, dict) and "role" in message:
        tags = TAGS | {"role_tag": "role", "content_tag": "content"}
    speaker = get_text(message, tags["role_tag"])
    role = roles.get(speaker)
    if role is None:
        known = ", ".join(roles)
        raise RowFault("role", f"{where} is from {speaker[:40]!r}, and only turns of {known} are read")
    if len(message) > 2:
        _refuse_keys(message, where)
    return Turn(role, get_text(message, tags["content_tag"]))


@lru_cache(maxsize=64)
def _roles(user: str, assistant: str, system: str) -> dict[str, Role]:
    return {user: "user", assistant: "assistant", system: "system"}


def _refuse_keys(message: dict[str, Any], where: str) -> None:
    """Refuse keys beside role and content that change what a message means."""
    for key in ("tool_calls", "function_call"):
        if message.get(key):
            raise RowFault("tools", f"{key!r} in {where}: calls of tools are not read")
    for key in _LOSS:
        if message.get(key) not in _NEUTRAL:
            raise RowFault("weight", f"{key!r} in {where}: a reply is learned as a whole or not at all")


def _pair_turns(raw: dict[str, Any], columns: dict[str, str]) -> list[Turn]:
    """The turns of a row with one question and its reply, earlier ones first."""
    turns: list[Turn] = []
    history = raw.get(columns.get("history", ""))
    if history is not None and not isinstance(history, list):
        raise RowFault("unparseable", f"{columns['history']!r} must be a list of [question, reply]")
    for pair in history or []:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise RowFault("unparseable", f"{columns['history']!r} must be a list of [question, reply]")
        for text in pair:
            check_text(text, columns["history"])
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    prompt, more = get_text(raw, columns["prompt"]), raw.get(columns["query"])
    if more is not None and not isinstance(more, str):
        raise RowFault("unparseable", f"{columns['query']!r} must be a string")
    check_text(more or "", columns["query"])
    turns.append(Turn("user", f"{prompt}\n{more}" if more else prompt))
    is_ranking = "chosen" in columns and raw.get(columns["chosen"]) is not None
    if raw.get(columns["response"]) is not None and not is_ranking:
        turns.append(Turn("assistant", get_text(raw, columns["response"])))
    return turns


def _without_system(raw: dict[str, Any], columns: dict[str, str], turns: list[Turn]) -> tuple[str, list[Turn]]:
    """The system message, of the first turn or of its column, and the other turns."""
    column = columns.get("system", "")
    system = get_text(raw, column) if column and raw.get(column) is not None else ""
    if turns[0].role == "system":  # it goes before the column
        system, turns = turns[0].text, turns[1:]
    if IMAGE in system:
        raise RowFault("unparseable", f"the system message holds an {IMAGE} mark")
    return system, turns


# --- Two replies ------------------------------------------------------------------------------------------------------


def _replies(
    raw: dict[str, Any], columns: dict[str, str], entry: DatasetEntry, turns: list[Turn]
) -> tuple[str | None, str | None, list[Turn]]:
    """The chosen and the rejected reply, where there are two, and the turns before them."""
    chosen, rejected = _reply(raw, columns, entry, "chosen"), _reply(raw, columns, entry, "rejected")
    if (chosen is None) != (rejected is None):
        raise RowFault("unparseable", "a ranking needs a chosen and a rejected reply")
    other = next((key for key in sorted(_SWIFT) if raw.get(key) is not None), None)
    if other is None:
        return chosen, rejected, turns
    if chosen is not None or not turns or turns[-1].role != "assistant":
        raise RowFault("unparseable", f"beside {other!r} the conversation must end with the chosen reply")
    if len([key for key in _SWIFT if raw.get(key) is not None]) > 1:
        raise RowFault("unparseable", "'rejected_response' beside 'rejected_messages': only one can hold the reply")
    if raw.get("rejected_images") is not None and raw["rejected_images"] != raw.get(columns["images"]):
        raise RowFault("unparseable", "'rejected_images': both replies must be about the same pictures")
    if other == "rejected_response":
        return turns[-1].text, get_text(raw, other), turns[:-1]
    messages = raw[other]
    if not isinstance(messages, list) or not messages:
        raise RowFault("unparseable", f"{other!r} must be a list of messages")
    worse = [_message(message, entry, f"message {number}") for number, message in enumerate(messages, start=1)]
    worse = worse[1:] if worse[0].role == "system" else worse
    if worse[:-1] != turns[:-1] or worse[-1].role != "assistant":
        raise RowFault("unparseable", f"{other!r} must differ from the messages in the last reply only")
    return turns[-1].text, worse[-1].text, turns[:-1]


def _reply(raw: dict[str, Any], columns: dict[str, str], entry: DatasetEntry, column: str) -> str | None:
    """One of two replies: a string, a message, or a list of one message."""
    key = columns.get(column, "")
    value = raw.get(key) if key else None
    if value is None or isinstance(value, str):
        check_text(value or "", column)
        return value
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    turn = _message(value, entry, repr(key))
    if turn.role != "assistant":
        raise RowFault("role", f"{key!r} is from the {turn.role}; a reply is the assistant's")
    return turn.text


def _weight(raw: dict[str, Any], columns: dict[str, str]) -> float:
    key = columns.get("weight", "")
    weight = raw.get(key) if key else None
    if weight is None:
        return 1.0
    if type(weight) not in (int, float) or not 0 <= weight < 1e6:
        raise RowFault("unparseable", f"{key!r} must be a number from 0, not {str(weight)[:60]}")
    return weight


# --- What must hold, and what is left out -----------------------------------------------------------------------------


def _check_order(dialog: Dialog, entry: DatasetEntry) -> None:
    """User and assistant take turns, the user first; the last turn is a reply, or what two replies answer."""
    if (dialog.chosen_step is None) != (dialog.rejected_step is None):
        raise RowFault("unparseable", "a ranking of boxes needs both chosen_step and rejected_step")
    if entry.ranking and not dialog.is_ranking:
        raise RowFault("unparseable", "a ranking needs a chosen and a rejected reply")
    for number, turn in enumerate(dialog.turns):
        wanted = ("user", "assistant")[number % 2]
        if turn.role != wanted:
            raise RowFault("role", f"turn {number + 1} must be the {wanted}'s, it is the {turn.role}'s")
        if mark := next((mark for mark in _MEDIA_MARKS if mark in turn.text), None):
            raise RowFault(
                "media", f"turn {number + 1} holds a {mark} mark: videos and sounds are not read, pictures are"
            )
        if turn.role == "assistant" and IMAGE in turn.text:
            raise RowFault("unparseable", f"the reply in turn {number + 1} holds an {IMAGE} mark")
    if not dialog.turns:
        raise RowFault("unparseable", "a row must hold a question and an answer")
    if dialog.is_ranking and len(dialog.turns) % 2 == 0:
        raise RowFault("role", "two replies answer a question: the last turn must be the user's, it is the assistant's")
    if not dialog.is_ranking and len(dialog.turns) % 2 == 1:
        raise RowFault("no_answer", "the last question has no answer")


def _with_marks(dialog: Dialog) -> Dialog:
    """The dialog with one mark per image; a single image without a mark stands before the first question."""
    marks = sum(turn.text.count(IMAGE) for turn in dialog.turns)
    if marks == len(dialog.pictures):
        return dialog
    if marks or len(dialog.pictures) > 1:
        raise RowFault("unparseable", f"{marks} {IMAGE} marks but {len(dialog.pictures)} pictures")
    first, *others = dialog.turns
    turns = (Turn(first.role, f"{IMAGE}\n{first.text}"), *others)
    return replace(dialog, turns=turns)


def _notes(raw: dict[str, Any], columns: dict[str, str]) -> Iterator[str]:
    """What is left out, a sentence each; sentences of many rows are equal, so that they can be counted."""
    known = {*columns.values(), *_OWN, *_SWIFT, *_OTHER_MEDIA, "tools", "rejected_images"}
    if "chosen" in columns or "chosen_step" in columns:
        known |= set(STEP_COLUMNS)  # a stage uses some of them
    for key in sorted(set(raw) - known):
        if raw[key] is not None:
            yield f"the column {key[:60]!r} has no meaning here and is passed by"
