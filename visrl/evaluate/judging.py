"""Judging the answers of an evaluation, by servers or by a model in this process."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from visrl.config import as_config
from visrl.engines.open import RequestConfig
from visrl.evaluate.answers import answer_to_judge, with_judgements
from visrl.evaluate.config import EvalConfig
from visrl.failures import MAX_FAILED, Tally
from visrl.manifest import hold
from visrl.prompts import JUDGE_TOKENS
from visrl.records import RecordError

if TYPE_CHECKING:
    from visrl.rewards.judge import Judgement


def judge_rows(config: EvalConfig, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The rows with the judge's two columns, and how many judgements failed or could not be read."""
    from visrl.rewards.judge import judge_all
    from visrl.rewards.open_judge import opened_judge

    rows = [{key: value for key, value in row.items() if key not in ("judge", "judge_published")} for row in rows]
    judge = config.judge_model_name_or_path
    if judge is None:
        return rows, {}
    asked = [one for one in map(answer_to_judge, rows) if one is not None]
    file = config.output_dir / f"judgements-{re.sub(r'[^A-Za-z0-9._-]+', '-', judge).strip('-')}.jsonl"
    with opened_judge(judge, config.judge_url, config.judge_request, **config.patience) as ask_all:
        print(f"{judge} judges {len(asked):,} answers → {file}")
        judgements = judge_all(asked, ask_all, judge, file, max_tokens=config.judge_max_tokens)
    kept = f"the answers are kept in {config.output_dir} and the judgements in {file}"
    return with_judgements(rows, judgements), count_judgements(judgements, config.max_failed, kept)


def judge_answers(
    rows: Sequence[dict[str, Any]],
    out: str | os.PathLike[str],
    *,
    model: str,
    base_url: str | Sequence[str],
    concurrency: int = 16,
    timeout_s: float = 60.0,
    attempts: int = 6,
    max_tokens: int = JUDGE_TOKENS,
    max_failed: float = MAX_FAILED,
    on_judgement: Callable[[Judgement], None] = lambda judgement: None,
    **keys: Any,
) -> dict[str, int]:
    """Ask a judge behind servers about every answer, with the published prompt of Visual-CoT (arXiv 2403.16999).

    Args:
        rows: result rows of answers, as `score_answer_files` gives them; those without an answer are skipped.
        out: file of the judgements; a stopped run resumes from it.
        model: the judge's name on its servers.
        base_url: their address or addresses, up to `/v1`.
        concurrency: requests at once.
        timeout_s: seconds for one try.
        attempts: tries before a judgement counts as failed.
        max_tokens: the most that the judge may write.
        max_failed: the share that may fail.
        on_judgement: called with every judgement as it comes.
        keys: keys of `RequestConfig`: `max_tokens_key`, `omit_fields`, `extra_body`, `api_key_env` …

    Returns:
        How many answers were judged, how many judgements failed, and how many replies could not be read.

    Raises:
        ConfigError: an unknown key.
        FailedRun: more than the share `max_failed` failed, as where no server answers.
        HeldError: another process writes `out`.
    """
    from visrl.rewards.judge import judge_all
    from visrl.rewards.open_judge import opened_judge

    request = as_config(RequestConfig, None, keys)
    asked = [one for one in map(answer_to_judge, rows) if one is not None]
    patience: dict[str, Any] = {"concurrency": concurrency, "timeout_s": timeout_s, "attempts": attempts}
    urls = [base_url] if isinstance(base_url, str) else base_url
    with opened_judge(model, urls, request, **patience) as ask_all, hold(out):
        judged = judge_all(asked, ask_all, model, out, on_judgement=on_judgement, max_tokens=max_tokens)
    return count_judgements(judged, max_failed, f"the judgements are kept in {out}")


def agree(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> dict[str, Any]:
    """How far two judges agree on the same answers, whose judgements are in the files `a` and `b`.

    Returns:
        `visrl.statistics.agreement` of the answers that both scored, with how many were `unread` by one of them, and
        how many one alone judged (`not_shared`).

    Raises:
        RecordError: a file that holds no judgements, or no answer that both judges scored.
    """
    from visrl.rewards.judge import read_judgements
    from visrl.statistics import agreement

    first, second = (_by_answer(read_judgements(path)) for path in (a, b))
    both = [(first[key], second[key]) for key in first if key in second]
    scores = [(x.score, y.score) for x, y in both if x.score is not None and y.score is not None]
    if not scores:
        raise RecordError(f"{a} and {b} have no answer that both judges scored; were both asked about the same?")
    found: dict[str, Any] = agreement([x for x, _ in scores], [y for _, y in scores])
    apart = len(first) + len(second) - 2 * len(both)
    return {**found, "unread": len(both) - len(scores), "not_shared": apart}


def _by_answer(judgements: Iterable[Judgement]) -> dict[tuple[str, str, int], Judgement]:
    """Judgements by data set, id, and how many before have both: an id may stand for several answers."""
    found: dict[tuple[str, str, int], Judgement] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for one in judgements:
        found[one.dataset, one.id, seen[one.dataset, one.id]] = one
        seen[one.dataset, one.id] += 1
    return found


def count_judgements(judgements: Sequence[Judgement], max_failed: float, kept: str) -> dict[str, int]:
    """How many answers were judged, how many judgements failed and how many replies could not be read.

    Raises:
        FailedRun: more than the share `max_failed` failed; `kept` says where what there is lies.
    """
    tally = Tally("judgements", max_failed)
    tally.count(one.error for one in judgements)
    if tally.is_hopeless():
        raise tally.refuse(kept)
    return {
        "judged": len(judgements),
        "judge_failed": tally.failed,
        "judge_unread": sum(one.error is None and one.score is None for one in judgements),
    }


def format_judged(counts: Mapping[str, int]) -> str:
    """What became of a judge's work, in a line."""
    return (
        f"{counts['judged']} answers judged: {counts['judge_failed']} failed, "
        f"{counts['judge_unread']} replies that could not be read"
    )
