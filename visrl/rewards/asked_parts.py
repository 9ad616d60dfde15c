"""The parts of an online reward that a model is asked about: the judge of answers, and the critic of boxes and answers.

Each is asked once a step about all that was sampled, and what it replied is kept in a file of the run. A step that a
resumed run samples again finds every reply there, read or unread; only what failed (no reply came) is asked again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visrl.box import CropRule
from visrl.config import CheckpointConfig
from visrl.failures import Tally
from visrl.prompts import IMAGE
from visrl.records import Journal, RecordError, Sample, Trajectory, Verdict, read_jsonl
from visrl.rewards.open import Grading, GradingConfig, asks_model, opened_critic
from visrl.rewards.open_judge import JudgeKeys, opened_judge
from visrl.rewards.parts import Attempt, RewardPart, Scorer, Scores

if TYPE_CHECKING:
    from visrl.models.encode import Encoder
    from visrl.rewards.critic import Critic
    from visrl.rewards.judge import AnswerToJudge, AskAll, Judgement
    from visrl.rollout.steps import Look

JUDGEMENTS, VERDICTS = "judgements", "verdicts"  # the files of a run that replies are kept in, without their endings


class RewardConfig(GradingConfig, JudgeKeys):
    """The keys that say what scores the attempts of online reinforcement, beside `rewards`."""


@dataclass(frozen=True, slots=True)
class RewardSetting:
    """What a part is opened for: the questions of a run, and the policy whose attempts at them it scores."""

    config: CheckpointConfig  # of the run, a `RewardConfig`; `model_name_or_path` is the policy at its start
    samples: Sequence[Sample]
    encoder: Encoder  # of the policy: how it sizes images
    crop_rule: CropRule
    image_root: str | None
    seed: int
    device: Any  # a torch.device: where this process computes
    folder: Path  # of the run; it is claimed once all parts are open
    process: int = 0  # which of those that train together this is
    shared: dict[str, Any] = field(default_factory=dict)  # what parts of one run have in common, once it is open

    def file(self, name: str) -> Path:
        """A file of this process in the folder of the run."""
        return self.folder / f"{name}{f'.{self.process}' if self.process else ''}.jsonl"


@dataclass(slots=True)
class Kept:
    """What a model replied so far, by what it was asked: read when the first step asks, for the folder is only then
    known to be this run's."""

    file: Path
    read: Callable[[Path], dict[str, Any]]
    tally: Tally
    _known: dict[str, Any] | None = None

    @property
    def known(self) -> dict[str, Any]:
        """By key."""
        if self._known is None:
            self._known = self.read(self.file)
        return self._known

    def append(self, row: dict[str, Any]) -> None:
        """Write a row; it is on disk when this returns."""
        with Journal(self.file) as journal:
            journal.append([row])

    def count(self, errors: Sequence[str | None]) -> None:
        """Count what a step wanted to know, what was known already among it.

        Raises:
            FailedRun: of what the run wanted to know, too large a share failed.
        """
        self.tally.count(errors)
        if self.tally.is_hopeless():
            raise self.tally.refuse(f"what was replied is kept in {self.file}")


# --- The judge --------------------------------------------------------------------------------------------------------


@contextmanager
def open_judge(part: RewardPart, setting: RewardSetting) -> Iterator[Scorer]:
    """The judge of `judge_model_name_or_path` and its like, as evaluations ask it.

    Raises:
        CheckpointError: a model in this process that cannot be loaded.
        EndpointError: a server that does not answer or serves another model.
    """
    config = setting.config
    assert isinstance(config, RewardConfig)
    assert config.judge_model_name_or_path is not None  # `check_reward_keys` has seen to it
    name, tally = config.judge_model_name_or_path, Tally("judgements", config.max_failed)
    urls, request, device = config.judge_url, config.judge_request, str(setting.device)
    with opened_judge(name, urls, request, device, **config.patience) as ask_all:
        kept = Kept(setting.file(JUDGEMENTS), _judgements, tally)
        yield JudgedAnswers(ask_all, name, config.judge_max_tokens, kept)


def _judgements(file: Path) -> dict[str, Judgement]:
    from visrl.rewards.judge import read_judgements

    return {one.key: one for one in read_judgements(file) if one.error is None}


class JudgedAnswers:
    """A `Scorer`: how right the judge finds each answer, beside the true one; 0 without a readable box. None where
    there is no true answer, where no reply came, and where it could not be read."""

    def __init__(self, ask_all: AskAll, name: str, max_tokens: int, kept: Kept) -> None:
        self.ask_all, self.name, self.max_tokens = ask_all, name, max_tokens
        self.kept = kept

    def __call__(self, attempts: Sequence[Attempt]) -> list[Scores]:
        rows = [[_to_judge(one.sample, look) for look in one.looks] for one in attempts]
        judged = iter(self._judged([row for own in rows for row in own if row is not None]))
        return [
            [None if not one.sample.answer else 0.0 if row is None else next(judged) for row in own]
            for one, own in zip(attempts, rows, strict=True)
        ]

    def _judged(self, asked: Sequence[AnswerToJudge]) -> Scores:
        from visrl.rewards.judge import judge_all, judgement_key

        known = self.kept.known
        keys = [judgement_key(one, self.name, self.max_tokens) for one in asked]
        waiting = [one for one, key in zip(asked, keys, strict=True) if key not in known]
        found: dict[str, Judgement] = {}

        def keep(judgement: Judgement) -> None:  # as each comes: a kill loses none that was paid for
            found[judgement.key] = judgement
            if judgement.error is None:
                self.kept.append(asdict(judgement))

        judge_all(waiting, self.ask_all, self.name, on_judgement=keep, max_tokens=self.max_tokens)
        known.update({key: one for key, one in found.items() if one.error is None})
        judgements = [known.get(key) or found[key] for key in keys]
        self.kept.count([one.error for one in judgements])
        return [one.score for one in judgements]


def _to_judge(sample: Sample, look: Look) -> AnswerToJudge | None:
    """What the judge is asked about an answer; None where there is none, or no true one."""
    from visrl.rewards.judge import AnswerToJudge

    if not sample.answer or look.answer is None:
        return None
    return AnswerToJudge(sample.id, f"{IMAGE}\n{sample.question}", sample.answer, look.answer)


# --- The critic -------------------------------------------------------------------------------------------------------


@contextmanager
def open_critic(part: RewardPart, setting: RewardSetting) -> Iterator[Scorer]:
    """The critic of `critic` and its like, as `visrl generate` asks it; all parts that read its scores share one.

    Raises:
        CheckpointError: a model in this process that cannot be loaded.
        ConfigError: no critic for these samples.
        EndpointError: a server that does not answer or serves another model.
    """
    with ExitStack() as stack:
        if "critic" not in setting.shared:  # the first part opens it, and closes it after all others
            setting.shared["critic"] = stack.enter_context(_opened_verdicts(setting))
        yield partial(_read_verdicts, setting.shared["critic"], part.name)


@contextmanager
def _opened_verdicts(setting: RewardSetting) -> Iterator[Verdicts]:
    config, encoder = setting.config, setting.encoder
    assert isinstance(config, RewardConfig)
    grading = Grading(
        setting.samples, partial(encoder.processed_size, is_crop=True), encoder.settings, setting.crop_rule,
        setting.image_root, setting.seed, device=str(setting.device),
    )  # fmt: skip
    tally = Tally("verdicts", config.max_failed)
    kept = Kept(setting.file(VERDICTS), _verdicts, tally) if asks_model(config, setting.samples) else None
    with opened_critic(config, grading) as critic:
        yield Verdicts(critic, kept, with_box=config.use_box_critic)


class Verdicts:
    """The scores of a critic, by attempt: of its box, and of each answer. A critic that is no model says the same
    whenever it is asked, and nothing is kept of it."""

    def __init__(self, critic: Critic, kept: Kept | None, *, with_box: bool) -> None:
        self.critic, self.kept, self.with_box = critic, kept, with_box
        self._step: dict[str, tuple[float | None, Scores]] = {}  # of the attempts that were asked about last
        self._readers: set[str] = set()  # parts that have read them

    def of(self, attempts: Sequence[Attempt], reader: str) -> list[tuple[float | None, Scores]]:
        """The scores of attempts that have answers; the same of the same step, whichever part reads them first."""
        if reader in self._readers:
            self._step.clear()
            self._readers.clear()
        self._readers.add(reader)
        known = self.kept.known if self.kept else {}
        new = {
            key: one for one in attempts if (key := _key(one)) not in known and key not in self._step
        }  # fmt: skip
        tried = [_trajectory(one) for one in new.values()]
        verdicts = self.critic.judge([one.sample for one in new.values()], tried) if new else []
        for key, verdict in zip(new, verdicts, strict=True):
            self._step[key] = verdict.box_score, list(verdict.all_scores)
        keys = list(map(_key, attempts))
        if self.kept:
            errors = self._keep(self.kept, dict(zip(new, verdicts, strict=True)))
            if new:  # else another part has counted this step
                self.kept.count([errors.get(key) for key in keys])
        return [known.get(key) or self._step[key] for key in keys]

    def _keep(self, kept: Kept, verdicts: Mapping[str, Verdict]) -> dict[str, str | None]:
        """Keep the verdicts of which no request failed; why others have no reply, by key."""
        from visrl.rewards.critic import critic_failure

        errors = {key: critic_failure(verdict) for key, verdict in verdicts.items()}
        for key, verdict in verdicts.items():
            if errors[key] is None:
                box, answers = kept.known[key] = self._step[key]
                kept.append({"key": key, "box": box, "answers": answers, "raw": verdict.raw})
        return errors


def _read_verdicts(verdicts: Verdicts, name: str, attempts: Sequence[Attempt]) -> list[Scores]:
    """The scores of a part: of the box, of the answers, or the mean of both (the answer's alone where the critic is not
    asked about boxes); 0 without a readable box, and None without a true answer."""
    answered = [one for one in attempts if one.sample.answer and one.looks[0].answer is not None]
    found = iter(verdicts.of(answered, name))
    scores: list[Scores] = []
    for one in attempts:
        if not one.sample.answer or one.looks[0].answer is None:
            scores.append([0.0 if one.sample.answer else None] * len(one.looks))
            continue
        box, answers = next(found)
        if name == "critic_answer" or (name == "critic" and not verdicts.with_box):
            scores.append(answers)
        elif name == "critic_box":
            scores.append([box] * len(answers))
        else:
            scores.append([None if box is None or answer is None else (box + answer) / 2 for answer in answers])
    return scores


def _trajectory(one: Attempt) -> Trajectory:
    first, *more = answers = [look.answer or "" for look in one.looks]
    return Trajectory(
        one.sample.id, 0, 0, one.looks[0].text, one.looks[0].box, "sampled", first, "policy", 0,
        repeat=one.sample.repeat, answers=tuple(answers) if more else (),
    )  # fmt: skip


def _key(one: Attempt) -> str:
    """What a verdict is a verdict on, as text."""
    box = one.looks[0].box
    return json.dumps([one.sample.place, box.as_list() if box else None, [look.answer for look in one.looks]])


def _verdicts(file: Path) -> dict[str, tuple[float | None, Scores]]:
    if not file.exists():
        return {}
    found = {}
    for number, row in enumerate(read_jsonl(file, unfinished="leave_out"), start=1):
        try:
            found[row["key"]] = row["box"], row["answers"]
        except (KeyError, TypeError) as error:
            raise RecordError(f"{file}, row {number}: not a verdict ({error}); remove this file") from error
    return found
