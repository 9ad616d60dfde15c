"""What `visrl eval CONFIG` takes. Imports no torch: a typo is refused at once."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from visrl.box import CropRule
from visrl.config import SourceConfig
from visrl.engines.open import PolicyConfig, RequestConfig, ServerUrls, refuse_unused
from visrl.evaluate.benchmarks import find_benchmark
from visrl.prompts import JUDGE_TOKENS
from visrl.rollout.greedy import Mode


class EvalConfig(PolicyConfig, SourceConfig):
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

    judge_model_name_or_path: str | None = None
    """A judge's name at `judge_url`, or a checkpoint to judge in this process; without it there is no judge."""
    judge_url: ServerUrls = ()
    judge_request: RequestConfig = Field(default_factory=RequestConfig)
    """How requests to the judge's servers are put: `{max_tokens_key: …, extra_body: …}`, as for the policy."""
    judge_max_tokens: int = Field(JUDGE_TOKENS, ge=1)
    """The most that a judge may write; raise it for one that thinks aloud first."""

    @model_validator(mode="after")
    def _together(self) -> EvalConfig:
        if self.judge_url and not self.judge_model_name_or_path:
            raise ValueError("judge_url needs judge_model_name_or_path, the judge's name there")
        if not self.judge_url:
            refuse_unused(self.judge_request, "judge_request: ", "judge_url")
        if find_benchmark(self.benchmark).scores == "boxes":
            if self.mode != "own":
                raise ValueError(f"{self.benchmark} scores the model's own boxes; mode={self.mode} has none")
            if self.judge_model_name_or_path is not None:
                raise ValueError(f"{self.benchmark} has no answers for a judge")
        return self
