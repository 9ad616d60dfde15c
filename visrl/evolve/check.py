"""`visrl generate --check N`: is the critic worth asking? Right and wrong answers and boxes, before a day is spent.

Right are the reference answers and the true boxes, where a data set has them; wrong are the reference answer of another
question and a random box of the same size elsewhere.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from visrl.box import Box
from visrl.engines.base import seed_of
from visrl.evolve.config import GenerateConfig
from visrl.evolve.generate import format_counts, generation_questions, opened_policy_and_critic
from visrl.evolve.pairs import FilterSettings
from visrl.failures import MAX_FAILED, Tally
from visrl.records import Sample, Trajectory, Verdict
from visrl.rewards.critic import Critic, count_verdicts, critic_failure
from visrl.rewards.outcome import OutcomeCritic
from visrl.rollout.diversity import random_box_apart
from visrl.rollout.steps import WHOLE

RULE = FilterSettings()  # the paper's thresholds of a win and a loss
FEW_READ, WELL_APART = 0.9, 0.8  # below these the check warns: our own bounds, not the paper's


@dataclass(frozen=True, slots=True)
class Apart:
    """How a critic tells right from wrong. `auc` is the share of (right, wrong) pairs that it puts in order, ties half;
    `passed` and `failed` are the shares of right scores ≥ 0.8 and of wrong scores < 0.2. None: nothing was read."""

    right: int
    wrong: int
    unread: int
    auc: float | None
    passed: float | None
    failed: float | None


def check_critic(config: GenerateConfig, count: int) -> dict[str, Any]:
    """Ask the config's critic about `count` of its questions, print and write (`check.json`) how far it can be trusted.

    Raises: as `visrl generate` for its critic.
    """
    samples = generation_questions(config, with_box=True)[:count]
    with opened_policy_and_critic(config, samples) as models:
        one_look = not config.looks_several_times
        result = measure_critic(models.critic, samples, config.seed, config.max_failed, about_boxes=one_look)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    Path(config.output_dir, "check.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(check_lines(result)))
    return result


def measure_critic(
    critic: Critic,
    samples: Sequence[Sample],
    seed: int = 0,
    max_failed: float = MAX_FAILED,
    *,
    about_boxes: bool = True,
) -> dict[str, Any]:
    """What `critic` makes of right and wrong answers, and of true and random boxes where the samples have true ones and
    boxes are scored (`about_boxes`).

    Raises:
        FailedRun: it gave no reply about more than the share `max_failed`.
    """
    known = {sample.place for sample in samples if sample.box is not None}
    boxes = bool(known) and about_boxes and not isinstance(critic, OutcomeCritic)  # which looks at no box
    asked: list[tuple[Sample, Trajectory]] = []
    for number, sample in enumerate(samples):
        box = sample.box or WHOLE
        asked.append((sample, _tried(sample, 0, box, sample.answer)))
        other = _another_answer(samples, number)
        if other is not None:
            asked.append((sample, _tried(sample, 1, box, other)))
        apart = sample.box and random_box_apart(sample.box, sample.box, seed_of(seed, *sample.place, "check"))
        if boxes and apart is not None:
            asked.append((sample, _tried(sample, 2, apart, sample.answer)))
    if not about_boxes:  # tries of several looks, which critics score by their answers alone
        asked = [(sample, replace(tried, end="answered")) for sample, tried in asked]
    blind = [replace(sample, box=None) for sample, _ in asked]  # no critic has ever seen a true box
    verdicts = critic.judge(blind, [tried for _, tried in asked])
    tally = Tally("verdicts", max_failed)
    tally.count(map(critic_failure, verdicts))
    if tally.is_hopeless():
        raise tally.refuse("nothing was written")
    true_boxes = [v.box_score for v in verdicts if v.branch == 0 and v.place in known]
    return {
        "critic": critic.name,
        "questions": len(samples),
        "counts": dict(count_verdicts(verdicts)),
        "answers": asdict(tell_apart(_answers(verdicts, 0), _answers(verdicts, 1))),
        "boxes": asdict(tell_apart(true_boxes, [v.box_score for v in verdicts if v.branch == 2])) if boxes else None,
        **({} if about_boxes else {"several_looks": True}),
    }


def tell_apart(right: Sequence[float | None], wrong: Sequence[float | None]) -> Apart:
    """How well scores of what is right and of what is wrong are apart; None stands for a score that was not read."""
    good, bad = ([score for score in scores if score is not None] for scores in (right, wrong))
    pairs = [(a > b) + 0.5 * (a == b) for a in good for b in bad]
    return Apart(
        right=len(good),
        wrong=len(bad),
        unread=len(right) + len(wrong) - len(good) - len(bad),
        auc=sum(pairs) / len(pairs) if pairs else None,
        passed=sum(score >= RULE.t_max for score in good) / len(good) if good else None,
        failed=sum(score < RULE.t_min for score in bad) / len(bad) if bad else None,
    )


def check_lines(result: dict[str, Any]) -> list[str]:
    """The check as text: counts, shares, and a warning where the critic is not to be trusted."""
    lines = [f"critic {result['critic']}, {result['questions']} questions: {format_counts(Counter(result['counts']))}"]
    for what, right, wrong in (("answers", "reference", "another's"), ("boxes", "true", "random")):
        found = result[what]
        if found is None:
            by_answers = result["critic"].startswith("outcome:")
            if result.get("several_looks"):
                why = "a look is worth what comes after it"
            elif by_answers:
                why = "they are scored by answers sampled from their crops"
            else:
                why = "the data set holds no true ones"
            lines.append(f"boxes: not checked, {why}")
            continue
        asked = found["right"] + found["wrong"] + found["unread"]
        lines.append(
            f"{what}: AUC {_share(found['auc'])} over {found['right']} {right} × {found['wrong']} {wrong}; "
            f"{right} scored ≥ {RULE.t_max}: {_share(found['passed'])}; "
            f"{wrong} scored < {RULE.t_min}: {_share(found['failed'])}; "
            f"{found['unread']} of {asked} unread"
        )
        if found["unread"] > (1 - FEW_READ) * asked:
            lines.append(f"WARNING: many replies about {what} cannot be read; try another critic")
        elif found["auc"] is None or found["auc"] < WELL_APART:
            lines.append(f"WARNING: this critic hardly tells right {what} from wrong ones; do not generate with it")
    return lines


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _answers(verdicts: Sequence[Verdict], branch: int) -> list[float | None]:
    return [verdict.answer_score for verdict in verdicts if verdict.branch == branch]


def _tried(sample: Sample, branch: int, box: Box, answer: str) -> Trajectory:
    return Trajectory(sample.id, 0, branch, "", box, "sampled", answer, "check", 0, None, sample.repeat)


def _another_answer(samples: Sequence[Sample], number: int) -> str | None:
    """The answer of the next question that has another one."""
    own = samples[number].answer
    later = [*samples[number + 1 :], *samples[:number]]
    return next((sample.answer for sample in later if sample.answer.casefold() != own.casefold()), None)
