"""Small benchmarks of our own in every form that zoom benchmarks are distributed in: drawn scenes with options."""

from __future__ import annotations

import base64
import csv
import io
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from visrl.box import Box
from visrl.records import Sample
from visrl.scenes import draw_ref, scene_samples

LETTERS = "ABCDEF"
WIDTH = 336  # of a picture, and its height


def drawn(count: int, first: int = 0) -> list[Sample]:
    """Drawn questions with their true boxes; each names itself, so that a scripted model can tell it."""
    own = scene_samples("test", 0, 4 * (first + count), with_box=True, kinds=("color", "shape"))[first : first + count]
    return [replace(one, question=f"Picture {first + number}: {one.question}") for number, one in enumerate(own)]


@cache
def drawn_png(ref: str) -> bytes:
    file = io.BytesIO()
    draw_ref(ref).resize((WIDTH, WIDTH)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def png(sample: Sample) -> bytes:
    return drawn_png(sample.image)


def pixels(box: Box | None) -> list[int]:
    assert box is not None
    return [round(value) for value in box.to_pixels((WIDTH, WIDTH))]


def options_of(sample: Sample, count: int) -> list[str]:
    """The right answer first, then as many others."""
    digit = int(sample.answer)
    return [str((digit + step) % 10) for step in range(count)]


def turned(options: list[str], turn: int) -> tuple[list[str], str]:
    """The options in another order, and the letter of the one that came first."""
    shown = options[turn:] + options[:turn]
    return shown, LETTERS[shown.index(options[0])]


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_tsv(path: Path, rows: list[dict[str, Any]]) -> Path:
    """As pandas writes it: quotes where a cell needs them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]], group: int = 3) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


# --- V* ---------------------------------------------------------------------------------------------------------------


def write_vstar(root: Path, count: int = 3) -> Path:
    """Both forms: folders of pictures and notes with the right option first, and the list with letters spread."""
    listed = []
    for part, options, first in (("direct_attributes", 4, 0), ("relative_position", 2, count)):
        for number, sample in enumerate(drawn(count, first)):
            name = f"{part}/sa_{number}"
            x0, y0, x1, y1 = pixels(sample.box)
            (root / part).mkdir(parents=True, exist_ok=True)
            (root / f"{name}.jpg").write_bytes(png(sample))
            own = options_of(sample, options)
            note = {"target_object": ["tag"], "bbox": [[x0, y0, x1 - x0, y1 - y0]], "question": sample.question}
            (root / f"{name}.json").write_text(json.dumps({**note, "options": own}, indent=1))
            shown, letter = turned(own, number % options)
            lines = "\n".join(f"({mark}) {text}" for mark, text in zip(LETTERS, shown, strict=False))
            text = f"{sample.question}\n{lines}\nAnswer with the option's letter from the given choices directly."
            listed.append({
                "question_id": len(listed), "image": f"{name}.jpg", "text": text, "category": part, "label": letter,
            })  # fmt: skip
    (root / "test_questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    return root


# --- HR-Bench, MME-RealWorld, TreeBench -------------------------------------------------------------------------------


def hrbench_rows(count: int = 2) -> list[dict[str, Any]]:
    """Four rotations of each question, pictures in base64."""
    rows: list[dict[str, Any]] = []
    for turn in range(4):
        for part, first in (("single", 0), ("cross", count)):
            for sample in drawn(count, first):
                shown, letter = turned(options_of(sample, 4), turn)
                rows.append({
                    "index": len(rows), "question": sample.question, **dict(zip("ABCD", shown, strict=True)),
                    "answer": letter, "category": part, "cycle_category": str(turn),
                    "image": base64.b64encode(png(sample)).decode(),
                })  # fmt: skip
    return rows


def write_hrbench(root: Path, count: int = 2) -> Path:
    write_tsv(root / "hr_bench_4k.tsv", hrbench_rows(count))
    write_parquet(root / "hr_bench_8k.parquet", hrbench_rows(count))
    return root


MME_PARTS = ("Perception/Remote Sensing", "Reasoning/Monitoring")


def write_mme(root: Path, count: int = 3) -> Path:
    """The full set as JSON beside pictures, the Lite one as VLMEvalKit's TSV, whose later pictures are indices."""
    whole, lite = [], []
    for place, part in enumerate(MME_PARTS):
        for number, sample in enumerate(drawn(count, place * count)):
            task, domain = part.split("/")
            shown, letter = turned([*options_of(sample, 4), "The image does not feature it."], number)
            name = f"{domain}/{number}.png"
            (root / "pictures" / domain).mkdir(parents=True, exist_ok=True)
            (root / "pictures" / name).write_bytes(png(sample))
            marked = [f"({mark}) {text}" for mark, text in zip("ABCDE", shown, strict=True)]
            whole.append({
                "Question_id": f"{part}/{number}", "Image": f"pictures/{name}", "Text": sample.question,
                "Question Type": "Multiple Choice", "Answer choices": marked, "Ground truth": letter,
                "Category": "position/attribute" if number else "color", "Task": task, "Subtask": domain,
                "Dataset": "drawn",
            })  # fmt: skip
            row = {
                "index": len(lite), "question": sample.question, "multi-choice options": "\n".join(marked),
                **dict(zip("ABCDE", shown, strict=True)), "answer": letter, "category": part, "l2-category": "color",
                "image": base64.b64encode(png(sample)).decode(),
            }  # fmt: skip
            lite += [row, {**row, "index": len(lite) + 1, "image": str(row["index"])}]
    write_json(root / "MME_RealWorld.json", whole)
    write_tsv(root / "mme_realworld_lite.tsv", lite)
    return root


def write_treebench(root: Path, count: int = 4) -> Path:
    """Two true boxes for every second question, and one question of "Perception/OCR" that holds its options."""
    rows = []
    parts = ("Perception/Attributes", "Reasoning/Ordering", "Perception/OCR")
    for number, sample in enumerate(drawn(count)):
        part = parts[number % 3]
        shown, letter = turned(options_of(sample, 4 + 2 * (number % 2)), number % 4)
        listed = "\n".join(f"{mark}. {text}" for mark, text in zip(LETTERS, shown, strict=False))
        boxes = [pixels(sample.box), [0, 0, 10, 12]][: 1 + number % 2]
        question = f'{sample.question} "quoted"' + (f"\n{listed}" if part.endswith("OCR") else "")
        cells = dict(zip(LETTERS, [*shown, "", ""], strict=False))
        rows.append({
            "index": number, "image": base64.b64encode(png(sample)).decode(), "question": question,
            "multi-choice options": listed, **cells, "answer": letter, "category": part, "target_instances": str(boxes),
        })  # fmt: skip
    write_tsv(root / "TreeBench.tsv", rows)
    return root


# --- ZoomBench, VisualProbe, documents --------------------------------------------------------------------------------


def write_zoombench(root: Path, count: int = 4) -> Path:
    """Every second question open, the others with options; two files, numbered through."""
    rows = []
    for number, sample in enumerate(drawn(count)):
        shown, letter = turned(options_of(sample, 4), number)
        listed = "\n".join(f"{mark}. {text}" for mark, text in zip("ABCD", shown, strict=True))
        picture = {"bytes": png(sample), "path": f"{number}.png"}
        rows.append({
            "image": picture, "crop_image": picture, "bbox": pixels(sample.box), "question_type": "OCR",
            "prompt": f"<image>\n{sample.question}" + (f"\n{listed}" if number % 2 else ""),
            "answer": f"{letter}. {sample.answer}" if number % 2 else sample.answer,
        })  # fmt: skip
    write_parquet(root / "data" / "test-00000-of-00002.parquet", rows[: count // 2], group=1)
    write_parquet(root / "data" / "test-00001-of-00002.parquet", rows[count // 2 :])
    return root


def write_visualprobe(root: Path, count: int = 2) -> Path:
    for place, part in enumerate(("Hard", "Medium", "Easy")):
        rows = []
        for number, sample in enumerate(drawn(count, place * count)):
            path = root / f"VisualProbe_{part}" / "data" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(sample))
            rows.append({
                "images": [f"data/{number}.png"], "doc_id": number, "problem": f"<image>\n{sample.question}",
                "solution": sample.answer, "data_source": f"visual_probe_{part.lower()}",
            })  # fmt: skip
        write_json(root / f"VisualProbe_{part}" / "val.json", rows)
    return root


def write_documents(root: Path, count: int = 3) -> Path:
    """DocVQA as VLMEvalKit's TSV, InfographicVQA as parquet, TextVQA with ten answers, ChartQA in two parts."""
    tables: dict[str, list[dict[str, Any]]] = {"doc": [], "info": [], "text": [], "chart": []}
    for number, sample in enumerate(drawn(count)):
        answers = [sample.answer, f"{sample.answer} "]
        coded, held = base64.b64encode(png(sample)).decode(), {"bytes": png(sample), "path": None}
        tables["doc"].append({"index": number, "image": coded, "question": sample.question, "answer": str(answers)})
        tables["info"].append(
            {"questionId": f"q{number}", "question": sample.question, "answers": answers, "image": held}
        )
        tables["text"].append({
            "question_id": number, "question": sample.question, "image": held,
            "answers": [sample.answer] * 7 + ["?"] * 3,
        })  # fmt: skip
        tables["chart"].append({
            "image": held, "question": sample.question, "answer": sample.answer,
            "type": "augmented_test" if number % 2 else "human_test",
        })  # fmt: skip
    write_tsv(root / "doc" / "DocVQA_VAL.tsv", tables["doc"])
    write_parquet(root / "info" / "InfographicVQA" / "validation-00000-of-00001.parquet", tables["info"])
    write_parquet(root / "text" / "data" / "validation-00000-of-00001.parquet", tables["text"])
    write_parquet(root / "chart" / "data" / "test-00000-of-00001.parquet", tables["chart"])
    return root


FOLDERS = {
    "vstar": "vstar", "hrbench4k": "hrbench", "hrbench8k": "hrbench", "mme-realworld": "mme",
    "mme-realworld-lite": "mme", "treebench": "treebench", "zoombench": "zoombench", "visualprobe": "visualprobe",
    "docvqa": "documents/doc", "infovqa": "documents/info", "textvqa": "documents/text", "chartqa": "documents/chart",
}  # fmt: skip


def write_all(root: Path) -> Path:
    """Every benchmark in its folder under `root`, as `FOLDERS` names them."""
    write_vstar(root / "vstar")
    write_hrbench(root / "hrbench")
    write_mme(root / "mme")
    write_treebench(root / "treebench")
    write_zoombench(root / "zoombench")
    write_visualprobe(root / "visualprobe")
    write_documents(root / "documents")
    return root
