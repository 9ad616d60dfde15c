"""What a step of online reinforcement samples: questions → boxes → answers → rewards → advantages → a packed batch.

Token ids go from the engine to the batch as they were sampled. Where a model looks several times, online_turns.py has
its turns. Knows no loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from visrl.box import CropRule
from visrl.engines.base import Policy, Sampling, seed_of
from visrl.packing.pack import PackedBatch
from visrl.records import Sample
from visrl.rewards.advantages import (
    FLAT,
    Estimator,
    Fork,
    GroupAdvantages,
    Outcome,
    best_of,
    box_reward,
    deviation,
    grpo,
    reinforce,
    rewards_alone,
    rloo,
    with_price,
)
from visrl.rewards.parts import Attempt, Scored, Scorer, score_attempts, wants_answer_without_crop
from visrl.rollout.episodes import SampledTurn
from visrl.rollout.greedy import greedy_looks
from visrl.rollout.protocols import LookProtocol, protocol_of
from visrl.rollout.rollout import OpenedQuestion, answers_all, failure, look_all, open_question
from visrl.rollout.steps import Look, answer_request
from visrl.train.checkpoints import TrainingError
from visrl.train.config import TrainConfig
from visrl.train.items import Branch, Collator, TrainingBatch
from visrl.train.online_turns import (
    ends_of,
    fork_values,
    is_unfinished,
    outcomes_of,
    sample_turns,
    turn_responses,
)
from visrl.train.responses import Response, check_prompt

NO_ADVANTAGES = GroupAdvantages((), True)
NO_CREDIT = Fork(NO_ADVANTAGES, ())
Rolled = tuple[OpenedQuestion, tuple[Attempt, ...], tuple[SampledTurn, ...]]  # a question, its attempts, its turns


@dataclass(slots=True)
class QuestionRollouts:
    """The attempts at a question with what they are worth; the advantages come once the whole step is known.

    An attempt is a box with the answers from its crop. Where the model looks several times it is a first turn with all
    ends after it, and `turns` are the first turns.
    """

    question: OpenedQuestion
    attempts: tuple[Attempt, ...]
    scored: Scored
    turns: tuple[SampledTurn, ...] = ()
    fork: Fork = NO_CREDIT

    @property
    def boxes(self) -> GroupAdvantages:
        """The advantages of the boxes, or first turns."""
        return self.fork.group

    @property
    def answers(self) -> list[GroupAdvantages]:
        """The advantages of the answers from the crop of each box, or of the turns after each first one."""
        return [NO_ADVANTAGES if after is None else after.group for after in self.fork.after]

    @property
    def box_rewards(self) -> list[float | None]:
        """The reward of every box: the mean of its answers', or its own where it cannot be read."""
        return [box_reward(rewards) for rewards in self.scored.rewards]

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """The rewards as a tree: what credit is given by."""
        if self.turns:
            return outcomes_of(self.turns, iter([reward for own in self.scored.rewards for reward in own]))
        return tuple(
            tuple(rewards) if attempt.looks[0].answer_completion is not None else rewards[0]
            for attempt, rewards in zip(self.attempts, self.scored.rewards, strict=True)
        )

    @property
    def ends(self) -> list[Attempt]:
        """Every answer as an attempt by itself."""
        return [replace(attempt, looks=(look,)) for attempt in self.attempts for look in attempt.looks]

    @property
    def unfinished(self) -> bool:
        """Whether an episode came to a limit, and teaches nothing."""
        return any(is_unfinished(look) for attempt in self.attempts for look in attempt.looks)

    @property
    def flat(self) -> bool:
        """Whether all that was sampled side by side is worth the same: nothing to learn from a comparison."""
        return all(deviation(group) <= FLAT for group in fork_values(self.outcomes))


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
) -> list[Rolled]:
    """The attempts at every question: `num_generations` boxes, `num_answers` answers from the crop of each; or the
    turns of several looks (see online_turns.py).

    Every completion has a seed of its own, named by step, question, box and answer, and by how often the question was
    sampled before in this step (`again`): a step that a resumed run samples once more comes out the same.

    Raises:
        TrainingError: a question cannot be asked at all.
    """
    plain, protocol = _plain_answers(policy, samples, config, crop_rule), protocol_of(config)
    policy.forget()  # the weights have changed
    questions = [_opened(policy, sample, protocol, config.image_root) for sample in samples]
    run = (seed, step, *([again] if again else []))
    if protocol.zoom is None:
        rolled = _one_look(policy, questions, plain, config, crop_rule, run)
    else:
        turns = sample_turns(policy, questions, protocol, config, crop_rule, run)
        rolled = [_rolled(*one, config) for one in zip(questions, turns, plain, strict=True)]
    policy.forget()  # memory is wanted for the update
    return rolled


def _one_look(
    policy: Policy, questions: Sequence[OpenedQuestion], plain: Sequence[str | None], config: TrainConfig,
    crop_rule: CropRule, run: Sequence[int],
) -> list[Rolled]:  # fmt: skip
    """A box first, then answers from its crop."""
    sampling = Sampling(config.temperature, config.top_p, config.max_completion_length, logprobs=True)
    boxes, places = range(config.num_generations), [question.sample.place for question in questions]
    run_seed, *named = run
    seeds = [[seed_of(run_seed, *named, *place, b, "box") for b in boxes] for place in places]
    looks = [look for own in look_all(policy, questions, sampling, seeds) for look in own]
    seeds = [
        [seed_of(run_seed, *named, *place, b, m, "answer") for m in range(config.num_answers)]
        for place in places
        for b in boxes
    ]
    answered = iter(answers_all(policy, looks, sampling, crop_rule, seeds))
    return [
        (question, tuple(Attempt(question.sample, _told(next(answered)), without) for _ in boxes), ())
        for question, without in zip(questions, plain, strict=True)
    ]


def _rolled(question: OpenedQuestion, turns: Sequence[SampledTurn], without: str | None, config: TrainConfig) -> Rolled:
    ends = [ends_of(first, punish_unfinished=config.punish_unfinished) for first in turns]
    return question, tuple(Attempt(question.sample, own, without) for own in ends), tuple(turns)


def _opened(policy: Policy, sample: Sample, protocol: LookProtocol, root: str | Path | None) -> OpenedQuestion:
    question = open_question(policy, sample, protocol.focus, root)
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
    rollouts: Sequence[Rolled], config: TrainConfig, scorers: Mapping[str, Scorer]
) -> list[QuestionRollouts]:
    """The rollouts with their rewards, by the parts' scorers; less the share that each look takes.

    Raises:
        RewardError: a function of the user's own gave no scores.
    """
    scored = score_attempts(config.rewards, scorers, [attempts for _, attempts, _ in rollouts])
    return [
        QuestionRollouts(question, attempts, _priced(rewards, attempts, config.look_price) if turns else rewards, turns)
        for (question, attempts, turns), rewards in zip(rollouts, scored, strict=True)
    ]


def _priced(scored: Scored, attempts: Sequence[Attempt], price: float) -> Scored:
    rewards = [
        [with_price(reward, len(look.looks or ()), price) for look, reward in zip(one.looks, own, strict=True)]
        for one, own in zip(attempts, scored.rewards, strict=True)
    ]
    return replace(scored, rewards=rewards)


# --- Batches ----------------------------------------------------------------------------------------------------------


def responses_of(one: QuestionRollouts, collator: Collator) -> list[Response]:
    """Every sampled response to a question, boxes first."""
    encoder, name = collator.encoder, "/".join(map(str, one.question.sample.place))
    if one.turns:
        return turn_responses(name, one.turns, one.fork, collator)
    prompt = encoder.encode(one.question.talk, [None])[0]
    check_prompt(name, prompt, [attempt.looks[0].box_completion for attempt in one.attempts])
    boxes, answers = [], []
    for b, (attempt, advantage) in enumerate(zip(one.attempts, one.boxes.values, strict=True)):
        first = attempt.looks[0]
        if first.box_completion is not None and first.box_completion.ids:
            boxes.append(Response(f"{name}/box {b}", "box", first.box_completion, prompt, advantage))
        told = [look.answer_completion for look in attempt.looks if look.answer_completion is not None]
        if not any(completion.ids for completion in told):
            continue
        shown = encoder.encode(answer_request(first), [None])[0]
        check_prompt(f"{name}/box {b}", shown, told)
        for m, (completion, worth) in enumerate(zip(told, one.answers[b].values, strict=True)):
            if completion.ids:
                answers.append(Response(f"{name}/box {b}/answer {m}", "answer", completion, shown, worth))
    return [*boxes, *answers]


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


def still_batch(questions: Sequence[Sequence[Response]], collator: Collator) -> OnlineBatch | None:
    """A batch without a gradient where all that was sampled came to no end: its shortest response, of an advantage 0.
    None where nothing of it can be computed."""
    mark = collator.encoder.image_token_id
    known = [one for own in questions for one in own if mark not in one.completion.ids]
    if not known:
        return None
    shortest = min(known, key=lambda one: len(one.completion.ids))
    return pack_responses([[replace(shortest, advantage=0.0)]], collator, mask_truncated=False, keep_all=False)


def _in_order(packed: PackedBatch, values: Sequence[Sequence[float]]) -> torch.Tensor:
    """The values of every branch's tokens, [T], in the order in which a packed batch holds them."""
    flat = [value for branch in packed.branch.unique_consecutive().tolist() for value in values[branch]]
    return torch.tensor(flat, dtype=torch.float32)
