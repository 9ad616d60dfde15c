"""A part of a reward that is a function of the user's own, called as TRL calls a reward function.

What it takes is checked before anything is sampled, and what it gives back before a step is taken: a fault of a reward
is said in a sentence and stops the run, for a score that was made up in its place would be learned from.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import reprlib
from collections.abc import Awaitable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from numbers import Real
from typing import TYPE_CHECKING, Any

from visrl.config import ConfigError
from visrl.errors import UserError
from visrl.plugins import load_plugin, raised
from visrl.records import Sample
from visrl.rewards.parts import Attempt, Scores

if TYPE_CHECKING:
    from visrl.rollout.steps import Look

# What TRL gives for a conversation, and what we know beside it. A column of the user's data of such a name is not
# handed on: under `box`, say, a function finds what the policy wrote.
OURS = (
    "prompts", "completions", "completion_ids", "answer", "solution", "question", "image", "id", "true_box", "box",
    "box_text",
)  # fmt: skip
LOOKS = "looks"  # beside them where the policy says how often it looks: all boxes, of which `box` is the last
KEPT_BACK = {*OURS, "prompt", "completion"}  # the last two are no columns of a reward function in TRL, either


class RewardError(UserError, RuntimeError):
    """A reward function that raised, or gave back what is no scores; the message says which and for what."""


class RewardFunction:
    """A `parts.Scorer`: a user's function, with every argument by keyword, each a list with an entry for every look."""

    def __init__(self, name: str, function: Any, columns: Sequence[str] = (), *, several: bool = False) -> None:
        self.name = name
        self.function = function
        self.columns = [column for column in columns if not several or column != LOOKS]  # of the data, beside ours
        self.several = several  # whether the policy says how often it looks
        self._loop = _Loop()

    def __call__(self, attempts: Sequence[Attempt]) -> list[Scores]:
        """The scores of all looks.

        Raises:
            RewardError: the function raised, or gave back what is no scores.
        """
        rows = [(one.sample, look) for one in attempts for look in one.looks]
        try:
            looks = {LOOKS: [[one.box for one in look.looks or ()] for _, look in rows]} if self.several else {}
            given: Any = self.function(**_columns(rows, self.columns), **looks)
            if inspect.isawaitable(given):
                given = self._loop.wait_for(given)
        except (Exception, SystemExit) as error:  # whatever a user's function raises is told, and ends the run
            raise RewardError(f"reward {self.name} stopped with {raised(error)}") from error
        scores = iter(_checked(self.name, given, [sample for sample, _ in rows]))
        return [[next(scores) for _ in one.looks] for one in attempts]

    def check_signature(self) -> None:
        """Make sure that the function takes what it is given.

        Raises:
            ConfigError: it wants what is no column, or does not take every column.
        """
        try:
            signature = inspect.signature(self.function)
        except (TypeError, ValueError):  # one that is not written in Python does not say
            return
        columns = [*OURS, *([LOOKS] if self.several else []), *self.columns]
        try:
            signature.bind(**dict.fromkeys(columns))
        except TypeError as error:
            raise ConfigError(
                f"reward {self.name}{signature}: {error}; it is called as TRL calls one, with every column by "
                f"keyword ({', '.join(columns)}): let it take **kwargs, and want no other argument"
            ) from error

    def close(self) -> None:
        """Close the event loop of an async function."""
        self._loop.close()


class _Loop:
    """One event loop for all calls of a run, so that an async function may keep its connections; in a thread of its
    own, for the caller (a notebook) may have a loop that runs."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._runner = asyncio.Runner()

    def wait_for(self, work: Awaitable[Any]) -> Any:
        self._thread = self._thread or ThreadPoolExecutor(1, "reward")
        return self._thread.submit(self._runner.run, _waited(work)).result()

    def close(self) -> None:
        if self._thread is not None:
            self._thread.submit(self._runner.close).result()
            self._thread.shutdown()


async def _waited(work: Awaitable[Any]) -> Any:
    return await work


def load_function(name: str, samples: Sequence[Sample] = (), *, several: bool = False) -> RewardFunction:
    """The function that `module:function` names, for questions whose rows may have columns of their own, and a policy
    that may say how often it looks (`several`).

    Raises:
        ConfigError: it is not there, or is no function.
    """
    function = load_plugin(name, "reward")
    if not callable(function):
        raise ConfigError(f"reward {name!r} is no function of completions")
    rows = [sample.raw for sample in samples if isinstance(sample.raw, dict)]
    columns = list(dict.fromkeys(key for row in rows for key in row if _is_own(key)))
    return RewardFunction(name, function, columns, several=several)


@contextmanager
def opened_function(name: str, samples: Sequence[Sample], *, several: bool = False) -> Iterator[RewardFunction]:
    """`load_function`, found to take its arguments, and closed at the end.

    Raises:
        ConfigError: it is not there, is no function, or takes other arguments.
    """
    function = load_function(name, samples, several=several)
    function.check_signature()
    try:
        yield function
    finally:
        function.close()


def _is_own(key: Any) -> bool:
    return isinstance(key, str) and key not in KEPT_BACK


def _columns(rows: Sequence[tuple[Sample, Look]], columns: Sequence[str]) -> dict[str, list[Any]]:
    """The arguments of a reward function, made for one call: it may do with them what it likes."""
    samples, looks = [sample for sample, _ in rows], [look for _, look in rows]
    ours: dict[str, list[Any]] = {
        "prompts": [[{"role": "user", "content": sample.question}] for sample in samples],
        "completions": [[{"role": "assistant", "content": look.answer or ""}] for look in looks],
        "completion_ids": [list(look.answer_completion.ids) if look.answer_completion else [] for look in looks],
        "answer": [sample.answer for sample in samples],
        "solution": [sample.answer for sample in samples],
        "question": [sample.question for sample in samples],
        "image": [sample.image for sample in samples],
        "id": [sample.id for sample in samples],
        "true_box": [sample.box for sample in samples],
        "box": [look.box for look in looks],
        "box_text": [look.text for look in looks],
    }
    raws = [sample.raw if isinstance(sample.raw, dict) else {} for sample in samples]
    return {**ours, **{name: [_copied(row.get(name)) for row in raws] for name in columns}}


def _copied(value: Any) -> Any:
    """A JSON value that shares no list or object with `value`."""
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}
    return [_copied(one) for one in value] if isinstance(value, list) else value


# --- What it gives back -----------------------------------------------------------------------------------------------


def _checked(name: str, given: Any, samples: Sequence[Sample]) -> Scores:
    scores = given.tolist() if callable(getattr(given, "tolist", None)) else given  # of NumPy, torch and pandas
    if not isinstance(scores, list | tuple):
        raise RewardError(f"reward {name} gave back {type(given).__name__}, and not a list of numbers")
    if len(scores) != len(samples):
        raise RewardError(f"reward {name} gave back {len(scores)} numbers for {len(samples)} completions")
    return [_number(name, sample, score) for sample, score in zip(samples, scores, strict=True)]


def _number(name: str, sample: Sample, given: Any) -> float | None:
    """A score as a float; None where there is none.

    Raises:
        RewardError: it is no finite real number.
    """
    if given is None:
        return None
    try:
        score = given.item() if callable(getattr(given, "item", None)) else given  # a number of NumPy or torch
        if isinstance(score, Real) and not isinstance(score, bool) and math.isfinite(score):
            return float(score)
    except (ValueError, RuntimeError, OverflowError):  # an array of several, or a whole number that no float holds
        pass
    remedy = "write float(…) around it" if type(given).__name__.startswith("bool") else "None says that there is none"
    raise RewardError(f"reward {name}: sample {sample.id!r}: {reprlib.repr(given)} is no number; {remedy}"[:500])
