"""Which critic and rule made the pairs of an iteration, by its manifests; and what the paper's rule gives of the same
tries, where the run holds that. Reads no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from visrl.pages.wording import count, percent
from visrl.report.shapes import JsonObject

PAPER = "filter-paper"  # beside `filter`: the same tries, filtered by the paper's rule
OUTCOME = "outcome"  # what the name of the critic `outcome` begins with; its grader follows a colon


@dataclass(frozen=True, slots=True)
class RuleLine:
    """What a rule made of the tries of an iteration. `positive` is the share of pairs whose winner alone has an IoU
    above 0.5 with the true box (WP-LN), `tokens` what was sampled for one pair; None where it is not known."""

    title: str
    rule: str
    questions: int
    kept: int
    positive: float | None
    tokens: float | None


def critic_words(generated: JsonObject) -> str:
    """What scored the tries, by the manifest of a generation; "" where that does not say."""
    critic = generated.get("critic")
    if not isinstance(critic, str):
        return ""
    kind, _, grader = critic.partition(":")
    words = f"The critic is “{critic}”"
    if kind == OUTCOME:
        words = f"A box scores the share of its answers that are right, by {grader or critic}"
    answers = generated.get("config", {}).get("answers", 1)
    sampled = f"; {count(answers, 'answer')} sampled from each crop" if isinstance(answers, int) and answers > 1 else ""
    return f"{words}{sampled}."


def rule_words(config: Mapping[str, Any], several: bool = False) -> str:
    """Which winners and losers a filter takes, by its config; of one look, or of the turns of `several`."""
    losers, apart = config.get("losers", "paper"), config.get("min_difference")
    if several:
        price = config.get("look_price")
        cost = f"; every look takes {percent(price, 0)} of what an answer is worth" if price else ""
        return "at every state the best turn against the worst" + (f", worse by {apart}" if apart else "") + cost
    if losers == "paper":
        critic = "" if config.get("use_box_critic", True) else ", without the box critic"
        limits = f"winners score {config.get('t_max', '?')} or more, losers {config.get('t_min', '?')} or less"
        return f"{config.get('rule', 'paper')} rule: {limits}{critic}"
    whose = {"own": "the worst of its own", "random": "the worst of random ones"}.get(losers, str(losers))
    return f"the policy's best box against {whose}" + (f", worse by {apart}" if apart else "")


def rule_lines(manifests: Mapping[str, JsonObject], iteration: int) -> list[RuleLine]:
    """The rule that an iteration was trained by, and the paper's on the same tries where there is that comparison."""
    found = []
    for title, name in (("Trained on", "filter"), ("The paper's rule", PAPER)):
        manifest = manifests.get(f"iter{iteration}/{name}")
        counts = (manifest or {}).get("counts")
        if manifest is None or not isinstance(counts, dict) or not isinstance(counts.get("kept"), int):
            continue
        boxes = counts.get("boxes") or {}
        pairs = sum(boxes.values())
        found.append(
            RuleLine(
                title=title,
                rule=rule_words(manifest.get("config", {}), several="pairs_by_kind" in counts),
                questions=counts.get("questions", 0),
                kept=counts["kept"],
                positive=boxes.get("WP-LN", 0) / pairs if pairs else None,
                tokens=counts.get("sampled_tokens_per_pair"),
            )
        )
    return found
