"""The benchmarks, one row each: how each is read, asked and scored. Everything else asks this table.

A new one is a file with a reader like viscot.py and a row of `BENCHMARKS`; one of your own is a `Benchmark` in a module
of yours, named as `benchmark: module:NAME`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal

from visrl.codecs import Codec
from visrl.config import ConfigError
from visrl.data.sources import read_samples
from visrl.evaluate import (
    documents,
    hrbench,
    mme_realworld,
    treebench,
    viscot,
    vstar,
    wordings,
    zoombench,
)
from visrl.evaluate.choice_figures import choice_figures
from visrl.evaluate.published import REFCOCO_SPLITS, VISCOT_QUESTIONS
from visrl.evaluate.questions import BenchmarkFiles, BenchmarkQuestion, check_each_once
from visrl.evaluate.readings import BenchmarkReading
from visrl.plugins import is_plugin, load_plugin
from visrl.rewards.choices import read_choice
from visrl.rewards.metrics import METRICS
from visrl.rewards.reply_scores import is_score
from visrl.rewards.results import ANSWER_COLUMNS, COLUMNS, Result, Row
from visrl.rollout.protocols import REFCOCO, VISCOT, VISCOT_BOXES, VISRL, VISRL_BOXES, LookProtocol
from visrl.zoom.episode import UNFINISHED


@dataclass(frozen=True, slots=True)
class Benchmark:
    """All that is known of a benchmark.

    `read` gives the questions of each data set by its name, lazily where it can; a sample without a `source` gets that
    name. `protocol` is how the benchmark was published to be asked; one without an answer step scores boxes alone.
    `datasets` are those that were published, with their number of questions where it is known. `score` gives columns of
    its own for the result of a question, of those in `rewards.results.COLUMNS`: `correct` where a rule says what is
    right, `correct_published` where the published rule is another one; its `prediction` is None where there is no
    answer. `figures` adds to the summary what is computed over all rows.

    `readings` are the ways in which its questions are worded and its replies read (readings.py), the default first; in
    them `protocol` and `score` play no part. `metrics` are the string metrics that say anything of its answers, `whole`
    its number of questions where that alone was published, `origin` where its files come from.
    """

    read: Callable[[BenchmarkFiles], Mapping[str, Iterable[BenchmarkQuestion]]]
    protocol: LookProtocol = VISRL
    datasets: Mapping[str, int | None] = field(default_factory=dict)
    score: Callable[[BenchmarkQuestion, Result, Codec], Mapping[str, float | None]] | None = None
    figures: Callable[[dict[str, Any], Sequence[Row]], dict[str, Any]] | None = None
    readings: Mapping[str, BenchmarkReading] = field(default_factory=dict)
    metrics: Sequence[str] = tuple(METRICS)
    whole: int | None = None
    origin: str = ""

    @property
    def scores(self) -> Literal["answers", "boxes"]:
        """What is scored; only answers can be judged, and only they have controls."""
        return "boxes" if self.protocol.answer is None else "answers"

    @property
    def protocols(self) -> dict[str, LookProtocol]:
        """How it may be asked, by name: as published first, or in the words of training."""
        if self.readings:
            return {"visrl": VISRL}  # each reading has its own words (`BenchmarkReading.protocol`)
        ours = VISRL if self.scores == "answers" else VISRL_BOXES
        return {self.protocol.name: self.protocol, "visrl": ours}

    def reading(self, name: str | None) -> BenchmarkReading | None:
        """The reading of that name, the first without one; None for a benchmark that has but one.

        Raises:
            ConfigError: it has no such reading.
        """
        if name is None:
            return next(iter(self.readings.values()), None)
        if name not in self.readings:
            there = f"there are {', '.join(self.readings)}" if self.readings else "this benchmark has but one"
            raise ConfigError(f"reading: no {name!r}; {there}")
        return self.readings[name]

    def row_of(
        self, question: BenchmarkQuestion, result: Result, codec: Codec, reading: BenchmarkReading | None = None
    ) -> dict[str, Any]:
        """The row of a question, with the benchmark's own columns; `codec` is that of the policy that was asked.

        Whatever `score` says: without a reply its columns are null; a box text that holds no box answers nothing, nor
        do several looks that came to a limit.

        Raises:
            ConfigError: `score` gives a column that no summary knows, or a value outside [0, 1].
        """
        reply = result.prediction if result.reply is None else result.reply
        if reading is not None:
            own = dict(reading.score(question, reply or ""))
        else:
            own = dict(self.score(question, result, codec)) if self.score else {}
        for name, value in own.items():
            if name not in COLUMNS:
                raise ConfigError(f"the benchmark's score gives a column {name!r}; there are {', '.join(COLUMNS)}")
            if value is not None and not is_score(value):
                raise ConfigError(f"the benchmark's score gives {name} = {value!r}; it must be None or lie in [0, 1]")
            if result.failure is not None or result.skipped:
                own[name] = None
            elif (result.unparseable or result.end in UNFINISHED) and name in ANSWER_COLUMNS:
                own[name] = 0.0
        row = {**result.eval_row(), **own, **_told_apart(question), **_said(question, result, reading)}
        if reading is not None:
            row["reading"] = next(name for name, one in self.readings.items() if one is reading)
        if result.mode != "no_box":  # the published boxes are those of a reply that was asked for in one turn
            row.pop("iou_published", None)
        for name, metric in METRICS.items():
            if name in row and (name not in self.metrics or question.choice is not None):
                del row[name]
            elif name in row and row[name] is not None and result.prediction is not None and question.references:
                row[name] = metric(result.prediction, question.references)
        return row


def _told_apart(question: BenchmarkQuestion) -> dict[str, Any]:
    """What a row holds that is one of several about a question, or of a part of its data set."""
    given = {"category": question.category, "group": question.group}
    numbers = {"rotation": question.rotation, "attempt": question.attempt}
    return {name: value for name, value in {**given, **numbers}.items() if value}


def _said(question: BenchmarkQuestion, result: Result, reading: BenchmarkReading | None) -> dict[str, Any]:
    """Several answers, the reply with what was thought aloud, the options as shown, and which of them we read."""
    row: dict[str, Any] = {"references": list(question.references)} if len(question.references) > 1 else {}
    if reading is not None and result.reply is not None and result.reply != result.prediction:
        row["reply"] = result.reply
    if question.choice is not None:
        row["options"] = dict(question.choice.letters)
        if reading is not None and reading.in_orders and result.prediction is not None:
            row["choice"] = read_choice(result.prediction, question.choice.letters)
    return row


def read_drawn_or_own(files: BenchmarkFiles) -> dict[str, list[BenchmarkQuestion]]:
    """Drawn scenes, a named data set or a file, as `data.sources.read_samples` takes them."""
    samples = read_samples(files.dataset, with_box=True, dataset_dir=files.dataset_dir, image_root=files.image_root)
    return {"": [BenchmarkQuestion(sample) for sample in samples]}


def read_as(
    read: Callable[[BenchmarkFiles], Mapping[str, Iterable[BenchmarkQuestion]]],
    parts: Mapping[str, int | None],
    readings: Mapping[str, BenchmarkReading],
    origin: str,
    metrics: Sequence[str] = (),
    whole: int | None = None,
) -> Benchmark:
    """A benchmark with several readings, whose figures are over questions."""
    return Benchmark(
        read, datasets=parts, figures=choice_figures, readings=readings, metrics=metrics, whole=whole, origin=origin
    )


def document(
    kind: documents.DocumentFiles, lmms: Callable[[BenchmarkQuestion], str], metric: str, tokens: int = 32
) -> Benchmark:
    """A benchmark of documents, charts or texts in pictures."""
    ways = documents.readings(lmms, metric, tokens)
    return read_as(documents.questions(kind), kind.parts, ways, kind.origin, ("exact", metric))


BENCHMARKS = {
    "samples": Benchmark(read_drawn_or_own),
    "viscot": Benchmark(viscot.questions_with_answers, VISCOT, VISCOT_QUESTIONS, figures=viscot.answer_figures),
    "viscot-detection": Benchmark(
        viscot.questions_with_boxes, VISCOT_BOXES, VISCOT_QUESTIONS, viscot.score_box, viscot.box_figures
    ),
    "refcoco": Benchmark(
        viscot.questions_with_boxes, REFCOCO, dict.fromkeys(REFCOCO_SPLITS), viscot.score_box, viscot.box_figures
    ),
    "vstar": read_as(vstar.questions, vstar.PARTS, vstar.READINGS, vstar.ORIGIN),
    "hrbench4k": read_as(hrbench.questions("4k"), hrbench.PARTS, hrbench.READINGS, hrbench.ORIGIN),
    "hrbench8k": read_as(hrbench.questions("8k"), hrbench.PARTS, hrbench.READINGS, hrbench.ORIGIN),
    "mme-realworld": read_as(
        mme_realworld.questions("MME_RealWorld.json", "MME-RealWorld.tsv"),
        mme_realworld.PARTS, mme_realworld.READINGS, mme_realworld.ORIGIN,
    ),
    "mme-realworld-lite": read_as(
        mme_realworld.questions("MME-RealWorld-Lite.json", "mme_realworld_lite.tsv"),
        mme_realworld.PARTS, mme_realworld.READINGS, mme_realworld.ORIGIN_LITE, whole=mme_realworld.LITE,
    ),
    "treebench": read_as(treebench.questions, treebench.PARTS, treebench.READINGS, treebench.ORIGIN),
    "zoombench": read_as(
        zoombench.questions, {}, zoombench.READINGS, zoombench.ORIGIN, ("exact",), whole=zoombench.WHOLE
    ),
    "visualprobe": read_as(
        zoombench.probe_questions, zoombench.PROBE_PARTS, zoombench.PROBE_READINGS, zoombench.PROBE_ORIGIN, ("exact",)
    ),
    "docvqa": document(documents.DOCVQA, wordings.short_answer, "anls"),
    "infovqa": document(documents.INFOVQA, wordings.short_answer, "anls"),
    "textvqa": document(documents.TEXTVQA, wordings.lmms_textvqa, "vqa"),
    "chartqa": document(documents.CHARTQA, wordings.lmms_chartqa, "relaxed", tokens=16),
}  # fmt: skip


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of that name, or the user's own that `module:NAME` names.

    Raises:
        ConfigError: there is none.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    if not is_plugin(name):
        raise ConfigError(f"benchmark {name!r}: there are {', '.join(BENCHMARKS)}, or one of your own as module:NAME")
    found = load_plugin(name, "benchmark")
    if not isinstance(found, Benchmark):
        raise ConfigError(f"benchmark {name!r} is a {type(found).__name__}, not a visrl.evaluate.benchmarks.Benchmark")
    return found


def read_benchmark(
    benchmark: str,
    dataset: str,
    *,
    dataset_dir: str = "data",
    datasets: Sequence[str] | None = None,
    boxes: str | None = None,
    image_root: str | None = None,
    limit: int | None = None,
) -> list[BenchmarkQuestion]:
    """The questions, data set after data set, at most `limit` of each. `boxes` is the config's `box_dir`.

    Raises:
        ConfigError: no such benchmark.
        RecordError: data sets that are not there, all named; a row that is no question; a question twice.
    """
    known = find_benchmark(benchmark)
    _check_names(known, datasets)
    files = BenchmarkFiles(
        dataset, tuple(datasets or known.datasets), dataset_dir, boxes, image_root, origin=known.origin
    )
    questions: list[BenchmarkQuestion] = []
    for name, own in known.read(files).items():
        some = _of_each(own, files.names, datasets, limit) if known.readings else islice(own, limit)
        for one in some:
            sample = one.sample if one.sample.source else replace(one.sample, source=name)
            questions.append(replace(one, sample=sample))
    check_each_once(questions, dataset)
    return questions


def _of_each(
    questions: Iterable[BenchmarkQuestion], names: Sequence[str], wanted: Sequence[str] | None, limit: int | None
) -> Iterator[BenchmarkQuestion]:
    """Of one file that holds several data sets, the questions of those `wanted`, at most `limit` of each of `names`."""
    taken = Counter[str]()
    for one in questions:
        name = one.sample.source
        if wanted and name not in wanted:
            continue
        if limit is None or taken[name] < limit:
            taken[name] += 1
            yield one
        elif names and all(taken[each] >= limit for each in names):
            return  # the rest of a file of gigabytes is not read


def _check_names(known: Benchmark, datasets: Sequence[str] | None) -> None:
    """Refuse a data set that the benchmark has not, where its files do not name them."""
    unknown = [name for name in datasets or () if known.readings and name not in known.datasets]
    if unknown:
        raise ConfigError(f"datasets: no {unknown[0]!r}; there are {', '.join(known.datasets) or 'no parts to name'}")


def incomplete(
    benchmark: str, questions: Sequence[BenchmarkQuestion], datasets: Sequence[str] | None = None
) -> dict[str, tuple[int, int]]:
    """Of the published data sets, or of `datasets`, those not asked in full: how many questions, of how many."""
    known = find_benchmark(benchmark)
    counts = Counter(question.sample.source for question in questions)
    wholes = {name: whole for name, whole in known.datasets.items() if whole is not None}
    if known.whole is not None and len(questions) != known.whole:
        return {benchmark: (len(questions), known.whole)}
    wanted = [name for name in datasets or known.datasets if name in wholes]
    return {name: (counts[name], wholes[name]) for name in wanted if counts[name] != wholes[name]}


def unpublished(benchmark: str, questions: Sequence[BenchmarkQuestion]) -> dict[str, int]:
    """The parts that the files of a benchmark name and its authors do not, with their number of questions."""
    known = find_benchmark(benchmark).datasets
    counts = Counter(question.sample.source for question in questions)
    return {name: count for name, count in counts.items() if known and name not in known}
