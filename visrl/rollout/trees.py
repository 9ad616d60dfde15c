"""Trajectories of several looks: trees of turns at each question, an end of the tree a trajectory.

A round is two first turns, as with one look. After each look of the first `num_forks`, `answers` next turns are
sampled, one more look or the answer as the policy wants it; after later ones a single turn. Nothing here scores: see
rewards/.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from visrl.box import CropRule
from visrl.engines.base import Policy, Sampling, seed_of
from visrl.records import Sample, Trajectory, TrajectoryLook
from visrl.replies import spoken
from visrl.rollout.episodes import SampledTurn, SeedOf, TurnPath, leaves, look_at_end, sampled_turns
from visrl.rollout.protocols import VISRL, several_looks
from visrl.rollout.rollout import OpenedQuestion, Refusal, failure, open_question


@dataclass(frozen=True, slots=True)
class TreeSettings:
    """How trees are sampled: `rounds` × 2 first turns, `answers` turns after each look down to the `num_forks`-th."""

    max_looks: int
    rounds: int = 5
    answers: int = 1
    num_forks: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    crop_rule: CropRule = "exact"
    seed: int = 0

    @property
    def branches(self) -> list[tuple[int, int]]:
        """Round and branch of every first turn, in order."""
        return [(round_, branch) for round_ in range(self.rounds) for branch in (0, 1)]

    @property
    def most_leaves(self) -> int:
        """How many trajectories a question has at most."""
        return int(2 * self.rounds * self.answers ** min(self.num_forks, self.max_looks))


def roll_out_trees(
    policy: Policy,
    samples: Sequence[Sample],
    settings: TreeSettings,
    root: str | Path | None = None,
    sampled: Counter[str] | None = None,
) -> list[Trajectory]:
    """All trajectories of some questions, one for each end of their trees, in order of sample, round, branch and path.

    All questions are one batch. A question that cannot be asked has a failed trajectory for every first turn. `sampled`
    is added how many tokens were sampled for looks ("box") and for answers ("answer"). Every turn has its own seed, by
    sample, round, branch and path, so that a tree does not depend on when or with which others it is sampled.
    """
    policy.forget()  # as in `sampled_looks`
    protocol = several_looks(VISRL, settings.max_looks)
    assert protocol.zoom is not None
    opened = [open_question(policy, sample, protocol.focus, root) for sample in samples]
    questions = [question for question in opened if isinstance(question, OpenedQuestion)]
    trees = sampled_turns(
        policy, questions, protocol.zoom, settings.crop_rule,
        Sampling(settings.temperature, settings.top_p, protocol.box_tokens),
        [2 * settings.rounds, *[settings.answers] * settings.num_forks],
        [_seeds(settings, question.sample) for question in questions],
    )  # fmt: skip
    if sampled is not None:
        for tree in trees:
            _count_tokens(tree, sampled)
    rest = iter(trees)
    found: list[Trajectory] = []
    for sample, question in zip(samples, opened, strict=True):
        if isinstance(question, OpenedQuestion):
            found += _of_tree(sample, next(rest), settings, policy.name)
        else:
            found += [_refused(sample, *branch, policy.name, question) for branch in settings.branches]
    return found


def _seeds(settings: TreeSettings, sample: Sample) -> SeedOf:
    def seed_by(path: TurnPath) -> int:
        return seed_of(settings.seed, *sample.place, *settings.branches[path[0]], "turn", *path[1:])

    return seed_by


def _count_tokens(turns: Sequence[SampledTurn], sampled: Counter[str]) -> None:
    for turn in turns:
        sampled["answer" if turn.after.end == "answered" else "box"] += turn.completion.tokens
        _count_tokens(turn.turns, sampled)


def _of_tree(
    sample: Sample, firsts: Sequence[SampledTurn], settings: TreeSettings, engine: str
) -> Iterator[Trajectory]:
    for (round_, branch), first in zip(settings.branches, firsts, strict=True):
        for chain in leaves(first):
            look = look_at_end(chain)
            siblings = [before.turns for before in chain[:-1]]
            path = tuple(
                next(n for n, one in enumerate(own) if one is turn)
                for own, turn in zip(siblings, chain[1:], strict=True)
            )
            yield Trajectory(
                sample.id, round_, branch, look.text, look.box, "sampled",
                look.answer if look.end == "answered" else None, engine, chain[-1].seed, look.error, sample.repeat,
                looks=tuple(TrajectoryLook(spoken(one.text), one.box) for one in look.looks or ()),
                end=look.end, path=path,
            )  # fmt: skip


def _refused(sample: Sample, round_: int, branch: int, engine: str, why: Refusal) -> Trajectory:
    return Trajectory(
        sample.id, round_, branch, "", None, "sampled", None, engine, 0, failure(why), sample.repeat, end="failed"
    )
