"""`visrl eval CONFIG`: ask a model every question of a benchmark, and score what it says. Resumable, and repeatable.

The folder of a run holds `results.jsonl` (one row a question, see results.py), `scores.json` and, with a judge,
`judgements-NAME.jsonl`. Heavy imports wait until there is something to ask.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visrl import manifest
from visrl.box import CropRule
from visrl.config import ConfigError, as_config
from visrl.engines.open import (
    PATIENCE,
    model_settings,
    opened_policy,
)
from visrl.evaluate.benchmarks import (
    BenchmarkQuestion,
    format_missing,
    incomplete,
    missing_pictures,
    read_benchmark,
)
from visrl.evaluate.config import EvalConfig
from visrl.evaluate.results import NAME, SCORES
from visrl.failures import Tally, is_failure
from visrl.manifest import claim_folder, hash_checkpoint, hold, is_complete, release_folder, write_manifest
from visrl.models.folder import check_folder
from visrl.records import Journal, RecordError, read_jsonl, write_records, write_text
from visrl.redact import without_secrets
from visrl.rewards.results import Key, Result, by_dataset, key_of, summarise
from visrl.rollout.greedy import Mode, greedy_looks
from visrl.sequences import batched

if TYPE_CHECKING:
    from visrl.engines.base import Policy
    from visrl.rollout.protocols import LookProtocol
    from visrl.rollout.rollout import Refusal
    from visrl.rollout.steps import Look

JOURNAL = "journal.jsonl"
FAILED = "failed.jsonl"  # what failed in a run of which too much did
Row = dict[str, Any]


def evaluate(config: EvalConfig | str | Path | None = None, /, **keys: Any) -> Path:
    """Ask a model every question of a benchmark at temperature 0, score what it says, and print the table.

    Killed at any moment and started again, it goes on at the last whole batch and ends with the same files.

    Args:
        config: an `EvalConfig`, the path of a YAML file of its keys, or nothing where `keys` say it all.
        keys: keys of `EvalConfig`, over what `config` says; an unknown one is refused with the nearest known one.

    Returns:
        `output_dir`: `results.jsonl` (a row for every question: boxes in fractions of the picture, scores in [0, 1]),
        `scores.json` (means with 95 % intervals), judgements where there is a judge, and manifest.

    Raises:
        RecordError, ConfigError: an unknown key, missing data sets or pictures, and whatever the engines refuse.
        ManifestError: the folder holds another run, or another process writes it.
    """
    config = as_config(EvalConfig, config, keys)
    with nullcontext() if config.dry_run else hold(config.output_dir):
        return _evaluate(config)


def _evaluate(config: EvalConfig) -> Path:
    from visrl.evaluate.tables import summary_lines

    started = time.monotonic()
    questions = _checked_questions(config)
    protocol = _protocol(config)
    identity = _identity(config, protocol, questions)
    is_complete(config.output_dir, identity)  # another run's folder is refused before a model is loaded
    if config.judge_model_name_or_path and not config.judge_url:
        check_folder(config.judge_model_name_or_path)  # and a judge that is not there, before answers are made for it
    if config.dry_run:
        print("nothing was asked (dry_run)")
        return config.output_dir
    rows, rule = _answers(config, protocol, questions, identity)
    rows, judged = _judged(config, rows)
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
    }
    scores = {**facts, **_scored(config, rows)}
    write_text(config.output_dir / SCORES, json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
    write_manifest(
        config.output_dir, verb="eval", config=identity, parents={"model": identity["weights"]}, crop_rule=rule
    )
    print("\n".join([*summary_lines(scores), *_closing_lines(scores, judged)]))
    print(f"{time.monotonic() - started:.0f} s; results, scores: {config.output_dir}")
    return config.output_dir


# --- Before anything runs ---------------------------------------------------------------------------------------------


def _checked_questions(config: EvalConfig) -> list[BenchmarkQuestion]:
    """The questions, with what was read said, once no picture is missing."""
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
        raise RecordError(f"{config.dataset} holds no questions")
    sources = {question.sample.source for question in questions}
    without = sum(question.sample.box is None for question in questions)
    told = f", {without} of them without a true box" if without else ""
    print(f"{len(questions):,} questions of {len(sources)} data sets{told}")
    for name, (count, whole) in incomplete(config.benchmark, questions).items():
        print(f"  {name}: {count:,} of its {whole:,} published questions")
    missing = missing_pictures(questions, config.image_root)
    if missing:
        told = format_missing(missing, config.image_root)
        if not config.allow_missing_pictures:
            raise RecordError(f"{told}\nset image_root, or allow_missing_pictures=true to count them as failed")
        print(f"{told}\ntheir questions count as failed")
    return questions


def _protocol(config: EvalConfig) -> LookProtocol:
    from visrl.rollout.protocols import REFCOCO, VISCOT, VISCOT_BOXES, VISRL, VISRL_BOXES

    published = {"samples": VISRL, "viscot": VISCOT, "viscot-detection": VISCOT_BOXES, "refcoco": REFCOCO}
    own = published[config.benchmark]
    allowed = {own.name: own, "visrl": VISRL if own.answer is not None else VISRL_BOXES}
    if config.protocol is not None and config.protocol not in allowed:
        raise ConfigError(f"protocol: {config.benchmark} is asked as {' or '.join(allowed)}, not {config.protocol!r}")
    return allowed[config.protocol or own.name]


def _identity(config: EvalConfig, protocol: LookProtocol, questions: Sequence[BenchmarkQuestion]) -> dict[str, Any]:
    """What decides the rows of this run: no address, no patience, no judge."""
    free = PATIENCE | {"output_dir", "retry_failed", "dry_run", "dataset_dir", "image_root", "box_dir"}
    kept = {key: value for key, value in config.recorded().items() if key not in free and not key.startswith("judge_")}
    digest = hashlib.blake2b(digest_size=16)
    for question in questions:
        sample = question.sample
        box = sample.box.as_list() if sample.box else None
        told = [sample.source, sample.id, sample.image, sample.question, sample.answer, box, question.truth]
        digest.update(json.dumps(told, ensure_ascii=True).encode())
    adapter = config.adapter_name_or_path
    return {
        **without_secrets(kept),
        "protocol": protocol.name,
        "questions": digest.hexdigest(),
        "weights": hash_checkpoint(config.model_name_or_path),
        "adapter": hash_checkpoint(adapter) if adapter else None,
    }


# --- Asking -----------------------------------------------------------------------------------------------------------


def _answers(
    config: EvalConfig, protocol: LookProtocol, questions: Sequence[BenchmarkQuestion], identity: dict[str, Any]
) -> tuple[list[Row], CropRule]:
    """A row for every question, in order, and the crop rule; those that are there already are not asked again."""
    from visrl.progress import progress

    known = _known_rows(config)
    tally = Tally("questions", config.max_failed)
    tally.count(_failure(row, config) for row in known.values())
    parts = batched(questions, config.batch_size)
    waiting = [part for part in parts if not all(_key(question) in known for question in part)]
    settings = model_settings(config)
    rule = config.crop_rule or protocol.crop_rule or settings.crop_rule
    if waiting:
        with opened_policy(config) as opened:
            if protocol.answer is not None and (notice := settings.other_rule(rule)):
                print(notice)
            claim_folder(config.output_dir, identity)
            with Journal(config.output_dir / JOURNAL) as journal:
                for part in progress(waiting, "eval", units="parts"):
                    rows = _ask(opened.policy, part, protocol, config, rule)
                    journal.append(rows)
                    tally.count(_failure(row, config) for row in rows if key_of(row) not in known)
                    known.update((key_of(row), row) for row in rows)
                    if tally.is_hopeless(len(questions)):
                        break
    if tally.is_hopeless(len(questions)):
        raise tally.refuse(_set_aside(config, list(known.values())))
    return [known[_key(question)] for question in questions], rule


def _failure(row: Row, config: EvalConfig) -> str | None:
    """Why a question failed; None where it did not, or where its missing picture was allowed."""
    error = row["error"]
    if not is_failure(error) or (config.allow_missing_pictures and error.startswith("picture:")):
        return None
    return str(error)


def _set_aside(config: EvalConfig, rows: Sequence[Row]) -> str:
    """Keep the sound rows of a run of which too much failed, so that the next one asks the others; what is kept."""
    folder = config.output_dir
    sound = [row for row in rows if _failure(row, config) is None]
    failed = [row for row in rows if _failure(row, config) is not None]
    write_records(folder / FAILED, failed)
    write_records(folder / JOURNAL, sound)
    for name in (NAME, SCORES, manifest.NAME):
        (folder / name).unlink(missing_ok=True)
    if not sound:
        release_folder(folder)  # another config may have it
    return f"{len(sound):,} answers are kept, and what failed lies in {folder / FAILED}"


def _known_rows(config: EvalConfig) -> dict[Key, Row]:
    """The rows of an earlier, stopped or complete run; without the failed ones where those are to be asked again."""
    journal, done = config.output_dir / JOURNAL, config.output_dir / NAME
    rows: list[Row] = list(read_jsonl(done)) if done.is_file() else []
    if journal.is_file():
        rows += read_jsonl(journal, unfinished="leave_out")
    return {key_of(row): row for row in rows if not (config.retry_failed and row["error"])}


def _key(question: BenchmarkQuestion) -> Key:
    return question.sample.source, question.sample.id, question.sample.repeat


def _ask(
    policy: Policy, part: Sequence[BenchmarkQuestion], protocol: LookProtocol, config: EvalConfig, rule: CropRule
) -> list[Row]:
    samples = [question.sample for question in part]
    looks = greedy_looks(
        policy,
        samples,
        mode=config.mode,
        protocol=protocol,
        crop_rule=rule,
        root=config.image_root,
        seed=config.seed,
    )
    return [_row(policy, question, look, config.mode) for question, look in zip(part, looks, strict=True)]


def _row(policy: Policy, question: BenchmarkQuestion, look: Look | Refusal, mode: Mode) -> Row:
    """The result row of one look, with the published rule's verdict where boxes are what is scored."""
    from visrl.rewards.detection import published_hit

    result = Result.of(question.sample, look, mode)
    row = result.eval_row()
    if question.truth is not None:
        size = question.sample.size
        assert size is not None
        hit = None if result.failure else int(published_hit(_published_text(policy, result), question.truth, size))
        row["hit_published"] = hit
    return row


def _published_text(policy: Policy, result: Result) -> str | None:
    """The box as the published scorer is to see it: as written by a model of its convention, else translated."""
    from visrl.codecs import CODECS

    if policy.codec.name == "viscot" or result.box is None:
        return result.box_text if policy.codec.name == "viscot" else None
    assert result.size is not None
    return CODECS["viscot"].format(result.box, result.size, result.size)


# --- Judging and scoring ----------------------------------------------------------------------------------------------


def _judged(config: EvalConfig, rows: list[Row]) -> tuple[list[Row], dict[str, int]]:
    """The rows with the judge's two columns, and how many judgements failed or could not be read."""
    from visrl.evaluate.answers import answer_to_judge, with_judgements
    from visrl.rewards.judge import judge_all
    from visrl.rewards.open import opened_judge

    rows = [{key: value for key, value in row.items() if key not in ("judge", "judge_published")} for row in rows]
    judge = config.judge_model_name_or_path
    if judge is None:
        return rows, {}
    asked = [one for one in map(answer_to_judge, rows) if one is not None]
    file = config.output_dir / f"judgements-{re.sub(r'[^A-Za-z0-9._-]+', '-', judge).strip('-')}.jsonl"
    with opened_judge(judge, config.judge_url, config.judge_request, **config.patience) as ask_all:
        print(f"{judge} judges {len(asked):,} answers → {file}")
        judgements = judge_all(asked, ask_all, judge, file, max_tokens=config.judge_max_tokens)
    tally = Tally("judgements", config.max_failed)
    tally.count(one.error for one in judgements)
    if tally.is_hopeless():
        raise tally.refuse(f"the answers are kept in {config.output_dir} and the judgements in {file}")
    counts = {
        "judged": len(judgements),
        "judge_failed": sum(one.error is not None for one in judgements),
        "judge_unread": sum(one.error is None and one.score is None for one in judgements),
    }
    return with_judgements(rows, judgements), counts


def _scored(config: EvalConfig, rows: Sequence[Row]) -> dict[str, Any]:
    """Totals of all rows and of each data set, the averages as published among them."""
    from visrl.evaluate.answers import with_averages
    from visrl.evaluate.boxfiles import box_totals, folder_totals

    summary = summarise(rows, config.seed)
    if config.benchmark == "viscot":
        return with_averages(summary)
    if config.benchmark in ("viscot-detection", "refcoco"):
        return {**summary, "totals": folder_totals({name: box_totals(own) for name, own in by_dataset(rows).items()})}
    return summary


def _closing_lines(scores: dict[str, Any], judged: dict[str, int]) -> list[str]:
    lines = []
    if judged:
        lines.append(
            f"{judged['judged']} answers judged: {judged['judge_failed']} failed, "
            f"{judged['judge_unread']} replies that could not be read"
        )
    if scores.get("missing_datasets"):
        lines.append(f"no answers to: {', '.join(scores['missing_datasets'])}; the means are over the others")
    if scores.get("average_published") is not None:
        lines.append(f"average as published, missing data sets counted 0: {scores['average_published']:.3f}")
    totals = scores.get("totals")
    if totals and totals["average_published"] is not None:
        lines.append(f"average as published, data sets scoring 0 left out: {totals['average_published']:.3f}")
    return ["", *lines] if lines else []
