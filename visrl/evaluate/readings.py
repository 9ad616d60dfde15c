"""A benchmark's readings: how its questions are worded and ordered, and what makes a reply right. Never mixed.

"published" is the authors' wording, order of options and rule; "vlmevalkit" and "lmms-eval" are those toolkits' where
they differ; "ours" shows the options in every order, reads letters strictly, and counts what it cannot read as wrong.
The columns differ, too: `correct_published` of the first three, `correct` of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from visrl.evaluate.choices import OptionOrder, orders
from visrl.evaluate.questions import BenchmarkQuestion
from visrl.evaluate.rules import RULES
from visrl.evaluate.wordings import our_choice
from visrl.records import place_name
from visrl.replies import spoken
from visrl.rewards.choices import unwrapped
from visrl.rewards.metrics import exact_match
from visrl.rollout.protocols import LookProtocol, as_published

Columns = Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class BenchmarkReading:
    """How questions are worded, and the columns that a whole reply to one gets.

    `system` and `tokens` are the published system message, sent where the question is asked in one turn, and room for
    the answer. `in_orders` where the options are shown in several orders, or in one drawn by lot.
    """

    word: Callable[[BenchmarkQuestion], str]
    score: Callable[[BenchmarkQuestion, str], Columns]
    source: str
    system: str | None = None
    tokens: int = 64
    in_orders: bool = False

    def protocol(self, max_new_tokens: int | None = None) -> LookProtocol:
        """How it is asked; `max_new_tokens` over the published room for an answer."""
        return as_published(self.system, max_new_tokens or self.tokens)


def by_rule(name: str, column: str = "correct_published") -> Callable[[BenchmarkQuestion, str], Columns]:
    """The column of a rule of `rules.RULES`."""
    rule = RULES[name]

    def score(question: BenchmarkQuestion, reply: str) -> Columns:
        choice = question.choice
        letters, truth = (choice.letters, choice.truth) if choice else ({}, question.sample.answer)
        return {column: rule.score(reply, letters, truth)}

    return score


def ruled(word: Callable[[BenchmarkQuestion], str], rule: str, **more: Any) -> BenchmarkReading:
    """A published reading with a rule of `rules.RULES`, whose source is the reading's."""
    return BenchmarkReading(word, by_rule(rule), RULES[rule].source, **more)


def _strictly(question: BenchmarkQuestion, reply: str) -> Columns:
    """A letter plainly named; an open answer is right where it is a reference, in so many words and in nothing but the
    tags of an answer."""
    if question.choice is not None:
        return by_rule("strict", "correct")(question, reply)
    said = unwrapped(spoken(reply))
    return {"correct": 0.0 if said is None else exact_match(said, question.references or [question.sample.answer])}


OUR_READING = BenchmarkReading(our_choice, _strictly, RULES["strict"].source, in_orders=True)


def as_asked(
    questions: Iterable[BenchmarkQuestion],
    reading: BenchmarkReading | None,
    order: OptionOrder = "file",
    seed: int = 0,
    attempts: int = 1,
) -> Iterator[BenchmarkQuestion]:
    """The questions as they are asked under a reading, one after the other in every order of its options and as often
    as there are `attempts`. What is asked more than once shares a `group`, and is told apart by its sample's `repeat`.

    Where a reading shows the options in orders of its own, the rows of a file that are one question in several orders
    are that one question.
    """
    seen: set[tuple[str, str]] = set()
    for question in questions:
        if reading and reading.in_orders and question.group:
            if (question.sample.source, question.group) in seen:
                continue
            seen.add((question.sample.source, question.group))
        yield from _variants(question, reading, order, seed, attempts)


def _variants(
    question: BenchmarkQuestion, reading: BenchmarkReading | None, order: OptionOrder, seed: int, attempts: int
) -> Iterator[BenchmarkQuestion]:
    sample, choice = question.sample, question.choice
    in_orders = reading is not None and reading.in_orders
    shown = orders(choice, order if in_orders else "file", seed, [sample.source, *sample.place]) if choice else [None]
    count = len(shown) * attempts
    group = "" if in_orders else question.group
    group = group or (place_name(sample.place) if count > 1 else "")
    for rotation, one in enumerate(shown):
        worded = replace(question, choice=one, rotation=rotation, group=group)
        for attempt in range(attempts):
            number = sample.repeat * count + rotation * attempts + attempt
            asked = replace(sample, repeat=number)
            if reading is not None:
                answer = one.truth if one else sample.answer
                asked = replace(asked, question=reading.word(worded), answer=answer)
            yield replace(worded, sample=asked, attempt=attempt)


def with_circular(rows: Sequence[dict[str, Any]], questions: Sequence[BenchmarkQuestion]) -> list[dict[str, Any]]:
    """The rows with the column `circular` in the first of each question: the share of its attempts that are right in
    every order of the options. Null where one has no reply and none is wrong."""
    groups: dict[tuple[str, str], list[int]] = {}
    for place, question in enumerate(questions):
        if question.group and question.choice:
            groups.setdefault((question.sample.source, question.group), []).append(place)
    found = list(rows)
    for places in groups.values():
        if len({questions[place].rotation for place in places}) > 1:
            attempts: dict[int, list[float | None]] = {}
            for place in places:
                attempts.setdefault(questions[place].attempt, []).append(rows[place].get("correct"))
            found[places[0]] = {**rows[places[0]], "circular": _mean([_all(own) for own in attempts.values()])}
    return found


def _all(values: Sequence[float | None]) -> float | None:
    """1 where all are right, 0 where one is wrong, None where that is not known."""
    if any(value is not None and value < 1 for value in values):
        return 0.0
    return None if None in values else 1.0


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
