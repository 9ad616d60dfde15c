"""`visrl generate`: samples → trajectories → verdicts, append-only and resumable at the edges of fixed batches."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from visrl.box import CropRule
from visrl.config import as_config
from visrl.data.native import read_records
from visrl.data.sources import hash_source, read_samples
from visrl.engines.base import Policy
from visrl.engines.open import opened_policy
from visrl.evolve.batches import PREFIX, SetAside, clear_aside, keep_whole_batches, set_aside, shard_of
from visrl.evolve.config import GenerateConfig, SamplingConfig
from visrl.evolve.tokens import TOKENS, batch_sizes, format_tokens, judge_counted, roll_out_counted, total_tokens
from visrl.failures import Tally, is_failure
from visrl.manifest import (
    claim_folder,
    hash_checkpoint,
    hold,
    is_complete,
    release_folder,
    write_manifest,
)
from visrl.pages.wording import count
from visrl.records import Journal, RecordError, Sample, Trajectory, Verdict
from visrl.redact import without_secrets
from visrl.rewards.critic import Critic, ModelCritic, count_verdicts, critic_failure
from visrl.rewards.open import NOT_IDENTITY, Grading, critic_hash, opened_critic
from visrl.rewards.outcome import OutcomeCritic
from visrl.rollout.rollout import RolloutSettings
from visrl.rollout.trees import TreeSettings
from visrl.sequences import batched
from visrl.zoom.episode import UNFINISHED

TRAJECTORIES, VERDICTS = "trajectories.jsonl", "verdicts.jsonl"


def generate(config: GenerateConfig | str | Path | None = None, /, **keys: Any) -> Path:
    """Sample trajectories of every question, and have the critic score them: Algorithm 1 of VisRL (arXiv 2503.07523).

    Killed at any moment and started again, it resumes at the last whole batch and ends with the same files. The files
    of shards 1 to n, one after another, are those of the whole.

    Args:
        config: a `GenerateConfig`, the path of a YAML file of its keys, or nothing where `keys` say it all.
        keys: keys of `GenerateConfig`, over what `config` says; an unknown one is refused with the nearest known one.

    Returns:
        `output_dir`: `trajectories.jsonl` and `verdicts.jsonl`, `rounds` × 2 lines for every question in one order
        (with `max_looks` one for each end of its tree), `tokens.jsonl` (what each batch cost), and manifest. Boxes are
        fractions of the image; scores are in [0, 1], None where none could be read.

    Raises:
        ConfigError: an unknown key, or no critic for these samples.
        RecordError: rows that are none.
        CheckpointError, EndpointError: a model that cannot be loaded, or a server that does not serve it.
        FailedRun: more failed than `max_failed` allows.
        ManifestError: the folder belongs to other work, or another process writes it.
    """
    config = as_config(GenerateConfig, config, keys)
    with hold(config.output_dir):
        return _generate(config)


def _generate(config: GenerateConfig) -> Path:
    started = time.time()
    samples = generation_questions(config)
    identity = generation_identity(config, samples)
    if is_complete(config.output_dir, identity):
        print(f"{config.output_dir} is already complete")
        return config.output_dir
    parts = shard_of(batched(samples, config.batch_size), config.shard)
    with opened_policy_and_critic(config, samples) as models:  # claims nothing where they cannot be opened
        claim_folder(config.output_dir, identity)
        counts = _work_off(config, parts, models)
        facts = {
            "questions": sum(map(len, parts)),
            "trajectories": counts["sampled"] + counts["random"],
            "counts": dict(counts),
            "crop_rule": models.crop_rule,
            "critic": models.critic.name,
            "requests": models.requests,
            **total_tokens(config.output_dir / TOKENS, len(parts)),
            "seconds": round(time.time() - started, 1),
            "seed": config.seed,
        }
    parents = {"model": identity["model"], "dataset": identity["data"]}
    write_manifest(config.output_dir, verb="generate", config=identity, parents=parents, **facts)
    clear_aside(config.output_dir / TRAJECTORIES, config.output_dir / VERDICTS)
    made = f"{facts['questions']} questions, {facts['trajectories']} trajectories"
    print(f"{made}: {format_counts(counts)} → {config.output_dir}")
    print(format_tokens(facts))
    for role, ended in models.requests.items():
        print(f"requests to the {role}: {format_counts(Counter(ended))}")
    return config.output_dir


def _work_off(config: GenerateConfig, parts: Sequence[Sequence[Sample]], models: PolicyAndCritic) -> Counter[str]:
    """Write what the folder lacks of the trajectories and verdicts of all parts; the counts of all of them.

    Raises:
        FailedRun: more failed than `max_failed` allows, or everything.
    """
    from visrl.progress import progress

    tried, judged = config.output_dir / TRAJECTORIES, config.output_dir / VERDICTS
    settings = rollout_settings(config, models)
    if isinstance(settings, TreeSettings):
        sizes, each, most = batch_sizes(config.output_dir / TOKENS)[: len(parts)], None, settings.most_leaves
    else:
        each = most = 2 * config.rounds
        sizes = [each * len(part) for part in parts]
    kept, seen = (keep_whole_batches(path, sizes) for path in (tried, judged))
    if kept:
        print(f"going on after {kept} of {len(parts)} batches")
    counts: Counter[str] = Counter()
    tallies = Tally("trajectories", config.max_failed), Tally("verdicts", config.max_failed)
    total = sum(map(len, parts)) * most
    again = SetAside(Trajectory, tried, lambda t: is_failure(t.error))
    again_verdicts = SetAside(Verdict, judged, lambda v: critic_failure(v) is not None)
    with Journal(tried) as tries, Journal(judged) as verdicts, Journal(config.output_dir / TOKENS) as costs:
        earlier, earlier_verdicts = read_records(Trajectory, tried), read_records(Verdict, judged)
        for number, part in enumerate(progress(parts, "generate", units="batches")):
            sound, sound_verdicts = again.batch(part), again_verdicts.batch(part)
            rolled: Sequence[Trajectory]
            if number < kept:
                rolled = list(islice(earlier, sizes[number]))
                _check_same(tried, part, rolled, each)
            else:
                rolled = sound
                if not sound:
                    rolled, cost = roll_out_counted(models.policy, part, settings, config.image_root)
                    costs.append([{"batch": number, **cost}])
                _check_same(tried, part, rolled, each)
                tries.append(rolled)
            if number < seen:
                said = list(islice(earlier_verdicts, len(rolled)))
            elif rolled == sound and sound_verdicts:
                said = sound_verdicts
                verdicts.append(said)
            else:
                of_place = {sample.place: sample for sample in part}
                asked = [of_place[one.place] for one in rolled]
                said, cost = judge_counted(models.critic, asked, rolled)
                costs.append([{"batch": number, **cost}])
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


def generation_questions(config: GenerateConfig, *, with_box: bool = False) -> list[Sample]:
    """The samples that a config names, shards aside."""
    return read_questions(
        config.dataset,
        dataset_dir=config.dataset_dir,
        skip=config.skip_samples,
        limit=config.max_samples,
        image_root=config.image_root,
        with_box=with_box,
    )


@dataclass(frozen=True, slots=True)
class PolicyAndCritic:
    """The policy, the rule that it crops by, and the critic of one run."""

    policy: Policy
    crop_rule: CropRule
    critic: Critic

    @property
    def requests(self) -> dict[str, dict[str, int]]:
        """How the attempts at each server ended, by role: "ok", "http 500", "time-out", "gave up" and so on."""
        from visrl.engines.endpoint import EndpointEngine

        engines = {
            "policy": self.policy,
            "critic": self.critic.engine if isinstance(self.critic, ModelCritic) else None,
        }
        clients = {role: engine.client for role, engine in engines.items() if isinstance(engine, EndpointEngine)}
        if isinstance(self.critic, OutcomeCritic) and self.critic.client is not None:
            clients["critic"] = self.critic.client
        return {role: dict(sorted(client.counts.items())) for role, client in clients.items()}


@contextmanager
def opened_policy_and_critic(config: GenerateConfig, samples: Sequence[Sample]) -> Iterator[PolicyAndCritic]:
    """The policy and critic of a generation, loaded, or reached and found healthy.

    Raises:
        CheckpointError: a model that cannot be loaded.
        ConfigError: no critic for these samples.
        EndpointError: a server that does not answer or serves another model.
    """
    with opened_policy(config) as opened:
        rule = config.crop_rule or opened.settings.crop_rule
        if notice := opened.settings.other_rule(rule):
            print(notice, flush=True)
        grading = Grading.of(opened, samples, rule, config.image_root, config.seed)
        with opened_critic(config, grading) as critic:
            yield PolicyAndCritic(opened.policy, rule, critic)


def rollout_settings(config: SamplingConfig, models: PolicyAndCritic) -> RolloutSettings | TreeSettings:
    """How a config has trajectories sampled: of one look, or trees of several."""
    if config.max_looks is not None:
        return tree_settings(config, models.crop_rule)
    return RolloutSettings(
        rounds=config.rounds,
        temperature=config.temperature,
        top_p=config.top_p,
        trigger=config.trigger,
        diversity=config.diversity,
        crop_rule=models.crop_rule,
        seed=config.seed,
        answers=config.answers,
    )


def tree_settings(config: SamplingConfig, crop_rule: CropRule) -> TreeSettings:
    """How a config has trees of several looks sampled."""
    assert config.max_looks is not None
    return TreeSettings(
        max_looks=config.max_looks,
        rounds=config.rounds,
        answers=config.answers,
        num_forks=config.num_forks,
        temperature=config.temperature,
        top_p=config.top_p,
        crop_rule=crop_rule,
        seed=config.seed,
    )


def generation_identity(config: GenerateConfig, samples: Sequence[Sample]) -> dict[str, Any]:
    """Everything that decides what a generation writes: two runs of one identity write the same files."""
    return {
        **without_secrets(config.recorded(exclude={"output_dir"} | NOT_IDENTITY)),
        "policy": "endpoint" if config.policy_url else "local",
        "model": hash_checkpoint(config.model_name_or_path),
        "adapter": hash_checkpoint(config.adapter_name_or_path) if config.adapter_name_or_path else None,
        "critic": critic_hash(config, samples),
        "data": hash_source(config.dataset, config.dataset_dir),
    }


def _check_same(path: Path, part: Sequence[Sample], rolled: Sequence[Trajectory], each: int | None) -> None:
    """That a batch has the trajectories of its questions in their order, so many of `each` where that is known."""
    found = [(place, len(list(own))) for place, own in groupby(rolled, lambda one: one.place)]
    if [place for place, _ in found] != [sample.place for sample in part] or any(
        each not in (None, n) for _, n in found
    ):
        raise RecordError(f"{path} holds trajectories of other questions; remove it or give another output folder")


# --- Counts -----------------------------------------------------------------------------------------------------------


def count_trajectories(trajectories: Iterable[Trajectory]) -> Counter[str]:
    """How boxes came about ("sampled", "random"), and errors by kind; of several looks also how they ended."""
    counts: Counter[str] = Counter()
    for trajectory in trajectories:
        counts[trajectory.origin] += 1
        if trajectory.error:
            counts[f"error: {trajectory.error.split(':')[0]}"] += 1
        elif trajectory.end in UNFINISHED:
            counts[f"unfinished: {trajectory.end}"] += 1
        elif trajectory.end is not None:
            counts[f"answered after {count(len(trajectory.looks), 'look')}"] += 1
    return counts


def format_counts(counts: Counter[str]) -> str:
    """Counts in words, the largest first."""
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "none"
