"""Greedy rollouts and their results at once: what `visrl eval`, a loop's checkpoints and a training are measured by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visrl.box import Box, CropRule
from visrl.engines.base import Policy
from visrl.records import Sample
from visrl.rewards.grounding import other_objects
from visrl.rewards.results import NO_OTHER, Result
from visrl.rollout.controls import other_questions
from visrl.rollout.greedy import Mode, greedy_looks
from visrl.rollout.protocols import VISRL, LookProtocol
from visrl.rollout.rollout import BATCH
from visrl.sequences import batched


@dataclass(frozen=True, slots=True)
class Asked:
    """A sample with what its run knows of its image: objects that it does not ask about, and another question.

    Both depend on all samples of a run, so that no batch has to hold the questions of an image together.
    """

    sample: Sample
    objects: tuple[Box, ...] = ()
    other: Sample | None = None


def with_surroundings(samples: Sequence[Sample], mode: Mode = "own", seed: int = 0) -> list[Asked]:
    """The samples of a whole run as they are to be asked in `mode`."""
    others = other_questions(samples, seed) if mode == "other_question" else [None] * len(samples)
    return [Asked(*each) for each in zip(samples, other_objects(samples), others, strict=True)]


def greedy_results(
    policy: Policy,
    batch: Sequence[Asked],
    *,
    mode: Mode,
    protocol: LookProtocol = VISRL,
    crop_rule: CropRule = "exact",
    root: str | Path | None = None,
    seed: int = 0,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> list[Result]:
    """The results of a batch, in order. In mode "other_question" what has no other question is skipped, not asked."""
    askable = [one for one in batch if mode != "other_question" or one.other is not None]
    looks = iter(
        greedy_looks(
            policy,
            [one.sample for one in askable],
            mode=mode,
            protocol=protocol,
            crop_rule=crop_rule,
            root=root,
            seed=seed,
            others=[one.other for one in askable if one.other is not None],
            temperature=temperature,
            top_p=top_p,
        )
    )
    return [
        Result(one.sample, mode=mode, skipped=NO_OTHER)
        if mode == "other_question" and one.other is None
        else Result.of(one.sample, next(looks), mode, crop_rule, one.objects)
        for one in batch
    ]


def evaluate_samples(
    policy: Policy,
    samples: Sequence[Sample],
    *,
    mode: Mode = "own",
    protocol: LookProtocol = VISRL,
    crop_rule: CropRule = "exact",
    root: str | Path | None = None,
    seed: int = 0,
    part: slice = slice(None),
) -> list[dict[str, Any]]:
    """One row per sample, in order (see `Result.loop_row`); `root` is the folder that images are named from.

    Of a `part` of the samples alone, where several processes share the work: what surrounds them comes from all.
    """
    rows: list[dict[str, Any]] = []
    for batch in batched(with_surroundings(samples, mode, seed)[part], BATCH):
        results = greedy_results(policy, batch, mode=mode, protocol=protocol, crop_rule=crop_rule, root=root, seed=seed)
        rows += [result.loop_row() for result in results]
    return rows
