"""Episodes of several looks in batches: every question's turns are asked together until each episode has ended.

The states are those of zoom.episode; here the policy is asked. Nothing here scores: see rewards/.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from visrl.box import CropRule, Size
from visrl.engines.base import Completion, Policy, Sampling, seed_of
from visrl.replies import spoken
from visrl.rollout.protocols import Zoom
from visrl.rollout.rollout import OpenedQuestion
from visrl.rollout.steps import Look, no_text
from visrl.zoom.episode import Episode, advance, begin


def zoomed_looks(
    policy: Policy,
    questions: Sequence[OpenedQuestion],
    zoom: Zoom,
    crop_rule: CropRule,
    sampling: Sampling,
    seeds: Sequence[Sequence[int]],
) -> list[list[Look]]:
    """The answer to every question after as many looks as the model took, one per seed. `sampling.max_tokens` bounds
    each turn. A turn after the first has a seed of its own, by its number."""
    shown = [one.processed for one in questions]
    groups: list[list[tuple[Episode, Completion | None]]] = [
        [(begin(zoom(policy.codec, one.whole.size, one.processed, crop_rule), one.sample.question, one.whole), None)]
        * len(own)
        for one, own in zip(questions, seeds, strict=True)
    ]
    turn = 0
    while running := [(i, k) for i, own in enumerate(groups) for k, (one, _) in enumerate(own) if one.end is None]:
        replies = policy.complete(
            [groups[i][k][0].conversation for i, k in running],
            sampling,
            [[seed_of(seeds[i][k], "turn", turn) if turn else seeds[i][k]] for i, k in running],
        )
        for (i, k), (reply,) in zip(running, replies, strict=True):
            groups[i][k] = (_after(groups[i][k][0], reply, shown[i]), reply)
        turn += 1
    return [
        [_as_look(one, reply, seed) for (one, reply), seed in zip(own, of_question, strict=True)]
        for own, of_question in zip(groups, seeds, strict=True)
    ]


def _after(episode: Episode, reply: Completion, shown: Size) -> Episode:
    if reply.text is None:
        return replace(episode, end="failed", error=no_text(reply))
    return advance(episode, reply.text, shown, cut_short=reply.finish_reason == "length")


def _as_look(episode: Episode, reply: Completion | None, seed: int) -> Look:
    """An ended episode as the look that its answer was given from: the last one. A text that neither looks nor answers
    is the answer; an episode that came to a limit has an empty one, which is wrong."""
    assert reply is not None  # nothing ends before its first turn
    look = Look(episode.question, episode.views[0], seed=seed, looks=episode.looks, end=episode.end)
    if episode.looks:
        last = episode.looks[-1]
        crops = [view for view in episode.views if view.is_crop]
        look = replace(look, text=last.text, box=last.box, detail=crops[-1] if crops else None)
    if episode.end == "failed":
        return replace(look, error=episode.error)
    if episode.end == "no_call" and not episode.protocol.keeps_turns:
        return replace(look, text=spoken(reply.text or ""), error=f"box: {episode.errors[-1]}", box=None, detail=None)
    said = spoken(reply.text or "") if episode.end == "no_call" else episode.answer or ""
    if episode.protocol.keeps_turns:  # with the words that the turn opened with
        reply = replace(reply, text=episode.messages[-1].text)
    return replace(look, answer=said, answer_completion=reply)
