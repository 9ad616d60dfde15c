"""What a step of online reinforcement samples: questions → boxes → answers → rewards → advantages → a packed batch.

Token ids go from the engine to the batch as they were sampled. Knows no loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from visrl.box import CropRule
from visrl.engines.base import Completion, Policy, Sampling, seed_of
from visrl.models.encode import TokenPath
from visrl.packing.pack import PackedBatch
from visrl.records import Sample, Step
from visrl.rewards.advantages import (
    FLAT,
    Estimator,
    GroupAdvantages,
    best_of,
    box_reward,
    deviation,
    grpo,
    reinforce,
    rewards_alone,
    rloo,
)
from visrl.rewards.parts import Attempt, Scored, Scorer, score_attempts, wants_answer_without_crop
from visrl.rollout.greedy import greedy_looks
from visrl.rollout.protocols import VISRL
from visrl.rollout.rollout import OpenedQuestion, answers_all, failure, look_all, open_question
from visrl.rollout.steps import Look, answer_request
from visrl.train.checkpoints import TrainingError
from visrl.train.config import TrainConfig
from visrl.train.items import Branch, Collator, TrainingBatch

NO_ADVANTAGES = GroupAdvantages((), True)


@dataclass(slots=True)
class QuestionRollouts:
    """The attempts at a question with what they are worth; the advantages come once the whole step is known.

    `boxes` are the advantages of the boxes, `answers` of the answers from the crop of each.
    """

    question: OpenedQuestion
    attempts: tuple[Attempt, ...]
    scored: Scored
    boxes: GroupAdvantages = NO_ADVANTAGES
    answers: list[GroupAdvantages] = field(default_factory=list)

    @property
    def box_rewards(self) -> list[float | None]:
        """The reward of every box: the mean of its answers', or its own where it cannot be read."""
        return [box_reward(rewards) for rewards in self.scored.rewards]

    @property
    def flat(self) -> bool:
        """Whether all boxes are worth the same, and all answers from each crop: nothing to learn from a comparison."""
        return all(deviation(group) <= FLAT for group in (self.box_rewards, *self.answer_rewards))

    @property
    def answer_rewards(self) -> list[list[float | None]]:
        """The rewards of the answers from the crop of each box; none where there is no answer."""
        return [
            rewards if attempt.looks[0].answer_completion is not None else []
            for attempt, rewards in zip(self.attempts, self.scored.rewards, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Response:
    """A sampled box text or answer, and the advantage that it has; None where its reward could not be told."""

    row: str
    step: Step
    completion: Completion
    prompt: TokenPath
    advantage: float | None


@dataclass(frozen=True, slots=True)
class TokenEstimates:
    """What a value head says of the T tokens of a batch when they were sampled, each [T]: their values, how much better
    what came was (whitened), and the returns that the values are fitted to."""

    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor


@dataclass(slots=True)
class OnlineBatch(TrainingBatch):
    """A packed batch of sampled responses. `responses` and `tokens` are how many it stands for: those with an advantage
    of 0, which need no computation, are among them.

    Once they are computed, `old` and `ref` are the log-probabilities of the T tokens under the policy before its update
    and under the reference. With a value head, advantages are of tokens (`estimates`), and `advantages` are rewards.
    """

    advantages: torch.Tensor  # [branches]
    lengths: torch.Tensor  # [branches], in tokens
    sampled: torch.Tensor  # [T]: log-probabilities as the engine told them
    responses: int
    tokens: int
    old: torch.Tensor | None = None
    ref: torch.Tensor | None = None
    estimates: TokenEstimates | None = None
    weights: torch.Tensor | None = None  # [T], of tokens that a server sampled


def estimator_of(config: TrainConfig) -> Estimator:
    """How a config has advantages estimated."""
    estimators: dict[str, Estimator] = {
        "grpo": partial(grpo, scale=config.scale_rewards),
        "rloo": partial(rloo, normalize=config.normalize_advantages),
        "reinforce++": reinforce,
        "raft": best_of,
        "ppo": rewards_alone,
    }
    return estimators[config.stage]


# --- Sampling ---------------------------------------------------------------------------------------------------------


def sample_rollouts(
    policy: Policy,
    samples: Sequence[Sample],
    config: TrainConfig,
    crop_rule: CropRule,
    *,
    seed: int,
    step: int,
    again: int = 0,
) -> list[tuple[OpenedQuestion, tuple[Attempt, ...]]]:
    """The attempts at every question: `num_generations` boxes, `num_answers` answers from the crop of each.

    Every completion has a seed of its own, named by step, question, box and answer, and by how often the question was
    sampled before in this step (`again`): a step that a resumed run samples once more comes out the same.

    Raises:
        TrainingError: a question cannot be asked at all.
    """
    plain = _plain_answers(policy, samples, config, crop_rule)
    policy.forget()  # the weights have changed
    questions = [_opened(policy, sample, config.image_root) for sample in samples]
    sampling = Sampling(config.temperature, config.top_p, config.max_completion_length, logprobs=True)
    boxes, run = range(config.num_generations), (step, *([again] if again else []))
    seeds = [[seed_of(seed, *run, *sample.place, b, "box") for b in boxes] for sample in samples]
    looks = [look for own in look_all(policy, questions, sampling, seeds) for look in own]
    seeds = [
        [seed_of(seed, *run, *sample.place, b, m, "answer") for m in range(config.num_answers)]
        for sample in samples
        for b in boxes
    ]
    answered = iter(answers_all(policy, looks, sampling, crop_rule, seeds))
    policy.forget()  # memory is wanted for the update
    return [
        (question, tuple(Attempt(question.sample, _told(next(answered)), without) for _ in boxes))
        for question, without in zip(questions, plain, strict=True)
    ]


def _opened(policy: Policy, sample: Sample, root: str | Path | None) -> OpenedQuestion:
    question = open_question(policy, sample, VISRL.focus, root)
    if not isinstance(question, OpenedQuestion):
        raise TrainingError(
            f"row {sample.id}: {failure(question)}; take the row out of the data, or leave out all such rows with "
            "drop_unusable=true"
        )
    return question


def _told(looks: Sequence[Look]) -> tuple[Look, ...]:
    """The looks of one box, one for each answer; a single one where none was asked for."""
    return tuple(looks) if looks[0].answer_completion is not None else (looks[0],)


def _plain_answers(
    policy: Policy, samples: Sequence[Sample], config: TrainConfig, crop_rule: CropRule
) -> list[str | None]:
    """The greedy answer to every question from the whole image in place of a crop, where a reward asks for it."""
    if not wants_answer_without_crop(config.rewards):
        return [None] * len(samples)
    looks = greedy_looks(policy, samples, mode="no_crop", crop_rule=crop_rule, root=config.image_root)
    return [look.answer if isinstance(look, Look) else None for look in looks]


def score_rollouts(
    rollouts: Sequence[tuple[OpenedQuestion, tuple[Attempt, ...]]],
    config: TrainConfig,
    scorers: Mapping[str, Scorer],
) -> list[QuestionRollouts]:
    """The rollouts with their rewards, by the parts' scorers.

    Raises:
        RewardError: a function of the user's own gave no scores.
    """
    scored = score_attempts(config.rewards, scorers, [attempts for _, attempts in rollouts])
    return [QuestionRollouts(*one, rewards) for one, rewards in zip(rollouts, scored, strict=True)]


# --- Batches ----------------------------------------------------------------------------------------------------------


def responses_of(one: QuestionRollouts, collator: Collator) -> list[Response]:
    """Every sampled response to a question, boxes first."""
    encoder, name = collator.encoder, "/".join(map(str, one.question.sample.place))
    prompt = encoder.encode(one.question.talk, [None])[0]
    _check_prompt(name, prompt, [attempt.looks[0].box_completion for attempt in one.attempts])
    boxes, answers = [], []
    for b, (attempt, advantage) in enumerate(zip(one.attempts, one.boxes.values, strict=True)):
        first = attempt.looks[0]
        if first.box_completion is not None and first.box_completion.ids:
            boxes.append(Response(f"{name}/box {b}", "box", first.box_completion, prompt, advantage))
        told = [look.answer_completion for look in attempt.looks if look.answer_completion is not None]
        if not any(completion.ids for completion in told):
            continue
        shown = encoder.encode(answer_request(first), [None])[0]
        _check_prompt(f"{name}/box {b}", shown, told)
        for m, (completion, worth) in enumerate(zip(told, one.answers[b].values, strict=True)):
            if completion.ids:
                answers.append(Response(f"{name}/box {b}/answer {m}", "answer", completion, shown, worth))
    return [*boxes, *answers]


def _check_prompt(name: str, prompt: TokenPath, completions: Sequence[Completion | None]) -> None:
    """Refuse what was sampled from a prompt of another length than is learned from: a server that sizes images, or
    writes prompts, in its own way."""
    for one in completions:
        if one is not None and one.prompt_tokens not in (0, len(prompt.ids)):
            raise TrainingError(
                f"row {name}: the server showed {one.prompt_tokens} tokens where the prompt has {len(prompt.ids)}; "
                "serve the same checkpoint with its chat template and picture sizes, and let no limit of the server's "
                "own come between"
            )


def pack_responses(
    questions: Sequence[Sequence[Response]], collator: Collator, *, mask_truncated: bool, keep_all: bool
) -> OnlineBatch | None:
    """One batch of the responses to some questions; None where none of them can be learned from.

    A response without an advantage is left out. One whose advantage is 0 moves nothing, and is counted and not computed
    unless `keep_all` (its KL moves something); likewise one that was cut off, with `mask_truncated`, whose tokens do
    not count either. One that holds the token of an image, which no image is for, cannot be computed.

    Raises:
        TooLong: a path is longer than the collator's cutoff.
    """
    mark = collator.encoder.image_token_id
    known = [
        [one for one in own if one.advantage is not None and mark not in one.completion.ids] for own in questions
    ]  # fmt: skip
    masked = {id(one) for own in known for one in own if mask_truncated and one.completion.finish_reason == "length"}
    taught = [[one for one in own if id(one) not in masked] for own in known]
    wanted = [[one for one in own if keep_all or one.advantage] for own in taught]
    if not any(wanted):  # a step without a gradient: as short as can be, and of an advantage 0
        shortest = min((one for own in taught for one in own), key=lambda r: len(r.completion.ids), default=None)
        if shortest is None:
            return None
        wanted = [[shortest]]
    items = [own for own in wanted if own]
    paths = [[collator.encoder.continued(one.prompt, one.completion.ids) for one in own] for own in items]
    for own, made in zip(items, paths, strict=True):
        for one, path in zip(own, made, strict=True):
            collator.check_length(path, one.row)
    packed, order = collator.pack(paths)
    ordered = [one for number in order for one in items[number]]
    return OnlineBatch(
        packed,
        [Branch(number, one.row, one.step, "sampled", 1.0) for number in order for one in items[number]],
        len(questions),
        int(packed.target.numel()),
        torch.tensor([one.advantage for one in ordered], dtype=torch.float32),
        torch.tensor([len(one.completion.ids) for one in ordered], dtype=torch.float32),
        _in_order(packed, [one.completion.logps for one in ordered]),
        sum(map(len, known)),
        sum(len(one.completion.ids) for own in taught for one in own),
    )


def _in_order(packed: PackedBatch, values: Sequence[Sequence[float]]) -> torch.Tensor:
    """The values of every branch's tokens, [T], in the order in which a packed batch holds them."""
    flat = [value for branch in packed.branch.unique_consecutive().tolist() for value in values[branch]]
    return torch.tensor(flat, dtype=torch.float32)
