"""A small benchmark of our own in the published formats: drawn pictures on disk, and rows good and bad."""

from __future__ import annotations

import json
from pathlib import Path

from visrl.box import Box, Size
from visrl.data.viscot import detection_row, viscot_row
from visrl.records import Sample
from visrl.scenes import draw_ref, scene_samples

SIDE = 224
BAD = [200, 10, 20, 90]  # inverted: no prediction can hit it


def samples_of(name: str, count: int, first: int = 0) -> list[Sample]:
    """Drawn questions as those of a published data set; each names itself, so that a scripted model can tell it."""
    return [
        Sample(
            str(number),
            f"cot/{name}/{one.image.rpartition('/')[2]}.png",
            f"{name} {number}: {one.question}",
            one.answer,
            one.box,
            name,
        )
        for number, one in enumerate(scene_samples("test", first, count, with_box=True))
    ]


def write_benchmark(root: Path, names: tuple[str, ...] = ("gqa", "vsr"), count: int = 4) -> Path:
    """`root` with pictures under `cot/`, `benchmark/NAME.json`, `detection/NAME.jsonl` and `refcoco/NAME.jsonl`.

    The last row of each data set has an inverted box, as some published ones have.
    """
    size: Size = (SIDE, SIDE)
    for place, name in enumerate(names):
        samples = samples_of(name, count, place * count)
        for sample, drawn in zip(samples, scene_samples("test", place * count, count), strict=True):
            path = root / sample.image
            path.parent.mkdir(parents=True, exist_ok=True)
            draw_ref(drawn.image).resize(size).save(path)
        whole = [viscot_row(sample, size, number) for number, sample in enumerate(samples)]
        boxes = [detection_row(sample, size, number) for number, sample in enumerate(samples)]
        boxes[-1]["bbox"] = BAD
        whole[-1]["image"][1] = f"{samples[-1].image}###{BAD}"
        expressions = [row | {"dataset_name": "drawn", "sent_id": row["question_id"]} for row in boxes]
        write(root / "benchmark" / f"{name}.json", json.dumps(whole))
        write(root / "detection" / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in boxes))
        write(root / "refcoco" / f"REC_{name}.jsonl", "".join(json.dumps(row) + "\n" for row in expressions))
    return root


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def true_text(box: Box) -> str:
    """A true box as a model would write it; the pictures are square, so both conventions agree."""
    return f"[{', '.join(f'{value:.3f}' for value in box.as_list())}]"
