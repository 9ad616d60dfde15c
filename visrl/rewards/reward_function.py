"""A part of a reward that is a function of the user's own, called as TRL calls a reward function.

What it gives back is checked: a fault of a reward is said in a sentence and stops the run, for a score that was made up
in its place would be learned from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

from visrl.config import ConfigError
from visrl.errors import UserError
from visrl.plugins import load_plugin, raised
from visrl.records import Sample
from visrl.rewards.parts import Attempt, Scores

if TYPE_CHECKING:
    from visrl.rollout.steps import Look


class RewardError(UserError, RuntimeError):
    """A reward function that raised, or gave back what is no scores; the message says which and for what."""


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """A `parts.Scorer`: the function that `module:function` names, with every argument by keyword, each a list with an
    entry for every look."""

    name: str
    function: Any

    def __call__(self, attempts: Sequence[Attempt]) -> list[Scores]:
        """The scores of all looks.

        Raises:
            RewardError: the function raised, or gave back what is no scores.
        """
        rows = [(one.sample, look) for one in attempts for look in one.looks]
        try:
            given: Any = self.function(**_columns(rows))
        except Exception as error:  # whatever a user's function raises: it is told, with its place, and ends the run
            raise RewardError(f"reward {self.name} stopped with {raised(error)}") from error
        scores = iter(_checked(self.name, given, [sample for sample, _ in rows]))
        return [[next(scores) for _ in one.looks] for one in attempts]


def load_function(name: str) -> RewardFunction:
    """The function that `module:function` names.

    Raises:
        ConfigError: it is not there, or is no function.
    """
    function = load_plugin(name, "reward")
    if not callable(function):
        raise ConfigError(f"reward {name!r} is no function of completions")
    return RewardFunction(name, function)


def _checked(name: str, given: Any, samples: Sequence[Sample]) -> Scores:
    try:
        scores = list(given)
    except TypeError as error:
        raise RewardError(f"reward {name} gave back {type(given).__name__}, and not a list of numbers") from error
    if len(scores) != len(samples):
        raise RewardError(f"reward {name} gave back {len(scores)} numbers for {len(samples)} completions")
    for sample, score in zip(samples, scores, strict=True):
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
