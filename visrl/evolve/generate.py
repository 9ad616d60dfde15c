"""`visrl generate`: samples → trajectories → verdicts, append-only and resumable at the edges of fixed batches."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from visrl.box import CropRule
from visrl.config import Config
from visrl.manifest import claim_folder, hash_files, write_manifest
from visrl.records import Journal, Record, Sample, Trajectory, Verdict, read_records

Critics = Literal["oracle"]


class GenerateConfig(Config):
    """What `visrl generate` takes."""

    model_name_or_path: str
    adapter_name_or_path: str | None = None
    dataset: str
    image_root: str | None = None
    output_dir: Path
    critic: Critics = "oracle"
    rounds: int = Field(5, ge=1)  # N of Algorithm 1
    temperature: float = Field(1.0, ge=0)  # the released code samples at 2; see docs/LOG.md for what was tried
    top_p: float = Field(1.0, gt=0, le=1)
    diversity: bool = True
    trigger: float = Field(0.2, ge=0, le=1)  # T
    crop_rule: CropRule | None = None
    batch_size: int = Field(64, ge=1)  # questions in one batch; part of what makes a run repeatable
    max_samples: int | None = None
    seed: int = 0


def generate(config: GenerateConfig) -> Path:
    """Trajectories and verdicts of every sample; the folder with both files and the manifest.

    Killed at any moment and started again, it goes on at the last whole batch and ends with the same files.
    """
    from visrl.data.sources import read_samples
    from visrl.engines.local import LocalEngine
    from visrl.evolve.critic import SceneOracle
    from visrl.evolve.rollout import RolloutSettings, roll_out
    from visrl.progress import progress

    started = time.time()
    samples = read_samples(config.dataset)[: config.max_samples]
    identity = {**config.model_dump(mode="json", exclude={"output_dir"}), "model": _weights(config.model_name_or_path)}
    if claim_folder(config.output_dir, identity):
        print(f"{config.output_dir} is already complete")
        return config.output_dir
    policy = LocalEngine.load(config.model_name_or_path, adapter=config.adapter_name_or_path)
    rule = config.crop_rule or policy.encoder.settings.crop_rule
    settings = RolloutSettings(
        rounds=config.rounds,
        temperature=config.temperature,
        top_p=config.top_p,
        trigger=config.trigger,
        diversity=config.diversity,
        crop_rule=rule,
        seed=config.seed,
    )
    critic = SceneOracle(lambda size: policy.processed_size(size, is_crop=True), rule)
    tried, judged = config.output_dir / "trajectories.jsonl", config.output_dir / "verdicts.jsonl"
    parts = [samples[start : start + config.batch_size] for start in range(0, len(samples), config.batch_size)]
    per_sample = 2 * config.rounds
    kept = resume_at_batch(Trajectory, tried, parts, per_sample)
    seen = resume_at_batch(Verdict, judged, parts, per_sample)
    counts: Counter[str] = Counter()
    with Journal(tried) as tries, Journal(judged) as verdicts:
        for number, part in enumerate(progress(parts, "generate", unit="batch")):
            rolled: Sequence[Trajectory]
            if number < len(kept):
                rolled = kept[number]
            else:
                rolled = roll_out(policy, part, settings, config.image_root)
                tries.append(rolled)
            if number >= len(seen):
                by_id = {sample.id: sample for sample in part}
                verdicts.append(critic.judge([by_id[t.sample_id] for t in rolled], rolled))
            counts.update(_counts(rolled))
    facts = {
        "questions": len(samples),
        "trajectories": sum(counts[key] for key in ("sampled", "random")),
        "counts": dict(counts),
        "crop_rule": rule,
        "prefilled_tokens": policy.prefilled_tokens,
        "seconds": round(time.time() - started, 1),
        "seed": config.seed,
    }
    parents = {"model": identity["model"]}
    write_manifest(config.output_dir, verb="generate", config=identity, parents=parents, **facts)
    print(f"{len(samples)} questions, {facts['trajectories']} trajectories: {_told(counts)} → {config.output_dir}")
    return config.output_dir


def resume_at_batch(
    kind: type[Record], path: Path, parts: Sequence[Sequence[Sample]], per_sample: int
) -> list[list[Record]]:
    """The whole batches that `path` already holds; what a kill left of an unfinished one is cut off.

    Raises:
        RecordError: a whole line that is no record.
    """
    if not path.is_file():
        return []
    with Journal(path):
        pass  # opening cuts an unfinished line
    found = list(read_records(kind, path))
    batches: list[list[Record]] = []
    place = 0
    for part in parts:
        size = len(part) * per_sample
        if place + size > len(found):
            break
        batches.append(found[place : place + size])
        place += size
    if place < len(found):
        lines = path.read_bytes().splitlines(keepends=True)
        rest = path.with_suffix(".part")
        rest.write_bytes(b"".join(lines[:place]))
        os.replace(rest, path)
    return batches


def _counts(trajectories: Iterable[Trajectory]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for trajectory in trajectories:
        counts[trajectory.origin] += 1
        if trajectory.error:
            counts[f"error: {trajectory.error.split(':')[0]}"] += 1
    return counts


def _told(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def _weights(path: str) -> str:
    folder = Path(path)
    return hash_files(*sorted(folder.glob("*.safetensors"))) if folder.is_dir() else path


class FilterConfig(Config):
    """What `visrl filter` takes: a folder of `visrl generate`, and the rule."""

    input_dir: Path
    dataset: str
    output_dir: Path
    rule: Literal["paper", "released"] = "paper"
    t_max: float = Field(0.8, ge=0, le=1)
    t_min: float = Field(0.2, ge=0, le=1)
    use_box_critic: bool = True
    max_samples: int | None = None


def filter_pairs(config: FilterConfig) -> dict[str, Any]:
    """Preferences from a generated folder, with counts of what was dropped and why; the counts."""
    from visrl.data.sources import read_samples
    from visrl.evolve.pairs import FilterSettings, make_pairs
    from visrl.records import write_records

    identity = {
        **config.model_dump(mode="json", exclude={"output_dir", "input_dir"}),
        "input": hash_files(config.input_dir / "trajectories.jsonl", config.input_dir / "verdicts.jsonl"),
    }
    done = claim_folder(config.output_dir, identity)
    samples = read_samples(config.dataset)[: config.max_samples]
    settings = FilterSettings(config.t_max, config.t_min, config.rule, config.use_box_critic)
    result = make_pairs(
        samples,
        read_records(Trajectory, config.input_dir / "trajectories.jsonl"),
        read_records(Verdict, config.input_dir / "verdicts.jsonl"),
        settings,
    )
    counts: dict[str, Any] = {
        "questions": result.questions,
        "kept": result.kept,
        "dropped_by_reason": dict(sorted(result.dropped.items())),
    }
    if not done:
        write_records(config.output_dir / "preferences.jsonl", result.preferences)
        parents = {"input": identity["input"]}
        write_manifest(config.output_dir, verb="filter", config=identity, parents=parents, counts=counts)
    reasons = ", ".join(f"{count} {name}" for name, count in counts["dropped_by_reason"].items()) or "none dropped"
    print(f"{result.kept} pairs of {result.questions} questions ({reasons}) → {config.output_dir}")
    return counts
