"""Runs of tokens between the forks of packed trees, and the calls in which a recurrent layer computes them.

A recurrent layer (linear attention, a short convolution) sees the past through a state, and the state at a fork is all
that its branches need of what came before. So every run is computed once, from the state in which the run above it
ends. Knows places of tokens; knows no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

# A part of a packed row that was added at once: first place, last place + 1, places of its ancestors.
Segment = tuple[int, int, np.ndarray]

# In tokens. A run up to SHORT is computed again with every run below it: a call of its own would cost more. Runs share
# a call where that makes it by no more than WASTE, and a quarter, longer.
SHORT, WASTE = 16, 64


@dataclass(frozen=True, slots=True)
class RunCall:
    """Runs that are computed side by side.

    `places` [runs, width] in the packed row; a shorter run repeats its last place, which changes nothing before it.
    `starts` [runs] numbers the states they start from among all that are kept; None where they start from nothing.
    `keeps`: the states they end in are kept, numbered on; no run is padded then.
    """

    places: torch.Tensor
    starts: torch.Tensor | None
    keeps: bool


@dataclass(frozen=True, slots=True)
class RunPlan:
    """The calls for a packed row, and for each place of it where its output lies in [Σ runs × width of all calls, and
    one more for padding]."""

    calls: list[RunCall]
    outputs: torch.Tensor

    def to(self, device: torch.device | str) -> RunPlan:
        """This plan with every tensor on `device`."""

        def there(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        calls = [
            replace(call, places=there(call.places), starts=None if call.starts is None else there(call.starts))
            for call in self.calls
        ]
        return RunPlan(calls, there(self.outputs))


class _Run(NamedTuple):
    """Places to be computed from a state on (−1: from nothing), and the runs that follow."""

    places: np.ndarray
    start: int
    below: list[int]


def runs_of(segments: Sequence[Segment], total: int) -> tuple[list[np.ndarray], list[int]]:
    """The places of every run between forks, and the number of the run above each, which comes before it; −1 where
    there is none."""
    filled = [(first, last, above[-1] if len(above) else -1) for first, last, above in segments if last > first]
    forks = np.unique([place + 1 for _, _, place in filled if place >= 0])
    run_of = np.full(total, -1, dtype=np.int64)
    own: list[np.ndarray] = []
    over: list[int] = []
    for first, last, before in filled:
        parent = before
        cuts = [first, *forks[(forks > first) & (forks < last)].tolist(), last]
        for a, b in pairwise(cuts):
            over.append(int(run_of[parent]) if parent >= 0 else -1)
            run_of[a:b] = len(own)
            own.append(np.arange(a, b))
            parent = b - 1
    return own, over


def plan_runs(segments: Sequence[Segment], total: int) -> RunPlan:
    """The calls that compute all segments of a packed row of `total` places.

    Runs with others below them go level by level, each call as long as its shortest run; what is left of a longer one
    is computed with the runs below it. Runs that end a path come last, padded to the longest.
    """
    own, above = runs_of(segments, total)
    below: list[list[int]] = [[] for _ in own]
    for number, parent in enumerate(above):
        if parent >= 0:
            below[parent].append(number)

    def following(run: _Run, done: int, start: int) -> list[_Run]:
        return [_Run(np.concatenate([run.places[done:], own[n]]), start, below[n]) for n in run.below]

    calls: list[RunCall] = []
    rows: list[np.ndarray] = []
    ends: list[_Run] = []
    level = [_Run(own[n], -1, below[n]) for n, parent in enumerate(above) if parent < 0]
    states = 0
    while level:
        forking, waiting = [], level
        while waiting:
            run = waiting.pop()
            if not run.below:
                ends.append(run)
            elif len(run.places) <= SHORT:
                waiting += following(run, 0, run.start)
            else:
                forking.append(run)
        level = []
        for members in _grouped(forking):
            width = min(len(run.places) for run in members)
            rows += [run.places[:width] for run in members]
            calls.append(_call(rows[-len(members) :], members, keeps=True))
            for run in members:
                level += following(run, width, states)
                states += 1
    for members in _grouped(ends):
        # Two tokens at least: for a single one layers take a step of decoding, without gradients on some kernels.
        width = max(2, *(len(run.places) for run in members))
        rows += [np.pad(run.places, (0, width - len(run.places)), mode="edge") for run in members]
        calls.append(_call(rows[-len(members) :], members, keeps=False))
    computed = np.concatenate(rows)
    outputs = np.full(total, len(computed), dtype=np.int64)
    outputs[computed[::-1]] = np.arange(len(computed))[::-1]  # the first time that a place was computed
    return RunPlan(calls, torch.from_numpy(outputs))


def _grouped(runs: Iterable[_Run]) -> list[list[_Run]]:
    """Runs of nearly one length together; those that start from nothing apart from those that start from a state."""
    groups: list[list[_Run]] = []
    for run in sorted(runs, key=lambda run: (run.start >= 0, len(run.places))):
        if groups and (groups[-1][0].start >= 0) == (run.start >= 0) and _waste([*groups[-1], run]) <= 0:
            groups[-1].append(run)
        else:
            groups.append([run])
    return groups


def _waste(runs: Sequence[_Run]) -> float:
    """Tokens that one call of these runs computes too often, beyond what a call of its own for each would cost."""
    lengths = np.array([len(run.places) for run in runs])
    if runs[0].below:
        again = int(((lengths - lengths.min()) * [len(run.below) - 1 for run in runs]).sum())
    else:
        again = int((lengths.max() - lengths).sum())
    return again - WASTE - lengths.sum() / 4


def _call(rows: Sequence[np.ndarray], runs: Sequence[_Run], *, keeps: bool) -> RunCall:
    starts = torch.tensor([run.start for run in runs]) if runs[0].start >= 0 else None
    return RunCall(torch.from_numpy(np.stack(rows)), starts, keeps)
