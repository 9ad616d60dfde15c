"""Judging the answers of an evaluation, by servers or by a model in this process."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from visrl.evaluate.answers import answer_to_judge, with_judgements
from visrl.evaluate.config import EvalConfig
from visrl.failures import Tally

if TYPE_CHECKING:
    from visrl.rewards.judge import Judgement

Row = dict[str, Any]


def judge_rows(config: EvalConfig, rows: list[Row]) -> tuple[list[Row], dict[str, int]]:
    """The rows with the judge's two columns, and how many judgements failed or could not be read."""
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
    kept = f"the answers are kept in {config.output_dir} and the judgements in {file}"
    return with_judgements(rows, judgements), count_judgements(judgements, config.max_failed, kept)


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
