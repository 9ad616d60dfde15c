"""What the paper's critic and rule keep of tries that were scored and filtered in another way: a comparison that a run
writes beside the pairs that it trains on, and trains nothing on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from visrl.data.native import read_records
from visrl.evolve.config import FilterConfig, GenerateConfig
from visrl.evolve.filter import filter_pairs
from visrl.evolve.generate import TRAJECTORIES, generate
from visrl.records import Trajectory, write_records
from visrl.report.rules import PAPER

GENERATED = "generate-paper"  # beside `generate` of an iteration


def filter_by_papers_rule(asked: GenerateConfig, source: dict[str, Any]) -> None:
    """Have the paper's critic judge the tries of the finished generation `asked`, the first answer of each, and keep
    pairs by its rule, in folders beside that generation's. `source` says which samples they are of, for the filter.

    Raises:
        ConfigError: no critic for these samples.
    """
    base = asked.output_dir.parent
    papers = {"critic": "auto", "grader": None, "answers": 1, "output_dir": base / GENERATED}
    again = asked.model_copy(update=papers)
    tries = again.output_dir / TRAJECTORIES
    if not tries.is_file():
        # One answer a crop is what was sampled first: the same tries, which `generate` finds there and has judged.
        sampled = read_records(Trajectory, asked.output_dir / TRAJECTORIES)
        write_records(tries, (replace(one, answers=()) for one in sampled))
    generate(again)
    filter_pairs(FilterConfig(input_dir=(again.output_dir,), output_dir=base / PAPER, pictures=0, **source))
