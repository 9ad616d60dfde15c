"""`visrl generate`: samples → trajectories → verdicts, append-only and resumable at the edges of fixed batches."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from pydantic import AfterValidator, Field

from visrl.box import CropRule
from visrl.data.sources import hash_source, read_samples
from visrl.evolve.again import PREFIX, SetAside, clear_aside, set_aside
from visrl.failures import Tally, is_failure
from visrl.manifest import (
    claim_folder,
    hash_checkpoint,
    hold,
    is_complete,
    read_manifest,
    release_folder,
    write_manifest,
)
from visrl.records import Journal, RecordError, Sample, Trajectory, Verdict, read_records
from visrl.redact import without_secrets
from visrl.rewards.critic import count_verdicts, critic_failure
from visrl.rewards.open import NOT_IDENTITY, Players, PlayersConfig, critic_name, players
from visrl.rollout.diversity import TRIGGER
from visrl.rollout.rollout import RolloutSettings, roll_out
from visrl.sequences import batched

TRAJECTORIES, VERDICTS = "trajectories.jsonl", "verdicts.jsonl"


def _valid_shard(text: str) -> str:
    parse_shard(text)
    return text


class SamplingConfig(PlayersConfig):
    """The keys of Algorithm 1's sampling, beside those of its engines."""

    image_root: str | None = None
    rounds: int = Field(5, ge=1)
    """N of Algorithm 1; a round is two boxes. The released code uses 3."""
    temperature: float = Field(1.0, ge=0)
    """The paper names none and the released code samples at 2; docs/EVOLVE.md says what was tried."""
    top_p: float = Field(1.0, gt=0, le=1)
    diversity: bool = True
    trigger: float = Field(TRIGGER, ge=0, le=1)
    """T: from this IoU on, the second box of a round is replaced. The released code replaces above 0.05."""
    crop_rule: CropRule | None = None
    """By default the checkpoint's own."""
    batch_size: int = Field(64, ge=1)
    """Questions in one batch: what a kill loses at most, and part of what makes a run repeat to the bit."""
    seed: int = 0


class GenerateConfig(SamplingConfig):
    """What `visrl generate` takes."""

    dataset: str
    dataset_dir: str = "data"
    skip_samples: int = Field(0, ge=0)
    max_samples: int | None = Field(None, ge=1)
    shard: Annotated[str, AfterValidator(_valid_shard)] = "1/1"
    """i/n: the i-th of n parts of the batches, for several machines; `--shard i/n` is the same."""
    output_dir: Path


def generate(config: GenerateConfig) -> Path:
    """Trajectories and verdicts of every sample; the folder with both files and the manifest.

    Killed at any moment and started again, it goes on at the last whole batch and ends with the same files. The files
    of shards 1 to n, one after another, are those of the whole.
    """
    with hold(config.output_dir):
        return _generate(config)


def _generate(config: GenerateConfig) -> Path:
    started = time.time()
    samples = questions_of(config)
    identity = generation_identity(config, samples)
    if is_complete(config.output_dir, identity):
        print(f"{config.output_dir} is already complete")
        return config.output_dir
    parts = shard_of(batches(samples, config.batch_size), config.shard)
    with open_players(config, samples) as play:  # claims nothing where they cannot be opened
        claim_folder(config.output_dir, identity)
        counts = _work_off(config, parts, play)
        facts = {
            "questions": sum(map(len, parts)),
            "trajectories": counts["sampled"] + counts["random"],
            "counts": dict(counts),
            "crop_rule": play.crop_rule,
            "critic": play.critic.name,
            "requests": play.requests,
            "prefilled_tokens": getattr(play.policy, "prefilled_tokens", None),
            "seconds": round(time.time() - started, 1),
            "seed": config.seed,
        }
    parents = {"model": identity["model"], "dataset": identity["data"]}
    write_manifest(config.output_dir, verb="generate", config=identity, parents=parents, **facts)
    clear_aside(config.output_dir / TRAJECTORIES, config.output_dir / VERDICTS)
    print(f"{facts['questions']} questions, {facts['trajectories']} trajectories: {told(counts)} → {config.output_dir}")
    for role, ended in play.requests.items():
        print(f"requests to the {role}: {told(Counter(ended))}")
    return config.output_dir


def _work_off(config: GenerateConfig, parts: Sequence[Sequence[Sample]], play: Players) -> Counter[str]:
    """Write what the folder lacks of the trajectories and verdicts of all parts; the counts of all of them.

    Raises:
        FailedRun: more failed than `max_failed` allows, or everything.
    """
    from visrl.progress import progress

    tried, judged = config.output_dir / TRAJECTORIES, config.output_dir / VERDICTS
    per_sample = 2 * config.rounds
    kept, seen = (keep_whole_batches(path, parts, per_sample) for path in (tried, judged))
    if kept:
        print(f"going on after {kept} of {len(parts)} batches")
    counts: Counter[str] = Counter()
    tallies = Tally("trajectories", config.max_failed), Tally("verdicts", config.max_failed)
    total = sum(map(len, parts)) * per_sample
    again = SetAside(Trajectory, tried, lambda t: is_failure(t.error))
    again_verdicts = SetAside(Verdict, judged, lambda v: critic_failure(v) is not None)
    with Journal(tried) as tries, Journal(judged) as verdicts:
        settings = rollout_settings(config, play)
        earlier, earlier_verdicts = read_records(Trajectory, tried), read_records(Verdict, judged)
        for number, part in enumerate(progress(parts, "generate", units="batches")):
            size = len(part) * per_sample
            sound, sound_verdicts = again.batch(size), again_verdicts.batch(size)
            rolled: Sequence[Trajectory]
            if number < kept:
                rolled = list(islice(earlier, size))
                _check_same(tried, part, rolled, per_sample)
            else:
                rolled = sound or roll_out(play.policy, part, settings, config.image_root)
                _check_same(tried, part, rolled, per_sample)
                tries.append(rolled)
            if number < seen:
                said = list(islice(earlier_verdicts, len(rolled)))
            elif rolled == sound and sound_verdicts:
                said = sound_verdicts
                verdicts.append(said)
            else:
                said = play.critic.judge([sample for sample in part for _ in range(per_sample)], rolled)
                verdicts.append(said)
            counts.update(count_trajectories(rolled))
            counts.update(count_verdicts(said))
            tallies[0].count(t.error if is_failure(t.error) else None for t in rolled)
            tallies[1].count(critic_failure(v) for t, v in zip(rolled, said, strict=True) if t.answer is not None)
            if any(tally.is_hopeless(total) for tally in tallies):
                break
    for tally in tallies:
        if tally.is_hopeless(total) or tally.is_hopeless():
            set_aside(judged, tried)
            if tallies[0].failed == tallies[0].seen:
                release_folder(config.output_dir)  # nothing is worth keeping: another config may have the folder
            raise tally.refuse(f"its files are kept as {PREFIX}{TRAJECTORIES} and {PREFIX}{VERDICTS}")
    return counts


def read_questions(
    dataset: str,
    *,
    dataset_dir: str = "data",
    skip: int = 0,
    limit: int | None = None,
    image_root: str | None = None,
    with_box: bool = False,
) -> list[Sample]:
    """The samples of a data set (see `visrl.data.sources`), `skip` passed by and at most `limit` taken.

    Raises:
        RecordError: none.
    """
    samples = read_samples(dataset, with_box=with_box, dataset_dir=dataset_dir, image_root=image_root)
    chosen = samples[skip : None if limit is None else skip + limit]
    if not chosen:
        raise RecordError(f"{dataset} has {len(samples)} samples, and skip_samples={skip} leaves none")
    return chosen


def questions_of(config: GenerateConfig, *, with_box: bool = False) -> list[Sample]:
    """The samples that a config names, shards aside."""
    return read_questions(
        config.dataset,
        dataset_dir=config.dataset_dir,
        skip=config.skip_samples,
        limit=config.max_samples,
        image_root=config.image_root,
        with_box=with_box,
    )


def open_players(config: GenerateConfig, samples: Sequence[Sample]) -> AbstractContextManager[Players]:
    """The policy and critic of a generation, as a context."""
    return players(config, samples, crop_rule=config.crop_rule, image_root=config.image_root, seed=config.seed)


def rollout_settings(config: SamplingConfig, play: Players) -> RolloutSettings:
    """How a config has trajectories drawn."""
    return RolloutSettings(
        rounds=config.rounds,
        temperature=config.temperature,
        top_p=config.top_p,
        trigger=config.trigger,
        diversity=config.diversity,
        crop_rule=play.crop_rule,
        seed=config.seed,
    )


def generation_identity(config: GenerateConfig, samples: Sequence[Sample]) -> dict[str, Any]:
    """Everything that decides what a generation writes: two runs of one identity write the same files."""
    critic = critic_name(config, samples)
    return {
        **without_secrets(config.model_dump(mode="json", exclude={"output_dir"} | NOT_IDENTITY)),
        "policy": "endpoint" if config.policy_url else "local",
        "model": hash_checkpoint(config.model_name_or_path),
        "adapter": hash_checkpoint(config.adapter_name_or_path) if config.adapter_name_or_path else None,
        "critic": hash_checkpoint(critic),
        "data": hash_source(config.dataset, config.dataset_dir),
    }


# --- Batches and shards -----------------------------------------------------------------------------------------------


def batches(samples: Sequence[Sample], size: int) -> list[Sequence[Sample]]:
    """Batches with fixed members: what is computed together never depends on when a run was stopped."""
    return batched(samples, size)


def parse_shard(text: str) -> tuple[int, int]:
    """i and n of "i/n", 1 ≤ i ≤ n.

    Raises:
        ValueError: it is not of this form.
    """
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if match is None or int(match[1]) > int(match[2]):
        raise ValueError(f"a shard is i/n with i from 1 to n, not {text!r}")
    return int(match[1]), int(match[2])


def shard_of(parts: list[Sequence[Sample]], shard: str) -> list[Sequence[Sample]]:
    """The i-th of n runs of whole batches, as even as can be; one after another they are all of them."""
    number, of = parse_shard(shard)
    return parts[(number - 1) * len(parts) // of : number * len(parts) // of]


def merge_shards(folders: Sequence[Path], out: Path) -> Path:
    """The files of complete shards, given in their order, one after another in `out`, with their counts added up.

    Raises:
        RecordError: a shard that is not complete.
    """
    with hold(out):
        return _merge_shards(folders, out)


def _merge_shards(folders: Sequence[Path], out: Path) -> Path:
    manifests = [read_manifest(folder) for folder in folders]
    for folder, manifest in zip(folders, manifests, strict=True):
        if manifest is None:
            raise RecordError(f"the shard {folder} is not complete")
    found = [manifest for manifest in manifests if manifest is not None]
    identity = {**found[0]["config"], "shard": "1/1", "shards": len(folders)}
    if claim_folder(out, identity):
        return out
    for name in (TRAJECTORIES, VERDICTS):
        with open(out / f"{name}.part", "wb") as whole:
            for folder in folders:
                with open(folder / name, "rb") as part:
                    shutil.copyfileobj(part, whole)
        os.replace(out / f"{name}.part", out / name)
    counts: Counter[str] = Counter()
    requests: dict[str, Counter[str]] = {}
    for manifest in found:
        counts.update(manifest["counts"])
        for role, ended in manifest["requests"].items():
            requests.setdefault(role, Counter()).update(ended)
    facts: dict[str, Any] = {
        key: sum(manifest[key] for manifest in found) for key in ("questions", "trajectories", "seconds")
    }
    same = {key: found[0][key] for key in ("crop_rule", "critic", "seed")}
    facts |= {"counts": dict(counts), "requests": requests}
    write_manifest(out, verb="generate", config=identity, parents=found[0]["parents"], **facts, **same)
    print(f"{len(folders)} shards, {facts['questions']} questions: {told(counts)} → {out}")
    return out


def keep_whole_batches(path: Path, parts: Sequence[Sequence[Sample]], per_sample: int) -> int:
    """How many whole batches of records `path` holds; what a kill left of an unfinished one is cut off.

    Raises:
        RecordError: more records than the batches have.
    """
    if not path.is_file():
        return 0
    sizes = [len(part) * per_sample for part in parts]
    with open(path, "rb+") as lines:
        whole = end = 0
        for size in sizes:
            ends = list(_line_ends(lines, size))
            if len(ends) < size:
                break
            whole, end = whole + 1, ends[-1]
        if whole == len(sizes) and lines.read(1):
            raise RecordError(f"{path} holds more than {sum(sizes)} records; remove it or give another output folder")
        lines.truncate(end)
    return whole


def _line_ends(lines: BinaryIO, count: int) -> Iterator[int]:
    """Where the next `count` whole lines of a file end."""
    for _ in range(count):
        if not lines.readline().endswith(b"\n"):
            return
        yield lines.tell()


def _check_same(path: Path, part: Sequence[Sample], rolled: Sequence[Trajectory], per_sample: int) -> None:
    wanted = [sample.place for sample in part for _ in range(per_sample)]
    found = [trajectory.place for trajectory in rolled]
    if found != wanted:
        raise RecordError(f"{path} holds trajectories of other questions; remove it or give another output folder")


# --- Counts -----------------------------------------------------------------------------------------------------------


def count_trajectories(trajectories: Iterable[Trajectory]) -> Counter[str]:
    """How boxes came about ("sampled", "random"), and errors by kind."""
    counts: Counter[str] = Counter()
    for trajectory in trajectories:
        counts[trajectory.origin] += 1
        if trajectory.error:
            counts[f"error: {trajectory.error.split(':')[0]}"] += 1
    return counts


def told(counts: Counter[str]) -> str:
    """Counts in words, the largest first."""
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "none"
