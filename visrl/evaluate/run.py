"""`visrl eval CONFIG`: ask a model every question of a benchmark, and score what it says. Resumable, and repeatable.

The folder of a run holds `results.jsonl` (one row a question, see rewards/results.py), `scores.json` and, with a judge,
`judgements-NAME.jsonl`. Heavy imports wait until there is something to ask.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visrl.config import ConfigError, as_config
from visrl.engines.open import PATIENCE
from visrl.evaluate.benchmarks import Benchmark, find_benchmark, incomplete, read_benchmark, unpublished
from visrl.evaluate.config import EvalConfig
from visrl.evaluate.inference import FAILED, JOURNAL, answer_questions
from visrl.evaluate.judging import format_judged, judge_rows
from visrl.evaluate.questions import BenchmarkQuestion, format_missing, missing_images
from visrl.evaluate.readings import as_asked, with_circular
from visrl.evaluate.results import NAME, SCORES
from visrl.manifest import hash_checkpoint, hash_files, hold, is_complete, write_manifest
from visrl.models.folder import check_folder
from visrl.plugins import plugin_file
from visrl.records import RecordError, Sample, write_records, write_text
from visrl.redact import without_secrets
from visrl.rewards.crop_effects import quadrants
from visrl.rewards.results import NO_OTHER, Row, by_dataset, looks_taken, right_column, summarise
from visrl.rollout.controls import other_questions
from visrl.zoom.protocols import ZOOM_PROTOCOLS

if TYPE_CHECKING:
    from visrl.rollout.protocols import LookProtocol


def evaluate(config: EvalConfig | str | Path | None = None, /, **keys: Any) -> Path:
    """Ask a model every question of a benchmark at temperature 0, score what it says, and print the table.

    Killed at any moment and started again, it resumes at the last whole batch and ends with the same files.

    Args:
        config: an `EvalConfig`, the path of a YAML file of its keys, or nothing where `keys` say it all.
        keys: keys of `EvalConfig`, over what `config` says; an unknown one is refused with the nearest known one.

    Returns:
        `output_dir`: `results.jsonl` (a row for every question: boxes in fractions of the image, scores in [0, 1]),
        `scores.json` (means with 95 % intervals), judgements where there is a judge, and manifest.

    Raises:
        RecordError, ConfigError: an unknown key, missing data sets or images, and whatever the engines refuse.
        ManifestError: the folder holds another run, or another process writes it.
    """
    config = as_config(EvalConfig, config, keys)
    with nullcontext() if config.dry_run else hold(config.output_dir):
        return _evaluate(config)


def _evaluate(config: EvalConfig) -> Path:
    from visrl.evaluate.tables import choice_lines, looks_line, quadrant_lines, summary_lines

    started = time.monotonic()
    benchmark = find_benchmark(config.benchmark)
    protocol = _protocol(config, benchmark)
    questions = _in_orders(config, benchmark, _checked_questions(config))
    identity = _identity(config, protocol, questions)
    is_complete(config.output_dir, identity)  # another run's folder is refused before a model is loaded
    if config.judge_model_name_or_path and not config.judge_url:
        check_folder(config.judge_model_name_or_path)  # and a judge that is not there, before answers are made for it
    if config.dry_run:
        print("nothing was asked (dry_run)")
        return config.output_dir
    rows, rule = answer_questions(config, benchmark, protocol, questions, identity)
    rows, judged = judge_rows(config, with_circular(rows, questions))
    write_records(config.output_dir / NAME, rows)
    for name in (JOURNAL, FAILED):
        (config.output_dir / name).unlink(missing_ok=True)
    facts = {
        "benchmark": config.benchmark,
        "model": config.policy_served_name or config.model_name_or_path,
        "mode": config.mode,
        "protocol": protocol.name,
        "crop_rule": rule,
        "judge": config.judge_model_name_or_path,
        "limit": config.max_samples,
        **_facts_of_looks(config),
        **_facts_of_reading(config, benchmark),
    }
    summary = {**summarise(rows, config.seed), **_quadrants(rows), **looks_taken(rows)}
    scores = {**facts, **(benchmark.figures(summary, rows) if benchmark.figures else summary)}
    write_text(config.output_dir / SCORES, json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
    write_manifest(
        config.output_dir, verb="eval", config=identity, parents={"model": identity["weights"]}, crop_rule=rule
    )
    cells = ["", *choice_lines(scores)] if "overall" in scores else []
    cells += [looks_line(scores["looks"])] if "looks" in scores else []
    cells += ["", *quadrant_lines(scores["quadrants"])] if "quadrants" in scores else []
    print("\n".join([*summary_lines(scores), *cells, *_closing_lines(scores, judged)]))
    print(f"{time.monotonic() - started:.0f} s; results, scores: {config.output_dir}")
    return config.output_dir


# --- Before anything runs ---------------------------------------------------------------------------------------------


def _checked_questions(config: EvalConfig) -> list[BenchmarkQuestion]:
    """The questions, with what was read said, once no image is missing."""
    questions = read_benchmark(
        config.benchmark,
        config.dataset,
        dataset_dir=config.dataset_dir,
        datasets=config.datasets,
        boxes=config.box_dir,
        image_root=config.image_root,
        limit=config.max_samples,
    )
    if not questions:
        which = f" of {', '.join(config.datasets)}" if config.datasets else ""
        raise RecordError(f"{config.dataset} holds no questions{which}")
    sources = {question.sample.source for question in questions}
    without = sum(question.sample.box is None for question in questions)
    lacking = f", {without} of them without a true box" if without else ""
    print(f"{len(questions):,} questions of {len(sources)} data sets{lacking}")
    for name, (count, whole) in incomplete(config.benchmark, questions, config.datasets).items():
        print(f"  {name}: {count:,} of its {whole:,} published questions")
    for name, count in unpublished(config.benchmark, questions).items():
        print(f"  {name}: {count:,} questions of a part that was not published")
    if config.mode == "other_question":
        _check_others([question.sample for question in questions], config.seed)
    missing = missing_images(questions, config.image_root)
    if missing:
        notice = format_missing(missing, config.image_root, find_benchmark(config.benchmark).origin)
        if not config.allow_missing_pictures:
            raise RecordError(f"{notice}\nset image_root, or allow_missing_pictures=true to count them as failed")
        print(f"{notice}\ntheir questions count as failed")
    return questions


def _in_orders(
    config: EvalConfig, benchmark: Benchmark, questions: Sequence[BenchmarkQuestion]
) -> list[BenchmarkQuestion]:
    """The questions as they are asked, in the orders of their options and as often as replies are wanted."""
    order = config.option_order or "rotations"
    asked = list(as_asked(questions, benchmark.reading(config.reading), order, config.seed, config.num_generations))
    if len(asked) != len(questions):
        whole = sum(question.is_first for question in asked)
        print(
            f"asked {len(asked):,} times: {whole:,} questions, in the orders of their options and in several attempts"
        )
    fixed = sum(question.choice is not None and question.choice.is_fixed for question in asked)
    reading = benchmark.reading(config.reading)
    if fixed and reading is not None and reading.in_orders:
        print(f"{fixed:,} keep the order of the file: their text holds the options")
    return asked


def _facts_of_reading(config: EvalConfig, benchmark: Benchmark) -> dict[str, Any]:
    """What `scores.json` says of the reading, and of sampling where there was any."""
    reading = benchmark.reading(config.reading)
    facts: dict[str, Any] = {}
    if reading is not None:
        facts |= {"reading": config.reading or next(iter(benchmark.readings)), "rule": reading.source}
        if reading.in_orders:
            facts["option_order"] = config.option_order or "rotations"
    if config.temperature:
        names = ("temperature", "top_p", "num_generations")
        facts |= {name: getattr(config, name) for name in names}
    return facts


def _facts_of_looks(config: EvalConfig) -> dict[str, Any]:
    """What `scores.json` says beside the protocol of how often was looked, and by which faults."""
    faults = {"protocol_faults": sorted(config.protocol_faults)} if config.protocol_faults else {}
    return faults if config.max_looks is None else {**faults, "max_looks": config.max_looks}


def _check_others(samples: Sequence[Sample], seed: int) -> None:
    """Refuse a run of mode "other_question" in which no question has another one; say how many have none."""
    without = other_questions(samples, seed).count(None)
    if without == len(samples):
        raise ConfigError(
            "mode: none of these questions has another one about another region of its image, whose box could be "
            "shown; mode=other_question needs a data set with several questions an image"
        )
    if without:
        print(f"{NO_OTHER}: {without:,}, left out of the figures")


def _protocol(config: EvalConfig, benchmark: Benchmark) -> LookProtocol:
    allowed = benchmark.protocols
    if config.protocol in ZOOM_PROTOCOLS:
        return _public_zoom(config, benchmark)
    from visrl.rollout.protocols import SEVERAL_LOOKS, several_looks

    protocol = _one_look(config, benchmark, allowed)
    if config.max_looks is None:
        return protocol
    if protocol.name not in SEVERAL_LOOKS or benchmark.scores == "boxes":
        raise ConfigError(f"max_looks: {config.benchmark} scores one box, and several looks come to an answer")
    return several_looks(protocol, config.max_looks)


def _public_zoom(config: EvalConfig, benchmark: Benchmark) -> LookProtocol:
    """A public protocol of several looks, around the benchmark's wording of its questions."""
    from visrl.rollout.protocols import public_zoom

    assert config.protocol is not None
    if benchmark.scores == "boxes":
        raise ConfigError(f"protocol: {config.benchmark} scores one box; {config.protocol} looks several times")
    reading = benchmark.reading(config.reading)
    plain = reading.protocol().plain if reading else benchmark.protocol.plain
    protocol = public_zoom(config.protocol, plain, config.protocol_faults)
    return replace(protocol, answer_tokens=config.max_new_tokens or protocol.answer_tokens)


def _one_look(config: EvalConfig, benchmark: Benchmark, allowed: dict[str, LookProtocol]) -> LookProtocol:
    if config.protocol is not None and config.protocol not in allowed:
        raise ConfigError(f"protocol: {config.benchmark} is asked as {' or '.join(allowed)}, not {config.protocol!r}")
    reading = benchmark.reading(config.reading)
    if reading is not None:
        return reading.protocol(config.max_new_tokens)
    protocol = allowed[config.protocol or benchmark.protocol.name]
    return replace(protocol, answer_tokens=config.max_new_tokens) if config.max_new_tokens else protocol


def _identity(config: EvalConfig, protocol: LookProtocol, questions: Sequence[BenchmarkQuestion]) -> dict[str, Any]:
    """What decides the rows of this run: no address, no patience, no judge."""
    free = PATIENCE | {"output_dir", "retry_failed", "dry_run", "dataset_dir", "image_root", "box_dir"}
    kept = {key: value for key, value in config.recorded().items() if key not in free and not key.startswith("judge_")}
    digest = hashlib.blake2b(digest_size=16)
    for question in questions:
        sample = question.sample
        box = sample.box.as_list() if sample.box else None
        parts = [sample.source, sample.id, sample.image, sample.question, sample.answer, box, question.truth]
        more = [question.references, question.truths] if question.references or question.truths else []
        digest.update(json.dumps([*parts, *more], ensure_ascii=True).encode())
    adapter = config.adapter_name_or_path
    own = plugin_file(config.benchmark)
    return {
        **without_secrets(kept),
        **({"benchmark_module": hash_files(own)} if own else {}),
        "protocol": protocol.name,
        "questions": digest.hexdigest(),
        "weights": hash_checkpoint(config.model_name_or_path),
        "adapter": hash_checkpoint(adapter) if adapter else None,
    }


def _quadrants(rows: Sequence[Row]) -> dict[str, Any]:
    """Grounded × right over all rows and over each data set, by the column that says what is right."""
    right_by = right_column(rows)
    cells = quadrants(rows, right_by)
    if not cells:
        return {}
    own = {name: quadrants(group, right_by) for name, group in by_dataset(rows).items()}
    return {"quadrants": {"right_by": right_by, **cells, "datasets": own}}


def _closing_lines(scores: dict[str, Any], judged: dict[str, int]) -> list[str]:
    lines = []
    if judged:
        lines.append(format_judged(judged))
    if scores.get("missing_datasets"):
        lines.append(f"no answers to: {', '.join(scores['missing_datasets'])}; the means are over the others")
    if scores.get("average_published") is not None:
        lines.append(f"average as published, missing data sets counted 0: {scores['average_published']:.3f}")
    totals = scores.get("totals")
    if totals and totals["average_published"] is not None:
        lines.append(f"average as published, data sets scoring 0 left out: {totals['average_published']:.3f}")
    return ["", *lines] if lines else []
