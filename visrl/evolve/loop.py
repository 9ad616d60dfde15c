"""The loop of self-evolution, step by step, each step resumable: `visrl evolve`.

start → [generate → filter → stage 1 → merge → stage 2 → merge] × iterations, and beside them
start → online reinforcement, where steps of it are asked for; → evaluation → report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from visrl.config import ConfigError, as_config
from visrl.engines.open import RequestConfig
from visrl.evolve.clock import StepClock, peak_memory
from visrl.evolve.config import (
    EvolveConfig,
    FilterConfig,
    GenerateConfig,
    RuleConfig,
    SamplingConfig,
    ServerConfig,
    parse_shard,
)
from visrl.evolve.filter import filter_pairs
from visrl.evolve.generate import generation_questions, read_questions, tree_settings
from visrl.evolve.papers_rule import filter_by_papers_rule
from visrl.evolve.scores import evaluate_all, format_scores, write_summary
from visrl.evolve.serving import generate_in_shards, generate_served, shard_config
from visrl.evolve.training import check_train_configs, online_config, train_and_merge, train_online
from visrl.manifest import claim_folder, hash_checkpoint, hold, read_manifest, write_manifest
from visrl.records import Sample
from visrl.redact import without_secrets
from visrl.report.loop import ONLINE
from visrl.rewards.open import NOT_IDENTITY, asks_model, critic_kind, critic_name


def run_evolve(
    config: EvolveConfig | str | Path | None = None,
    /,
    *,
    shard: str | None = None,
    plan_only: bool = False,
    **keys: Any,
) -> Path | None:
    """Run what is left of the iterations of generate → filter → stage 1 → stage 2, once the plan has been printed: the
    loop of VisRL (arXiv 2503.07523). Killed at any moment, the same call resumes.

    Args:
        config: an `EvolveConfig`, the path of a YAML file of its keys, or nothing where `keys` say it all.
        keys: keys of `EvolveConfig`, over what `config` says; an unknown one is refused with the nearest known one.
        shard: "i/n": make the i-th of n parts of the next generation on this machine, and nothing else.
        plan_only: print the plan and do nothing.

    Returns:
        The path of the report; None with a `shard` or `plan_only`.

    Raises:
        ManifestError: the output folder holds a run of another config, or another process writes it.
        ConfigError: an unknown key, keys that do not go together, or a data set that is too short.
    """
    config = as_config(EvolveConfig, config, keys)
    if shard is not None and parse_shard(shard)[1] != config.shards:
        raise ConfigError(f"--shard {shard}: the plan has shards={config.shards}")
    if config.adapter_name_or_path:
        raise ConfigError("adapter_name_or_path: iterations start from a merged model; merge it with `visrl export`")
    check_train_configs(config)
    print("\n".join(plan(config)), flush=True)
    if plan_only:
        return None
    # How a policy is served decides nothing, and a server that did not start may be mended in the same folder.
    how = {*NOT_IDENTITY, *ServerConfig.model_fields, "output_dir"}
    identity = without_secrets(config.recorded(exclude=how))
    identity["model"] = hash_checkpoint(config.model_name_or_path)
    if shard is not None:  # several machines work in this folder: each holds its own shard's
        claim_folder(config.output_dir, identity)
        _make_shard(config, shard)
        return None
    with hold(config.output_dir):
        claim_folder(config.output_dir, identity)
        return run_iterations(config, "evolve", shown=without_secrets(config.recorded()))


def plan(config: EvolveConfig) -> list[str]:
    """What a run will do, step by step, and what of it is done.

    Raises:
        ConfigError: a data set that is too short.
    """
    samples = generation_questions(_generation(config, 0, config.model_name_or_path))
    critic = critic_name(config, samples)
    lines = [
        f"start {config.model_name_or_path}; critic {critic}; {config.iterations} iterations → {config.output_dir}",
        f"each: {_tries(config, samples)}; {_rule(config)}, diversity controller {_on(config.diversity)}",
    ]
    if config.losers == "own" and config.diversity:
        lines.append("its random boxes are left out of pairs of the policy's own; diversity=false saves their cost")
    for number in range(config.iterations):
        if number:
            generation_questions(_generation(config, number, config.model_name_or_path))
        steps = ("generate", "filter", "stage1", "stage1-merged", "stage2", "stage2-merged")
        folder = config.output_dir / f"iter{number}"
        done = [step for step in steps if read_manifest(folder / step) is not None]
        lines.append(f"iteration {number}: {' → '.join(steps)}" + (f" (done: {', '.join(done)})" if done else ""))
    if config.online_steps:
        state = " (done)" if read_manifest(config.output_dir / ONLINE) is not None else ""
        stage = online_config(config).stage
        lines.append(f"{ONLINE}, from the same start: {stage}, {config.online_steps} steps{state}")
    if config.eval_dataset:
        lines.append(f"evaluation of every checkpoint on {config.eval_dataset}")
    return lines


def run_iterations(
    config: EvolveConfig, verb: str, shown: dict[str, Any], beside: Callable[[StepClock], None] | None = None
) -> Path:
    """Run what is left of all iterations, score every checkpoint, and write the report; its path. `shown` is the config
    that the manifest of `verb` shows; `beside` does what a verb does beside the loop, in the same run and report."""
    from visrl.report.page import write_report

    run = config.output_dir
    clock = StepClock(run / "seconds.json")
    with peak_memory(run / "peak_rss.json"):
        checkpoints = {"sft": config.model_name_or_path}
        current = config.model_name_or_path
        for iteration in range(config.iterations):
            current = _iterate(config, iteration, current, checkpoints, clock)
        if config.online_steps:
            clock.time(ONLINE, lambda: checkpoints.update({ONLINE: train_online(config)}))
        if config.eval_dataset:
            samples = read_questions(
                config.eval_dataset, dataset_dir=config.dataset_dir, limit=config.eval_samples,
                image_root=config.image_root, with_box=True,
            )  # fmt: skip
            evaluate_all(run, samples, checkpoints, config, controls=config.controls, clock=clock)
        if beside is not None:
            beside(clock)
    summary = write_summary(run, list(checkpoints), config.iterations, seed=config.seed, clock=clock, config=shown)
    parents = {"model": hash_checkpoint(config.model_name_or_path)}
    write_manifest(
        run, verb=verb, config=shown, parents=parents, seconds=summary["seconds"], chain=_chain(run), last=current
    )
    report = write_report(run)
    print(format_scores(summary))
    print(f"last checkpoint: {current}")
    print(f"report: {report}")
    return report


def _chain(run: Path) -> dict[str, Any]:
    """What every step of the run was made from, by the hashes in its manifest."""
    found = {}
    for path in sorted(run.glob("iter*/*/manifest.json")):
        manifest = read_manifest(path.parent) or {}
        found[str(path.parent.relative_to(run))] = manifest.get("parents", {})
    return found


# --- One iteration ----------------------------------------------------------------------------------------------------


def _iterate(config: EvolveConfig, iteration: int, policy: str, checkpoints: dict[str, str], clock: StepClock) -> str:
    """One iteration from `policy`; its merged stage-2 checkpoint."""
    base = config.output_dir / f"iter{iteration}"
    asked = _generation(config, iteration, policy)
    clock.time(f"iter{iteration}/generate", partial(generate_in_shards, asked, config.shards, config))
    rule = {key: getattr(config, key) for key in RuleConfig.model_fields}
    kept = FilterConfig(input_dir=(base / "generate",), output_dir=base / "filter", **rule, **_source(asked))
    counts: dict[str, Any] = {}
    clock.time(f"iter{iteration}/filter", lambda: counts.update(filter_pairs(kept)))
    if config.compare_paper:
        clock.time(f"iter{iteration}/paper's rule", partial(filter_by_papers_rule, asked, _source(asked)))
    current = policy
    for stage in (1, 2):
        if not counts["kept"]:
            print(f"iteration {iteration}: no pair was kept, so stage {stage} is left out and the checkpoint stays")
            checkpoints[f"iter{iteration}-stage{stage}"] = current
            continue
        merged = base / f"stage{stage}-merged"
        clock.time(f"iter{iteration}/stage{stage}", partial(train_and_merge, config, base, stage, current, merged))
        checkpoints[f"iter{iteration}-stage{stage}"] = current = str(merged)
    return current


def _generation(config: EvolveConfig, iteration: int, policy: str) -> GenerateConfig:
    """The generation of an iteration.

    Raises:
        ConfigError: no questions are left for it.
    """
    values = {key: getattr(config, key) for key in SamplingConfig.model_fields}
    if len(config.dataset) not in (1, config.iterations):
        raise ConfigError(
            f"dataset: {len(config.dataset)} data sets for {config.iterations} iterations; give one or all"
        )
    shared = len(config.dataset) == 1
    skip = config.skip_samples + (config.max_samples or 0) * iteration if shared else config.skip_samples
    values |= {
        "model_name_or_path": policy,
        "dataset": config.dataset[0] if shared else config.dataset[iteration],
        "skip_samples": skip,
        "output_dir": config.output_dir / f"iter{iteration}" / "generate",
    }
    if iteration and not config.server:  # policy_url serves the first policy only
        values |= {"policy_url": (), **RequestConfig().model_dump()}
    return GenerateConfig(**values)


def _source(asked: GenerateConfig) -> dict[str, Any]:
    keys = ("dataset", "dataset_dir", "skip_samples", "max_samples", "image_root")
    return {key: getattr(asked, key) for key in keys}


def _make_shard(config: EvolveConfig, shard: str) -> None:
    """This machine's shard of the first iteration whose generation is not complete."""
    policy = config.model_name_or_path
    for iteration in range(config.iterations):
        base = config.output_dir / f"iter{iteration}"
        if read_manifest(base / "generate") is None:
            number, of = parse_shard(shard)
            generate_served(shard_config(_generation(config, iteration, policy), number, of), config)
            print(f"shard {shard} of iteration {iteration} is made; without --shard the run goes on once all are")
            return
        policy = _policy_after(base, policy)
    print("every generation is complete")


def _policy_after(base: Path, policy: str) -> str:
    """The policy that a finished iteration leaves: merged stage 2, or `policy` where no pair was kept.

    Raises:
        ConfigError: it is not finished.
    """
    filtered = read_manifest(base / "filter")
    if filtered and not filtered["counts"]["kept"]:
        return policy
    if read_manifest(base / "stage2-merged") is None:
        raise ConfigError(f"{base} is generated and not trained yet; go on without --shard first")
    return str(base / "stage2-merged")


def _tries(config: EvolveConfig, samples: Sequence[Sample]) -> str:
    """How much is sampled in an iteration, and how much the critic is asked."""
    firsts = f"{len(samples)} questions × {config.rounds} rounds × 2"
    about_boxes = config.use_box_critic and critic_kind(config, samples) == "model"
    if config.max_looks is not None:
        tries = asks = len(samples) * tree_settings(config, "exact").most_leaves
        made = f"{firsts} first turns, up to {tries} tries of up to {config.max_looks} looks"
    else:
        tries = 2 * config.rounds * len(samples)
        asks = (about_boxes + config.answers) * tries
        made = f"{firsts} = {tries} tries"
        made += f", {config.answers} answers from each crop" if config.answers > 1 else ""
    return made + (f", up to {asks} questions to the critic" if asks_model(config, samples) else "")


def _rule(config: EvolveConfig) -> str:
    settings = config.filter_settings()
    if config.max_looks is not None:
        return f"turns worse by {settings.min_difference:g}, a look takes {settings.look_price:g} of its score"
    if settings.losers == "paper":
        return f"losers 'paper', rule {settings.rule!r}, box critic {_on(settings.use_box_critic)}"
    return f"losers {settings.losers!r}, worse by {settings.min_difference:g}"


def _on(switch: bool) -> str:
    return "on" if switch else "off"
