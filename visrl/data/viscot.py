"""Visual-CoT: training and benchmark JSON, metadata JSONL and detection JSONL, in and out. Knows no other format.

Three versions of one box occur: floats (detection, metadata), integers cut off after `###`, and three-decimal text in
the padded square. They must agree within what cutting and rounding explain, and a row is bad where any of them is.
"""

from __future__ import annotations

import re
from typing import Any

from visrl.box import Box, BoxError, BoxFault, Corners, Size, corner_fault, enclosing
from visrl.codecs import BOX_SPACES
from visrl.data.rows import RowFault, check_text, four_numbers, get_size, get_text
from visrl.data.sizes import FOLDERS, Sizes, viscot_path
from visrl.prompts import BOX_SENTENCE, FOCUS_SENTENCE, IMAGE
from visrl.records import Sample

_PIXEL = r"\s*(-?[0-9]{1,9}(?:\.[0-9]{1,18})?)\s*"
_PIXELS = re.compile(rf"\[{_PIXEL},{_PIXEL},{_PIXEL},{_PIXEL}\]")
# Marks of images: before a text with a line break or blanks after each, after it with blanks before, and inside it.
_MARK_FIRST = re.compile(rf"\A\s*(?:{IMAGE}(?:\r?\n|[ \t]*))+")
_MARK_LAST = re.compile(rf"(?:\s*{IMAGE})+\s*\Z")
_MARK_INSIDE = re.compile(IMAGE)
_TEXT = BOX_SPACES["padded_square"]
_HALF_DIGIT = 0.0005  # what rounding to three decimals may move a corner, in padded-square fractions

_SPEAKERS = ["human", "gpt", "human", "gpt"]


def parse_viscot(raw: Any, number: int, sizes: Sizes, boxes: bool = True) -> tuple[Sample]:
    """The sample of a row of training or benchmark JSON; without `boxes` its box is passed by, right or wrong.

    Raises:
        RowFault, BoxError: the row's form, its box, or three versions of the box that disagree.
    """
    ref, pixels = _image_and_pixels(raw)
    question, box_text, answer = _turns(raw)
    dataset = raw.get("dataset")
    source = dataset if isinstance(dataset, str) else ""
    name = sample_id(source or "viscot", raw, number)
    if not boxes:
        return (Sample(name, ref, question, answer, None, source, raw, sizes.annotated(ref)),)
    exact = _untruncated(raw, ref, pixels, sizes)
    _check_form(exact)
    size = sizes.of(ref)
    if sizes.annotated(ref) is None and not _fits(box_text, pixels, size) and _fits(box_text, pixels, size[::-1]):
        # Only the image says its size, and its EXIF tag turns it: text and pixels were made the other way up.
        size = size[::-1]
    _check_inside(exact, size)
    _check_inside(pixels, size)
    if not _agree(box_text, pixels, size):
        raise RowFault("disagree", f"the text {box_text} is not the pixels {list(pixels)} of {size[0]} × {size[1]}")
    return (Sample(name, ref, question, answer, Box.from_pixels(exact, size), source, raw, size),)


def parse_meta(raw: Any, number: int, boxes: bool = True) -> tuple[Sample]:
    """The sample of a row of per-data-set metadata JSONL; several boxes become their enclosing box."""
    source = get_text(raw, "dataset")
    question, answer = get_text(raw, "question"), get_text(raw, "answer")
    ref = viscot_path(source, get_text(raw, "image"))
    size = get_size(raw)
    corners = raw.get("bboxs")
    if boxes and not (isinstance(corners, list) and corners):
        raise RowFault("unparseable", "'bboxs' must be a list of boxes")
    box = enclosing([_pixel_box(four_numbers(each, "bboxs"), size) for each in corners]) if boxes else None
    return (Sample(sample_id(source, raw, number), ref, question, answer, box, source, raw, size),)


def parse_detection(raw: Any, number: int) -> tuple[Sample]:
    """The sample of a row of detection JSONL: a question and its box, without an answer."""
    ref, question = get_text(raw, "img_path"), get_text(raw, "expression")
    size = get_size(raw)
    box = _pixel_box(four_numbers(raw.get("bbox"), "bbox"), size)
    parts = ref.split("/")
    source = parts[1] if len(parts) > 2 and parts[0] == "cot" else ""
    return (Sample(sample_id(source or "detection", raw, number), ref, question, "", box, source, raw, size),)


def viscot_row(sample: Sample, size: Size, number: int) -> dict[str, Any]:
    """The row of training JSON that says what `sample` says. Pixels are cut off to integers, as published."""
    box = need_box(sample)
    whole = [int(value + 1e-6) for value in box.to_pixels(size)]
    return {
        "dataset": sample.source,
        "split": split_of(sample),
        "question_id": number_of(sample, number),
        "image": [sample.image, f"{sample.image}###{whole}"],
        "conversations": [
            {"from": "human", "value": f"{IMAGE}\n{sample.question} {BOX_SENTENCE}"},
            {"from": "gpt", "value": _TEXT.format(box, size, size)},
            {"from": "human", "value": IMAGE},
            {"from": "gpt", "value": need_answer(sample)},
        ],
    }


def meta_row(sample: Sample, size: Size, number: int) -> dict[str, Any]:
    """The row of metadata JSONL that says what `sample` says."""
    folder = f"cot/{FOLDERS.get(sample.source, sample.source)}/"
    return {
        "question": sample.question,
        "answer": need_answer(sample),
        "image": sample.image.removeprefix(folder),
        "width": size[0],
        "height": size[1],
        "bboxs": [pixel_list(need_box(sample), size)],
        "dataset": sample.source,
        "split": split_of(sample),
    }


def detection_row(sample: Sample, size: Size, number: int) -> dict[str, Any]:
    """The row of detection JSONL that says what `sample` says; its answer has no place there."""
    return {
        "img_path": sample.image,
        "expression": sample.question,
        "bbox": pixel_list(need_box(sample), size),
        "height": size[1],
        "width": size[0],
        "question_id": number_of(sample, number),
        "split": split_of(sample),
    }


# --- Shared by formats with boxes in pixels -------------------------------------------------------------------------


def need_box(sample: Sample) -> Box:
    """The box of a sample.

    Raises:
        RowFault: "no_box", where it has none.
    """
    if sample.box is None:
        raise RowFault("no_box", f"{sample.id} has no box, and this format needs one")
    return sample.box


def need_answer(sample: Sample) -> str:
    """The answer of a sample.

    Raises:
        RowFault: "no_answer", where it has none.
    """
    if not sample.answer:
        raise RowFault("no_answer", f"{sample.id} has no answer, and this format needs one")
    return sample.answer


def sample_id(source: str, raw: dict[str, Any], number: int, key: str = "question_id") -> str:
    """A name for a row that is the same at every reading: data set, split, and the row's own number or place."""
    split, own = raw.get("split"), raw.get(key)
    return f"{source}/{split if isinstance(split, str) else 'all'}/{f'row-{number}' if own is None else own}"


def pixel_list(box: Box, size: Size) -> list[float]:
    """The corners in pixels; whole numbers as integers, so that what came as integers goes as integers."""
    rounded = [round(value, 6) for value in box.to_pixels(size)]
    return [int(value) if value.is_integer() else value for value in rounded]


def split_of(sample: Sample) -> str:
    """The split that the row of a sample names, else "train"."""
    split = sample.raw.get("split") if isinstance(sample.raw, dict) else None
    return split if isinstance(split, str) else "train"


def number_of(sample: Sample, number: int) -> Any:
    """The `question_id` of the row that a sample came from, else `number`, its place in what is written."""
    question_id = sample.raw.get("question_id") if isinstance(sample.raw, dict) else None
    return number if question_id is None else question_id


def _untruncated(raw: dict[str, Any], ref: str, pixels: Corners, sizes: Sizes) -> Corners:
    """The box of this question in the detection file that sizes came from; the integers where there is none."""
    given = [four_numbers(box, "bbox") for box in sizes.boxes(ref, raw.get("question_id"))]
    if not given:
        return pixels
    exact = min(given, key=lambda box: _distance(box, pixels)) if len(given) > 1 else given[0]
    if _distance(exact, pixels) > 1:
        raise RowFault("disagree", f"the pixels {list(pixels)} are not those of the detection file, {list(exact)}")
    return exact


def _pixel_box(corners: Corners, size: Size) -> Box:
    _check_form(corners)
    _check_inside(corners, size)
    return Box.from_pixels(corners, size)


def _check_form(corners: Corners) -> None:
    x0, y0, x1, y1 = corners
    if x0 > x1 or y0 > y1:
        raise _fault("inverted", corners)
    if x0 == x1 or y0 == y1:
        raise _fault("empty", corners)


def _check_inside(corners: Corners, size: Size) -> None:
    if corner_fault(corners, size) == "outside":
        raise _fault("outside", corners, f" of {size[0]} × {size[1]}")


def _fault(fault: BoxFault, corners: Corners, more: str = "") -> BoxError:
    return BoxError(fault, f"the box {list(corners)} in pixels{more} is {fault}")


def _agree(text: str, pixels: Corners, size: Size) -> bool:
    """Whether the text is the box of the pixels, as far as cutting off and rounding allow.

    Raises:
        BoxError: the text is no box, or one outside the image.
    """
    try:
        box = _TEXT.parse(text, size, size)
    except BoxError as error:
        if error.fault == "empty":  # a box narrower than a thousandth of the square: the pixels say what it is
            return True
        raise
    return _distance(box.to_pixels(size), pixels) <= 1 + _HALF_DIGIT * max(size) + 1e-6


def _fits(text: str, pixels: Corners, size: Size) -> bool:
    """Whether text and pixels are one box inside an image of `size`."""
    try:
        return corner_fault(pixels, size) is None and _agree(text, pixels, size)
    except BoxError:
        return False


def _distance(a: Corners, b: Corners) -> float:
    """How far the furthest of two boxes' corners are apart along an axis."""
    return max(abs(a[0] - b[0]), abs(a[1] - b[1]), abs(a[2] - b[2]), abs(a[3] - b[3]))


def _image_and_pixels(raw: Any) -> tuple[str, Corners]:
    image = raw.get("image") if isinstance(raw, dict) else None
    if not (isinstance(image, list) and len(image) == 2 and isinstance(image[0], str) and isinstance(image[1], str)):
        raise RowFault("unparseable", "'image' must be [path, path###[x1, y1, x2, y2]]")
    ref, marked = image
    if not ref.isascii():
        check_text(ref, "image")
    found = _PIXELS.fullmatch(marked, len(ref) + 3) if marked.startswith(ref + "###") else None
    if found is None:
        raise RowFault("unparseable", f"{marked[:80]!r} must be the path, ### and four pixels in brackets")
    x0, y0, x1, y1 = found.groups()
    return ref, (_number(x0), _number(y0), _number(x1), _number(y1))


def _number(text: str) -> float:
    return float(text) if "." in text else int(text)


def _turns(raw: dict[str, Any]) -> tuple[str, str, str]:
    """Question, box text and answer of the four turns."""
    turns = raw.get("conversations")
    if not isinstance(turns, list) or len(turns) != 4:
        raise RowFault("unparseable", "'conversations' must hold four turns")
    if [isinstance(turn, dict) and turn.get("from") for turn in turns] != _SPEAKERS:
        raise RowFault("unparseable", f"the turns must be from {', '.join(_SPEAKERS)}")
    question, box_text, _, answer = [get_text(turn, "value") for turn in turns]
    return bare_question(question), box_text, answer


def bare_question(prompt: str) -> str:
    """The question in a prompt to the letter, without image marks and without the sentence that asks for a box."""
    return without_sentence(without_marks(prompt))


def without_sentence(question: str) -> str:
    """A question without the sentence that asks for a box, which it may end with."""
    for sentence in (BOX_SENTENCE, FOCUS_SENTENCE):
        head, found, tail = question.rpartition(sentence)
        if found and not tail.strip():
            return head.removesuffix("\n").removesuffix(" ")
    return question


def without_marks(prompt: str) -> str:
    """A prompt without the marks of its images, and without the line breaks or blanks that set them apart."""
    if prompt.startswith(f"{IMAGE}\n") and prompt.count(IMAGE) == 1:  # as nearly every prompt is written
        return prompt[len(IMAGE) + 1 :]
    return _MARK_INSIDE.sub("", _MARK_LAST.sub("", _MARK_FIRST.sub("", prompt)))
