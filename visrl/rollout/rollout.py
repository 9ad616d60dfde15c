"""Rollouts: where to look, then what is there. One code path for generation, evaluation, training curves and serving.

A rollout that fails is a record with its error, whose first word says what failed: `picture` (it cannot be opened),
`engine` (no text came), `box` (the text is no box) or `no_room` (the diversity controller found no place). An empty
text is a reply: a wrong one. What a model thinks aloud is no part of one. Nothing here scores: see critic.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from visrl.box import Box, BoxError, CropRule, Size
from visrl.conversation import Conversation, PromptError, View, crop_view, focus_conversation, open_view
from visrl.engines.base import Completion, Policy, Sampling, seed_of
from visrl.images import ImageError
from visrl.records import Origin, Picture, Place, Sample, Trajectory
from visrl.replies import spoken
from visrl.rollout.diversity import TRIGGER, needs_replacing, random_box_apart
from visrl.rollout.protocols import VISRL, LookProtocol

MAX_BOX_TOKENS = VISRL.box_tokens
MAX_ANSWER_TOKENS = VISRL.answer_tokens

Refusal = ImageError | PromptError  # why a question cannot be asked


@dataclass(frozen=True, slots=True)
class RolloutSettings:
    """How trajectories are drawn: N rounds of two branches each, as in Algorithm 1."""

    rounds: int = 5
    temperature: float = 1.0
    top_p: float = 1.0
    trigger: float = TRIGGER
    diversity: bool = True
    crop_rule: CropRule = "exact"
    seed: int = 0


@dataclass(slots=True)
class Look:
    """One focus on its way to an answer: what was written, where it points, or why it points nowhere."""

    question: str
    whole: View
    text: str
    box: Box | None
    error: str | None = None
    answer: str | None = None
    origin: Origin = "sampled"
    seed: int = 0
    detail: View | None = field(default=None, repr=False)

    @property
    def box_pixels(self) -> tuple[float, float, float, float] | None:
        """The box's corners (x0, y0, x1, y1) in pixels of the picture, which is upright."""
        return self.box.to_pixels(self.whole.size) if self.box else None

    @property
    def crop(self) -> Image.Image | None:
        """What the answer was given from beside the whole picture, in the picture's own pixels."""
        return self.detail.image if self.detail else None


def read_box(policy: Policy, text: str, size: Size) -> Box:
    """The box in a policy's text about a picture of `size`.

    Raises:
        BoxError: there is none.
    """
    return policy.codec.parse(text, size, policy.processed_size(size))


def look_at(policy: Policy, question: str, whole: View, completion: Completion) -> Look:
    """The look that a step-1 completion asks for."""
    if completion.text is None:
        return Look(question, whole, "", None, _no_text(completion))
    text = spoken(completion.text)
    try:
        return Look(question, whole, text, read_box(policy, text, whole.size))
    except BoxError as error:
        cut = "; the reply ended inside its thinking" if completion.text and not text else ""
        return Look(question, whole, text, None, f"box: {error}{cut}")


def _no_text(completion: Completion) -> str:
    return f"{'prompt' if completion.refused else 'engine'}: {completion.error or 'no text'}"


def begin(
    policy: Policy, sample: Sample, ask: Callable[[str, View], Conversation], root: str | Path | None = None
) -> tuple[View, Conversation] | Refusal:
    """The picture of a question and the conversation that `ask` opens about it; or the error in their place, where the
    picture cannot be used or the question not be put to the model."""
    try:
        whole = open_view(Picture(sample.image, size=sample.size), root)
        policy.processed_size(whole.size)
        return whole, ask(sample.question, whole)
    except (ImageError, PromptError) as error:
        return error


def failure(refused: Refusal) -> str:
    """What the record of a question says that could not be asked."""
    return f"{'picture' if isinstance(refused, ImageError) else 'prompt'}: {refused}"


def answer_all(
    policy: Policy, looks: Sequence[Look], sampling: Sampling, crop_rule: CropRule, protocol: LookProtocol = VISRL
) -> None:
    """Answer every look that has a box, from the crop of that box; fills in `answer` or `error`."""
    answer = protocol.answer
    assert answer is not None  # a protocol that asks for boxes only has nothing to answer
    ready: list[tuple[Look, Conversation]] = []
    for look in looks:
        if look.box is None:
            continue
        look.detail = crop_view(look.whole, Picture(look.whole.key, look.box), crop_rule)
        try:
            ready.append((look, answer(look.question, look.whole, look.text, look.detail)))
        except PromptError as error:  # what the policy wrote may hold anything
            look.error = failure(error)
    answers = policy.complete([talk for _, talk in ready], sampling, [[look.seed] for look, _ in ready])
    for (look, _), (completion,) in zip(ready, answers, strict=True):
        hear(look, completion)


def hear(look: Look, completion: Completion) -> None:
    """Put the answer of a completion, or why there is none, into the look that asked for it."""
    look.answer = None if completion.text is None else spoken(completion.text)
    look.error = _no_text(completion) if completion.text is None else None


def roll_out(
    policy: Policy, samples: Sequence[Sample], settings: RolloutSettings, root: str | Path | None = None
) -> list[Trajectory]:
    """All trajectories of some questions: `rounds` × 2 branches each, in order of sample, round and branch.

    Every draw has its own seed, named by sample, round, branch and step, so a question's trajectories do not depend on
    when or with which others it is asked.
    """
    policy.forget()  # what a batch computes, and how much it keeps, shall depend on its members alone
    branches = [(r, b) for r in range(settings.rounds) for b in (0, 1)]
    starts = [begin(policy, sample, focus_conversation, root) for sample in samples]
    opened = [(sample, *start) for sample, start in zip(samples, starts, strict=True) if isinstance(start, tuple)]
    seeds = [[seed_of(settings.seed, *sample.place, r, b, "box") for r, b in branches] for sample, _, _ in opened]
    sampling = Sampling(settings.temperature, settings.top_p, MAX_BOX_TOKENS)
    completions = policy.complete([talk for _, _, talk in opened], sampling, seeds)
    looks: list[list[Look]] = []
    for (sample, whole, _), drawn in zip(opened, completions, strict=True):
        own = [look_at(policy, sample.question, whole, completion) for completion in drawn]
        if settings.diversity:
            for r in range(settings.rounds):
                _diversify(policy, own[2 * r], own[2 * r + 1], settings, sample.place, r)
        for look, (r, b) in zip(own, branches, strict=True):
            look.seed = seed_of(settings.seed, *sample.place, r, b, "answer")
        looks.append(own)
    sampling = Sampling(settings.temperature, settings.top_p, MAX_ANSWER_TOKENS)
    answer_all(policy, [look for own in looks for look in own], sampling, settings.crop_rule)
    rolled = iter(looks)
    trajectories: list[Trajectory] = []
    for sample, start in zip(samples, starts, strict=True):
        if not isinstance(start, tuple):
            trajectories += [_failed(sample, r, b, policy.name, failure(start)) for r, b in branches]
            continue
        trajectories += [
            Trajectory(
                sample.id, r, b, look.text, look.box, look.origin, look.answer, policy.name, look.seed, look.error,
                sample.repeat,
            )
            for look, (r, b) in zip(next(rolled), branches, strict=True)
        ]  # fmt: skip
    return trajectories


def _diversify(policy: Policy, first: Look, second: Look, settings: RolloutSettings, place: Place, round_: int) -> None:
    """Replace the second box of a round where it says the same as the first; its text comes from the codec, too."""
    if first.box is None or second.box is None or not needs_replacing(first.box, second.box, settings.trigger):
        return
    box = random_box_apart(first.box, second.box, seed_of(settings.seed, *place, round_, 1, "random"))
    second.origin = "random"
    if box is None:
        second.box, second.text, second.error = None, "", "no_room"
        return
    size = second.whole.size
    second.text = policy.codec.format(box, size, policy.processed_size(size))
    try:
        second.box = read_box(policy, second.text, size)
    except BoxError as error:
        second.box, second.error = None, f"no_room: {error}"


def _failed(sample: Sample, round_: int, branch: int, engine: str, error: str) -> Trajectory:
    return Trajectory(sample.id, round_, branch, "", None, "sampled", None, engine, 0, error, sample.repeat)
