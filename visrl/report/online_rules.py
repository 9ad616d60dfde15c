"""Known failures of online reinforcement, told from the curves of a training: rows of a log in, sentences out.

Every rule looks at means over the first and the last fifth of the logged steps, so that a single odd step says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from visrl.pages.figures import is_drawn
from visrl.pages.wording import number, percent
from visrl.report.shapes import JsonObject

FEWEST = 5  # logged steps, below which no rule speaks
COLLAPSED = 0.1  # of its start: entropy below this share of it
ALL_FLAT = 0.95  # of questions whose boxes are all worth the same
UNREAD = 0.05  # by which the share of readable boxes may fall
WHOLE = 0.6  # of the image: boxes that are larger, and have grown by half, crop next to nothing away
SHRUNK = 0.25  # of its start: area below this share of it
CUT = 0.2  # of responses cut off at max_completion_length
LEFT_OUT = 0.2  # of answers whose reward could not be told
UNFINISHED = 0.2  # of episodes that came to a limit

Rule = Callable[[Sequence[JsonObject]], str | None]


def failures(rows: Sequence[JsonObject]) -> list[str]:
    """What the log of an online training shows of known failures, a sentence for each."""
    return [found for rule in RULES if (found := rule(rows)) is not None]


def _ends(rows: Sequence[JsonObject], key: str) -> tuple[float, float] | None:
    values = [float(row[key]) for row in rows if is_drawn(row.get(key))]
    if len(values) < FEWEST:
        return None
    size = max(1, len(values) // 5)
    return sum(values[:size]) / size, sum(values[-size:]) / size


def _entropy_collapse(rows: Sequence[JsonObject], key: str = "entropy/box", what: str = "box texts") -> str | None:
    ends = _ends(rows, key)
    if ends is None or ends[0] <= 0 or ends[1] >= COLLAPSED * ends[0]:
        return None
    return (
        f"Entropy collapse: that of {what} fell from {number(ends[0], 3)} to {number(ends[1], 3)} nats per token. "
        "What is sampled is all alike, and a group has little left to compare. Raise temperature or epsilon_high, set "
        "beta, or stop earlier."
    )


def _answer_entropy_collapse(rows: Sequence[JsonObject]) -> str | None:
    return _entropy_collapse(rows, "entropy/answer", "answers")


def _all_flat(rows: Sequence[JsonObject]) -> str | None:
    boxes, *later = (_ends(rows, f"frac_reward_zero_std{of}") for of in ("", "/answer", "/1"))
    if boxes is None or boxes[1] < ALL_FLAT or any(ends is not None and ends[1] < ALL_FLAT for ends in later):
        return None
    return (
        f"Nothing to learn from: at the end the boxes of {percent(boxes[1], 0)} of the questions are all worth the "
        "same. Their advantages are 0. Take questions that are sometimes answered right, raise temperature, or set "
        "dynamic_sampling."
    )


def _parse_rate_falls(rows: Sequence[JsonObject]) -> str | None:
    ends = _ends(rows, "box/parsed")
    if ends is None or ends[0] - ends[1] <= UNREAD:
        return None
    return (
        f"Box texts come apart: {percent(ends[0])} of them could be read at the start, {percent(ends[1])} at the end. "
        "Lower learning_rate, set beta, or add a part format to rewards."
    )


def _boxes_grow(rows: Sequence[JsonObject]) -> str | None:
    ends = _ends(rows, "box/area")
    if ends is None or ends[1] < WHOLE or ends[1] < 1.5 * ends[0]:
        return None
    return (
        f"Boxes grow to the whole image: from {percent(ends[0])} of its area to {percent(ends[1])}. A crop that holds "
        "everything selects nothing. Reward what the crop gains (crop_gain), or add a part area to rewards."
    )


def _boxes_shrink(rows: Sequence[JsonObject]) -> str | None:
    ends = _ends(rows, "box/area")
    if ends is None or ends[1] >= SHRUNK * ends[0]:
        return None
    return (
        f"Boxes shrink: from {percent(ends[0])} of the image's area to {percent(ends[1])}. A crop that holds too "
        "little cannot be answered from. Lower the weight of area, or count it only when the answer is right (when)."
    )


def _reward_without_answers(rows: Sequence[JsonObject]) -> str | None:
    reward, known = _ends(rows, "reward"), [row for row in rows if is_drawn(row.get("eval_rollout/accuracy_low"))]
    if reward is None or len(known) < 2 or reward[1] <= reward[0]:
        return None
    first, last = known[0], known[-1]
    if last["eval_rollout/accuracy_high"] >= first["eval_rollout/accuracy_low"]:
        return None
    return (
        f"The reward rises and held-out answers get worse: from {percent(first['eval_rollout/accuracy'])} right to "
        f"{percent(last['eval_rollout/accuracy'])}. What is rewarded is not what is wanted; look at the parts of the "
        "reward one by one."
    )


def _cut_off(rows: Sequence[JsonObject]) -> str | None:
    named = {"box": "box texts", "answer": "answers"}
    ends = {what: _ends(rows, f"completions/clipped_ratio/{kind}") for kind, what in named.items()}
    cut = {what: at[1] for what, at in ends.items() if at is not None and at[1] >= CUT}
    if not cut:
        return None
    told = " and ".join(f"{percent(share, 0)} of the {what}" for what, share in cut.items())
    return f"Cut off at max_completion_length: {told} at the end. Raise it, or set mask_truncated_completions."


def _left_out(rows: Sequence[JsonObject]) -> str | None:
    ends = _ends(rows, "left_out")
    if ends is None or ends[1] < LEFT_OUT:
        return None
    return (
        f"Rewards are missing: of {percent(ends[1], 0)} of the answers none could be told, and nothing is learned from "
        "them. Look at the judge, or at the data."
    )


def _unfinished(rows: Sequence[JsonObject]) -> str | None:
    ends = _ends(rows, "rollout/unfinished")
    if ends is None or ends[1] < UNFINISHED:
        return None
    return (
        f"Episodes come to no end: {percent(ends[1], 0)} of them at the end, and nothing is learned from those. Raise "
        "max_completion_length or cutoff_len, or set punish_unfinished or a look_price."
    )


RULES: list[Rule] = [
    _entropy_collapse,
    _answer_entropy_collapse,
    _all_flat,
    _parse_rate_falls,
    _boxes_grow,
    _boxes_shrink,
    _reward_without_answers,
    _cut_off,
    _left_out,
    _unfinished,
]
