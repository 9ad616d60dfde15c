"""Critics: one score for the box, one for each answer, in [0, 1] or None where none could be read.

A critic sees the question, the image, the crop window, the reference answer and the answer; never a true box. The
oracle for drawn scenes knows what is drawn and judges exactly; for everything else a model is asked.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from visrl.box import Box, CropRule, Size, Window, crop_window
from visrl.conversation import Conversation, Message, PromptError, View, crop_view, open_view
from visrl.engines.base import Engine, Sampling, seed_of
from visrl.images import ImageError
from visrl.prompts import critic_answer_prompt, critic_box_prompt, without_marks
from visrl.records import Picture, RecordError, Sample, Trajectory, Verdict
from visrl.rewards.metrics import exact_match
from visrl.rewards.reply_scores import read_score
from visrl.scenes import GLYPH_HEIGHT, SIDE, PixelBox, Tag, find_question

ILLEGIBLE_HEIGHT = 5.0  # px of a shown digit up to which it cannot be read (in the whole image it has 3.5)
LEGIBLE_HEIGHT = 16.0  # px from which on it counts as fully legible
MAX_REPLY_TOKENS = 64  # of a model critic: room for the JSON and a few words
RETRY_TEMPERATURE = 0.7  # a greedy reply that cannot be read would come again


class Critic(Protocol):
    """Scores trajectories. One with an error gets no scores, and one of several looks that of its answer alone: a look
    is worth what comes after it."""

    name: str

    @property
    def sampled_tokens(self) -> int:
        """What models have written for it so far; 0 where none is asked."""
        ...

    def judge(self, samples: Sequence[Sample], trajectories: Sequence[Trajectory]) -> list[Verdict]:
        """One verdict per trajectory, in order; `samples` holds the sample of each."""
        ...


class SceneOracle:
    """An exact critic for drawn scenes.

    The box score asks whether the crop holds what the question needs and whether it can be read there: the share of
    the content inside the crop × its legibility at the size the crop is shown with × (half + half the share of the
    tag inside, for a number without its tag answers nothing). The answer score is 1 or 0.
    """

    name = "oracle"
    sampled_tokens = 0

    def __init__(self, shown_size: Callable[[Size], Size], crop_rule: CropRule = "exact") -> None:
        self.shown_size = shown_size  # the size in pixels at which a crop of some size is shown
        self.crop_rule: CropRule = crop_rule

    def judge(self, samples: Sequence[Sample], trajectories: Sequence[Trajectory]) -> list[Verdict]:
        return [self._judge(*pair) for pair in zip(samples, trajectories, strict=True)]

    def _judge(self, sample: Sample, trajectory: Trajectory) -> Verdict:
        if not trajectory.can_be_judged:
            return without_scores(trajectory)
        answers = [exact_match(answer, [sample.answer]) for answer in trajectory.all_answers]
        box = scored_box(trajectory)
        return verdict_of(trajectory, None if box is None else self.box_score(sample, box), answers)

    def box_score(self, sample: Sample, box: Box) -> float:
        """How well the crop of `box` lets the question be answered, in [0, 1]; of several tags that must be seen, the
        worst counts.

        Raises:
            RecordError: the sample is not one of a drawn scene.
        """
        try:
            scene, question = find_question(sample.id)
        except ValueError as error:
            raise RecordError(f"the oracle judges drawn scenes only: {error}") from error
        window = crop_window(box, (SIDE, SIDE), self.crop_rule)
        size = (window[2] - window[0], window[3] - window[1])
        shown = self.shown_size(size)
        scale = min(shown[0] / size[0], shown[1] / size[1])
        return min(_seen(scene.tags[index], window, scale) for index in question.targets)


def verdict_of(tried: Trajectory, box: float | None, answers: Sequence[float | None], raw: str = "") -> Verdict:
    """The verdict on a trajectory, from the score of its box and of each of its answers."""
    several = tuple(answers) if len(answers) > 1 else ()
    return Verdict(
        tried.sample_id, tried.round, tried.branch, box, answers[0], raw, tried.repeat, several, path=tried.path
    )


def scored_box(tried: Trajectory) -> Box | None:
    """The box that a critic scores: that of the one look; none of several."""
    return tried.box if tried.end is None else None


def without_scores(tried: Trajectory) -> Verdict:
    """The verdict on a trajectory that has no box or no answer."""
    return verdict_of(tried, None, [None], tried.error or "nothing to judge")


def _seen(tag: Tag, window: Window, scale: float) -> float:
    """How well what a tag holds can be read in a crop that is shown at `scale`."""
    height = GLYPH_HEIGHT * tag.scale * scale
    legible = min(1.0, max(0.0, (height - ILLEGIBLE_HEIGHT) / (LEGIBLE_HEIGHT - ILLEGIBLE_HEIGHT)))
    return _share(tag.content, window) * legible * (0.5 + 0.5 * _share(tag.box, window))


def _share(part: PixelBox, window: tuple[float, float, float, float]) -> float:
    """The share of `part` that lies inside `window`."""
    width = min(part[2], window[2]) - max(part[0], window[0])
    height = min(part[3], window[3]) - max(part[1], window[1])
    return max(0.0, width) * max(0.0, height) / ((part[2] - part[0]) * (part[3] - part[1]))


# --- Models as critics ------------------------------------------------------------------------------------------------

# What is judged: the same crop or answer of the same question is asked about once a batch.
OpinionKey = tuple[str | int, ...]


@dataclass(slots=True)
class Opinion:
    """What a critic replied about one thing, try after try; `score` is None while no reply could be read."""

    replies: list[str] = field(default_factory=list)
    score: float | None = None
    error: str | None = None  # the engine gave no text


class ModelCritic:
    """A model that scores the box by its crop, and the answer by the whole image, both against the reference answer.

    The paper's critic is the original base model. It is asked greedily first, and again with sampling, up to
    `attempts` times in all, while its reply cannot be read (`visrl.rewards.reply_scores.read_score`).
    """

    def __init__(
        self,
        engine: Engine,
        *,
        crop_rule: CropRule = "exact",
        root: str | Path | None = None,
        attempts: int = 3,
        max_tokens: int = MAX_REPLY_TOKENS,
        score_boxes: bool = True,
        seed: int = 0,
    ) -> None:
        self.engine = engine
        self.name = f"model:{engine.name}"
        self.crop_rule: CropRule = crop_rule
        self.root = root
        self.attempts = attempts
        self.max_tokens = max_tokens
        self.score_boxes = score_boxes
        self.seed = seed
        self.sampled_tokens = 0

    def judge(self, samples: Sequence[Sample], trajectories: Sequence[Trajectory]) -> list[Verdict]:
        wholes: dict[Picture, View] = {}
        talks: dict[OpinionKey, Conversation] = {}
        refused: dict[OpinionKey, Opinion] = {}
        for sample, trajectory in zip(samples, trajectories, strict=True):
            if not trajectory.can_be_judged:
                continue
            box = scored_box(trajectory)
            for answer in trajectory.all_answers:
                keys = _keys(sample, box, answer)
                try:
                    self._put(keys, sample, box, answer, wholes, talks)
                except (ImageError, PromptError) as error:  # one that cannot be shown stops no other
                    refused |= dict.fromkeys(keys if box else keys[1:], Opinion(error=str(error)))
        opinions = self._ask(talks) | refused
        return [self._verdict(*pair, opinions) for pair in zip(samples, trajectories, strict=True)]

    def _put(
        self, keys: tuple[OpinionKey, OpinionKey], sample: Sample, box: Box | None, answer: str,
        wholes: dict[Picture, View], talks: dict[OpinionKey, Conversation],
    ) -> None:  # fmt: skip
        """Put what is to be asked about one trajectory into `talks`, where it is not there yet."""
        picture = Picture(sample.image, size=sample.size)
        if picture not in wholes:
            wholes[picture] = open_view(picture, self.root)
        if box is not None and self.score_boxes and keys[0] not in talks:
            part = crop_view(wholes[picture], Picture(sample.image, box), self.crop_rule)
            talks[keys[0]] = _about(critic_box_prompt(sample.question, sample.answer), part)
        if keys[1] not in talks:
            asked = critic_answer_prompt(sample.question, sample.answer, without_marks(answer))
            talks[keys[1]] = _about(asked, wholes[picture])

    def _ask(self, talks: dict[OpinionKey, Conversation]) -> dict[OpinionKey, Opinion]:
        opinions = {key: Opinion() for key in talks}
        waiting = list(talks)
        for attempt in range(self.attempts):
            sampling = Sampling(RETRY_TEMPERATURE if attempt else 0.0, max_tokens=self.max_tokens)
            seeds = [[seed_of(self.seed, *key, "critic", attempt)] for key in waiting]
            completions = self.engine.complete([talks[key] for key in waiting], sampling, seeds)
            for key, (completion,) in zip(waiting, completions, strict=True):
                opinion = opinions[key]
                self.sampled_tokens += completion.tokens
                if completion.text is None:
                    opinion.error = completion.error or "no text"
                else:
                    opinion.replies.append(completion.text)
                    opinion.score = read_score(completion.text)
            # An engine that failed has had its own retries.
            waiting = [key for key in waiting if opinions[key].score is None and opinions[key].error is None]
            if not waiting:
                break
        return opinions

    def _verdict(self, sample: Sample, trajectory: Trajectory, opinions: dict[OpinionKey, Opinion]) -> Verdict:
        if not trajectory.can_be_judged:
            return without_scores(trajectory)
        keys = [_keys(sample, scored_box(trajectory), answer) for answer in trajectory.all_answers]
        box, answers = opinions.get(keys[0][0]), [opinions[answer_key] for _, answer_key in keys]
        scores = [answer.score for answer in answers]
        return verdict_of(trajectory, box.score if box else None, scores, told(box, answers))


def count_verdicts(verdicts: Iterable[Verdict]) -> Counter[str]:
    """What became of the critic's work on some trajectories: scores read, unread and failed, and second askings.

    "not judged" counts trajectories without a box or an answer.
    """
    counts: Counter[str] = Counter()
    for verdict in verdicts:
        opinions = _read_raw(verdict.raw)
        if opinions is None:
            counts["judged" if verdict.answer_score is not None else "not judged"] += 1
            continue
        counts["judged"] += 1
        parts = ["box", *("answer" for _ in opinions[1:])]
        scores = [verdict.box_score, *verdict.all_scores]
        for what, score, opinion in zip(parts, scores, opinions, strict=True):
            if opinion is None:
                continue
            if opinion["error"] is not None:
                counts[f"failed {what} score"] += 1
            elif score is None:
                counts[f"unread {what} score"] += 1
            counts["asked again"] += max(0, len(opinion["replies"]) - 1)
    return +counts


def critic_failure(verdict: Verdict) -> str | None:
    """Why a model critic gave no reply about a trajectory, where it gave none; an unread reply is no failure."""
    opinions = _read_raw(verdict.raw) or []
    return next((str(one["error"]) for one in opinions if one and one["error"] is not None), None)


def told(box: Opinion | None, answers: Sequence[Opinion]) -> str:
    """What models replied about a trajectory, as its verdict keeps it; `box` is None where they were not asked."""
    first, *more = ({"replies": one.replies, "error": one.error} for one in answers)
    said: dict[str, Any] = {"box": box and {"replies": box.replies, "error": box.error}, "answer": first}
    return json.dumps(said | ({"more answers": more} if more else {}), ensure_ascii=False)


def _read_raw(raw: str) -> list[dict[str, Any] | None] | None:
    """What a model replied about the box and about each answer, or None where another critic wrote the verdict."""
    if not raw.startswith('{"box": '):
        return None
    said = json.loads(raw)
    return [said["box"], said["answer"], *said.get("more answers", [])]


def _keys(sample: Sample, box: Box | None, answer: str) -> tuple[OpinionKey, OpinionKey]:
    corners = ",".join(f"{value:.6f}" for value in box.as_list()) if box else ""
    return (*sample.place, "box", corners), (*sample.place, "answer", answer)


def _about(prompt: str, view: View) -> Conversation:
    return Conversation((Message("user", prompt),), (view,))
