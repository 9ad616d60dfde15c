"""Rows of every public format, made here: the forms are the published ones, the contents are ours."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

SENTENCE = "Please provide the bounding box coordinate of the region that can help you answer the question better."


def viscot(number: int, corners: tuple[float, ...], size: tuple[int, int], dataset: str = "gqa") -> dict[str, Any]:
    """A benchmark row as Visual-CoT derives it: pixels cut off to integers, text rounded in the padded square."""
    width, height = size
    side = max(size)
    left, top = (side - width) // 2, (side - height) // 2
    shifts = (left, top, left, top)
    text = ", ".join(f"{(value + shift) / side:.3f}" for value, shift in zip(corners, shifts, strict=True))
    ref = f"cot/{dataset}/{number}.jpg"
    return {
        "dataset": dataset,
        "split": "val",
        "question_id": number,
        "image": [ref, f"{ref}###{[int(value) for value in corners]}"],
        "conversations": [
            {"from": "human", "value": f"<image>\nWhat is number {number}? {SENTENCE}"},
            {"from": "gpt", "value": f"[{text}]"},
            {"from": "human", "value": "<image>"},
            {"from": "gpt", "value": f"thing {number}"},
        ],
    }


def detection(number: int, corners: tuple[float, ...], size: tuple[int, int], dataset: str = "gqa") -> dict[str, Any]:
    return {
        "img_path": f"cot/{dataset}/{number}.jpg",
        "expression": f"What is number {number}?",
        "bbox": list(corners),
        "height": size[1],
        "width": size[0],
        "question_id": number,
        "split": "val",
    }


def meta(number: int, boxes: list[list[float]], size: tuple[int, int], dataset: str = "gqa") -> dict[str, Any]:
    return {
        "question": f"What is number {number}?",
        "answer": f"thing {number}",
        "image": f"{number}.jpg",
        "width": size[0],
        "height": size[1],
        "bboxs": boxes,
        "dataset": dataset,
        "split": "train",
    }


def refcoco(number: int, corners: tuple[float, ...], size: tuple[int, int]) -> dict[str, Any]:
    return {
        "img_path": f"COCO_train2014_{number:012d}.jpg",
        "expression": f"the thing numbered {number}",
        "bbox": list(corners),
        "dataset_name": "jxu124/refcoco",
        "height": size[1],
        "width": size[0],
        "image_id": number,
        "sent_id": number,
        "split": "validation",
    }


# Two inverted, three outside (one by half a pixel above the edge, which cutting off to integers hides), one empty.
BAD = [
    ((400, 100, 300, 200), (640, 480)),
    ((10, 300, 90, 200), (480, 640)),
    ((600, 10, 641, 90), (640, 480)),
    ((10.25, 20.5, 90.75, 640.125), (480, 640)),
    ((350.75, -0.9, 784.9, 695.6), (1024, 1024)),
    ((100, 100, 100, 200), (640, 480)),
]


def good_boxes(count: int) -> list[tuple[tuple[float, ...], tuple[int, int]]]:
    rng = random.Random(7)
    made = []
    for _ in range(count):
        width, height = rng.randrange(100, 2400), rng.randrange(100, 2400)
        x0, y0 = rng.uniform(0, width - 40), rng.uniform(0, height - 40)
        made.append(((x0, y0, rng.uniform(x0 + 4, width), rng.uniform(y0 + 4, height)), (width, height)))
    return made


def write_lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def benchmark(folder: Path, good: int = 20) -> tuple[str, str, list[dict[str, Any]]]:
    """A benchmark JSON with `good` good rows and the bad ones, its detection file, and the rows."""
    cases = good_boxes(good) + BAD
    rows = [viscot(number, *case) for number, case in enumerate(cases)]
    path = folder / "benchmark.json"
    path.write_text(json.dumps(rows, indent=1))
    sizes = write_lines(folder / "detection.jsonl", [detection(number, *case) for number, case in enumerate(cases)])
    return str(path), sizes, rows
