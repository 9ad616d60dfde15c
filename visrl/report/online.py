"""What an online training left in its folder: its log, the rollouts of its first and last step, and what they say.

Reads `log.jsonl` and `rollouts.jsonl`, in a folder by itself or anywhere in a run. Knows no page and draws nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from visrl.manifest import NAME as MANIFEST
from visrl.manifest import STARTED
from visrl.pages.figures import Curve, is_drawn
from visrl.pages.wording import NO_BREAK, count, number, percent, plus
from visrl.records import RecordError, read_jsonl
from visrl.report.shapes import (
    JsonObject,
    LooksRolloutShape,
    ManifestShape,
    ReportError,
    RolloutShape,
    fault,
    read_run_object,
)
from visrl.train.rollout_cards import JOURNAL

SHOWN = 4  # questions of the first step, and of the last, that are shown as pictures

PERCENT, PLAIN, SECONDS, TOKENS = "percent", "plain", "seconds", "tokens"
# The table of measures: key of the log, title, unit. The parts of the reward come after "reward".
MEASURES = [
    ("eval_rollout/accuracy", "Held-out answers right, greedy", PERCENT),
    ("eval_rollout/iou", "Held-out mean IoU, greedy", PLAIN),
    ("eval_rollout/right_object", "Held-out boxes on the right object, greedy", PERCENT),
    ("eval_rollout/looks_mean", "Held-out looks a question, greedy", PLAIN),
    ("eval_rollout/no_look", "Held-out questions answered without a look, greedy", PERCENT),
    ("reward", "Reward", PLAIN),
    ("frac_reward_zero_std", "Questions whose boxes, or first turns, are all worth the same", PERCENT),
    ("frac_reward_zero_std/answer", "Crops whose answers are all worth the same", PERCENT),
    ("frac_reward_zero_std/1", "Second turns that are all worth the same", PERCENT),
    ("rollout/looks_mean", "Looks a question", PLAIN),
    ("rollout/no_look", "Questions answered without a look", PERCENT),
    ("rollout/unfinished", "Episodes that came to a limit", PERCENT),
    ("left_out", "Answers whose reward could not be told", PERCENT),
    ("entropy/box", "Entropy of box texts, nats per token", PLAIN),
    ("entropy/answer", "Entropy of answers, nats per token", PLAIN),
    ("kl", "KL to the start, nats per token", PLAIN),
    ("clip_ratio/region_mean", "Tokens whose ratio is clipped", PERCENT),
    ("box/parsed", "Boxes that can be read", PERCENT),
    ("box/area", "Area of boxes", PERCENT),
    ("box/right_object", "Boxes on the right object", PERCENT),
    ("completions/mean_length/box", "Length of box texts, tokens", TOKENS),
    ("completions/mean_length/answer", "Length of answers, tokens", TOKENS),
    ("completions/clipped_ratio/box", "Box texts cut off", PERCENT),
    ("completions/clipped_ratio/answer", "Answers cut off", PERCENT),
    ("tokens/sampled", "Tokens sampled in a step", TOKENS),
    ("tokens/prefilled", "Prompt tokens computed for that", TOKENS),
    ("tokens/update", "Tokens computed in the update", TOKENS),
    ("time/rollout", "A step: rollout", SECONDS),
    ("time/reward", "A step: reward", SECONDS),
    ("time/update", "A step: update", SECONDS),
    ("samples_per_second", "Questions per second", PLAIN),
]
SPREADS = {"reward": "reward_std", "box/area": "box/area_std"}
TIMES = ("time/rollout", "time/reward", "time/update")


@dataclass(frozen=True, slots=True)
class OnlineRun:
    """An online training. `first` and `last` are rows of its journal: of its first step, and of the last one.

    `rows` is its log; `questions` counts the rows of the journal, `steps` the steps that they are of.
    """

    title: str
    folder: Path
    rows: list[JsonObject]
    first: list[JsonObject]
    last: list[JsonObject]
    questions: int
    steps: int
    config: JsonObject

    @property
    def curve(self) -> Curve:
        return Curve(self.title, self.rows)

    @property
    def step_count(self) -> int:
        """How many optimisation steps the log has seen."""
        return max((row["step"] for row in self.rows), default=0)


@dataclass(frozen=True, slots=True)
class OnlineMeasure:
    """A line of the table: a measure at both ends of the training, in words, and its spread where it has one."""

    title: str
    first: str
    last: str
    first_spread: str = ""
    last_spread: str = ""


def read_online(curves: dict[Path, Curve]) -> list[OnlineRun]:
    """The online trainings in a run, in the order of `curves`: training logs by their folder.

    Raises:
        ReportError: a journal that cannot be read.
    """
    found = []
    for where, curve in curves.items():
        if (where / JOURNAL).is_file():
            first, last, questions, steps = _ends(where / JOURNAL)
            found.append(OnlineRun(curve.title, where, curve.rows, first, last, questions, steps, _config(where)))
    return found


def _ends(path: Path) -> tuple[list[JsonObject], list[JsonObject], int, int]:
    """The first rows of a journal's first and last step, and how many rows and steps it has; it is never held whole."""
    first: list[JsonObject] = []
    last: list[JsonObject] = []
    steps: set[int] = set()
    questions = 0
    try:
        for questions, row in enumerate(read_jsonl(path, unfinished="leave_out"), start=1):
            step = row.get("step") if isinstance(row, dict) else None
            is_new = step not in steps
            if is_new or len(last) < SHOWN:
                several = isinstance(row, dict) and "turns" in row
                wrong = fault(row, LooksRolloutShape if several else RolloutShape)
                if wrong is not None:
                    raise ReportError(f"{path}, row {questions}: {wrong}; run the training again")
                last = [row] if is_new else [*last, row]
            steps.add(row["step"])
            if len(steps) == 1:
                first = last
    except RecordError as error:
        raise ReportError(str(error)) from error
    return first, last, questions, len(steps)


def _config(folder: Path) -> JsonObject:
    """The config of a training, finished or not."""
    for name in (MANIFEST, STARTED):
        if (folder / name).is_file():
            held = read_run_object(folder / name, ManifestShape)
            config: JsonObject = held.get("config") or held
            return config
    return {}


def paired_rows(run: OnlineRun) -> tuple[list[JsonObject], list[JsonObject]]:
    """Rows of the first and of the last step to look at; questions that both have stand first, side by side."""
    if run.steps < 2:
        return run.first, []
    last = {(row["id"], row.get("repeat", 0)): row for row in run.last}
    shared = [row for row in run.first if (row["id"], row.get("repeat", 0)) in last]
    names = [(row["id"], row.get("repeat", 0)) for row in shared]
    rest = [row for row in run.first if row not in shared]
    others = [row for name, row in last.items() if name not in names]
    return [*shared, *rest], [*(last[name] for name in names), *others]


# --- Numbers ----------------------------------------------------------------------------------------------------------


def ends_of(rows: Sequence[JsonObject], key: str) -> tuple[float, float] | None:
    """A measure at both ends of a training: of held-out rollouts the first and the last, of a step's measures means
    over the first and the last tenth. None where the log has it in fewer than two rows."""
    values = [float(row[key]) for row in rows if is_drawn(row.get(key))]
    if len(values) < 2:
        return None
    size = 1 if key.startswith("eval_") else max(1, len(values) // 10)
    return sum(values[:size]) / size, sum(values[-size:]) / size


def measure_table(rows: Sequence[JsonObject]) -> list[OnlineMeasure]:
    """Every measure that the log has, at both ends."""
    found = []
    for key, title, unit in _with_parts(rows):
        ends = ends_of(rows, key)
        if ends is None:
            continue
        spreads = ends_of(rows, SPREADS.get(key, key.removesuffix("/mean") + "/std")) or _held_out_interval(rows, key)
        told = [said(value, unit) for value in ends]
        found.append(OnlineMeasure(title, *told, *(_spread(one, unit) for one in spreads or ())))
    return found


def _with_parts(rows: Sequence[JsonObject]) -> list[tuple[str, str, str]]:
    keys = sorted({key for row in rows for key in row if key.startswith("rewards/") and key.endswith("/mean")})
    parts = [(key, f"Part of the reward: {key[len('rewards/') : -len('/mean')]}", PLAIN) for key in keys]
    after = 1 + next(n for n, (key, _, _) in enumerate(MEASURES) if key == "reward")
    return [*MEASURES[:after], *parts, *MEASURES[after:]]


def _held_out_interval(rows: Sequence[JsonObject], key: str) -> tuple[tuple[float, float], ...] | None:
    known = [(row[f"{key}_low"], row[f"{key}_high"]) for row in rows if is_drawn(row.get(f"{key}_low"))]
    return (known[0], known[-1]) if len(known) > 1 else None


def _spread(value: float | tuple[float, float], unit: str) -> str:
    if isinstance(value, tuple):
        low, high = (100 * end if unit == PERCENT else end for end in value)
        digits = 1 if unit == PERCENT else 3
        return f"[{low:.{digits}f}, {high:.{digits}f}]"
    return f"±{NO_BREAK}{said(value, unit)}"


def said(value: float, unit: str) -> str:
    """A value in its unit."""
    if unit == PERCENT:
        return percent(value)
    if unit == SECONDS:
        return f"{number(value, 2 if value < 10 else 1)}{NO_BREAK}s"
    if unit == TOKENS:
        return count(round(value)) if value >= 100 else number(value, 1)
    return number(value, 3)


def time_shares(rows: Sequence[JsonObject]) -> list[tuple[str, float, float]]:
    """Rollout, reward and update: name, mean seconds of a step, and share of the whole."""
    means = {}
    for key in TIMES:
        values = [float(row[key]) for row in rows if is_drawn(row.get(key))]
        if values:
            means[key.removeprefix("time/")] = sum(values) / len(values)
    whole = sum(means.values())
    return [(name, seconds, seconds / whole) for name, seconds in means.items()] if whole else []


def online_lede(run: OnlineRun) -> str:
    """An online training in a sentence or two."""
    config = run.config
    stage = f" ({config['stage']})" if config.get("stage") else ""
    a_question = ""
    if config.get("max_looks") is not None or config.get("protocol") not in (None, "visrl"):
        most = (
            f"up to {count(config['max_looks'], 'look')}" if "max_looks" in config else f"looks by {config['protocol']}"
        )
        a_question = f", {config['num_generations']} first turns a question and {most}"
    elif "num_generations" in config:
        a_question = f", {config['num_generations']} boxes a question and {config['num_answers']} answers a crop"
    text = f"Online reinforcement{stage}: {count(run.step_count, 'step')}{a_question}."
    if (reward := ends_of(run.rows, "reward")) is not None:
        text += f" The reward went from {number(reward[0])} to {number(reward[1])} ({plus(reward[1] - reward[0])})."
    if (answers := ends_of(run.rows, "eval_rollout/accuracy")) is not None:
        asked = next(int(row["eval_rollout/n"]) for row in reversed(run.rows) if "eval_rollout/n" in row)
        text += (
            f" Of {count(asked, 'held-out question')} it answers {percent(answers[1])} right, greedily; before it were "
            f"{percent(answers[0])}."
        )
    return text
