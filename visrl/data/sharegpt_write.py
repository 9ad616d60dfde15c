"""Samples and preferences as ShareGPT rows, and the entry of `dataset_info.json` that describes their file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from visrl.box import Box, BoxError, Size
from visrl.codecs import BOX_SPACES, BoxSpace
from visrl.data.dialogs import CHOSEN_CROP
from visrl.data.info import INFO, STEP_COLUMNS, DatasetEntry, read_values
from visrl.data.rows import RowFault
from visrl.data.viscot import need_answer, need_box
from visrl.manifest import hold
from visrl.prompts import IMAGE, answer_prompt, focus_prompt
from visrl.records import Picture, Preference, Sample, picture_json, write_text


def sft1_row(sample: Sample, space: BoxSpace, size: Size | None) -> dict[str, Any]:
    """Warm-up, round 1: image and question, answered with the box as three decimals in `space`."""
    box = need_box(sample)
    if space == "padded_square" and size is None:
        raise RowFault(
            "no_size", f"the padded square of {sample.image} needs its size: give --sizes FILE or --images DIR"
        )
    text = BOX_SPACES[space].format(box, size or (1, 1), size or (1, 1))
    return _row(sample.id, focus_prompt(sample.question), text, [Picture(sample.image)], size)


def sft2_row(sample: Sample, size: Size | None) -> dict[str, Any]:
    """Warm-up, round 2: image, question and crop, answered. The crop is named by its box, and cut at training time."""
    pictures = [Picture(sample.image), Picture(sample.image, need_box(sample))]
    return _row(sample.id, answer_prompt(sample.question), need_answer(sample), pictures, size)


def sft_row(sample: Sample, space: BoxSpace, size: Size | None) -> dict[str, Any]:
    """All that a sample holds in one row: round 2 where it has box and answer, else what there is."""
    if sample.box is None:
        return _row(sample.id, f"{IMAGE}\n{sample.question}", need_answer(sample), [Picture(sample.image)], size)
    return sft2_row(sample, size) if sample.answer else sft1_row(sample, space, size)


def ranking_row(preferences: Sequence[Preference]) -> dict[str, Any]:
    """The ranking row of one item: its box preference, its answer preference, or both.

    Raises:
        RowFault: more than one preference of a step, or of another look after a crop; a row has room for neither.
    """
    steps = {preference.step: preference for preference in preferences}
    first = steps.get("box") or preferences[0]
    if any(one.step == "box" and len(one.images) > 1 for one in preferences):
        raise RowFault("several_looks", f"{first.id} looks again after a crop; a ranking row has room for one box")
    if len(steps) != len(preferences):
        raise RowFault("duplicate", f"{first.id} has two preferences of one step; a ranking row holds one")
    row: dict[str, Any] = {
        "id": first.id,
        "images": [picture_json(replace(picture, size=None)) for picture in first.images],
        "conversations": [*_context(first), {"from": "human", "value": first.prompt}],
    }
    if first.images[0].size is not None:
        row["size"] = list(first.images[0].size)
    if len({(preference.weight, preference.context) for preference in preferences}) > 1:
        raise RowFault("form", f"the steps of {first.id} differ in weight or context; a ranking row has one of each")
    if first.weight != 1:
        row["weight"] = first.weight
    box, answer = steps.get("box"), steps.get("answer")
    if box is not None:
        row |= {"chosen_step": _gpt_message(box.chosen), "rejected_step": _gpt_message(box.rejected)}
    if answer is not None:
        row |= {"chosen": _gpt_message(answer.chosen), "rejected": _gpt_message(answer.rejected)}
    if box is not None and answer is not None:
        crop = next((picture.crop for picture in answer.images if picture.crop), None)
        if answer.prompt != f"{box.prompt}\n{IMAGE}" or crop is None:
            raise RowFault(
                "form", f"the answer step of {first.id} must ask as its box step does, with the crop after it"
            )
        if not _means(box.chosen, crop):
            row[CHOSEN_CROP] = crop.as_list()
    return row


def add_entry(file: str | os.PathLike[str], entry: dict[str, Any]) -> Path:
    """Describe `file` by `entry` in the `dataset_info.json` beside it, under its stem; other entries are kept.

    Raises:
        RecordError: there is one already that is no JSON object.
    """
    file = Path(file)
    path = file.parent / INFO
    with hold(path, wait_s=30):  # other conversions describe their files here, too
        info = read_values(path) if path.is_file() else {}
        info[file.stem] = entry
        return write_text(path, json.dumps(info, indent=2, ensure_ascii=False) + "\n")


def copied_entry(entry: DatasetEntry, file_name: str) -> dict[str, Any]:
    """The description of a file that holds the rows of `entry` as they stood."""
    described: dict[str, Any] = {"file_name": file_name, "formatting": entry.formatting}
    if entry.ranking:
        described["ranking"] = True
    if entry.box_space:
        described["box_space"] = entry.box_space
    named = {"columns": dict(entry.columns), "tags": dict(entry.tags)}
    return described | (named if entry.columns else {})


def entry_json(
    file_name: str, *, ranking: Sequence[str] = (), box_space: BoxSpace = "image", stage: int = 2
) -> dict[str, Any]:
    """The entry of one data set. At stage 1 of a step-level file, `chosen` and `rejected` are its boxes."""
    columns = {"messages": "conversations"}
    if stage == 1:
        columns |= {"chosen": "chosen_step", "rejected": "rejected_step"}
    else:
        columns |= {name: name for name in (*STEP_COLUMNS, "weight") if name in ranking}
    entry: dict[str, Any] = {
        "file_name": file_name,
        "formatting": "sharegpt",
        "columns": columns | {"images": "images"},
    }
    if ranking:
        entry["ranking"] = True
    return entry | {"box_space": box_space}


def _row(name: str, prompt: str, reply: str, pictures: list[Picture], size: Size | None) -> dict[str, Any]:
    """A row with its images as plain paths; the annotated size stands beside them, where other readers pass it by."""
    row = {
        "id": name,
        "images": [picture_json(picture) for picture in pictures],
        "conversations": [{"from": "human", "value": prompt}, _gpt_message(reply)],
    }
    return row if size is None else row | {"size": list(size)}


def _context(preference: Preference) -> list[dict[str, str]]:
    speakers = {"system": "system", "user": "human", "assistant": "gpt"}
    return [{"from": speakers[message.role], "value": message.text} for message in preference.context]


def _gpt_message(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def _means(text: str, crop: Box) -> bool:
    """Whether three decimals of `text` are the box `crop`, so that it need not be written beside them."""
    try:
        box = BOX_SPACES["image"].parse(text, (1, 1), (1, 1))
    except BoxError:
        return False
    return max(abs(a - b) for a, b in zip(box.as_list(), crop.as_list(), strict=True)) < 1e-9
