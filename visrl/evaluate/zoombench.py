"""ZoomBench (Zooming without Zooming) and VisualProbe (Mini-o3): open questions, some of ZoomBench's of choice.

Both are published with a judge, whom nobody asks here: `correct_published` is null where their rule would. Our own
reading of an open answer is that it is the reference, in so many words; a judge of the run's config stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from visrl.box import enclosing
from visrl.data.rows import RowFault, four_numbers
from visrl.evaluate import wordings
from visrl.evaluate.choices import ChoiceQuestion
from visrl.evaluate.questions import BenchmarkFiles, BenchmarkQuestion, boxes_in
from visrl.evaluate.readings import OUR_READING, BenchmarkReading, ruled
from visrl.evaluate.row_files import (
    Row,
    cell,
    optional_cell,
    read_questions,
    read_shards,
    require_columns,
)
from visrl.evaluate.rules import RULES
from visrl.prompts import IMAGE
from visrl.records import RecordError, Sample
from visrl.rewards.choices import read_choice, split_options

ORIGIN = "https://huggingface.co/datasets/inclusionAI/ZoomBench"
PROBE_ORIGIN = "https://huggingface.co/Mini-o3"
WHOLE = 845
PROBE_PARTS: dict[str, int | None] = {"hard": 106, "medium": 268, "easy": 141}


def _zoom_rule(question: BenchmarkQuestion, reply: str) -> Mapping[str, float | None]:
    """The published rule compares with the answer as the file has it, letter or not."""
    return {"correct_published": RULES["zoombench"].score(reply, {}, question.references[0])}


READINGS: dict[str, BenchmarkReading] = {
    "published": BenchmarkReading(
        wordings.as_distributed, _zoom_rule, RULES["zoombench"].source, wordings.ZOOMBENCH_SYSTEM, tokens=8192
    ),
    "ours": OUR_READING,
}
PROBE_READINGS: dict[str, BenchmarkReading] = {
    "published": ruled(wordings.visualprobe, "visualprobe", tokens=4096),
    "ours": OUR_READING,
}


def questions(files: BenchmarkFiles) -> Mapping[str, Iterator[BenchmarkQuestion]]:
    """The questions of ZoomBench's parquet files, in the folder or in its `data/`; they have no ids but their place."""
    return {"": read_shards(files.shards("test"), _question, ("image", "images", "crop_image", "crop_images"))}


def _question(row: Row, number: int) -> BenchmarkQuestion:
    require_columns(row, ("image", "prompt", "answer"))
    text, answer, ref = _unmarked(row, "prompt"), cell(row, "answer"), cell(row, "image")
    truths = () if row.get("bbox") in (None, []) else (four_numbers(row["bbox"], "bbox"),)
    boxes = boxes_in(truths, ref, None)
    stem, options = split_options(text)
    letter = read_choice(answer, options) if options else None
    choice = ChoiceQuestion(stem, tuple(options.values()), ord(letter) - 65) if letter else None
    sample = Sample(str(number), ref, text, answer, enclosing(boxes) if boxes else None, "zoombench")
    category = optional_cell(row, "question_type") or ""
    return BenchmarkQuestion(sample, None, choice, text, truths, (answer,), category)


def _unmarked(row: Row, key: str) -> str:
    """The question of a cell without the mark of its one picture.

    Raises:
        RowFault: it has several, or nothing beside it.
    """
    text = cell(row, key)
    bare = text.replace(IMAGE, "").strip()
    if not bare or text.count(IMAGE) > 1:
        raise RowFault("unparseable", f"{key!r} must be a question with at most one {IMAGE} mark, it is {text[:60]!r}")
    return bare


# --- VisualProbe ------------------------------------------------------------------------------------------------------


def probe_questions(files: BenchmarkFiles) -> Mapping[str, Iterator[BenchmarkQuestion]]:
    """The questions of `VisualProbe_Hard/val.json` and the others, or of the file that `dataset` names.

    Raises:
        RecordError: folders that are not there, all named.
    """
    path = Path(files.dataset)
    if path.is_file():
        return {"": _probes(path, files)}
    paths = {name: path / f"VisualProbe_{name.capitalize()}" / "val.json" for name in files.names}
    missing = [str(one) for one in paths.values() if not one.is_file()]
    if missing:
        raise RecordError(f"{path} lacks {', '.join(missing)}; they come from {files.origin}")
    return {name: _probes(one, files) for name, one in paths.items()}


def _probes(path: Path, files: BenchmarkFiles) -> Iterator[BenchmarkQuestion]:
    return read_questions(path, lambda row, number: _probe(row, number, path.parent, files))


def _probe(row: Row, number: int, folder: Path, files: BenchmarkFiles) -> BenchmarkQuestion:
    images = row.get("images")
    if not isinstance(images, list) or len(images) != 1:
        raise RowFault("several_pictures", f"'images' must be a list of one picture, it is {str(images)[:60]}")
    answer = cell(row, "solution")
    name = optional_cell(row, "doc_id") or str(number)
    part = (optional_cell(row, "data_source") or "").removeprefix("visual_probe_")
    ref = files.picture(folder, cell({"images": images[0]}, "images"))
    sample = Sample(name, ref, _unmarked(row, "problem"), answer, None, part if part in PROBE_PARTS else "")
    return BenchmarkQuestion(sample, references=(answer,))
