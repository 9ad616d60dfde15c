"""What `visrl eval CONFIG` takes. Imports no torch: a typo is refused at once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from visrl.box import CropRule
from visrl.config import SourceConfig
from visrl.engines.open import PolicyConfig
from visrl.evaluate.benchmarks import find_benchmark
from visrl.rewards.open_judge import JudgeKeys
from visrl.rollout.greedy import Mode
from visrl.zoom.config import LooksConfig


class EvalConfig(PolicyConfig, JudgeKeys, LooksConfig, SourceConfig):
    """What `visrl eval CONFIG` takes, besides what says which model is asked."""

    benchmark: str = "samples"
    """A row of the table in evaluate/benchmarks.py, or one of your own as `module:NAME`."""
    dataset: str
    """The folder of the benchmark's files; for "samples" drawn scenes, a named data set or a JSONL file."""
    datasets: list[str] | None = None
    """Which data sets of the folder; all that were published, if left out."""
    box_dir: str | None = None
    """viscot: the folder of detection files, which hold image sizes and exact boxes."""
    allow_missing_pictures: bool = False
    """Go on without some images: their questions count as failed."""
    max_samples: int | None = Field(None, ge=1, serialization_alias="limit")
    """At most so many questions of each data set."""

    reading: str | None = None
    """How questions are worded, their options ordered and replies read: "published", "vlmevalkit", "lmms-eval" or
    "ours", of those that the benchmark has; by default its first."""
    option_order: Literal["rotations", "shuffle"] | None = None
    """reading=ours: the options in every rotation (the default), or in one order a question, drawn by `seed`."""
    mode: Mode = "own"
    crop_rule: CropRule | None = None
    """By default the protocol's, or else the checkpoint's."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Room for an answer, over the protocol's; raise it for a model that thinks aloud."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    num_generations: int = Field(1, ge=1)
    """Replies to each question, sampled at `temperature`; a question counts as their mean (Avg@k)."""
    batch_size: int = Field(32, ge=1)
    """Questions asked together: the unit of resuming, and part of what makes a run repeatable."""
    seed: int = 0
    output_dir: Path
    retry_failed: bool = False
    """Ask again what failed in a run that is complete."""
    dry_run: bool = False
    """Read and check everything that is there, ask nothing."""

    @model_validator(mode="after")
    def _together(self) -> EvalConfig:
        benchmark = find_benchmark(self.benchmark)
        reading = benchmark.reading(self.reading)
        if self.looks_several_times and self.mode not in ("own", "no_box"):
            raise ValueError(f"mode={self.mode} puts one box in the model's place; several looks have own and no_box")
        if self.option_order and not (reading and reading.in_orders):
            raise ValueError("option_order needs reading=ours: a published reading has the order of the file")
        if self.num_generations > 1 and not self.temperature:
            raise ValueError("num_generations above 1 needs a temperature above 0: greedy replies are all the same")
        if self.temperature and "temperature" in self.omit_fields:
            raise ValueError("temperature cannot be both set and among omit_fields")
        if not self.temperature and self.top_p != 1:
            raise ValueError("top_p needs a temperature above 0: a greedy reply is the likeliest in any case")
        if benchmark.scores == "boxes":
            if self.mode != "own":
                raise ValueError(f"{self.benchmark} scores the model's own boxes; mode={self.mode} has none")
            if self.judge_model_name_or_path is not None:
                raise ValueError(f"{self.benchmark} has no answers for a judge")
        return self

    def recorded(self, exclude: Iterable[str] = ()) -> dict[str, Any]:
        """As `Config.recorded`, keys that came later left out where they say what was so before they came."""
        values = super().recorded(exclude)
        return {key: value for key, value in values.items() if key not in _LATER or value != _LATER[key]}


_LATER: dict[str, Any] = {
    "reading": None,
    "option_order": None,
    "max_new_tokens": None,
    "temperature": 0.0,
    "top_p": 1.0,
    "num_generations": 1,
}
