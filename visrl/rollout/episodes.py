"""Episodes of several looks in batches: every question's turns are asked together until each episode has ended.

The states are those of zoom.episode; here the policy is asked. Nothing here scores: see rewards/.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from visrl.box import Size
from visrl.conversation import View
from visrl.engines.base import Completion, Policy, Sampling, seed_of
from visrl.zoom.episode import Episode, advance, begin
from visrl.zoom.protocols import ZoomProtocol

Asked = tuple[str, View]  # a question and its image


def run_episodes(
    policy: Policy,
    questions: Sequence[Asked],
    protocol: ZoomProtocol,
    sampling: Sampling,
    seeds: Sequence[Sequence[int]],
) -> list[list[Episode]]:
    """One ended episode per seed: `seeds[i]` holds those of question i. `sampling.max_tokens` bounds each turn, under
    the protocol's own bound. Every turn has a seed of its own, so that an episode does not depend on its batch."""
    episodes = [
        [begin(protocol, question, whole) for _ in own] for (question, whole), own in zip(questions, seeds, strict=True)
    ]
    shown = [policy.processed_size(whole.size) for _, whole in questions]
    per_turn = replace(sampling, max_tokens=min(sampling.max_tokens, protocol.turn_tokens))
    turn = 0
    while running := [(i, k) for i, own in enumerate(episodes) for k, one in enumerate(own) if one.end is None]:
        replies = policy.complete(
            [episodes[i][k].conversation for i, k in running],
            per_turn,
            [[seed_of(seeds[i][k], "turn", turn) if turn else seeds[i][k]] for i, k in running],
        )
        for (i, k), (reply,) in zip(running, replies, strict=True):
            episodes[i][k] = _after(episodes[i][k], reply, shown[i])
        turn += 1
    return episodes


def _after(episode: Episode, reply: Completion, shown: Size) -> Episode:
    if reply.text is None:
        kind = "prompt" if reply.refused else "engine"
        return replace(episode, end="failed", error=f"{kind}: {reply.error or 'no text'}")
    return advance(episode, reply.text, shown, cut_short=reply.finish_reason == "length")
