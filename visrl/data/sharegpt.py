"""Rows of other tools as records of ours: LLaMA-Factory's, ms-swift's and LLaVA's SFT sets and rankings.

Each question of a conversation about one image is a sample of its own; a ranking is a preference over the last reply,
with the conversation before it as its prompt. How a row is read is `dialogs`' matter, what an entry says `info`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from visrl.box import Box, BoxError, Size
from visrl.codecs import BOX_SPACES, BoxSpace
from visrl.data.dialogs import CHOSEN_CROP, MESSAGES, Dialog, Turn, parse_dialog
from visrl.data.grounding import filled_turns
from visrl.data.info import DatasetEntry
from visrl.data.native import check_shown, row_name
from visrl.data.rows import SAME, DataRow, Parsed, RowFault, four_numbers, parsed_row, read_rows
from visrl.data.sizes import Sizes
from visrl.data.viscot import without_marks, without_sentence
from visrl.prompts import IMAGE
from visrl.records import Message, Picture, Preference, RecordError, Sample, Step

_ALONE = "each question of several turns is a sample of its own, asked without the turns before it"
_SYSTEM = "the system message is left out: a sample is asked with the prompt of visrl alone"


def read_sharegpt(entry: DatasetEntry, sizes: Sizes, box_space: BoxSpace | None = None) -> Iterator[DataRow]:
    """The rows of a data set; rankings become preferences, the others samples.

    Raises:
        RecordError: the file is not there, damaged, or of a kind that is not read.
    """
    space = entry.box_space or box_space

    def parse(raw: Any, number: int) -> Parsed:
        return parse_sharegpt(raw, number, entry, sizes, space)

    if entry.path.suffix == ".parquet" or entry.path.is_dir():
        from visrl.data.hf import raw_rows

        rows: Iterable[DataRow] = (parsed_row(raw, n, parse) for n, raw in enumerate(raw_rows(entry.path), start=1))
    elif entry.path.suffix in (".csv", ".tsv", ".arrow", ".txt"):
        raise RecordError(
            f"{entry.path}: {entry.path.suffix} files are not read; write it as .json, .jsonl or .parquet"
        )
    else:
        rows = read_rows(entry.path, parse)
    yield from rows


def parse_sharegpt(
    raw: Any, number: int, entry: DatasetEntry, sizes: Sizes, box_space: BoxSpace | None = None
) -> Parsed:
    """The records of one row: a sample for each question, one preference, or the two preferences of a step-level item.

    Raises:
        RowFault, BoxError: the row's form, what no record has a place for, or a chosen box that is none.
    """
    dialog = parse_dialog(raw, entry)
    name = row_name(raw, f"{entry.name}/row-{number}")
    turns, boxes = filled_turns(dialog, raw.get("objects"), sizes)
    if dialog.is_ranking:
        pairs = ((dialog.chosen, dialog.rejected), (dialog.chosen_step, dialog.rejected_step))
        same = any(chosen is not None and chosen == rejected for chosen, rejected in pairs)
        return Parsed(_preferences(raw, name, dialog, sizes, box_space), (*dialog.notes, *[SAME] * same))
    if dialog.weight != 1:
        raise RowFault("weight", "'weight' is read in rankings; every sample counts the same")
    samples = list(_samples(name, turns, dialog.pictures, boxes, entry, sizes, box_space, raw))
    notes = (*dialog.notes, *[_SYSTEM] * bool(dialog.system), *[_ALONE] * (len(samples) > 1))
    return Parsed(tuple(samples), notes)


def read_box(text: str, picture: Picture, sizes: Sizes, space: BoxSpace) -> Box:
    """The box that a three-decimal text means in `space`; the padded square needs the image's size."""
    size: Size = (picture.size or sizes.of(picture.ref)) if space == "padded_square" else (1, 1)
    return BOX_SPACES[space].parse(text, size, size)


# --- Samples ----------------------------------------------------------------------------------------------------------


def _samples(
    name: str, turns: tuple[Turn, ...], pictures: tuple[Picture, ...], boxes: dict[int, Box], entry: DatasetEntry,
    sizes: Sizes, space: BoxSpace | None, raw: dict[str, Any],
) -> Iterator[Sample]:  # fmt: skip
    """A sample for each question. A crop shown after a box, or beside the image, is the box of its question."""
    wholes, shown = _wholes(turns, pictures)
    several = sum(1 for place in range(0, len(turns), 2) if not _continues(turns, shown, place)) > 1
    # The conversation is not kept with each of its questions: a long one would be written as often as it has turns.
    kept = {key: value for key, value in raw.items() if key not in MESSAGES} if several else raw
    for place in range(0, len(turns), 2):
        if _continues(turns, shown, place):
            continue
        asked, said, whole = turns[place].text, turns[place + 1].text, wholes[place]
        box = next((picture.crop for picture in shown[place] if picture.crop), None) or boxes.get(place + 1)
        answer = "" if place + 1 in boxes else said
        prompt = without_marks(asked)
        question = without_sentence(prompt)
        if box is None and (box := _box_reply(said, question != prompt, whole, sizes, space)) is not None:
            answer = ""
        if not answer and place + 2 < len(turns) and _continues(turns, shown, place + 2):
            crop = next((picture.crop for picture in shown[place + 2] if picture.crop), None)
            box, answer = crop or box, turns[place + 3].text
        own = f"{name}/{place // 2 + 1}" if several else name
        if box is None and not answer.strip():
            raise RowFault("no_answer", f"the reply in turn {place + 2} is empty")
        if not question.strip():
            raise RowFault("unparseable", f"turn {place + 1} holds no question")
        yield Sample(own, whole.ref, question, answer, box, entry.name, kept, whole.size)


def _continues(turns: tuple[Turn, ...], shown: list[tuple[Picture, ...]], place: int) -> bool:
    """Whether the question at `place` is the one before it again, now with the crop of the box that it was answered
    with: Visual-CoT's second round."""
    if place == 0:
        return False
    return any(picture.crop for picture in shown[place]) or not without_marks(turns[place].text).strip()


def _wholes(turns: tuple[Turn, ...], pictures: tuple[Picture, ...]) -> tuple[list[Picture], list[tuple[Picture, ...]]]:
    """For each turn the image that its question is about, and the images that it shows.

    Raises:
        RowFault: a question about several images, or one that may be about another one's.
    """
    left = list(pictures)
    shown = []
    for turn in turns:
        count = turn.text.count(IMAGE)
        shown.append(tuple(left[:count]))
        del left[:count]
    wholes: list[Picture] = []
    for place, seen in enumerate(shown):
        own = [picture for picture in seen if picture.crop is None]
        if len(own) > 1:
            raise RowFault("several_pictures", f"turn {place + 1} shows {len(own)} pictures; a sample is about one")
        wholes.append(own[0] if own else wholes[-1] if wholes else seen[0] if seen else pictures[0])
        if any(picture.ref != wholes[-1].ref for picture in seen):
            raise RowFault("several_pictures", f"turn {place + 1} shows a crop of another picture than its own")
    if wholes[0].crop is not None:
        raise RowFault("several_pictures", "the first picture is a crop; the whole picture goes before it")
    if len({whole.ref for whole in wholes}) > 1:
        without = [place for place in range(0, len(turns), 2) if not any(p.crop is None for p in shown[place])]
        if without:
            raise RowFault(
                "several_pictures",
                f"turn {without[0] + 1} may be about any of the pictures before it; a sample is about one",
            )
    return wholes, shown


def _box_reply(said: str, asked: bool, whole: Picture, sizes: Sizes, space: BoxSpace | None) -> Box | None:
    """The box that a reply is: the question asks for one in our words (`asked`), or the set says what its boxes are and
    the reply is nothing else.

    Raises:
        RowFault: nothing says what the box is a fraction of, or the image's size is needed and not known.
        BoxError: a box is asked for, and the reply is none.
    """
    if space is None:
        if asked and _image_box(said) is not None:
            raise RowFault(
                "no_box_space",
                "the question asks for a box, and nothing says what its numbers are fractions of: "
                'give "box_space" in dataset_info.json, or --box-space image or padded_square',
            )
        return None
    if asked:
        return read_box(said, whole, sizes, space)
    shown = said.strip()
    box = _image_box(said) if shown.startswith("[") and shown.endswith("]") else None
    return box if box is None or space == "image" else read_box(said, whole, sizes, space)


# --- Preferences ------------------------------------------------------------------------------------------------------


def _preferences(
    raw: dict[str, Any], name: str, dialog: Dialog, sizes: Sizes, space: BoxSpace | None
) -> tuple[Preference, ...]:
    """The preferences of a ranking row. Boxes with no named `box_space` are of the image, as the authors crop them."""
    *before, last = dialog.turns
    said = [*[Turn("system", dialog.system)] * bool(dialog.system), *before]
    context = tuple(Message(turn.role, turn.text) for turn in said)
    whole, pictures, prompt, weight = dialog.pictures[0], dialog.pictures, last.text, dialog.weight
    rows = []
    if dialog.chosen_step is not None and dialog.rejected_step is not None:
        if len(pictures) > 1:
            raise RowFault("several_pictures", "a step-level item shows one picture: the crop is the chosen box's")
        boxes = (dialog.chosen_step, dialog.rejected_step)
        rows.append(Preference(name, "box", prompt, pictures, *boxes, weight, context))
    if dialog.chosen is not None and dialog.rejected is not None:
        step: Step = "box" if not rows and _is_box(dialog.chosen) and _is_box(dialog.rejected) else "answer"
        if dialog.chosen_step is not None:
            # Both answers see the crop of the chosen box, as in the objective of stage 2.
            given = raw.get(CHOSEN_CROP)
            crop = Box(*four_numbers(given, CHOSEN_CROP)) if given else None
            crop = crop or read_box(dialog.chosen_step, whole, sizes, space or "image")
            prompt, pictures = f"{prompt}\n{IMAGE}", (whole, Picture(whole.ref, crop, whole.size))
        rows.append(Preference(name, step, prompt, pictures, dialog.chosen, dialog.rejected, weight, context))
    for row in rows:
        check_shown("\n".join([*(message.text for message in context), row.prompt]), row.images)
    return tuple(rows)


def _is_box(text: str) -> bool:
    return _image_box(text) is not None


def _image_box(text: str) -> Box | None:
    """The box that three decimals mean as fractions of the image; None where they are none."""
    try:
        return BOX_SPACES["image"].parse(text, (1, 1), (1, 1))
    except BoxError:
        return None
