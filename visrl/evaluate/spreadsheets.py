"""Sheets of Excel (.xlsx), which VLMEvalKit writes by default. Needs openpyxl, and asks for it where it is missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from visrl.evaluate.row_files import Row
from visrl.records import RecordError


def read_xlsx(path: Path) -> Iterator[tuple[int, Row]]:
    """The rows of the first sheet with their numbers from 1, by the names in its first line; an empty cell is None.

    Raises:
        RecordError: no such file, no sheet in it, or no openpyxl to read it with.
    """
    if not path.is_file():
        raise RecordError(f"no file at {path}")
    openpyxl = _openpyxl(path, "let VLMEvalKit write PRED_FORMAT=tsv")
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except (OSError, KeyError, ValueError, BadZipFile) as error:
        raise RecordError(f"{path} is no sheet of Excel: {str(error)[:200]}") from error
    try:
        if not book.worksheets:
            raise RecordError(f"{path} holds no sheet")
        lines = book.worksheets[0].iter_rows(values_only=True)
        names = [str(name) for name in next(lines, ()) if name is not None]
        if not names:
            raise RecordError(f"{path}: the first line of its first sheet names no columns")
        for number, values in enumerate(lines, start=1):
            yield number, dict(zip(names, values, strict=False))
    finally:
        book.close()


def write_xlsx(path: Path, rows: Sequence[Row]) -> None:
    """One sheet with the columns of the first row. Texts are written as texts, whatever they begin with.

    Raises:
        RecordError: there is no openpyxl, or a text holds what no sheet can.
    """
    openpyxl = _openpyxl(path, "name a .tsv or .json file")
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.utils.exceptions import IllegalCharacterError

    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet()
    names = list(rows[0])
    sheet.append(names)
    for number, row in enumerate(rows, start=1):
        cells = []
        for name in names:
            try:
                one = WriteOnlyCell(sheet, value=row.get(name))
            except IllegalCharacterError as error:
                raise RecordError(
                    f"row {number}: {name!r} holds a character that no sheet of Excel can; name a .tsv or .json file"
                ) from error
            if isinstance(row.get(name), str):
                one.data_type = "s"  # a text that opens with "=" is no formula
            cells.append(one)
        sheet.append(cells)
    path.parent.mkdir(parents=True, exist_ok=True)
    book.save(path)


def _openpyxl(path: Path, otherwise: str) -> Any:
    try:
        import openpyxl
    except ImportError as error:
        raise RecordError(f"{path}: .xlsx needs openpyxl: pip install 'visrl[xlsx]', or {otherwise}") from error
    return openpyxl
