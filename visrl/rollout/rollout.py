"""Sampled rollouts in batches: N rounds of two looks at each question, as in Algorithm 1 of VisRL.

The steps are those of steps.py; here the policy is asked for many at a time. A rollout that fails is a record with its
error, `picture` (it cannot be opened) or `prompt` beside those of `Look`. Nothing here scores: see rewards/.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from visrl.box import Box, BoxError, CropRule, Size
from visrl.codecs import Codec
from visrl.config import ConfigError
from visrl.conversation import Conversation, PromptError, View, open_view
from visrl.engines.base import Policy, Sampling, seed_of
from visrl.images import ImageError
from visrl.records import Picture, Sample, Trajectory
from visrl.rollout.diversity import TRIGGER, needs_replacing, random_box_apart
from visrl.rollout.protocols import VISRL, LookProtocol
from visrl.rollout.steps import Look, answer_request, cut, finish, look_of, with_box

BATCH = 64  # questions asked together, where no config says how many

Refusal = ImageError | PromptError  # why a question cannot be asked


@dataclass(frozen=True, slots=True)
class RolloutSettings:
    """How rollouts are sampled: N rounds of two branches each, as in Algorithm 1.

    Raises:
        ConfigError: a number is outside its range.
    """

    rounds: int = 5
    temperature: float = 1.0
    top_p: float = 1.0
    trigger: float = TRIGGER
    diversity: bool = True
    crop_rule: CropRule = "exact"
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "rounds must be at least 1": self.rounds >= 1,
            "temperature must be at least 0": self.temperature >= 0,
            "top_p must be above 0 and at most 1": 0 < self.top_p <= 1,
            "trigger must be from 0 to 1": 0 <= self.trigger <= 1,
        }
        for said, holds in ranges.items():
            if not holds:
                raise ConfigError(said)

    @property
    def branches(self) -> list[tuple[int, int]]:
        """Round and branch of every look at a question, in order."""
        return [(round_, branch) for round_ in range(self.rounds) for branch in (0, 1)]


@dataclass(frozen=True, slots=True)
class OpenedQuestion:
    """A sample that can be asked: its image, opened, the size the processor gives it, and the first conversation."""

    sample: Sample
    whole: View
    processed: Size
    talk: Conversation


def roll_out(
    policy: Policy, samples: Sequence[Sample], settings: RolloutSettings, root: str | Path | None = None
) -> list[Trajectory]:
    """All trajectories of some questions: `rounds` × 2 branches each, in order of sample, round and branch.

    `policy` is an engine with a codec, as `LoadedPolicy.engine`; relative paths of images start from `root`. All
    questions are one batch. A failed rollout is a trajectory with its `error`.
    """
    return [
        _trajectory(sample, round_, branch, policy.name, looks[n] if isinstance(looks, list) else looks)
        for sample, looks in zip(samples, sampled_looks(policy, samples, settings, root), strict=True)
        for n, (round_, branch) in enumerate(settings.branches)
    ]


def _trajectory(sample: Sample, round_: int, branch: int, engine: str, look: Look | Refusal) -> Trajectory:
    if not isinstance(look, Look):
        return Trajectory(sample.id, round_, branch, "", None, "sampled", None, engine, 0, failure(look), sample.repeat)
    return Trajectory(
        sample.id, round_, branch, look.text, look.box, look.origin, look.answer, engine, look.seed, look.error,
        sample.repeat,
    )  # fmt: skip


def sampled_looks(
    policy: Policy, samples: Sequence[Sample], settings: RolloutSettings, root: str | Path | None = None
) -> list[list[Look] | Refusal]:
    """The looks at each question, in order of `settings.branches`, answered; or why it cannot be asked.

    Every completion has its own seed, named by sample, round, branch and step, so a question's looks do not depend on
    when or with which others it is asked.
    """
    policy.forget()  # what a batch computes, and how much it keeps, shall depend on its members alone
    opened = [open_question(policy, sample, VISRL.focus, root) for sample in samples]
    questions = [question for question in opened if isinstance(question, OpenedQuestion)]
    seeds = [
        [seed_of(settings.seed, *question.sample.place, r, b, "box") for r, b in settings.branches]
        for question in questions
    ]
    sampling = Sampling(settings.temperature, settings.top_p, VISRL.box_tokens)
    groups = look_all(policy, questions, sampling, seeds)
    if settings.diversity:
        pairs = zip(questions, groups, strict=True)
        groups = [_diversified(question, looks, settings, policy.codec) for question, looks in pairs]
    flat = [
        replace(look, seed=seed_of(settings.seed, *question.sample.place, r, b, "answer"))
        for question, looks in zip(questions, groups, strict=True)
        for look, (r, b) in zip(looks, settings.branches, strict=True)
    ]
    sampling = Sampling(settings.temperature, settings.top_p, VISRL.answer_tokens)
    answered = iter(answer_all(policy, flat, sampling, settings.crop_rule))
    return [
        [next(answered) for _ in settings.branches] if isinstance(question, OpenedQuestion) else question
        for question in opened
    ]


# --- The steps in batches, which greedy rollouts share ----------------------------------------------------------------


def open_question(
    policy: Policy, sample: Sample, ask: Callable[[str, View], Conversation], root: str | Path | None = None
) -> OpenedQuestion | Refusal:
    """A question with its image and the conversation that `ask` opens about it; or the error in its place, where the
    image cannot be used or the question not be put to the model."""
    try:
        whole = open_view(Picture(sample.image, size=sample.size), root)
        return OpenedQuestion(sample, whole, policy.processed_size(whole.size), ask(sample.question, whole))
    except (ImageError, PromptError) as error:
        return error


def failure(refused: Refusal) -> str:
    """What the record of a question says that could not be asked."""
    return f"{'picture' if isinstance(refused, ImageError) else 'prompt'}: {refused}"


def look_all(
    policy: Policy, questions: Sequence[OpenedQuestion], sampling: Sampling, seeds: Sequence[Sequence[int]]
) -> list[list[Look]]:
    """Step 1 of every question, one look per seed."""
    completions = policy.complete([question.talk for question in questions], sampling, seeds)
    return [
        [look_of(one.sample.question, one.whole, completion, policy.codec, one.processed) for completion in own]
        for one, own in zip(questions, completions, strict=True)
    ]


def answer_all(
    policy: Policy, looks: Sequence[Look], sampling: Sampling, crop_rule: CropRule, protocol: LookProtocol = VISRL
) -> list[Look]:
    """Step 2 of every look that has a box, from the crop of that box; the others stay as they are."""
    done = list(looks)
    ready: list[tuple[int, Conversation]] = []
    for n, look in enumerate(looks):
        if look.box is None:
            continue
        done[n] = cut(look, crop_rule)
        try:
            ready.append((n, answer_request(done[n], protocol)))
        except PromptError as error:  # what the policy wrote may hold anything
            done[n] = replace(done[n], error=failure(error))
    completions = policy.complete([talk for _, talk in ready], sampling, [[looks[n].seed] for n, _ in ready])
    for (n, _), (completion,) in zip(ready, completions, strict=True):
        done[n] = finish(done[n], completion)
    return done


# --- The diversity controller -----------------------------------------------------------------------------------------


def _diversified(
    question: OpenedQuestion, looks: Sequence[Look], settings: RolloutSettings, codec: Codec
) -> list[Look]:
    """The looks at a question, the second of a round replaced where its box says the same as the first."""
    kept: list[Look] = []
    for r in range(settings.rounds):
        first, second = looks[2 * r : 2 * r + 2]
        if first.box and second.box and needs_replacing(first.box, second.box, settings.trigger):
            seed = seed_of(settings.seed, *question.sample.place, r, 1, "random")
            second = _elsewhere(second, random_box_apart(first.box, second.box, seed), codec, question.processed)
        kept += [first, second]
    return kept


def _elsewhere(look: Look, box: Box | None, codec: Codec, processed: Size) -> Look:
    """`look` at another box in place of the policy's, as read back from the text that stands for it."""
    look = replace(look, origin="random", text="", box=None, error="no_room", box_completion=None)
    if box is None:
        return look
    look = with_box(look, box, codec, processed)
    try:
        return replace(look, box=codec.parse(look.text, look.whole.size, processed), error=None)
    except BoxError as error:
        return replace(look, box=None, error=f"no_room: {error}")
