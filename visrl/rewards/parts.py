"""The reward of an attempt as a weighted sum of named parts, and `PARTS`, the table of those that `rewards` names.

An attempt is one box of a question with the answers from its crop; every answer gets a reward of its own. None says
that a score could not be told: it is never 0. What cannot be blamed on the policy (a prompt that it cannot be shown) is
None in every part; a box that cannot be read is the policy's own failure, and 0. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from visrl.box import iou
from visrl.config import ConfigError
from visrl.errors import UserError
from visrl.plugins import is_plugin, load_plugin, raised
from visrl.records import Sample
from visrl.rewards.metrics import METRICS

if TYPE_CHECKING:
    from visrl.rollout.steps import Look

Metric = Literal["exact", "relaxed", "anls", "vqa"]
Scores = list[float | None]

RIGHT = 0.5  # from this score on, an answer is more right than wrong: what `when` asks for


class RewardError(UserError, RuntimeError):
    """A reward function that raised, or gave back what is no scores; the message says which and for what."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One box of a question: a look for each answer from its crop, or a single one without an answer. `without` is the
    greedy answer to the same question from the whole image in place of a crop, where a part asks for it."""

    sample: Sample
    looks: tuple[Look, ...]
    without: str | None = None

    @property
    def failed(self) -> bool:
        """Whether something else than the policy failed: the engine, or a prompt that the model cannot be shown."""
        error = self.looks[0].error
        return error is not None and not error.startswith("box: ")


# --- What a config says -----------------------------------------------------------------------------------------------


def _known_part(name: str) -> str:
    if name not in PARTS and not is_plugin(name):
        known = ", ".join(map(repr, PARTS))
        raise ValueError(f"Input should be {known}, or module:function for one of your own")
    return name


class RewardPart(BaseModel):
    """One part of a reward: `{name: answer, weight: 1.0}`; a name alone has weight 1."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: Annotated[str, AfterValidator(_known_part)]
    weight: float = 1.0  # 0: the part is logged and teaches nothing
    metric: Metric | None = None  # what says that an answer is right; exact
    when: str | None = Field(None, min_length=1)  # a bonus: counts only where the part of this name is at least 0.5

    @property
    def label(self) -> str:
        """What the part is called in logs."""
        return self.name if self.metric is None else f"{self.name}_{self.metric}"


Part = Annotated[RewardPart, BeforeValidator(lambda given: {"name": given} if isinstance(given, str) else given)]


def check_parts(parts: Sequence[RewardPart]) -> Sequence[RewardPart]:
    """`parts`, if they go together.

    Raises:
        ValueError: none, two of one name, a metric where nothing is compared, or a condition on no other part.
    """
    labels = [part.label for part in parts]
    if not any(part.weight for part in parts):
        raise ValueError("nothing would be learned; give at least one part a weight")
    if doubled := next((label for label in labels if labels.count(label) > 1), None):
        raise ValueError(f"{doubled!r} is there twice; give one of them, with the weights of both")
    for part in parts:
        if part.metric is not None and not (part.name in PARTS and PARTS[part.name].compares):
            raise ValueError(f"{part.name!r} compares no answers: leave its metric out")
        if part.when is not None and part.when not in set(labels) - {part.label}:
            raise ValueError(f"{part.label!r} counts when {part.when!r} is right, which is no other part of the list")
    return parts


# --- The parts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PartKind:
    """A row of the table: the scores of an attempt's looks by a metric, in order, each in [0, 1]."""

    score: Callable[[Attempt, Metric], Scores]
    about: str
    compares: bool = False  # whether the metric says anything
    without_crop: bool = False  # whether it reads `Attempt.without`


def _right(answer: str | None, sample: Sample, metric: Metric) -> float | None:
    """How right an answer is; None where the sample says no true one."""
    from visrl.rewards.outcome import references_of  # which a config need not wait for

    if not sample.answer:
        return None
    return 0.0 if answer is None else METRICS[metric](answer, references_of(sample, metric))


def _answer(attempt: Attempt, metric: Metric) -> Scores:
    return [_right(look.answer, attempt.sample, metric) for look in attempt.looks]


def _outcome(attempt: Attempt, metric: Metric) -> Scores:
    scores = [score for score in _answer(attempt, metric) if score is not None]
    return [math.fsum(scores) / len(scores) if scores else None] * len(attempt.looks)


def _crop_gain(attempt: Attempt, metric: Metric) -> Scores:
    before = _right(attempt.without, attempt.sample, metric)
    return [
        None if score is None or before is None else score * (1 - before) for score in _answer(attempt, metric)
    ]  # fmt: skip


def _format(attempt: Attempt, metric: Metric) -> Scores:
    return [float(look.box is not None) for look in attempt.looks]


def _iou(attempt: Attempt, metric: Metric) -> Scores:
    truth = attempt.sample.box
    if truth is None:
        return [None] * len(attempt.looks)
    return [0.0 if look.box is None else iou(look.box, truth) for look in attempt.looks]


def _area(attempt: Attempt, metric: Metric) -> Scores:
    return [0.0 if look.box is None else 1.0 - look.box.area for look in attempt.looks]


PARTS: dict[str, PartKind] = {
    "answer": PartKind(_answer, "the answer is right", compares=True),
    "outcome": PartKind(_outcome, "share of the crop's answers that are right, the same for each", compares=True),
    "crop_gain": PartKind(
        _crop_gain, "right with the crop and wrong without it", compares=True, without_crop=True
    ),
    "format": PartKind(_format, "the box can be read"),
    "iou": PartKind(_iou, "IoU with the true box; None without one"),
    "area": PartKind(_area, "1 − the box's share of the image"),
}  # fmt: skip


def load_parts(parts: Sequence[RewardPart]) -> None:
    """Import the functions of the user's own.

    Raises:
        ConfigError: one is not there, or is no function.
    """
    for part in parts:
        if is_plugin(part.name) and not callable(load_plugin(part.name, "reward")):
            raise ConfigError(f"reward {part.name!r} is no function of completions")


def wants_answer_without_crop(parts: Sequence[RewardPart]) -> bool:
    """Whether a part reads `Attempt.without`."""
    return any(part.name in PARTS and PARTS[part.name].without_crop for part in parts)


# --- Scoring ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scored:
    """The scores of attempts, by the label of the part, and their rewards: one for every look of every attempt."""

    parts: dict[str, list[Scores]]
    rewards: list[Scores]


def score_attempts(parts: Sequence[RewardPart], questions: Sequence[Sequence[Attempt]]) -> list[Scored]:
    """What every attempt at every question is worth, by each part and in all: Σ weight × score.

    A score of None leaves the look out: its reward is None. A part that says nothing about any attempt at a question
    (IoU where there is no true box) is left out of that question's rewards instead.

    Raises:
        RewardError: a function of the user's own raised, or gave back what is no scores.
    """
    scores = {part.label: iter(_scores_of(part, [one for own in questions for one in own])) for part in parts}
    found = []
    for own in questions:
        table = {label: [next(rows) for _ in own] for label, rows in scores.items()}
        told = {label for label, rows in table.items() if any(score is not None for row in rows for score in row)}
        speaking = [part for part in parts if part.weight and {part.label, part.when or part.label} <= told]
        rewards = [
            [_reward(speaking, {label: rows[a][m] for label, rows in table.items()}) for m in range(len(one.looks))]
            for a, one in enumerate(own)
        ]
        found.append(Scored(table, rewards))
    return found


def _reward(parts: Sequence[RewardPart], scores: Mapping[str, float | None]) -> float | None:
    """The weighted sum of one look's scores; None where no part speaks, or one that counts is None."""
    total = 0.0
    for part in parts:
        score, condition = scores[part.label], scores[part.when] if part.when is not None else 1.0
        if score is None or condition is None:
            return None
        total += part.weight * score * (condition >= RIGHT)
    return total if parts else None


def _scores_of(part: RewardPart, attempts: Sequence[Attempt]) -> list[Scores]:
    sound = [one for one in attempts if not one.failed]
    if part.name in PARTS:
        metric: Metric = part.metric or "exact"
        scores = iter([PARTS[part.name].score(one, metric) for one in sound])
    else:
        flat = iter(_call(part.name, sound))
        scores = iter([[next(flat) for _ in one.looks] for one in sound])
    return [[None] * len(one.looks) if one.failed else next(scores) for one in attempts]


def _call(name: str, attempts: Sequence[Attempt]) -> Scores:
    """What a function of the user's own says of every look, checked. It is called as TRL calls a reward function: every
    argument by keyword, a list with an entry for each look."""
    rows = [(one.sample, look) for one in attempts for look in one.looks]
    if not rows:
        return []
    function = load_plugin(name, "reward")
    try:
        given: Any = function(**_columns(rows))
    except Exception as error:  # whatever a user's function raises: it is told, with its place, and ends the run
        raise RewardError(f"reward {name} stopped with {raised(error)}") from error
    try:
        scores = list(given)
    except TypeError as error:
        raise RewardError(f"reward {name} gave back {type(given).__name__}, and not a list of numbers") from error
    if len(scores) != len(rows):
        raise RewardError(f"reward {name} gave back {len(scores)} numbers for {len(rows)} completions")
    for (sample, _), score in zip(rows, scores, strict=True):
        if score is not None and not (isinstance(score, Real) and math.isfinite(score)):
            raise RewardError(
                f"reward {name}: sample {sample.id!r}: {score!r} is no number; None says that there is no score"[:500]
            )
    return [None if score is None else float(score) for score in scores]


def _columns(rows: Sequence[tuple[Sample, Look]]) -> dict[str, list[Any]]:
    """The arguments of a reward function: those that TRL gives for conversations, and what we know beside them."""
    samples, looks = [sample for sample, _ in rows], [look for _, look in rows]
    return {
        "prompts": [[{"role": "user", "content": sample.question}] for sample in samples],
        "completions": [[{"role": "assistant", "content": look.answer or ""}] for look in looks],
        "completion_ids": [list(look.answer_completion.ids) if look.answer_completion else [] for look in looks],
        "answer": [sample.answer for sample in samples],
        "solution": [sample.answer for sample in samples],
        "image": [sample.image for sample in samples],
        "id": [sample.id for sample in samples],
        "true_box": [sample.box for sample in samples],
        "box": [look.box for look in looks],
        "box_text": [look.text for look in looks],
    }
