"""The reward of an attempt as a weighted sum of named parts, and `PARTS`, the table of those that `rewards` names.

An attempt is one box of a question with the answers from its crop, or where the policy looks several times one first
turn with all ends after it; every answer gets a reward of its own. None says that a score could not be told: it is
never 0. What cannot be blamed on the policy (a prompt that it cannot be shown) is
None in every part; a box that cannot be read is the policy's own failure, and 0. Parts that need a model, a server or a
function of the user's own are opened once for a run, in open_parts.py. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from visrl.box import Box, iou
from visrl.plugins import is_plugin
from visrl.records import Sample
from visrl.rewards.choices import choice_score, options_of
from visrl.rewards.metrics import METRICS

if TYPE_CHECKING:
    from visrl.rollout.steps import Look

Metric = Literal["exact", "relaxed", "anls", "vqa", "choice"]
Scores = list[float | None]

RIGHT = 0.5  # from this score on, an answer is more right than wrong: what `when` asks for


@dataclass(frozen=True, slots=True)
class Attempt:
    """One box of a question: a look for each answer from its crop, or a single one without an answer; of several looks
    (`Look.looks`) one for every end after a first turn. `without` is the greedy answer to the same question from the
    whole image in place of a crop, where a part asks for it."""

    sample: Sample
    looks: tuple[Look, ...]
    without: str | None = None


def is_failed(look: Look) -> bool:
    """Whether something else than the policy failed: the engine, or a prompt that the model cannot be shown; or the
    policy was not left to come to its end."""
    return look.error is not None and not look.error.startswith("box: ")


Scorer = Callable[[Sequence[Attempt]], list[Scores]]
"""What a part says of all attempts of a step at once: a score for every look of every attempt, in their order. It is
never asked about a look that failed (`is_failed`)."""


# --- What a config says -----------------------------------------------------------------------------------------------


def _known_part(name: str) -> str:
    if kind_of(name) is None and not is_plugin(name):
        known = ", ".join(repr(f"{key}:{kind.argument}" if kind.argument else key) for key, kind in PARTS.items())
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
        name = f"{self.name.partition(':')[0]}:{Path(self.argument).name}" if self.argument else self.name
        return "_".join(filter(None, (name, self.metric, self.when and f"when_{self.when}")))

    @property
    def argument(self) -> str:
        """What stands after the colon in the name of one of our parts; "" where there is none."""
        return self.name.partition(":")[2] if kind_of(self.name) is not None else ""


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
        if part.metric is not None and not ((kind := kind_of(part.name)) and kind.compares):
            raise ValueError(f"{part.name!r} compares no answers: leave its metric out")
        if part.when is not None and part.when not in set(labels) - {part.label}:
            raise ValueError(f"{part.label!r} counts when {part.when!r} is right, which is no other part of the list")
    return parts


# --- The parts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PartKind:
    """A row of the table: the scores of an attempt's looks by a metric, in order, each in [0, 1]. One of which `score`
    is None is opened once for a run: it has a row in `open_parts.OPENERS`, too. `about_several` says what it is of an
    answer after several looks, where that is more than one look says; "" where it can be asked about one look alone."""

    score: Callable[[Attempt, Metric], Scores] | None
    about: str
    argument: str = ""  # what must stand after a colon in its name, as "PATH"
    compares: bool = False  # whether the metric says anything
    without_crop: bool = False  # whether it reads `Attempt.without`
    about_several: str = "the same"


def _right(answer: str | None, sample: Sample, metric: Metric) -> float | None:
    """How right an answer is; None where the sample says no true one."""
    from visrl.rewards.outcome import references_of  # which a config need not wait for

    if not sample.answer:
        return None
    if metric == "choice":
        return choice_score(answer or "", sample.answer, options_of(sample.question, sample.raw))
    return 0.0 if answer is None else METRICS[metric](answer, references_of(sample, metric))


def _answer(attempt: Attempt, metric: Metric) -> Scores:
    return [_right(look.answer, attempt.sample, metric) for look in attempt.looks]


def _outcome(attempt: Attempt, metric: Metric) -> Scores:
    scores = [score for score in _answer(attempt, metric) if score is not None]
    return [math.fsum(scores) / len(scores) if scores else None] * len(attempt.looks)


def _boxes(look: Look) -> list[Box]:
    """The boxes of all looks that were taken for an answer, in their order."""
    if look.looks is not None:
        return [one.box for one in look.looks]
    return [] if look.box is None else [look.box]


def _crop_gain(attempt: Attempt, metric: Metric) -> Scores:
    before = _right(attempt.without, attempt.sample, metric)
    return [
        None if score is None or before is None else score * (1 - before) if _gains(look) else 0.0
        for look, score in zip(attempt.looks, _answer(attempt, metric), strict=True)
    ]


def _gains(look: Look) -> bool:
    return look.looks is None or bool(look.looks)


def _format(attempt: Attempt, metric: Metric) -> Scores:
    return [float(look.box is not None if look.looks is None else look.end == "answered") for look in attempt.looks]


def _iou(attempt: Attempt, metric: Metric) -> Scores:
    truths = [attempt.sample.box] if attempt.looks[0].looks is None else attempt.sample.true_looks or ()
    known = [truth for truth in truths if truth is not None]
    if not known:
        return [None] * len(attempt.looks)
    return [
        math.fsum(max((iou(box, truth) for box in _boxes(look)), default=0.0) for truth in known) / len(known)
        for look in attempt.looks
    ]


def _dual_iou(attempt: Attempt, metric: Metric) -> Scores:
    from visrl.rewards.dual_iou import dual_iou, true_boxes

    truths = true_boxes(attempt.sample, attempt.looks[0].whole.size)
    if not truths:
        return [None] * len(attempt.looks)
    return [dual_iou(_boxes(look), truths) for look in attempt.looks]


def _area(attempt: Attempt, metric: Metric) -> Scores:
    return [
        0.0 if _is_unread(look) else 1.0 - max((box.area for box in _boxes(look)), default=0.0)
        for look in attempt.looks
    ]


def _is_unread(look: Look) -> bool:
    """Whether a box was written that cannot be read."""
    return look.box is None and (look.looks is None or look.error is not None)


PARTS: dict[str, PartKind] = {
    "answer": PartKind(_answer, "the answer is right", compares=True),
    "outcome": PartKind(
        _outcome, "share of the crop's answers that are right, the same for each", compares=True,
        about_several="share of all answers after the first turn that are right",
    ),
    "crop_gain": PartKind(
        _crop_gain, "right with the crop and wrong without it", compares=True, without_crop=True,
        about_several="right after a look or more and wrong without a crop; 0 without a look",
    ),
    "format": PartKind(
        _format, "the box can be read", about_several="it came to an answer in the protocol's form",
    ),
    "iou": PartKind(
        _iou, "IoU with the true box; None without one",
        about_several="mean over the true looks of the best IoU that a look has with each; None where there are none",
    ),
    "dual_iou": PartKind(
        _dual_iou, "recall and precision with several true boxes; None without one",
        about_several="recall and precision of all looks",
    ),
    "judge": PartKind(None, "a model finds the answer right, beside the true one"),
    "critic": PartKind(None, "mean of the critic's scores of box and answer", about_several=""),
    "critic_box": PartKind(None, "the critic's score of the box", about_several=""),
    "critic_answer": PartKind(None, "the critic's score of the answer", about_several=""),
    "area": PartKind(
        _area, "1 − the box's share of the image", about_several="1 − the share of the largest look; 1 without a look"
    ),
    "model": PartKind(
        None, "what a reward model of stage: rm says of box and answer", argument="PATH", about_several=""
    ),
}  # fmt: skip


def kind_of(name: str) -> PartKind | None:
    """The row of the table that a name means; None for a function of the user's own."""
    head, _, argument = name.partition(":")
    kind = PARTS.get(head)
    return kind if kind is not None and bool(kind.argument) == bool(argument) else None


def wants_answer_without_crop(parts: Sequence[RewardPart]) -> bool:
    """Whether a part reads `Attempt.without`."""
    return any((kind := kind_of(part.name)) is not None and kind.without_crop for part in parts)


# --- Scoring ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scored:
    """The scores of attempts, by the label of the part, and their rewards: one for every look of every attempt."""

    parts: dict[str, list[Scores]]
    rewards: list[Scores]


def score_attempts(
    parts: Sequence[RewardPart], scorers: Mapping[str, Scorer], questions: Sequence[Sequence[Attempt]]
) -> list[Scored]:
    """What every attempt at every question is worth, by each part and in all: Σ weight × score. `scorers` are those of
    the parts by their labels, as `open_parts.opened_parts` gives them; each is asked once.

    A score of None leaves the look out: its reward is None. A part that the data says nothing for (IoU where there is
    no true box), or a function that is None for every attempt at a question, is left out of that question's rewards
    instead; a model or a server that failed throughout is not, for what the other parts say is another reward.
    """
    attempts = [one for own in questions for one in own]
    asked = {part.label: _scores_of(scorers[part.label], attempts) for part in parts}
    scores = {label: iter(rows) for label, rows in _with_conditions(parts, asked).items()}
    found = []
    for own in questions:
        table = {label: [next(rows) for _ in own] for label, rows in scores.items()}
        told = {label for label, rows in table.items() if any(score is not None for row in rows for score in row)}
        answered = bool(own and own[0].sample.answer)
        speaking = [
            part for part in parts if part.weight and (part.label in told or (answered and _is_asked(part, parts)))
        ]
        rewards = [
            [_reward(speaking, {label: rows[a][m] for label, rows in table.items()}) for m in range(len(one.looks))]
            for a, one in enumerate(own)
        ]
        found.append(Scored(table, rewards))
    return found


def _reward(parts: Sequence[RewardPart], scores: Mapping[str, float | None]) -> float | None:
    """The weighted sum of one look's scores; None where no part speaks, or one that counts is None."""
    told = [scores[part.label] for part in parts]
    if not parts or None in told:
        return None
    return sum(part.weight * score for part, score in zip(parts, told, strict=True) if score is not None)


def _is_asked(part: RewardPart, parts: Sequence[RewardPart]) -> bool:
    """Whether a model or a server is asked about a part, or about what it counts under."""
    kind = kind_of(part.name)
    condition = next((one for one in parts if one.label == part.when), None)
    return (kind is not None and kind.score is None) or (condition is not None and _is_asked(condition, parts))


def _with_conditions(parts: Sequence[RewardPart], asked: Mapping[str, list[Scores]]) -> dict[str, list[Scores]]:
    """The scores as they count: those of a bonus are 0 where its condition is not right, and None where it is None."""
    found: dict[str, list[Scores]] = {}

    def fill(part: RewardPart) -> list[Scores]:
        if part.label not in found:
            own = asked[part.label]
            if part.when is not None:  # no two wait for each other: a label holds that of its condition
                given = fill(next(one for one in parts if one.label == part.when))
                own = [list(map(_bonus, row, condition)) for row, condition in zip(own, given, strict=True)]
            found[part.label] = own
        return found[part.label]

    return {part.label: fill(part) for part in parts}


def _bonus(score: float | None, condition: float | None) -> float | None:
    return None if score is None or condition is None else score * (condition >= RIGHT)


def _scores_of(scorer: Scorer, attempts: Sequence[Attempt]) -> list[Scores]:
    sound = [
        replace(one, looks=looks) for one in attempts if (looks := tuple(x for x in one.looks if not is_failed(x)))
    ]
    told = iter([score for scores in (scorer(sound) if sound else []) for score in scores])
    return [[None if is_failed(look) else next(told) for look in one.looks] for one in attempts]
