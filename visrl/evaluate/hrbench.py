"""HR-Bench 4K and 8K (Wang et al. 2024, arXiv 2408.15556): a TSV with pictures in base64, or parquet.

800 rows are 200 questions with their options in four orders (`cycle_category`). The authors' repository is a fork of
VLMEvalKit whose judge is asked about every reply; what is published since is VLMEvalKit's, whose rule it is here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from visrl.evaluate import wordings
from visrl.evaluate.questions import BenchmarkFiles, BenchmarkQuestion
from visrl.evaluate.readings import OUR_READING, BenchmarkReading, ruled
from visrl.evaluate.row_files import Row, cell, lettered_choice, optional_cell, read_questions, require_columns
from visrl.records import Sample

ORIGIN = "https://huggingface.co/datasets/DreamMr/HR-Bench"
PARTS: dict[str, int | None] = {"single": 400, "cross": 400}
READINGS: dict[str, BenchmarkReading] = {
    "published": ruled(wordings.vlmevalkit_choice, "vlmevalkit"),
    "lmms-eval": ruled(wordings.lmms_hrbench, "lmms-eval-hrbench"),
    "ours": OUR_READING,
}


def questions(size: str) -> Callable[[BenchmarkFiles], Mapping[str, Iterator[BenchmarkQuestion]]]:
    """The reader of `hr_bench_SIZE`, `size` being 4k or 8k."""

    def read(files: BenchmarkFiles) -> dict[str, Iterator[BenchmarkQuestion]]:
        path = files.find(f"hr_bench_{size}.tsv", f"hr_bench_{size}.parquet")
        seen: Counter[tuple[str, str]] = Counter()
        return {"": read_questions(path, lambda row, number: _question(row, seen))}

    return read


def _question(row: Row, seen: Counter[tuple[str, str]]) -> BenchmarkQuestion:
    require_columns(row, ("index", "image", "question", "answer", "category", "A", "B"))
    choice = lettered_choice(row, cell(row, "question"), cell(row, "answer"))
    # The same question in another order of its options has the same text and the same options. Where two pictures have
    # such a question, the first of each order belong together, and the second.
    cycle, name = optional_cell(row, "cycle_category") or "", "\x1f".join([choice.stem, *sorted(choice.options)])
    seen[name, cycle] += 1
    group = f"{name}\x1f{seen[name, cycle]}"
    sample = Sample(cell(row, "index"), cell(row, "image"), choice.stem, choice.truth, None, cell(row, "category"))
    return BenchmarkQuestion(sample, choice=choice, category=cycle, group=group)
