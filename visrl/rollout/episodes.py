"""Episodes of several looks in batches: the turns of all questions are asked together until every episode has ended.

    first turns (N of a question) ─► M turns after each look, so many looks deep ─► one turn after another ─► ends

The states are those of zoom.episode; here the policy is asked. What was sampled is a tree of turns, and an episode is a
chain of it from a first turn to an end (`leaves`). Nothing here scores: see rewards/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from visrl.box import CropRule, Size
from visrl.engines.base import Completion, Policy, Sampling, seed_of
from visrl.replies import spoken
from visrl.rollout.protocols import Zoom
from visrl.rollout.rollout import OpenedQuestion
from visrl.rollout.steps import Look, no_text
from visrl.zoom.episode import Episode, advance, begin

TurnPath = tuple[int, ...]  # of a turn: the number of its first turn, then at every depth its place among its siblings
SeedOf = Callable[[TurnPath], int]  # the seed of a turn by its path


@dataclass(slots=True)
class SampledTurn:
    """A turn that was sampled: the episode before it and after it, and the turns that were sampled next, none where the
    episode has ended. One for which no text came ends its episode as "failed"."""

    before: Episode
    completion: Completion
    after: Episode
    seed: int
    turns: list[SampledTurn] = field(default_factory=list)


def sampled_turns(
    policy: Policy,
    questions: Sequence[OpenedQuestion],
    zoom: Zoom,
    crop_rule: CropRule,
    sampling: Sampling,
    widths: Sequence[int],
    seeds: Sequence[SeedOf],
    longest: int | None = None,
) -> list[list[SampledTurn]]:
    """The first turns of every question, each with all that was sampled after it.

    `widths` (N, M, …) says how many turns are sampled at each depth: N first ones, M after each of those, and one where
    it says no more. `sampling.max_tokens` bounds each turn. `seeds` holds one function for each question, so that its
    turns depend on nothing but itself and their paths. An episode of more than `longest` tokens, as far as the engine
    tells them, has come to its end as "tokens".
    """
    starts = [
        begin(zoom(policy.codec, one.whole.size, one.processed, crop_rule), one.sample.question, one.whole)
        for one in questions
    ]
    found: list[list[SampledTurn]] = [[] for _ in questions]
    # What is asked next: the question, where it stands and by which path, and the list that its turns belong into.
    waiting: list[tuple[int, Episode, TurnPath, list[SampledTurn]]] = [
        (n, one, (), found[n]) for n, one in enumerate(starts)
    ]
    while waiting:
        depth = len(waiting[0][2])
        width = widths[depth] if depth < len(widths) else 1
        asked = [[seeds[n]((*path, place)) for place in range(width)] for n, _, path, _ in waiting]
        replies = policy.complete([episode.conversation for _, episode, _, _ in waiting], sampling, asked)
        for (n, episode, _, turns), own_seeds, own in zip(waiting, asked, replies, strict=True):
            turns += [
                SampledTurn(episode, reply, _after(episode, reply, questions[n].processed, longest), seed)
                for seed, reply in zip(own_seeds, own, strict=True)
            ]
        waiting = [
            (n, turn.after, (*path, place), turn.turns)
            for n, _, path, turns in waiting
            for place, turn in enumerate(turns)
            if turn.after.end is None
        ]
    return found


def leaves(turn: SampledTurn) -> Iterator[tuple[SampledTurn, ...]]:
    """The chains of turns from this one to every end under it, in the order in which they were sampled."""
    if not turn.turns:
        yield (turn,)
    for following in turn.turns:
        yield from ((turn, *rest) for rest in leaves(following))


def zoomed_looks(
    policy: Policy,
    questions: Sequence[OpenedQuestion],
    zoom: Zoom,
    crop_rule: CropRule,
    sampling: Sampling,
    seeds: Sequence[Sequence[int]],
) -> list[list[Look]]:
    """The answer to every question after as many looks as the model took, one per seed; of every question there are as
    many. A turn after the first has a seed of its own, by its number."""
    (width,) = {len(own) for own in seeds} or {0}

    def seed_by(own: Sequence[int]) -> SeedOf:
        return lambda path: own[path[0]] if len(path) == 1 else seed_of(own[path[0]], "turn", len(path) - 1)

    firsts = sampled_turns(policy, questions, zoom, crop_rule, sampling, [width], list(map(seed_by, seeds)))
    return [[look_at_end(chain) for first in own for chain in leaves(first)] for own in firsts]


def _after(episode: Episode, reply: Completion, shown: Size, longest: int | None) -> Episode:
    if reply.text is None:
        return replace(episode, end="failed", error=no_text(reply))
    if longest is not None and reply.prompt_tokens + len(reply.ids) > longest:
        return replace(episode, end="tokens")
    return advance(episode, reply.text, shown, cut_short=reply.finish_reason == "length")


def look_at_end(chain: Sequence[SampledTurn]) -> Look:
    """An ended episode as the look that its answer was given from: the last one. A text that neither looks nor answers
    is the answer; an episode that came to a limit has an empty one, which is wrong. The seed is that of the first turn,
    which names the episode."""
    episode, reply = chain[-1].after, chain[-1].completion
    look = Look(episode.question, episode.views[0], seed=chain[0].seed, looks=episode.looks, end=episode.end)
    if episode.looks:
        last = episode.looks[-1]
        crops = [view for view in episode.views if view.is_crop]
        look = replace(look, text=last.text, box=last.box, detail=crops[-1] if crops else None)
    if episode.end == "failed":
        return replace(look, error=episode.error)
    if episode.end == "no_call" and episode.protocol.on_failure == "end":  # a box that cannot be read
        return replace(look, text=spoken(reply.text or ""), error=f"box: {episode.errors[-1]}", box=None, detail=None)
    said = spoken(reply.text or "") if episode.end == "no_call" else episode.answer or ""
    if episode.protocol.keeps_turns:  # with the words that the turn opened with
        reply = replace(reply, text=episode.messages[-1].text)
    return replace(look, answer=said, answer_completion=reply)
