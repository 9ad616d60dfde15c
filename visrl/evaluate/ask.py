"""`visrl ask`: questions about one image, by one checkpoint or several side by side, as text and as an image.

The image shows where each looked, what it saw there, and what it answered; of a drawn scene, where the truth is
known, also whether that is right.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from visrl.box import Box, CropRule, crop_window, iou
from visrl.config import ConfigError, shown_path
from visrl.conversation import PromptError, View, open_view
from visrl.data.native import without_mark
from visrl.data.rows import RowFault
from visrl.engines.base import Policy
from visrl.failures import FailedRun, Tally, is_failure
from visrl.images import ImageError
from visrl.pages.draw import FIRST_COLOUR, LAST_COLOUR, TRUE_COLOUR, annotate, shrink
from visrl.records import Picture, Sample
from visrl.replies import whole_text
from visrl.rewards.metrics import exact_match
from visrl.rollout.greedy import greedy_looks
from visrl.rollout.rollout import failure
from visrl.rollout.steps import Look
from visrl.scenes import parse_ref, questions_of, true_box

if TYPE_CHECKING:
    from visrl.engines.open import PolicyConfig

COLOURS = (FIRST_COLOUR, LAST_COLOUR, "#0a7d4f", "#8b2fc9", "#c2185b", "#5d4037")
WHOLE_SIDE, CROP_SIDE, TEXT_WIDTH, GAP = 480, 220, 320, 16  # px
FONT_SIZE = 17
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tiff", ".pdf")  # what a sheet is written as
MOST_LINES = 12  # of a question, an answer or a name
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
INK, GOOD, BAD = "#111318", "#15803d", "#b42318"


@dataclass(frozen=True, slots=True)
class Truth:
    """The right answer, and the box around what it is about."""

    answer: str
    box: Box


@dataclass(frozen=True, slots=True)
class Answer:
    """What one checkpoint made of one question; `truth` is None where it is not known."""

    model: str
    question: str
    look: Look
    crop_rule: CropRule
    truth: Truth | None = None

    @property
    def is_right(self) -> bool:
        return self.truth is not None and exact_match(self.look.answer or "", [self.truth.answer]) == 1

    def verdict(self) -> str:
        """Whether the answer is right and how well the box lies, "" where the truth is not known."""
        if self.truth is None:
            return ""
        overlap = "no box" if self.look.box is None else f"IoU {iou(self.look.box, self.truth.box):.2f}"
        return f"right, {overlap}" if self.is_right else f"wrong: it is {self.truth.answer}, {overlap}"

    def lines(self) -> list[str]:
        """The two steps in words."""
        look = self.look
        verdict = f" ({self.verdict()})" if self.truth else ""
        if look.box is None:
            return [f"{self.model}: no box ({look.error}){verdict}", *([f"  wrote {look.text!r}"] if look.text else [])]
        corners = ", ".join(f"{value:.0f}" for value in look.box_pixels or ())
        left, top, right, bottom = crop_window(look.box, look.whole.size, self.crop_rule)
        answer = f"({look.error})" if look.answer is None else look.answer or "(an empty reply)"
        return [
            f"{self.model}: {answer}{verdict}",
            f"  looked at [{corners}] px of {look.whole.size[0]} × {look.whole.size[1]} ({look.text}), "
            f"crop {right - left} × {bottom - top} px",
        ]


def ask(policy: Policy, model: str, image: str, questions: Sequence[str], crop_rule: CropRule) -> list[Answer]:
    """Both steps at temperature 0 for every question about the image `image` (a path, or `scene:POOL/INDEX`).

    Raises:
        ImageError: the image cannot be opened, or the model takes no such.
    """
    samples = [Sample(str(number), image, question, "") for number, question in enumerate(questions)]
    answers = []
    for sample, look in zip(samples, greedy_looks(policy, samples, crop_rule=crop_rule), strict=True):
        if isinstance(look, ImageError):
            raise look
        if isinstance(look, PromptError):  # the other questions can be asked
            look = Look(sample.question, open_view(Picture(image)), error=failure(look))
        answers.append(Answer(model, sample.question, look, crop_rule, known_truth(image, sample.question)))
    return answers


def known_truth(image: str, question: str) -> Truth | None:
    """The truth of a question that a drawn scene answers, None of any other."""
    scene = parse_ref(image) if image.startswith("scene:") else None
    known = {one.text: one for one in questions_of(scene)} if scene else {}
    one = known.get(question.strip())
    return Truth(one.answer, true_box(scene, one)) if scene and one else None


def hint(image: str, question: str) -> str:
    """What can be asked of a drawn scene that does not answer `question`; "" of anything else."""
    if not image.startswith("scene:") or known_truth(image, question):
        return ""
    answerable = [f"“{one.text}”" for one in questions_of(parse_ref(image))[:3]]
    return f"{image} has no answer to this; it has to {', '.join(answerable)}" if answerable else ""


def answer_sheet(by_question: Sequence[Sequence[Answer]]) -> Image.Image:
    """One image of all answers: a row a question, with every checkpoint's box on it, crop and answer beside it."""
    font = ImageFont.load_default(size=FONT_SIZE)
    rows = [_question_strip(answers, font) for answers in by_question]
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def _question_strip(answers: Sequence[Answer], font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Image.Image:
    whole: View = answers[0].look.whole
    several = len(answers) > 1
    marks = [
        (answer.look.box, colour, answer.model if several else "")
        for answer, colour in zip(answers, _colours(len(answers)), strict=True)
        if answer.look.box is not None
    ]
    if answers[0].truth is not None:
        marks.insert(0, (answers[0].truth.box, TRUE_COLOUR, "true"))
    shown = shrink(annotate(whole.image, marks), WHOLE_SIDE)
    panels = [_panel(answer, colour, font) for answer, colour in zip(answers, _colours(len(answers)), strict=True)]
    asked = _wrapped(answers[0].question, 90) or [""]
    head = GAP + len(asked) * (FONT_SIZE + 6)
    beside = sum(panel.height + GAP for panel in panels)
    width = WHOLE_SIDE + CROP_SIDE + TEXT_WIDTH + 4 * GAP
    row = Image.new("RGB", (width, head + max(shown.height + GAP, beside) + GAP), "white")
    draw = ImageDraw.Draw(row)
    draw.multiline_text((GAP, GAP // 2), "\n".join(asked), font=font, fill=INK, spacing=6)
    row.paste(shown, (GAP, head))
    top = head
    for panel in panels:
        row.paste(panel, (WHOLE_SIDE + 2 * GAP, top))
        top += panel.height + GAP
    return row


def _panel(answer: Answer, colour: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Image.Image:
    """The crop and the text of an answer, with its colour along the crop."""
    look = answer.look
    crop = shrink(look.crop, CROP_SIDE) if look.crop else Image.new("RGB", (CROP_SIDE, 60), "#e8e8ea")
    scale = min(CROP_SIDE / crop.width, CROP_SIDE / crop.height, 4.0)
    if scale > 1:  # a small crop is shown large enough to be read
        crop = crop.resize((round(crop.width * scale), round(crop.height * scale)), Image.Resampling.LANCZOS)
    said = look.answer if look.answer is not None else f"no answer: {look.error}"
    verdict = _wrapped(answer.verdict(), 36)
    text = "\n".join([*_wrapped(answer.model, 36), *(_wrapped(said, 36) or ["(nothing)"])])
    panel = Image.new("RGB", (CROP_SIDE + GAP + TEXT_WIDTH, 0), "white")
    draw = ImageDraw.Draw(panel)
    _, _, _, end = draw.multiline_textbbox((0, 0), text, font=font, spacing=6)
    bottom = end + len(verdict) * (FONT_SIZE + 6)
    panel = Image.new("RGB", (panel.width, max(crop.height + 6, int(bottom) + 6)), "white")
    draw = ImageDraw.Draw(panel)
    draw.rectangle((0, 0, crop.width + 5, crop.height + 5), fill=colour)
    panel.paste(crop, (3, 3))
    draw.multiline_text((CROP_SIDE + GAP, 0), text, font=font, fill=INK, spacing=6)
    ink = GOOD if answer.is_right else BAD
    draw.multiline_text((CROP_SIDE + GAP, end + 6), "\n".join(verdict), font=font, fill=ink, spacing=6)
    return panel


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(printable(text), width, max_lines=MOST_LINES, placeholder=" …")


def printable(text: str) -> str:
    """`text` with U+FFFD for what no font draws and no terminal should get: control characters, half surrogates."""
    return _CONTROL.sub("\ufffd", whole_text(text))


def _colours(count: int) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(count)]


def ask_models(
    models: Sequence[str], image: str, questions: Sequence[str], out: Path, given: Sequence[str] = ()
) -> None:
    """Ask every model every question, print the two steps, and write the image to `out`.

    A model is a checkpoint folder or hub name. They are opened one after another, so that only one is in memory.
    `given` is `key=value` of `PolicyConfig`, as of every verb that asks a policy; what it says of servers is of those
    of the first model, and the others run in this process.

    Raises:
        ConfigError: a key of `given` that is none, or a value of the wrong type; no question, or `out` is no image.
        FailedRun: no model gave a reply to more than the share `max_failed` of the questions.
    """
    from visrl.engines.open import opened_policy

    if out.suffix.lower() not in PICTURES:
        raise ConfigError(f"out: {shown_path(out)} is no picture's name; end it in {', '.join(PICTURES)}")
    try:
        questions = [without_mark(question) for question in questions]
    except RowFault as error:
        raise ConfigError(f"ask a question about the picture: {error}") from error
    answers: list[list[Answer]] = []
    configs = _configs(models, given)
    for name, config in zip(short_names(models), configs, strict=True):
        with opened_policy(config) as opened:
            answers.append(ask(opened.policy, name, image, questions, opened.settings.crop_rule))
    by_question = [list(group) for group in zip(*answers, strict=True)]
    for group in by_question:
        print(printable(group[0].question))
        print("\n".join(f"  {printable(line)}" for answer in group for line in answer.lines()))
        if unanswerable := hint(image, group[0].question):
            print(f"  ({unanswerable})")
    out.parent.mkdir(parents=True, exist_ok=True)
    answer_sheet(by_question).save(out)
    print(f"picture: {out}")
    tally = Tally("questions", configs[0].max_failed)
    tally.count(answer.look.error if is_failure(answer.look.error) else None for group in answers for answer in group)
    if tally.is_hopeless():
        raise FailedRun(tally.sentence())


def _configs(models: Sequence[str], given: Sequence[str]) -> list[PolicyConfig]:
    """How each model is opened."""
    from visrl.config import read_config
    from visrl.engines.open import ModelConfig, PolicyConfig

    first = read_config(PolicyConfig, None, [f"model_name_or_path={json.dumps(models[0])}", *given])
    looks = {name: getattr(first, name) for name in ModelConfig.model_fields}
    here = {**looks, "adapter_name_or_path": None, "box_codec": None if first.policy_url else first.box_codec}
    return [first, *(PolicyConfig(**{**here, "model_name_or_path": model}) for model in models[1:])]


def short_names(models: Sequence[str]) -> list[str]:
    """The models' names as short as they stay different: the ends of their paths."""
    for count in range(1, max(len(Path(model).parts) for model in models) + 1):
        names = ["/".join(Path(model).parts[-count:]) for model in models]
        if len(set(names)) == len(set(models)):
            break
    return names
