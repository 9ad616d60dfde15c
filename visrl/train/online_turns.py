"""What a step of online reinforcement samples where a model looks several times: a tree of turns for every question.

`num_generations` first turns, `num_answers` turns after each of the first `num_forks` looks, then one after another to
the end. An end is a look with its answer, and gets a reward; credit goes back fork by fork (rewards/advantages.py), and
every turn that was sampled is learned from after the very prompt that it was sampled after. Knows no loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from visrl.box import CropRule
from visrl.engines.base import Completion, Policy, Sampling, seed_of
from visrl.records import Step
from visrl.rewards.advantages import Fork, Outcome, value_of
from visrl.rollout.episodes import SampledTurn, TurnPath, leaves, look_at_end, sampled_turns
from visrl.rollout.protocols import LookProtocol
from visrl.rollout.rollout import OpenedQuestion
from visrl.rollout.steps import Look
from visrl.train.config import TrainConfig
from visrl.train.items import Collator
from visrl.train.responses import Response, check_prompt
from visrl.zoom.episode import UNFINISHED

Turns = Sequence[SampledTurn]
NO_END = "unfinished"  # the first word of the error of what came to a limit


def sample_turns(
    policy: Policy, questions: Sequence[OpenedQuestion], protocol: LookProtocol, config: TrainConfig,
    crop_rule: CropRule, run: Sequence[int],
) -> list[list[SampledTurn]]:  # fmt: skip
    """The first turns of every question with all that was sampled after each. `run` names the run and its step: every
    turn has a seed of its own, by that, its question and its path."""
    assert protocol.zoom is not None
    sampling = Sampling(config.temperature, config.top_p, config.max_completion_length, logprobs=True)
    widths = (config.num_generations, *[config.num_answers] * config.num_forks)
    seeds = [partial(_seed, (*run, *one.sample.place)) for one in questions]
    return sampled_turns(
        policy, questions, protocol.zoom, crop_rule, sampling, widths, seeds, longest=config.cutoff_len
    )


def _seed(named: Sequence[object], path: TurnPath) -> int:
    run_seed, *rest = named
    assert isinstance(run_seed, int)
    return seed_of(run_seed, *rest, "turn", *path)


def ends_of(first: SampledTurn, *, punish_unfinished: bool) -> tuple[Look, ...]:
    """The looks at every end after a first turn, as they are scored: one that came to a limit (of turns, pictures or
    tokens) has failed, so that no reward is told for it, unless that is to be punished: then its answer is empty, and
    wrong. That a policy needs more turns than it is given says nothing against them (Mini-o3, arXiv 2509.07969)."""
    looks = map(look_at_end, leaves(first))
    return tuple(
        replace(look, error=f"{NO_END}: {look.end}") if look.end in UNFINISHED and not punish_unfinished else look
        for look in looks
    )


def is_unfinished(look: Look) -> bool:
    """Whether a look came to a limit, and teaches nothing."""
    return look.error is not None and look.error.startswith(NO_END)


def outcomes_of(turns: Turns, rewards: Iterator[float | None]) -> tuple[Outcome, ...]:
    """What came of some turns, from the rewards of all ends under them, in their order."""
    return tuple(outcomes_of(turn.turns, rewards) if turn.turns else next(rewards) for turn in turns)


def fork_values(outcomes: tuple[Outcome, ...]) -> Iterator[list[float | None]]:
    """What the turns of every fork are worth, of those that have more than one turn."""
    if len(outcomes) > 1:
        yield list(map(value_of, outcomes))
    for one in outcomes:
        if isinstance(one, tuple):
            yield from fork_values(one)


def turn_responses(name: str, turns: Turns, fork: Fork, collator: Collator, before: TurnPath = ()) -> list[Response]:
    """Every turn that was sampled at a question as a response; those of one fork share their prompt. One that is too
    long for a batch with its prompt is left out (see `is_too_long`)."""
    if not any(turn.completion.ids for turn in turns):
        return []
    encoder, found = collator.encoder, []
    prompt = encoder.encode(turns[0].before.conversation, [None])[0]
    check_prompt(name, prompt, [turn.completion for turn in turns])
    for place, (turn, advantage, after) in enumerate(zip(turns, fork.group.values, fork.after, strict=True)):
        path = (*before, place)
        if turn.completion.ids and not is_too_long(turn, collator.cutoff):
            heard = until_stop(turn.completion, turn.before.protocol.stop, encoder.decode)
            row = f"{name}/turn {'.'.join(map(str, path))}"
            found.append(Response(row, step_of(turn), heard, prompt, advantage))
        if after is not None:
            found += turn_responses(name, turn.turns, after, collator, path)
    return found


def is_too_long(turn: SampledTurn, cutoff: int | None) -> bool:
    """Whether a turn and its prompt have more tokens than a batch takes; its episode has come to its end with it."""
    return cutoff is not None and turn.completion.prompt_tokens + len(turn.completion.ids) > cutoff


def step_of(turn: SampledTurn) -> Step:
    """Whether a turn is an answer; every other one looks, or tries to."""
    end = turn.after.end
    answers = end == "answered" or (end == "no_call" and turn.after.protocol.keeps_turns)
    return "answer" if answers else "box"


def until_stop(completion: Completion, stops: Sequence[str], decode: Callable[[Sequence[int]], str]) -> Completion:
    """A completion up to the token with which its first stop text is complete: what was sampled after it was heard by
    nobody, and is not learned from."""
    if not any(stop in (completion.text or "") for stop in stops):
        return completion
    ids = completion.ids
    count = next((n for n in range(1, len(ids)) if any(stop in decode(ids[:n]) for stop in stops)), len(ids))
    if count == len(ids):
        return replace(completion, finish_reason="stop")
    return replace(completion, ids=ids[:count], logps=completion.logps[:count], tokens=count, finish_reason="stop")
