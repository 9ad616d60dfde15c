"""Opening the parts of an online reward once for a run: each becomes a `parts.Scorer`, asked once a step.

A part that needs a model or a server has a row in `parts.PARTS` whose `score` is None, and a row here: a context
manager that opens it before the first step, gives its scorer, and closes it after the last. It raises a `UserError`
where the part cannot be used (no such model, no key, a server that does not answer), so that nothing is sampled in
vain; a single attempt that cannot be told gets None, which is counted. A scorer knows no step: asked about the same
attempts again, as by a run that was killed and resumed, it must say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

from visrl.rewards.asked_parts import RewardSetting, open_critic, open_judge
from visrl.rewards.parts import Attempt, PartKind, RewardPart, Scorer, Scores, kind_of
from visrl.rewards.reward_function import load_function, opened_function
from visrl.zoom.config import LooksConfig

Opener = Callable[[RewardPart, RewardSetting], AbstractContextManager[Scorer]]


@contextmanager
def _reward_model(part: RewardPart, setting: RewardSetting) -> Iterator[Scorer]:
    from visrl.rewards.reward_model import open_reward_model  # which imports torch

    yield open_reward_model(part.argument, setting.encoder.settings, setting.crop_rule, setting.device)


OPENERS: dict[str, Opener] = {
    "model": _reward_model,
    "judge": open_judge,
    "critic": open_critic,
    "critic_box": open_critic,
    "critic_answer": open_critic,
}  # by the name of the row in `PARTS`


@contextmanager
def opened_parts(parts: Sequence[RewardPart], setting: RewardSetting) -> Iterator[dict[str, Scorer]]:
    """The scorers of a reward's parts, by their labels; what they hold is closed at the end.

    Raises:
        UserError: a part that cannot be used, with the remedy.
    """
    with ExitStack() as stack:
        yield {part.label: _opened(part, setting, stack) for part in parts}


def _opened(part: RewardPart, setting: RewardSetting, stack: ExitStack) -> Scorer:
    kind = kind_of(part.name)
    if kind is None:
        several = isinstance(setting.config, LooksConfig) and setting.config.looks_several_times
        return stack.enter_context(opened_function(part.name, setting.samples, several=several))
    if kind.score is None:
        return stack.enter_context(OPENERS[part.name.partition(":")[0]](part, setting))
    return _each(part, kind)


def _each(part: RewardPart, kind: PartKind) -> Scorer:
    """The scorer of a part that looks at one attempt after another."""
    score, metric = kind.score, part.metric or "exact"
    assert score is not None

    def scorer(attempts: Sequence[Attempt]) -> list[Scores]:
        return [score(one, metric) for one in attempts]

    return scorer


def load_parts(parts: Sequence[RewardPart]) -> None:
    """Import the functions of the user's own, before anything else is opened.

    Raises:
        ConfigError: one is not there, or is no function.
    """
    for part in parts:
        if kind_of(part.name) is None:
            load_function(part.name)
