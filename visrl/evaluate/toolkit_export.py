"""Our results in the form of lmms-eval's samples or of VLMEvalKit's prediction files. Rows in, a file out."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visrl.data.rows import Writer
from visrl.evaluate.spreadsheets import write_xlsx
from visrl.evaluate.toolkit_files import LMMS_FAILED, VLMEVALKIT_ENDINGS, VLMEVALKIT_FAILED
from visrl.evaluate.toolkits import Toolkit
from visrl.records import RecordError, write_records, write_text
from visrl.rewards.results import Row, right_column
from visrl.zoom.episode import UNFINISHED

NO_BOX = "no readable box"


def export_results(rows: Sequence[Row], out: str | Path, toolkit: Toolkit) -> dict[str, int]:
    """Write result rows of answers as `toolkit` would have. How many were written, and how many were left out since
    their mode did not apply to them: `{"written", "skipped"}`.

    Raises:
        RecordError: rows without answers, a file name of another form, or no openpyxl for .xlsx.
    """
    out = Path(out)
    kept = [row for row in rows if not row.get("skipped")]
    lacking = next((row for row in kept if "prediction" not in row or "answer" not in row), None)
    if lacking is not None or not kept:
        what = "no answers" if lacking is None else f"no answer and no prediction in the row of {lacking['id']}"
        raise RecordError(f"{what}: only results of answers can be exported")
    if toolkit == "lmms-eval":
        if out.suffix != ".jsonl":
            raise RecordError(f"{out}: samples of lmms-eval are a .jsonl file")
        write_records(out, lmms_samples(kept))
    else:
        _write_vlmevalkit(out, vlmevalkit_rows(kept))
    return {"written": len(kept), "skipped": len(rows) - len(kept)}


def lmms_samples(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as lmms-eval logs samples: `doc_id` is the number of the row, `doc` holds the options as earlier
    releases logged them, `score` says whether it is right (absent where that is not known), and `visrl` names question,
    part and category."""
    right = right_column(rows)
    samples = []
    for number, row in enumerate(rows):
        score = row.get(right)
        told = {"question_id": _name(row), "category": row.get("dataset") or ""}
        told["cycle_category" if row.get("group") else "detail"] = row.get("category") or ""
        samples.append(
            {
                "doc_id": number,
                "target": row.get("references") or str(row["answer"]),
                "filtered_resps": _reply(row, f"{LMMS_FAILED[0]}] "),
                "input": row.get("question") or "",
                **({"doc": dict(row["options"])} if row.get("options") else {}),
                **({} if score is None else {"score": float(score)}),
                "visrl": told,
            }
        )
    return samples


def vlmevalkit_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows under VLMEvalKit's columns: index, question, options by their letters, answer, category, prediction."""
    letters = sorted({letter for row in rows for letter in row.get("options") or {}})
    names = Counter(_name(row) for row in rows)
    parts = [(row.get("dataset") or "", row.get("category") or "") for row in rows]
    finer = "cycle_category" if all(row.get("group") for row in rows) else "l2-category"
    several = any(count > 1 for count in names.values())  # an index must be of one row, whatever its data set
    found = []
    for row, (part, category) in zip(rows, parts, strict=True):
        options = row.get("options") or {}
        found.append(
            {
                "index": f"{part}/{_name(row)}" if several else _name(row),
                "question": row.get("question") or "",
                **{letter: options.get(letter) for letter in letters},
                "answer": str(row["references"]) if row.get("references") else row["answer"],
                "category": part,
                finer: category,
                "prediction": _reply(row, f"{VLMEVALKIT_FAILED}. "),
            }
        )
    return found


def _reply(row: Row, failed: str) -> str:
    """The whole reply, or the toolkit's words for none. Several looks that came to a limit answered nothing, whatever
    their last turn says; where no box could be read, words that name no answer: that is wrong, and no failure."""
    said = row["prediction"] if row.get("end") in UNFINISHED else row.get("reply", row["prediction"])
    if said is None and row.get("unparseable"):
        return NO_BOX
    return f"{failed}{row.get('error') or 'no answer'}" if said is None else said


def _name(row: Row) -> str:
    """What names a row within its data set."""
    return f"{row['id']}#{row['repeat']}" if row.get("repeat") else str(row["id"])


def _write_vlmevalkit(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    if out.suffix not in VLMEVALKIT_ENDINGS:
        raise RecordError(f"{out}: files of VLMEvalKit end in {', '.join(VLMEVALKIT_ENDINGS)}")
    if out.suffix == ".xlsx":
        write_xlsx(out, rows)
    elif out.suffix == ".json":
        with Writer(out) as file:
            for row in rows:
                file.write(row)
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(out, text.getvalue())
