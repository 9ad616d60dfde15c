"""V*Bench (Wu and Xie 2023, arXiv 2312.14135): its two distributed forms and its readings.

A folder (`direct_attributes/`, `relative_position/`) has X.jpg and X.json with boxes, the right option first; the list
`test_questions.jsonl` beside it has the same questions as texts, letters spread, without boxes. The authors' own score
takes the option of the least loss, without a reply, and is no reading here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from visrl.box import Box, Corners, enclosing
from visrl.data.rows import RowFault, four_numbers
from visrl.evaluate import wordings
from visrl.evaluate.choices import MAX_OPTIONS, ChoiceQuestion
from visrl.evaluate.questions import BenchmarkFiles, BenchmarkQuestion, boxes_in
from visrl.evaluate.readings import OUR_READING, BenchmarkReading, ruled
from visrl.evaluate.row_files import Row, cell, read_object, read_questions, without_marks
from visrl.images import image_path
from visrl.records import RecordError, Sample

ORIGIN = "https://huggingface.co/datasets/craigwu/vstar_bench"
PARTS: dict[str, int | None] = {"direct_attributes": 115, "relative_position": 76}
READINGS: dict[str, BenchmarkReading] = {
    "published": ruled(wordings.vstar, "deepeyes"),
    "vlmevalkit": ruled(wordings.vlmevalkit_choice, "vlmevalkit"),
    "lmms-eval": ruled(wordings.lmms_vstar, "lmms-eval-vstar", tokens=16),
    "ours": OUR_READING,
}
_PICTURES = (".jpg", ".jpeg", ".png", ".webp")
_OPTION = re.compile(r"^\(([A-F])\) ?(.*)$", re.M)


def questions(files: BenchmarkFiles) -> Mapping[str, Iterator[BenchmarkQuestion]]:
    """The questions of the folder, or of the list where `dataset` names the file.

    Raises:
        RecordError: parts of the folder that are not there, all named.
    """
    path = Path(files.dataset)
    if path.is_file():
        return {"": read_questions(path, lambda row, number: _from_list(row, path.parent, files))}
    missing = [name for name in files.names if not (path / name).is_dir()]
    if missing:
        raise RecordError(f"{path} lacks the folders {', '.join(missing)}; they come from {files.origin}")
    return {name: _from_folder(path, name, files) for name in files.names}


def _from_folder(folder: Path, part: str, files: BenchmarkFiles) -> Iterator[BenchmarkQuestion]:
    notes = sorted((folder / part).glob("*.json"))
    if not notes:
        raise RecordError(f"{folder / part} holds no X.json beside pictures; they come from {files.origin}")
    for path in notes:
        try:
            yield without_marks(_from_note(read_object(path), path, folder, files))
        except RowFault as fault:
            raise RecordError(f"{path}: {fault}; a benchmark must be whole: mend or replace it") from fault


def _from_note(row: Row, path: Path, folder: Path, files: BenchmarkFiles) -> BenchmarkQuestion:
    picture = next((path.with_suffix(end) for end in _PICTURES if path.with_suffix(end).is_file()), None)
    name = str((picture or path.with_suffix(".jpg")).relative_to(folder))
    options = row.get("options")
    if not isinstance(options, list) or not 2 <= len(options) <= MAX_OPTIONS:
        raise RowFault("unparseable", f"'options' must be a list of 2 to {MAX_OPTIONS}, it is {str(options)[:60]}")
    texts = tuple(cell({"options": option}, "options") for option in options)
    ref = files.picture(folder, name)
    truths = _corners(row)
    return BenchmarkQuestion(
        Sample(path.stem, ref, cell(row, "question"), "", _box(truths, ref, files), path.parent.name),
        choice=ChoiceQuestion(cell(row, "question"), texts, 0),
        truths=truths,
    )


def _from_list(row: Row, folder: Path, files: BenchmarkFiles) -> BenchmarkQuestion:
    text, letter, name = cell(row, "text"), cell(row, "label").strip(), cell(row, "image")
    found = _OPTION.findall(text)
    letters = [one for one, _ in found]
    if len(found) < 2 or letters != [chr(65 + place) for place in range(len(found))]:
        raise RowFault("unparseable", "the text holds no lines (A) …, (B) … in order")
    if letter not in letters:
        raise RowFault("unparseable", f"the label {letter[:20]!r} is none of its options {', '.join(letters)}")
    stem = text[: next(_OPTION.finditer(text)).start()].rstrip()
    ref = files.picture(folder, name)
    path = folder / name
    note = image_path(str(path.parent / f"{path.stem}.json"))  # None, too, for a name that no file system takes
    truths = _corners(read_object(note)) if note else ()
    return BenchmarkQuestion(
        Sample(cell(row, "question_id"), ref, stem, letter, _box(truths, ref, files), cell(row, "category")),
        choice=ChoiceQuestion(stem, tuple(option.strip() for _, option in found), letters.index(letter)),
        text=text,
        truths=truths,
    )


def _corners(row: Row) -> tuple[Corners, ...]:
    """The boxes of a note, which have left, top, width and height in pixels, as corners."""
    given = row.get("bbox")
    if given is None:
        return ()
    if not isinstance(given, list):
        raise RowFault("unparseable", f"'bbox' must be a list of boxes, it is {str(given)[:60]}")
    found = []
    for one in given:
        x, y, width, height = four_numbers(one, "bbox")
        found.append((x, y, x + width, y + height))
    return tuple(found)


def _box(truths: tuple[Corners, ...], ref: str, files: BenchmarkFiles) -> Box | None:
    boxes = boxes_in(truths, ref, files.image_root)
    return enclosing(boxes) if boxes else None
