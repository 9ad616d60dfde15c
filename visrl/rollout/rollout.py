"""Sampled rollouts in batches: N rounds of two looks at each question, as in Algorithm 1 of VisRL, M answers to each.

The steps are those of steps.py; here the policy is asked for many at a time. A rollout that fails is a record with its
error, `picture` (it cannot be opened) or `prompt` beside those of `Look`. Nothing here scores: see rewards/.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from visrl.box import Box, BoxError, CropRule, Size
from visrl.codecs import Codec
from visrl.config import ConfigError
from visrl.conversation import Conversation, PromptError, View, open_view
from visrl.engines.base import Completion, Policy, Sampling, seed_of
from visrl.images import ImageError
from visrl.records import Picture, Sample, Trajectory
from visrl.rollout.diversity import TRIGGER, needs_replacing, random_box_apart
from visrl.rollout.protocols import VISRL, LookProtocol
from visrl.rollout.steps import Look, answer_request, cut, finish, look_of, with_box

BATCH = 64  # questions asked together, where no config says how many

Refusal = ImageError | PromptError  # why a question cannot be asked


@dataclass(frozen=True, slots=True)
class RolloutSettings:
    """How rollouts are sampled: N rounds of two branches each, as in Algorithm 1, and `answers` from every crop.

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
    answers: int = 1

    def __post_init__(self) -> None:
        ranges = {
            "rounds must be at least 1": self.rounds >= 1,
            "answers must be at least 1": self.answers >= 1,
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
    policy: Policy,
    samples: Sequence[Sample],
    settings: RolloutSettings,
    root: str | Path | None = None,
    sampled: Counter[str] | None = None,
) -> list[Trajectory]:
    """All trajectories of some questions: `rounds` × 2 branches each, in order of sample, round and branch.

    `policy` is an engine with a codec, as `LoadedPolicy.engine`; relative paths of images start from `root`. All
    questions are one batch. A failed rollout is a trajectory with its `error`; one of several answers that did not
    come fails the whole. `sampled` is added how many tokens were sampled of each step ("box", "answer").
    """
    found = sampled_looks(policy, samples, settings, root, sampled)
    return [
        _trajectory(sample, round_, branch, policy.name, looks[n] if isinstance(looks, list) else looks)
        for sample, looks in zip(samples, found, strict=True)
        for n, (round_, branch) in enumerate(settings.branches)
    ]


def _trajectory(sample: Sample, round_: int, branch: int, engine: str, looks: list[Look] | Refusal) -> Trajectory:
    if not isinstance(looks, list):
        return Trajectory(
            sample.id, round_, branch, "", None, "sampled", None, engine, 0, failure(looks), sample.repeat
        )
    look = next((one for one in looks if one.error), looks[0])
    answers = tuple(one.answer for one in looks if one.answer is not None)
    return Trajectory(
        sample.id, round_, branch, look.text, look.box, look.origin, None if look.error else look.answer, engine,
        looks[0].seed, look.error, sample.repeat, answers if len(looks) > 1 and not look.error else (),
    )  # fmt: skip


def sampled_looks(
    policy: Policy,
    samples: Sequence[Sample],
    settings: RolloutSettings,
    root: str | Path | None = None,
    sampled: Counter[str] | None = None,
) -> list[list[list[Look]] | Refusal]:
    """The looks at each question, in order of `settings.branches`, each once for every answer sampled from its crop; or
    why it cannot be asked. `sampled` is added the tokens of each step.

    Every completion has its own seed, named by sample, round, branch and step (and by its number from the second answer
    on), so a question's looks do not depend on when or with which others it is asked.
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
    count = Counter(box=_tokens(look.box_completion for looks in groups for look in looks))
    if settings.diversity:
        pairs = zip(questions, groups, strict=True)
        groups = [_diversified(question, looks, settings, policy.codec) for question, looks in pairs]
    flat = [look for looks in groups for look in looks]
    seeds = [
        [
            seed_of(settings.seed, *question.sample.place, r, b, "answer", *([m] if m else []))
            for m in range(settings.answers)
        ]
        for question in questions
        for r, b in settings.branches
    ]
    sampling = Sampling(settings.temperature, settings.top_p, VISRL.answer_tokens)
    answered = answers_all(policy, flat, sampling, settings.crop_rule, seeds)
    count["answer"] = _tokens(look.answer_completion for looks in answered for look in looks)
    if sampled is not None:
        sampled.update(count)
    rest = iter(answered)
    return [
        [next(rest) for _ in settings.branches] if isinstance(question, OpenedQuestion) else question
        for question in opened
    ]


def _tokens(completions: Iterable[Completion | None]) -> int:
    return sum(completion.tokens for completion in completions if completion is not None)


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
    seeds = [[look.seed] for look in looks]
    return [look for (look,) in answers_all(policy, looks, sampling, crop_rule, seeds, protocol)]


def answers_all(
    policy: Policy, looks: Sequence[Look], sampling: Sampling, crop_rule: CropRule,
    seeds: Sequence[Sequence[int]], protocol: LookProtocol = VISRL,
) -> list[list[Look]]:  # fmt: skip
    """`answer_all` with several answers from one crop: every look as often as it has seeds."""
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
    found = [[replace(look, seed=seed) for seed in own] for look, own in zip(done, seeds, strict=True)]
    completions = policy.complete([talk for _, talk in ready], sampling, [seeds[n] for n, _ in ready])
    for (n, _), own in zip(ready, completions, strict=True):
        found[n] = [finish(look, completion) for look, completion in zip(found[n], own, strict=True)]
    return found


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
