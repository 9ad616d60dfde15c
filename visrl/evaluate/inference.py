"""Asking a policy the questions of an evaluation: resumable, batch after batch; rows in the run's journal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from visrl import manifest
from visrl.box import CropRule
from visrl.engines.open import model_settings, opened_policy
from visrl.evaluate.benchmarks import Benchmark
from visrl.evaluate.config import EvalConfig
from visrl.evaluate.questions import BenchmarkQuestion
from visrl.evaluate.results import NAME, SCORES
from visrl.failures import Tally, is_failure
from visrl.manifest import claim_folder, release_folder
from visrl.records import Journal, read_jsonl, write_records
from visrl.rewards.results import Key, key_of
from visrl.rewards.scored import Asked, greedy_results, with_surroundings
from visrl.sequences import batched

if TYPE_CHECKING:
    from visrl.engines.base import Policy
    from visrl.rollout.protocols import LookProtocol

JOURNAL = "journal.jsonl"
FAILED = "failed.jsonl"  # what failed in a run of which too much did


def answer_questions(
    config: EvalConfig,
    benchmark: Benchmark,
    protocol: LookProtocol,
    questions: Sequence[BenchmarkQuestion],
    identity: dict[str, Any],
) -> tuple[list[dict[str, Any]], CropRule]:
    """A row for every question, in order, and the crop rule; those that are there already are not asked again.

    Raises:
        FailedRun: more than the share `max_failed` failed; what is kept and what failed lies in the run's folder.
    """
    from visrl.progress import progress

    known = _known_rows(config)
    tally = Tally("questions", config.max_failed)
    tally.count(_failure(row, config) for row in known.values())
    asked = _surrounded(questions, config)
    parts = batched(list(zip(questions, asked, strict=True)), config.batch_size)
    waiting = [part for part in parts if not all(_key(question) in known for question, _ in part)]
    settings = model_settings(config)
    rule = config.crop_rule or protocol.crop_rule or settings.crop_rule
    if waiting:
        with opened_policy(config) as opened:
            if protocol.answer is not None and (notice := settings.other_rule(rule)):
                print(notice)
            claim_folder(config.output_dir, identity)
            with Journal(config.output_dir / JOURNAL) as journal:
                for part in progress(waiting, "eval", units="parts"):
                    rows = _ask(opened.policy, part, benchmark, protocol, config, rule)
                    journal.append(rows)
                    tally.count(_failure(row, config) for row in rows if key_of(row) not in known)
                    known.update((key_of(row), row) for row in rows)
                    if tally.is_hopeless(len(questions)):
                        break
    if tally.is_hopeless(len(questions)):
        raise tally.refuse(_set_aside(config, list(known.values())))
    return [known[_key(question)] for question in questions], rule


def _failure(row: dict[str, Any], config: EvalConfig) -> str | None:
    """Why a question failed; None where it did not, or where its missing image was allowed."""
    error = row["error"]
    if not is_failure(error) or (config.allow_missing_pictures and error.startswith("picture:")):
        return None
    return str(error)


def _set_aside(config: EvalConfig, rows: Sequence[dict[str, Any]]) -> str:
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


def _known_rows(config: EvalConfig) -> dict[Key, dict[str, Any]]:
    """The rows of an earlier, stopped or complete run; without the failed ones where those are to be asked again."""
    journal, done = config.output_dir / JOURNAL, config.output_dir / NAME
    rows: list[dict[str, Any]] = list(read_jsonl(done)) if done.is_file() else []
    if journal.is_file():
        rows += read_jsonl(journal, unfinished="leave_out")
    return {key_of(row): row for row in rows if not (config.retry_failed and row["error"])}


def _key(question: BenchmarkQuestion) -> Key:
    return question.sample.source, question.sample.id, question.sample.repeat


def _surrounded(questions: Sequence[BenchmarkQuestion], config: EvalConfig) -> list[Asked]:
    """The questions with what surrounds them. What is asked more than once about a question is one question there: its
    other orders and attempts are no other questions about the image."""
    firsts = [question.sample for question in questions if question.is_first]
    found = iter(with_surroundings(firsts, config.mode, config.seed))
    asked: list[Asked] = []
    for question in questions:
        asked.append(replace(next(found) if question.is_first else asked[-1], sample=question.sample))
    return asked


def _ask(
    policy: Policy,
    part: Sequence[tuple[BenchmarkQuestion, Asked]],
    benchmark: Benchmark,
    protocol: LookProtocol,
    config: EvalConfig,
    rule: CropRule,
) -> list[dict[str, Any]]:
    """Both steps of a batch of questions, and a row for each with the benchmark's own columns."""
    results = greedy_results(
        policy,
        [asked for _, asked in part],
        mode=config.mode,
        protocol=protocol,
        crop_rule=rule,
        root=config.image_root,
        seed=config.seed,
        temperature=config.temperature,
        top_p=config.top_p,
    )
    reading = benchmark.reading(config.reading)
    return [
        benchmark.row_of(one, result, policy.codec, reading) for (one, _), result in zip(part, results, strict=True)
    ]
