"""Rows of the files that benchmarks are distributed in: TSV with pictures in base64, parquet, JSON, JSONL.

Rows come one by one, and pictures stay where they lie (`visrl.image_rows`): a table of gigabytes is read in the memory
of its longest row. Knows no benchmark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from visrl.box import BoxError
from visrl.data.rows import RowFault, check_text, json_items
from visrl.evaluate.choices import MAX_OPTIONS, ChoiceQuestion, letter_of
from visrl.evaluate.questions import BenchmarkQuestion
from visrl.evaluate.tsv import Row, tsv_rows
from visrl.image_rows import parquet_ref
from visrl.prompts import IMAGE
from visrl.records import BadLine, RecordError, json_value, line_fault

MAX_NOTE = 1 << 20  # bytes of a JSON file beside a picture
_BATCH = 256  # rows of a parquet file read at once, their pictures aside

Parse = Callable[[Row, int], BenchmarkQuestion]


def read_questions(path: Path, parse: Parse, pictures: Sequence[str] = ("image",)) -> Iterator[BenchmarkQuestion]:
    """What `parse` makes of each row of a file, given the row and its number from 1. Columns of `pictures` hold the
    references of pictures, where the file is a table.

    Raises:
        RecordError: a row that is no question, named by its number: a benchmark is read whole or not at all.
    """
    for number, row in table_rows(path, pictures):
        try:
            if isinstance(row, RowFault):
                raise row
            yield without_marks(parse(row, number))
        except (RowFault, BoxError) as fault:
            raise broken_row(path, number, fault) from fault


def read_shards(
    paths: Sequence[Path], parse: Parse, pictures: Sequence[str] = ("image",)
) -> Iterator[BenchmarkQuestion]:
    """`read_questions` of several files as one, their rows numbered through for `parse`."""
    before = 0
    for path in paths:
        count = 0
        for question in read_questions(path, partial(_numbered_from, before, parse), pictures):
            count += 1
            yield question
        before += count


def _numbered_from(before: int, parse: Parse, row: Row, number: int) -> BenchmarkQuestion:
    return parse(row, before + number)


def broken_row(path: Path, number: int, fault: Exception) -> RecordError:
    """What is raised where a row is no question."""
    return RecordError(f"{path}, row {number}: {fault}; a benchmark must be whole: mend or replace it")


def without_marks(question: BenchmarkQuestion) -> BenchmarkQuestion:
    """The question, unless a text of it holds the mark of an image, which prompts set themselves.

    Raises:
        RowFault: one does.
    """
    options = question.choice.options if question.choice else ()
    for text in (question.sample.question, question.sample.answer, question.text or "", *options):
        if IMAGE in text:
            raise RowFault("unparseable", f"a text holds an {IMAGE} mark: {text[:60]!r}")
    return question


def table_rows(path: Path, pictures: Sequence[str] = ("image",)) -> Iterator[tuple[int, Row | RowFault]]:
    """The rows of a file with their numbers from 1, each as values by name, or as the fault that it has.

    Raises:
        RecordError: the file is not there, or so damaged that no rows can be told.
    """
    if not path.is_file():
        raise RecordError(f"no file at {path}")
    ending = path.suffix.lower()
    if ending == ".tsv":
        yield from tsv_rows(path, pictures)
    elif ending == ".parquet":
        yield from _parquet_rows(path, pictures)
    elif ending not in (".json", ".jsonl"):
        raise RecordError(f"{path}: rows are read from .tsv, .parquet, .json and .jsonl; unpack or convert this file")
    else:
        for number, value in enumerate(json_items(path), start=1):
            if isinstance(value, BadLine):
                yield number, RowFault("unparseable", f"the line is {line_fault(value)}")
            elif not isinstance(value, dict):
                yield number, RowFault("unparseable", "not a JSON object")
            else:
                yield number, value


def read_object(path: Path) -> Row:
    """The one JSON object that a small file holds.

    Raises:
        RecordError: it holds something else.
    """
    try:
        data = path.read_bytes()[: MAX_NOTE + 1]
        value = json_value(data.decode("utf-8-sig")) if len(data) <= MAX_NOTE else None
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} is not JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise RecordError(f"{path} must be one JSON object of at most {MAX_NOTE:,} bytes")
    return value


def require_columns(row: Row, names: Sequence[str]) -> None:
    """Refuse a file that is another one.

    Raises:
        RowFault: a column is not there.
    """
    if missing := [name for name in names if name not in row]:
        raise RowFault("unparseable", f"no column {', '.join(map(repr, missing))} among {', '.join(row)}"[:300])


def cell(row: Row, key: str) -> str:
    """The text of a cell; whole numbers as they are written.

    Raises:
        RowFault: it is empty, or holds something else.
    """
    found = optional_cell(row, key)
    if found is None:
        raise RowFault("unparseable", f"{key!r} is empty" if key in row else f"there is no {key!r}")
    return found


def optional_cell(row: Row, key: str) -> str | None:
    """`cell`, or None where it is empty or not there.

    Raises:
        RowFault: it holds something else than a text or a number.
    """
    value = row.get(key)
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise RowFault("unparseable", f"{key!r} must be a text, it is {str(value)[:60]}")
    text = str(value)
    check_text(text, key)
    return text


def lettered_choice(row: Row, stem: str, answer: str, is_fixed: bool = False) -> ChoiceQuestion:
    """The choice whose options are in the columns A, B and so on, up to the first that is empty.

    Raises:
        RowFault: fewer than two, an empty one between others, or an answer that is none of them.
    """
    found = [optional_cell(row, letter_of(number)) for number in range(MAX_OPTIONS)]
    count = next((number for number, option in enumerate(found) if option is None), MAX_OPTIONS)
    options = tuple(option for option in found[:count] if option is not None)
    if any(option is not None for option in found[count:]):
        raise RowFault("unparseable", f"the option {letter_of(count)} is empty, and there is one after it")
    if count < 2:
        raise RowFault("unparseable", "fewer than two options")
    answer = answer.strip()
    if answer not in [letter_of(number) for number in range(count)]:
        raise RowFault("unparseable", f"the answer {answer[:20]!r} is none of its options A to {letter_of(count - 1)}")
    return ChoiceQuestion(stem, options, ord(answer) - 65, is_fixed)


# --- Parquet ----------------------------------------------------------------------------------------------------------


def _parquet_rows(path: Path, pictures: Sequence[str]) -> Iterator[tuple[int, Row | RowFault]]:
    import pyarrow
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            names = file.schema_arrow.names
            own = [name for name in names if name not in pictures]
            held = [name for name in pictures if name in names]
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH, columns=own):
                for row in batch.to_pylist():
                    yield number + 1, {**row, **{name: parquet_ref(path, number, name) for name in held}}
                    number += 1
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from error
