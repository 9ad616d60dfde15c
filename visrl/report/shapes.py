"""What the files of a run must hold for a report to be made of them, beyond being JSON. Other keys are welcome.

Shapes are looked at and not copied: who reads the files goes on with the rows and objects as they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FiniteFloat,
    NonNegativeInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from visrl.box import Box
from visrl.errors import UserError
from visrl.records import RecordError, read_jsonl


def _is_box(value: list[FiniteFloat]) -> list[float]:
    if len(value) != 4:
        raise ValueError("not four fractions of the picture")
    Box(*value)
    return value


BoxList = Annotated[list[FiniteFloat], AfterValidator(_is_box)]


class Shape(BaseModel):
    model_config = ConfigDict(extra="allow", coerce_numbers_to_str=False)


class ScoreShape(Shape):
    mean: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat


class ScoresShape(Shape):
    """The measures of a checkpoint or a control."""

    answer_accuracy: ScoreShape | None = None
    box_iou: ScoreShape | None = None
    box_accuracy_50: ScoreShape | None = None
    right_object: ScoreShape | None = None
    skipped: NonNegativeInt = 0


class KindShape(Shape):
    n: NonNegativeInt
    answer_accuracy: FiniteFloat | None = None
    box_iou: FiniteFloat | None = None
    right_object: FiniteFloat | None = None


class QuadrantShape(Shape):
    """Grounded × right, as `rewards.crop_effects.quadrants` counts it; empty where no evidence is known."""

    n: NonNegativeInt = 0
    grounded_right: NonNegativeInt = 0
    grounded_wrong: NonNegativeInt = 0
    ungrounded_right: NonNegativeInt = 0
    ungrounded_wrong: NonNegativeInt = 0


class CropShape(Shape):
    """What crops gain and harm, as `rewards.crop_effects.gain_and_harm` counts it."""

    n: NonNegativeInt = 0
    gain: NonNegativeInt = 0
    harm: NonNegativeInt = 0
    difference: FiniteFloat = 0
    low: FiniteFloat = 0
    high: FiniteFloat = 0


class StageShape(ScoresShape):
    name: str
    iteration: NonNegativeInt
    n: NonNegativeInt
    answer_accuracy: ScoreShape
    by_kind: dict[str, KindShape] = {}
    quadrants: QuadrantShape | None = None
    crop: CropShape | None = None


class PairsShape(Shape):
    iteration: NonNegativeInt
    questions: NonNegativeInt = 0
    kept: NonNegativeInt | None = None
    trajectories: NonNegativeInt | None = None
    dropped_by_reason: dict[str, NonNegativeInt] = {}


class SummaryShape(Shape):
    """`summary.json`, which `visrl demo` and `visrl evolve` write."""

    stages: list[StageShape] = []
    controls: dict[str, ScoresShape] = {}
    controls_last: dict[str, ScoresShape] = {}
    pairs: list[PairsShape] = []
    seconds: FiniteFloat = 0
    seconds_by_step: dict[str, FiniteFloat] = {}
    cpu_seconds_by_step: dict[str, FiniteFloat] = {}
    peak_rss_mb: FiniteFloat = 0
    versions: dict[str, Any] = {}


class ColumnShape(Shape):
    counted: ScoreShape | None = None
    unread: NonNegativeInt = 0


class EvaluationShape(Shape):
    """`scores.json`, which `visrl eval` writes."""

    n: NonNegativeInt = 0
    failed: NonNegativeInt = 0
    unparseable: NonNegativeInt = 0
    bad_truth: NonNegativeInt = 0
    skipped: NonNegativeInt = 0
    columns: dict[str, ColumnShape] = {}
    quadrants: QuadrantShape | None = None


class ManifestShape(Shape):
    verb: str = ""
    config: dict[str, Any] = {}
    counts: dict[str, Any] | None = None
    image_root: str | None = None


class AnswerShape(Shape):
    """A line of `eval/CHECKPOINT.jsonl`."""

    id: str | int
    question: str
    answer: str
    image: str
    box: BoxList | None
    true_box: BoxList | None = None
    prediction: str | None
    correct: bool | None
    iou: FiniteFloat | None
    right_object: bool | None = None
    grounded: bool | None = None
    skipped: str | None = None
    kind: str = ""
    repeat: NonNegativeInt = 0
    error: str | None = None
    looks: list[BoxList] = []
    end: str | None = None


class TryShape(Shape):
    sample_id: str | int
    origin: str
    error: str | None


class PairShape(Shape):
    id: str | int


class RolledBoxShape(Shape):
    """A box in a line of `rollouts.jsonl`, with the answers from its crop."""

    text: str
    box: BoxList | None
    reward: FiniteFloat | None
    advantage: FiniteFloat | None
    answers: list[str | None]
    rewards: list[FiniteFloat | None]
    advantages: list[FiniteFloat | None]
    parts: dict[str, list[FiniteFloat | None]]


class RolledTurnShape(Shape):
    """A turn in a line of `rollouts.jsonl`, with those after it, or with how it ended."""

    text: str
    looks: list[BoxList]
    value: FiniteFloat | None
    advantage: FiniteFloat | None
    turns: list[RolledTurnShape] | None = None
    end: str = ""
    answer: str | None = None
    reward: FiniteFloat | None = None
    parts: dict[str, FiniteFloat | None] = {}

    @model_validator(mode="after")
    def _ends_or_goes_on(self) -> RolledTurnShape:
        if (self.turns is None) != bool(self.end):
            raise ValueError("a turn has either an end or turns after it")
        return self


class RolledQuestionShape(Shape):
    step: NonNegativeInt
    id: str | int
    image: str
    question: str
    answer: str
    true_box: BoxList | None = None
    true_looks: list[BoxList] | None = None
    repeat: NonNegativeInt = 0


class RolloutShape(RolledQuestionShape):
    """A line of `rollouts.jsonl`, which an online training writes."""

    boxes: list[RolledBoxShape]


class LooksRolloutShape(RolledQuestionShape):
    """A line of `rollouts.jsonl` where the model looks several times."""

    turns: list[RolledTurnShape]


class LogShape(Shape):
    """A line of a training log: numbers, some of them not finite where a training went wrong."""

    __pydantic_extra__: dict[str, float | str | bool | list[Any] | dict[str, Any] | None]
    step: NonNegativeInt | None = None


def fault(value: Any, shape: type[Shape]) -> str | None:
    """What keeps `value` from being of this shape, None where nothing does."""
    try:
        TypeAdapter(shape).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            return f"no {place!r}"
        return f"{place or 'it'}: {first['msg'].removeprefix('Value error, ')} (it holds {str(first['input'])[:60]!r})"
    return None


JsonObject = dict[str, Any]


class ReportError(UserError, ValueError):
    """A run folder that no report can be made of; the message names file and remedy."""


def read_run_rows(path: Path, shape: type[Shape]) -> list[JsonObject]:
    """The objects of a JSONL file, each of the shape given; an unfinished last line is left out.

    Raises:
        ReportError: another line is not JSON, or not of that shape.
    """
    try:
        rows = list(read_jsonl(path, unfinished="leave_out"))
    except RecordError as error:
        raise ReportError(str(error)) from error
    for number, row in enumerate(rows, start=1):
        wrong = fault(row, shape)
        if wrong is not None:
            raise ReportError(f"{path}, row {number}: {wrong}; run the step that writes this file again")
    return rows


def read_run_object(path: Path, shape: type[Shape]) -> JsonObject:
    """The object of a JSON file, of the shape given.

    Raises:
        ReportError: it is not JSON, or not of that shape.
    """
    try:
        value: JsonObject = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path} is not JSON ({error}); remove it and run the step that writes it again") from error
    wrong = "no JSON object" if not isinstance(value, dict) else fault(value, shape)
    if wrong is not None:
        raise ReportError(f"{path}: {wrong}; remove it and run the step that writes it again")
    return value
