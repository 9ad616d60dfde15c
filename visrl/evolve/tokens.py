"""What a generation costs in tokens: counted batch by batch beside its records, so that a resumed run's total is whole.

A batch has two lines in `tokens.jsonl`, one of the policy and one of the critic, each written before the records that
it is the cost of: one that a kill cut off is done again, and its last line counts. Of several looks the policy's line
also says how many trajectories the batch has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from visrl.engines.base import Policy
from visrl.records import Sample, Trajectory, Verdict, read_jsonl
from visrl.rewards.critic import Critic
from visrl.rollout.rollout import RolloutSettings, roll_out
from visrl.rollout.trees import TreeSettings, roll_out_trees

TOKENS = "tokens.jsonl"
SAMPLED = ("box", "answer", "critic")
TRAJECTORIES = "trajectories"

Cost = dict[str, Any]


def roll_out_counted(
    policy: Policy, part: Sequence[Sample], settings: RolloutSettings | TreeSettings, root: str | None
) -> tuple[list[Trajectory], Cost]:
    """The trajectories of a batch, and the tokens sampled for its boxes and answers, and prefilled (None: not here)."""
    sampled: Counter[str] = Counter()
    before = getattr(policy, "prefilled_tokens", None)
    if isinstance(settings, TreeSettings):
        rolled = roll_out_trees(policy, part, settings, root, sampled)
    else:
        rolled = roll_out(policy, part, settings, root, sampled)
    after = getattr(policy, "prefilled_tokens", None)
    prefilled = None if before is None or after is None else after - before
    cost = {"of": "policy", "box": sampled["box"], "answer": sampled["answer"], "prefilled": prefilled}
    return rolled, cost | ({TRAJECTORIES: len(rolled)} if isinstance(settings, TreeSettings) else {})


def judge_counted(
    critic: Critic, samples: Sequence[Sample], rolled: Sequence[Trajectory]
) -> tuple[list[Verdict], Cost]:
    """The verdicts on a batch, and the tokens that the critic's model wrote for them."""
    before = critic.sampled_tokens
    verdicts = critic.judge(samples, rolled)
    return verdicts, {"of": "critic", "critic": critic.sampled_tokens - before}


def batch_sizes(path: Path) -> list[int]:
    """How many trajectories each of the first batches of a generation of several looks has, as far as it got."""
    sizes: dict[int, int] = {}
    for line in read_jsonl(path, unfinished="leave_out") if path.is_file() else ():
        if TRAJECTORIES in line:
            sizes[line["batch"]] = line[TRAJECTORIES]
    return [sizes[number] for number in takewhile(sizes.__contains__, count())]


def total_tokens(path: Path, batches: int) -> dict[str, Any]:
    """`sampled_tokens` (of boxes, of answers, and by the critic) and `prefilled_tokens` of a generation of so many
    batches, from its `tokens.jsonl`."""
    rows: list[Cost] = [{} for _ in range(batches)]
    for line in read_jsonl(path):
        if line["batch"] < batches:  # more are left where a failed run gave its folder to a smaller one
            rows[line["batch"]].update(line)
    return add_tokens({"sampled_tokens": row, "prefilled_tokens": row.get("prefilled")} for row in rows)


def add_tokens(costs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The tokens of several generations together, by their manifests; None where one of them did not count."""
    found = list(costs)
    sampled = [one.get("sampled_tokens") or {} for one in found]
    return {
        "sampled_tokens": {what: _total([one.get(what) for one in sampled]) for what in SAMPLED},
        "prefilled_tokens": _total([one.get("prefilled_tokens") for one in found]),
    }


def all_sampled(cost: Mapping[str, Any]) -> int | None:
    """Every token that was sampled, by whatever model; None where that is not known."""
    return _total([cost["sampled_tokens"][what] for what in SAMPLED])


def format_tokens(cost: Mapping[str, Any]) -> str:
    """What was sampled, in words."""
    if all_sampled(cost) is None:
        return "sampled tokens: not known, for a part of this was made before they were counted"
    box, answer, critic = (cost["sampled_tokens"][what] for what in SAMPLED)
    return f"sampled tokens: {box:,} of boxes, {answer:,} of answers, {critic:,} by the critic"


def _total(values: Iterable[int | None]) -> int | None:
    total = 0
    for value in values:
        if value is None:
            return None
        total += value
    return total
