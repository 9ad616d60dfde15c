"""What is wrong with a data set before it is used: bad rows, missing and broken images, duplicates, leaks.

Reads every row and, where a folder of images is given, decodes every image once. Changes nothing.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visrl.box import MAX_CROP_ASPECT, MIN_CROP_SIDE, Size
from visrl.data.convert import dataset_of
from visrl.data.formats import Reading, other_format, read_format
from visrl.data.rows import DataRow, format_notes
from visrl.data.sizes import FOLDERS, viscot_path
from visrl.images import ImageError, image_path, names_file, open_image
from visrl.records import Sample

FAULTS = ("inverted", "outside", "empty", "unparseable")  # always reported, also where there are none
EXAMPLES = 3

# Where the images of Visual-CoT's data sets come from. All of them together: the Visual-CoT data set on the hub.
ORIGINS = {
    "cub": "https://www.vision.caltech.edu/datasets/cub_200_2011/",
    "docvqa": "https://rrc.cvc.uab.es/?ch=17",
    "dude": "https://rrc.cvc.uab.es/?ch=23",
    "flickr30k": "https://shannon.cs.illinois.edu/DenotationGraph/",
    "gqa": "https://cs.stanford.edu/people/dorarad/gqa/download.html",
    "infographicsvqa": "https://rrc.cvc.uab.es/?ch=17",
    "openimages": "https://storage.googleapis.com/openimages/web/index.html",
    "sroie": "https://rrc.cvc.uab.es/?ch=13",
    "textvqa": "https://textvqa.org/dataset/",
    "textcap": "https://textvqa.org/dataset/",
    "v7w": "https://ai.stanford.edu/~yukez/visual7w/",
    "vsr": "https://cocodataset.org/#download",
    "refcoco": "https://cocodataset.org/#download",
    "refcoco+": "https://cocodataset.org/#download",
    "refcocog": "https://cocodataset.org/#download",
}
ALL_PICTURES = "https://huggingface.co/datasets/deepcs233/Visual-CoT"


@dataclass(slots=True)
class Report:
    """What was found. Images are counted once each; `missing_images` is None where none were looked for."""

    rows: int = 0
    good: int = 0
    bad: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(FAULTS, 0)))
    missing_images: int | None = None
    pictures: int = 0
    missing: Counter[str] = field(default_factory=Counter)  # by data set
    unusable: Counter[str] = field(default_factory=Counter)  # "unreadable", "absurd"
    duplicates: int = 0
    leaks: int = 0
    other_formats: Counter[str] = field(default_factory=Counter)  # which formats unparseable rows have the keys of
    notes: Counter[str] = field(default_factory=Counter)  # what good rows hold and records have no place for
    examples: dict[str, list[str]] = field(default_factory=dict)

    def note(self, kind: str, text: str) -> None:
        kept = self.examples.setdefault(kind, [])
        if len(kept) < EXAMPLES:
            kept.append(text)

    def as_json(self) -> dict[str, Any]:
        found = {"rows": self.rows, "good": self.good, "bad": dict(self.bad), "missing_images": self.missing_images}
        return found | ({"notes": dict(self.notes)} if self.notes else {})


def check(
    source: str,
    inputs: Iterable[str],
    reading: Reading | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> Report:
    """Read all rows of `inputs` and report. Images are looked at where `reading.sizes.images` names their folder.

    Raises:
        RecordError: a file is not there or damaged.
    """
    reading = reading or Reading()
    report = Report(missing_images=None if reading.sizes.images is None else 0)
    seen_rows: set[int] = set()  # hashes, here and below: of hundreds of thousands, no two are likely to be equal
    splits: dict[int, str] = {}  # of every image seen
    leaked: set[int] = set()
    for path in inputs:
        for row in read_format(source, path, reading):
            report.rows += 1
            progress(report.rows)
            if row.fault:
                report.bad[row.fault] += 1
                report.note(row.fault, f"{path}, row {row.number}: {row.reason}")
                if row.fault == "unparseable" and (other := other_format(row.raw, source, reading)):
                    report.other_formats[other] += 1
            else:
                report.good += 1
                report.notes.update(row.notes)
            _find_duplicate(report, row, path, seen_rows)
            for ref, size in _pictures(row):
                key = hash(ref)
                split = _split(row, path)
                if key not in splits:
                    splits[key] = split
                    report.pictures += 1
                    _look_at(report, row, ref, size, reading.sizes.images)
                elif splits[key] != split and key not in leaked:
                    leaked.add(key)
                    report.leaks += 1
                    report.note("leaks", f"{ref} is in {splits[key]!r} and in {split!r}")
    return report


def _find_duplicate(report: Report, row: DataRow, path: str, seen: set[int]) -> None:
    for record in row.records:
        if not isinstance(record, Sample):
            continue
        key = hash((record.image, record.question, record.answer, record.box, record.looks))
        if key in seen:
            report.duplicates += 1
            report.note("duplicates", f"{path}, row {row.number}: the same picture, question, box and answer again")
        seen.add(key)


def _look_at(report: Report, row: DataRow, ref: str, size: Size | None, root: Path | None) -> None:
    """Open an image once: is it there, whole, of its annotated `size` and of a shape that a model can take?"""
    if root is None:
        return
    if names_file(ref) and image_path(ref, root) is None:
        report.missing_images = (report.missing_images or 0) + 1
        report.missing[_origin(row, ref)] += 1
        report.note("missing", ref)
        return
    try:
        width, height = open_image(ref, root, size).size
    except ImageError as error:
        report.unusable["unreadable"] += 1
        report.note("unreadable", str(error))
        return
    if min(width, height) < MIN_CROP_SIDE or max(width, height) > MAX_CROP_ASPECT * min(width, height):
        report.unusable["absurd"] += 1
        report.note("absurd", f"{ref} is {width} × {height}: too small or too thin for the models' processors")


def _pictures(row: DataRow) -> Iterator[tuple[str, Size | None]]:
    """The images of a row with their annotated sizes, of a bad one as far as it says so."""
    for record in row.records:
        if isinstance(record, Sample):
            yield record.image, record.size
        else:
            yield record.images[0].ref, record.images[0].size
    if row.records or not isinstance(row.raw, dict):
        return
    value = row.raw.get("image", row.raw.get("img_path", row.raw.get("images")))
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, str):
        yield viscot_path(dataset_of(row), value) if "bboxs" in row.raw else value, None


def _split(row: DataRow, path: str) -> str:
    """The split that a row names, or the file it stands in."""
    split = row.raw.get("split") if isinstance(row.raw, dict) else None
    return sys.intern(split) if isinstance(split, str) else Path(path).stem


def _origin(row: DataRow, ref: str) -> str:
    parts = Path(ref).parts
    return dataset_of(row) or (parts[1] if len(parts) > 2 else "")


def as_text(report: Report, root: Path | None) -> str:
    """The report for people: what was found, the first examples of each, and what to do about missing images."""
    lines = [f"{report.rows:,} rows: {report.good:,} good, {report.rows - report.good:,} bad"]
    for fault, count in sorted(report.bad.items(), key=lambda item: -item[1]):
        if count:
            shown = report.examples.get(fault, [])
            lines += [f"  {fault}: {count:,}", *(f"    {text}" for text in shown)]
            if count > len(shown):
                lines.append(f"    and {count - len(shown):,} more; `visrl data convert` lists all in OUT.bad.jsonl")
    for other, count in report.other_formats.most_common():
        lines.append(f"  {count:,} of them have the keys of {other}: read them with --from {other}")
    lines += format_notes(report.notes)
    found = {"duplicates": report.duplicates, "leaks": report.leaks, **report.unusable}
    for kind, count in found.items():
        if count:
            lines += [f"{kind}: {count:,}", *(f"    {text}" for text in report.examples.get(kind, []))]
    if report.missing_images is None:
        lines.append(f"{report.pictures:,} pictures, not looked for (give --images DIR)")
    else:
        lines.append(f"{report.pictures:,} pictures, {report.missing_images:,} missing under {root}")
    for dataset, count in report.missing.most_common():
        folder = FOLDERS.get(dataset, dataset) or "…"
        origin = ORIGINS.get(dataset, "the place its data came from")
        where = f"{root}/cot/{folder}/" if dataset in ORIGINS and not dataset.startswith("refcoco") else f"{root}/"
        lines.append(f"  {dataset or 'pictures'}: {count:,} missing; they belong in {where} and come from {origin}")
    if report.missing:
        lines += [f"    {ref}" for ref in report.examples.get("missing", [])]
        if any(dataset in ORIGINS and not dataset.startswith("refcoco") for dataset in report.missing):
            lines.append(f"  all of Visual-CoT's pictures in one place: {ALL_PICTURES}")
    return "\n".join(lines)
