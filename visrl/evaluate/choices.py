"""Questions of choice: the options as they are shown, in the order of the file, in every rotation, or shuffled.

An order decides much: where the right option always comes first, a model that always says "A" is always right. In every
rotation each option has each letter once, and such a model is right in one of so many. Knows no prompt and no score.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from visrl.engines.base import seed_of

OptionOrder = Literal["file", "rotations", "shuffle"]
MAX_OPTIONS = 26


@dataclass(frozen=True, slots=True)
class ChoiceQuestion:
    """A question, its options in the order in which they are shown, and the number of the right one.

    `is_fixed` where the question itself holds the options: their order cannot be changed.
    """

    stem: str
    options: tuple[str, ...]
    right: int
    is_fixed: bool = False

    @property
    def letters(self) -> dict[str, str]:
        """The options by their letters, in order."""
        return {letter_of(number): option for number, option in enumerate(self.options)}

    @property
    def truth(self) -> str:
        """The letter of the right option."""
        return letter_of(self.right)


def letter_of(number: int) -> str:
    """The letter of an option: A for 0."""
    return chr(65 + number)


def orders(choice: ChoiceQuestion, order: OptionOrder, seed: int, place: Sequence[str | int]) -> list[ChoiceQuestion]:
    """The question as often as it is to be asked, in each with the options in another order; once where the order is
    that of the file, is drawn by lot (by `seed` and the question's `place`), or cannot be changed."""
    if choice.is_fixed or order == "file":
        return [choice]
    numbers = list(range(len(choice.options)))
    if order == "shuffle":
        random.Random(seed_of(seed, *place, "options")).shuffle(numbers)
        return [_reordered(choice, numbers)]
    return [_reordered(choice, numbers[turn:] + numbers[:turn]) for turn in numbers]


def _reordered(choice: ChoiceQuestion, numbers: list[int]) -> ChoiceQuestion:
    return replace(
        choice, options=tuple(choice.options[number] for number in numbers), right=numbers.index(choice.right)
    )
