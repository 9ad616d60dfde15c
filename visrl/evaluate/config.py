"""What `visrl eval CONFIG` takes. Imports no torch: a typo is refused at once."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from visrl.box import CropRule
from visrl.config import SourceConfig
from visrl.engines.open import PolicyConfig
from visrl.evaluate.benchmarks import find_benchmark
from visrl.rewards.open_judge import JudgeKeys
from visrl.rollout.greedy import Mode


class EvalConfig(PolicyConfig, JudgeKeys, SourceConfig):
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

    mode: Mode = "own"
    protocol: str | None = None
    """"visrl" or the published one; by default what was published for the benchmark, and "visrl" for samples."""
    crop_rule: CropRule | None = None
    """By default the protocol's, or else the checkpoint's."""
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
        if find_benchmark(self.benchmark).scores == "boxes":
            if self.mode != "own":
                raise ValueError(f"{self.benchmark} scores the model's own boxes; mode={self.mode} has none")
            if self.judge_model_name_or_path is not None:
                raise ValueError(f"{self.benchmark} has no answers for a judge")
        return self
