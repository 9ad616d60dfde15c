"""The benchmarks, one row each: how each is read, asked and scored. Everything else asks this table.

A new one is a file with a reader like viscot.py and a row of `BENCHMARKS`; one of your own is a `Benchmark` in a module
of yours, named as `benchmark: module:NAME`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal

from visrl.codecs import Codec
from visrl.config import ConfigError
from visrl.data.sources import read_samples
from visrl.evaluate import viscot
from visrl.evaluate.published import REFCOCO_SPLITS, VISCOT_QUESTIONS
from visrl.evaluate.questions import BenchmarkFiles, BenchmarkQuestion, check_each_once
from visrl.plugins import is_plugin, load_plugin
from visrl.rewards.reply_scores import is_score
from visrl.rewards.results import ANSWER_COLUMNS, COLUMNS, Result, Row
from visrl.rollout.protocols import REFCOCO, VISCOT, VISCOT_BOXES, VISRL, VISRL_BOXES, LookProtocol


@dataclass(frozen=True, slots=True)
class Benchmark:
    """All that is known of a benchmark.

    `read` gives the questions of each data set by its name, lazily where it can; a sample without a `source` gets that
    name. `protocol` is how the benchmark was published to be asked; one without an answer step scores boxes alone.
    `datasets` are those that were published, with their number of questions where it is known. `score` gives columns of
    its own for the result of a question, of those in `rewards.results.COLUMNS`: `correct` where a rule says what is
    right, `correct_published` where the published rule is another one; its `prediction` is None where there is no
    answer. `figures` adds to the summary what is computed over all rows.
    """

    read: Callable[[BenchmarkFiles], Mapping[str, Iterable[BenchmarkQuestion]]]
    protocol: LookProtocol = VISRL
    datasets: Mapping[str, int | None] = field(default_factory=dict)
    score: Callable[[BenchmarkQuestion, Result, Codec], Mapping[str, float | None]] | None = None
    figures: Callable[[dict[str, Any], Sequence[Row]], dict[str, Any]] | None = None

    @property
    def scores(self) -> Literal["answers", "boxes"]:
        """What is scored; only answers can be judged, and only they have controls."""
        return "boxes" if self.protocol.answer is None else "answers"

    @property
    def protocols(self) -> dict[str, LookProtocol]:
        """How it may be asked, by name: as published first, or in the words of training."""
        ours = VISRL if self.scores == "answers" else VISRL_BOXES
        return {self.protocol.name: self.protocol, "visrl": ours}

    def row_of(self, question: BenchmarkQuestion, result: Result, codec: Codec) -> dict[str, Any]:
        """The row of a question, with the benchmark's own columns; `codec` is that of the policy that was asked.

        Whatever `score` says: without a reply its columns are null, and a box text that holds no box answers nothing.

        Raises:
            ConfigError: `score` gives a column that no summary knows, or a value outside [0, 1].
        """
        own = dict(self.score(question, result, codec)) if self.score else {}
        for name, value in own.items():
            if name not in COLUMNS:
                raise ConfigError(f"the benchmark's score gives a column {name!r}; there are {', '.join(COLUMNS)}")
            if value is not None and not is_score(value):
                raise ConfigError(f"the benchmark's score gives {name} = {value!r}; it must be None or lie in [0, 1]")
            if result.failure is not None or result.skipped:
                own[name] = None
            elif result.unparseable and name in ANSWER_COLUMNS:
                own[name] = 0.0
        return {**result.eval_row(), **own}


def read_drawn_or_own(files: BenchmarkFiles) -> dict[str, list[BenchmarkQuestion]]:
    """Drawn scenes, a named data set or a file, as `data.sources.read_samples` takes them."""
    samples = read_samples(files.dataset, with_box=True, dataset_dir=files.dataset_dir, image_root=files.image_root)
    return {"": [BenchmarkQuestion(sample) for sample in samples]}


BENCHMARKS = {
    "samples": Benchmark(read_drawn_or_own),
    "viscot": Benchmark(viscot.questions_with_answers, VISCOT, VISCOT_QUESTIONS, figures=viscot.answer_figures),
    "viscot-detection": Benchmark(
        viscot.questions_with_boxes, VISCOT_BOXES, VISCOT_QUESTIONS, viscot.score_box, viscot.box_figures
    ),
    "refcoco": Benchmark(
        viscot.questions_with_boxes, REFCOCO, dict.fromkeys(REFCOCO_SPLITS), viscot.score_box, viscot.box_figures
    ),
}


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
    files = BenchmarkFiles(dataset, tuple(datasets or known.datasets), dataset_dir, boxes, image_root)
    questions = []
    for name, own in known.read(files).items():
        for one in islice(own, limit):
            sample = one.sample if one.sample.source else replace(one.sample, source=name)
            questions.append(replace(one, sample=sample))
    check_each_once(questions)
    return questions


def incomplete(benchmark: str, questions: Sequence[BenchmarkQuestion]) -> dict[str, tuple[int, int]]:
    """Of the published data sets that are not asked in full: how many questions there are, of how many."""
    counts = Counter(question.sample.source for question in questions)
    wholes = {name: whole for name, whole in find_benchmark(benchmark).datasets.items() if whole is not None}
    return {name: (count, wholes[name]) for name, count in counts.items() if count != wholes.get(name, count)}
