"""`critic: outcome`: a box is as good as the answers given from its crop. No critic model is asked, no true box known.

Several answers are sampled from each crop; the score of its box is the share that a grader finds right (or the mean,
where a grader knows more than right and wrong). The answer's own score is the first one's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from visrl.data.native import answer_texts
from visrl.engines.base import Completion
from visrl.prompts import IMAGE
from visrl.records import Sample, Trajectory, Verdict
from visrl.rewards.critic import Opinion, scored_box, told, verdict_of, without_scores
from visrl.rewards.judge import AnswerToJudge, AskAll, OnReply, judge_all
from visrl.rewards.metrics import METRICS

if TYPE_CHECKING:
    from visrl.engines.client import Client
    from visrl.engines.openai_server import Ask

Answered = tuple[Sample, str]  # a question and one answer to it
GradeAnswers = Callable[[Sequence[Answered]], list[Opinion]]

VOTES = ("vqa", "anls")  # metrics that are defined over all answers that people gave


class OutcomeCritic:
    """Scores the box of a trajectory by its answers, all of which `grade` is asked about once."""

    def __init__(
        self, name: str, grade: GradeAnswers, *, score_boxes: bool = True, client: Client | None = None
    ) -> None:
        self.name = f"outcome:{name}"
        self.grade = grade
        self.score_boxes = score_boxes
        self.client = client  # of the servers of a judge

    @property
    def sampled_tokens(self) -> int:
        return self.grade.sampled_tokens if isinstance(self.grade, Judge) else 0

    def judge(self, samples: Sequence[Sample], trajectories: Sequence[Trajectory]) -> list[Verdict]:
        """One verdict per trajectory, in order; `samples` holds the sample of each."""
        whole = [tried.can_be_judged for tried in trajectories]
        shown = [
            (sample, answer)
            for sample, tried, has in zip(samples, trajectories, whole, strict=True)
            if has
            for answer in tried.all_answers
        ]
        opinions = iter(self.grade(shown))
        return [
            self._verdict(tried, [next(opinions) for _ in tried.all_answers]) if has else without_scores(tried)
            for tried, has in zip(trajectories, whole, strict=True)
        ]

    def _verdict(self, tried: Trajectory, opinions: Sequence[Opinion]) -> Verdict:
        scores = [one.score for one in opinions]
        box = share_right(scores) if self.score_boxes and scored_box(tried) else None
        return verdict_of(tried, box, scores, told(None, opinions) if isinstance(self.grade, Judge) else "")


def share_right(scores: Sequence[float | None]) -> float | None:
    """The mean of the scores that could be read; None where none could."""
    read = [score for score in scores if score is not None]
    return sum(read) / len(read) if read else None


# --- Graders ----------------------------------------------------------------------------------------------------------


def metric_grader(name: str) -> GradeAnswers:
    """A grader that needs no model: a metric of `rewards.metrics`, against the reference answer."""
    metric = METRICS[name]

    def grade(answered: Sequence[Answered]) -> list[Opinion]:
        return [Opinion(score=metric(answer, references_of(sample, name))) for sample, answer in answered]

    return grade


def references_of(sample: Sample, metric: str) -> list[str]:
    """What a metric compares an answer with: the reference answer, or where the metric is defined over the answers of
    several people (VQA accuracy, ANLS) and the data set's row holds them, all of those."""
    row = sample.raw if isinstance(sample.raw, dict) else {}
    several = answer_texts(row.get("answers", row.get("answer"))) if metric in VOTES else []
    return several or [sample.answer]


class Judge:
    """A grader that is a model: the judge of evaluations, by its published prompt, asked once about each answer."""

    def __init__(self, ask_all: AskAll, name: str, max_tokens: int) -> None:
        self.ask_all = ask_all
        self.name = name
        self.max_tokens = max_tokens
        self.sampled_tokens = 0

    def __call__(self, answered: Sequence[Answered]) -> list[Opinion]:
        asked = [
            AnswerToJudge(sample.id, f"{IMAGE}\n{sample.question}", sample.answer, answer)
            for sample, answer in answered
        ]
        judged = judge_all(asked, self._counting, self.name, max_tokens=self.max_tokens)
        return [Opinion([] if one.reply is None else [one.reply], one.score, one.error) for one in judged]

    def _counting(self, asks: Iterable[Ask], on_reply: OnReply | None = None) -> list[Completion]:
        replies = self.ask_all(asks, on_reply)
        self.sampled_tokens += sum(reply.tokens for reply in replies)
        return replies
