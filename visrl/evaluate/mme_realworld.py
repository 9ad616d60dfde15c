"""MME-RealWorld and its Lite form (Zhang et al. 2024, arXiv 2408.13257): JSON beside pictures, or VLMEvalKit's TSV.

Five options, the last of which says that the picture does not show it. A data set is a task and its domain, such as
"Perception/Remote Sensing"; published means are over questions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from visrl.data.rows import RowFault
from visrl.evaluate import wordings
from visrl.evaluate.choices import MAX_OPTIONS, ChoiceQuestion, letter_of
from visrl.evaluate.questions import BenchmarkFiles, BenchmarkQuestion
from visrl.evaluate.readings import OUR_READING, BenchmarkReading, ruled
from visrl.evaluate.row_files import Row, cell, lettered_choice, optional_cell, read_questions, require_columns
from visrl.records import Sample

ORIGIN = "https://huggingface.co/datasets/yifanzhang114/MME-RealWorld"
ORIGIN_LITE = "https://huggingface.co/datasets/yifanzhang114/MME-RealWorld-Lite"
LITE = 1919  # questions: 50 of each task, or all where there are fewer
PARTS: dict[str, int | None] = {
    f"{task}/{domain}": None
    for task, domains in {
        "Perception": (
            "OCR with Complex Context", "Remote Sensing", "Diagram and Table", "Monitoring", "Autonomous_Driving",
        ),
        "Reasoning": ("OCR with Complex Context", "Diagram and Table", "Monitoring", "Autonomous_Driving"),
    }.items()
    for domain in domains
}  # fmt: skip
READINGS: dict[str, BenchmarkReading] = {
    "published": ruled(wordings.mme_realworld, "mme-realworld"),
    "vlmevalkit": ruled(wordings.vlmevalkit_mme_realworld, "vlmevalkit-letter"),
    "lmms-eval": ruled(wordings.lmms_mme_realworld, "lmms-eval-mme-realworld", tokens=16),
    "ours": OUR_READING,
}
_MARK = re.compile(r"\(([A-Z])\)\s*")


def questions(*names: str) -> Callable[[BenchmarkFiles], Mapping[str, Iterator[BenchmarkQuestion]]]:
    """The reader of the first of these files that the folder holds."""

    def read(files: BenchmarkFiles) -> dict[str, Iterator[BenchmarkQuestion]]:
        path = files.find(*names)
        parse = _from_table if path.suffix.lower() in (".tsv", ".parquet") else _from_json
        return {"": read_questions(path, lambda row, number: parse(row, path.parent, files))}

    return read


def _from_json(row: Row, folder: Path, files: BenchmarkFiles) -> BenchmarkQuestion:
    stem, answer = cell(row, "Text"), cell(row, "Ground truth").strip()
    given = row.get("Answer choices")
    if not isinstance(given, list) or not 2 <= len(given) <= MAX_OPTIONS:
        raise RowFault("unparseable", f"'Answer choices' must be a list of 2 to {MAX_OPTIONS}, it is {str(given)[:60]}")
    texts = [cell({"Answer choices": option}, "Answer choices") for option in given]
    options = tuple(_without_letter(text, number) for number, text in enumerate(texts))
    if answer not in [letter_of(number) for number in range(len(options))]:
        raise RowFault("unparseable", f"the 'Ground truth' {answer[:20]!r} is none of its {len(options)} options")
    sample = Sample(
        cell(row, "Question_id"), files.picture(folder, cell(row, "Image")), stem, answer, None,
        f"{cell(row, 'Task')}/{cell(row, 'Subtask')}",
    )  # fmt: skip
    return BenchmarkQuestion(
        sample, choice=ChoiceQuestion(stem, options, ord(answer) - 65), category=cell(row, "Category")
    )


def _without_letter(text: str, number: int) -> str:
    """An option without the "(A) " before it.

    Raises:
        RowFault: it has another letter than its place.
    """
    mark = _MARK.match(text)
    if mark is None or mark[1] != letter_of(number):
        raise RowFault("unparseable", f"option {number + 1} must open with ({letter_of(number)}), it is {text[:40]!r}")
    return text[mark.end() :]


def _from_table(row: Row, folder: Path, files: BenchmarkFiles) -> BenchmarkQuestion:
    require_columns(row, ("index", "image", "question", "answer", "category", "A", "B"))
    choice = lettered_choice(row, cell(row, "question"), cell(row, "answer"))
    options = tuple(option.removeprefix(f"({letter})").lstrip() for letter, option in choice.letters.items())
    choice = ChoiceQuestion(choice.stem, options, choice.right)
    sample = Sample(cell(row, "index"), cell(row, "image"), choice.stem, choice.truth, None, cell(row, "category"))
    return BenchmarkQuestion(sample, choice=choice, category=optional_cell(row, "l2-category") or "")
