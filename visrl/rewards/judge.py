"""Judging answers with a language model: the published prompt, its reading to the letter, and ours beside it.

The judge is anything that answers `Ask`s: `client_asker` for an endpoint, `engine_asker` for a model in this process.
A judge that fails or cannot be understood leaves a record without a score, never a 0; what the published scorer would
have made of it stands beside it. Knows nothing of data sets or of averages.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from visrl.conversation import Conversation, Message
from visrl.engines.base import Completion, Engine, Sampling
from visrl.prompts import IMAGE, JUDGE_SYSTEM, JUDGE_TOKENS, judge_prompt
from visrl.records import Journal, RecordError, read_jsonl, utf8, write_records
from visrl.replies import whole_text
from visrl.rewards.reply_scores import is_score, read_published_score, read_score

if TYPE_CHECKING:  # the client loads the whole of openai, and reading judgements needs none of it
    from visrl.engines.client import Client
    from visrl.engines.openai_server import Ask

OnReply = Callable[[int, Completion], None]


class AskAll(Protocol):
    """Requests in, one completion each, in their order; `on_reply` hears of each as it comes. Failures are values."""

    def __call__(self, asks: Iterable[Ask], on_reply: OnReply | None = None) -> list[Completion]: ...


@dataclass(frozen=True, slots=True)
class AnswerToJudge:
    """An answer to be judged. `question` is what `prompts.judged_question` gives of the benchmark's first turn."""

    id: str
    question: str
    reference: str
    prediction: str
    dataset: str = ""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a judge said of one answer.

    `score` is our reading, None where the judge failed (`error` says why) or could not be understood; `published` is
    the published scorer's number, 0 in those cases. `key` is a hash of judge, prompt and answer: a judgement is used
    again only for the very same question to the very same judge, with as much room (`max_tokens`) for its reply.
    """

    id: str
    dataset: str
    judge: str
    reply: str | None
    score: float | None
    published: float
    error: str | None
    key: str
    max_tokens: int = JUDGE_TOKENS


# --- Asking ---------------------------------------------------------------------------------------------------------


def judge_ask(answer: AnswerToJudge, max_tokens: int = JUDGE_TOKENS) -> Ask:
    """The published prompt about one answer, at temperature 0."""
    from visrl.engines.openai_server import Ask

    return Ask(_messages(answer), Sampling(temperature=0.0, max_tokens=max_tokens))


def _messages(answer: AnswerToJudge) -> list[dict[str, str]]:
    asked = judge_prompt(answer.question, answer.reference, answer.prediction)
    # An answer may come from any program's file.
    return [{"role": "system", "content": JUDGE_SYSTEM}, {"role": "user", "content": whole_text(asked)}]


def judge_all(
    answers: Sequence[AnswerToJudge],
    ask_all: AskAll,
    judge: str,
    journal: str | os.PathLike[str] | None = None,
    on_judgement: Callable[[Judgement], None] | None = None,
    max_tokens: int = JUDGE_TOKENS,
) -> list[Judgement]:
    """One judgement per answer, in their order. `judge` names the judge in the records.

    `max_tokens` bounds a reply, what the judge thinks aloud before it included.

    With a `journal` (a JSONL path) every judgement is kept as it comes, a killed run goes on where it was, failed ones
    are asked again, and the finished file is in the order of `answers`, whatever was interrupted.

    Raises:
        RecordError: the journal holds a line that is no judgement, or another judge's.
    """
    keys = [judgement_key(answer, judge, max_tokens) for answer in answers]
    earlier = [] if journal is None else list(read_judgements(journal))
    other = next((done.judge for done in earlier if done.judge != judge), None)
    if other is not None:
        raise RecordError(f"{journal} holds what {other!r} said, not {judge!r}; give each judge a file of its own")
    known = {done.key: done for done in earlier if done.error is None}
    waiting = {key: index for index, key in enumerate(keys) if key not in known}
    order = list(waiting.values())
    kept = None if journal is None else Journal(journal)

    def on_reply(index: int, completion: Completion) -> None:
        answer = answers[order[index]]
        judgement = _judgement(answer, judge, keys[order[index]], completion, max_tokens)
        known[judgement.key] = judgement
        if kept is not None:
            kept.append([asdict(judgement)])
        if on_judgement is not None:
            on_judgement(judgement)

    try:
        ask_all((judge_ask(answers[index], max_tokens) for index in order), on_reply)
    finally:
        if kept is not None:
            kept.close()
    judgements = [
        Judgement(**{**asdict(known[key]), "id": answer.id, "dataset": answer.dataset})
        for key, answer in zip(keys, answers, strict=True)
    ]
    if journal is not None:
        write_records(journal, (asdict(judgement) for judgement in judgements))
    return judgements


def read_judgements(path: str | os.PathLike[str]) -> Iterator[Judgement]:
    """The judgements in a JSONL file; none where there is no such file. A last line cut off by a kill is left out.

    Raises:
        RecordError: a line is no judgement.
    """
    if not Path(path).exists():
        return
    for number, row in enumerate(read_jsonl(path, unfinished="leave_out"), start=1):
        try:
            judgement = Judgement(**row)
            _check(judgement)
        except TypeError as error:
            raise RecordError(
                f"{path}, row {number}: not a judgement ({error}); name another file or remove this one"
            ) from error
        yield judgement


def _check(judgement: Judgement) -> None:
    """Look at the types, which JSON may have any of.

    Raises:
        TypeError: a field holds what no judge's does.
    """
    texts = {"id": False, "dataset": False, "judge": False, "key": False, "reply": True, "error": True}
    for name, may_lack in texts.items():
        value = getattr(judgement, name)
        if not isinstance(value, str) and not (may_lack and value is None):
            raise TypeError(f"{name} cannot be {str(value)[:60]!r}")
    scores = {"published": judgement.published, **({} if judgement.score is None else {"score": judgement.score})}
    for name, value in scores.items():
        if not is_score(value):
            raise TypeError(f"{name} cannot be {str(value)[:60]!r}: it lies between 0 and 1")
    if type(judgement.max_tokens) is not int:
        raise TypeError(f"max_tokens cannot be {str(judgement.max_tokens)[:60]!r}")


def client_asker(client: Client) -> AskAll:
    """The judge behind a client's servers, once they answer and serve it.

    The published prompt keeps the `<image>` mark of the question, and so it goes out; our own server, which takes such
    a mark for a forged image, is asked without it.

    Raises:
        EndpointError: a server that does not answer or serves another model.
    """
    from visrl.engines.endpoint import OWNER, trial

    if client.check() != {OWNER}:
        client.try_out(trial(with_image=False))
        return client.ask_all

    def ask_all(asks: Iterable[Ask], on_reply: OnReply | None = None) -> list[Completion]:
        return client.ask_all((replace(ask, messages=_without_marks(ask)) for ask in asks), on_reply)

    return ask_all


def engine_asker(engine: Engine) -> AskAll:
    """A model in this process as the judge. The `<image>` mark of the question goes: no image is shown with it."""

    def ask_all(asks: Iterable[Ask], on_reply: OnReply | None = None) -> list[Completion]:
        replies = []
        for index, ask in enumerate(asks):
            messages = tuple(Message(message["role"], message["content"]) for message in _without_marks(ask))
            replies.append(engine.complete([Conversation(messages)], ask.sampling, [[0]])[0][0])
            if on_reply is not None:
                on_reply(index, replies[-1])
        return replies

    return ask_all


def _without_marks(ask: Ask) -> list[dict[str, Any]]:
    return [
        message | {"content": message["content"].replace(f"{IMAGE}\n", "").replace(IMAGE, "")}
        for message in ask.messages
    ]


def _judgement(answer: AnswerToJudge, judge: str, key: str, completion: Completion, max_tokens: int) -> Judgement:
    return Judgement(
        id=answer.id,
        dataset=answer.dataset,
        judge=judge,
        reply=completion.text,
        score=read_score(completion.text),
        published=read_published_score(completion.text),
        error=completion.error,
        key=key,
        max_tokens=max_tokens,
    )


def judgement_key(answer: AnswerToJudge, judge: str, max_tokens: int = JUDGE_TOKENS) -> str:
    """What a judgement is a judgement of: a hash of the judge's name, its limit and every word it was asked."""
    parts = [judge, str(max_tokens), *(message["content"] for message in _messages(answer))]
    return hashlib.blake2b(utf8("\x1f".join(parts)), digest_size=12).hexdigest()
