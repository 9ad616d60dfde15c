"""How fast data is read, and what mixed box conventions cost.

`python benchmarks/data.py` makes a synthetic file of 438,000 Visual-CoT rows in a temporary folder and times reading,
checking and converting it, and reading it again as our own rows and as ShareGPT's, each in a process of its own, with
its largest memory. `--rows N` makes another number.
`--samples DIR` measures instead, on published rows (`DIR/viscot_benchmark`, `DIR/viscot_detection`), how much of what
was meant is cropped when text of the padded square is taken for text of the image, as the reference does.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from visrl.box import Box, BoxError, Size, iou
from visrl.codecs import BOX_SPACES, BoxSpace
from visrl.data.check import check
from visrl.data.convert import convert
from visrl.data.formats import Reading, read_format
from visrl.data.rows import Writer
from visrl.data.sizes import Sizes
from visrl.data.viscot import detection_row, viscot_row
from visrl.records import Sample

TASKS = (
    "read",
    "check",
    "convert to visrl",
    "read visrl",
    "convert to sharegpt",
    "read sharegpt",
    "convert to rl-pool",
)
ROWS = 438_000  # of Visual-CoT's whole training file


def make_files(folder: Path, rows: int) -> None:
    """A training file of the published form, a size of its own for every picture, and its detection file."""
    rng = random.Random(0)
    with Writer(folder / "train.json") as train, Writer(folder / "sizes.jsonl") as sizes:
        for number in range(rows):
            size = rng.randrange(300, 1500), rng.randrange(300, 1500)
            x0, y0 = rng.uniform(0, 0.9), rng.uniform(0, 0.9)
            box = Box(x0, y0, rng.uniform(x0 + 0.02, 1), rng.uniform(y0 + 0.02, 1))
            sample = Sample(
                str(number), f"cot/gqa/{number}.jpg", f"What is the colour of thing {number}?", "red", box, "gqa"
            )
            train.write(viscot_row(sample, size, number))
            sizes.write(detection_row(sample, size, number))


def measure(folder: Path, what: str) -> None:
    """Time one task in this process and print its figures as JSON."""
    train = str(folder / "train.json")
    reading = Reading(Sizes([str(folder / "sizes.jsonl")]))
    tasks: dict[str, Callable[[], int]] = {
        "read": lambda: sum(1 for row in read_format("viscot", train, reading) if not row.fault),
        "check": lambda: check("viscot", [train], reading).good,
        "convert to visrl": lambda: sum(convert("viscot", "visrl", [train], str(folder / "o.jsonl"), reading=reading)
                                        .written.values()),
        "read visrl": lambda: sum(1 for row in read_format("visrl", str(folder / "o.jsonl"), reading) if not row.fault),
        "convert to sharegpt": lambda: sum(convert("visrl", "sharegpt", [str(folder / "o.jsonl")],
                                                   str(folder / "s.json")).written.values()),
        "read sharegpt": lambda: sum(1 for row in read_format("sharegpt", str(folder / "s.json"), Reading())
                                     if not row.fault),
        "convert to rl-pool": lambda: sum(convert("viscot", "rl-pool", [train], str(folder / "p.jsonl"))
                                          .written.values()),
    }  # fmt: skip
    wall, processor = time.monotonic(), time.process_time()
    good = tasks[what]()
    figures = {
        "good": good,
        "wall_s": round(time.monotonic() - wall, 2),
        "cpu_s": round(time.process_time() - processor, 2),
        "peak_mb": peak_megabytes(),
    }
    print(json.dumps(figures))


def peak_megabytes() -> int:
    """The largest memory this process held. What `getrusage` says includes the process that started it, on Linux."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return round(int(line.split()[1]) / 1000)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)  # bytes on macOS


def convention_cost(samples: Path) -> None:
    """Mean IoU of what is cropped with what was meant, per data set, under the mixed and under the right reading."""
    print(f"{'data set':16}{'rows':>6}{'mixed':>8}{'read right':>12}")
    for path in sorted((samples / "viscot_benchmark").glob("*.json")):
        reading = Reading(Sizes([str(samples / "viscot_detection" / f"{path.stem}.jsonl")]))
        mixed, right = [], []
        for row in read_format("viscot", str(path), reading):
            if row.fault:
                continue
            (sample,) = row.records
            text, size = sample.raw["conversations"][1]["value"], sample.size
            mixed.append(_overlap(sample.box, text, "image", size))
            right.append(_overlap(sample.box, text, "padded_square", size))
        print(f"{path.stem:16}{len(mixed):>6}{sum(mixed) / len(mixed):>8.3f}{sum(right) / len(right):>12.3f}")


def _overlap(meant: Box, text: str, space: BoxSpace, size: Size) -> float:
    """IoU of `meant` with what a text means in `space`; 0 where rounding left no box in the text."""
    try:
        return iou(meant, BOX_SPACES[space].parse(text, size, size))
    except BoxError:
        return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--samples", type=Path)
    parser.add_argument("--task", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        measure(Path(options.task[0]), options.task[1])
        return
    if options.samples:
        convention_cost(options.samples)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder, options.rows)
        print(f"{options.rows:,} rows, {(folder / 'train.json').stat().st_size / 1e6:.0f} MB")
        print(f"{'task':20}{'rows/s':>10}{'rows/cpu-s':>12}{'peak MB':>9}")
        for what in TASKS:
            command = [sys.executable, __file__, "--task", name, what]
            figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            assert figures["good"] == options.rows
            rates = options.rows / figures["wall_s"], options.rows / figures["cpu_s"]
            print(f"{what:20}{rates[0]:>10,.0f}{rates[1]:>12,.0f}{figures['peak_mb']:>9}")


if __name__ == "__main__":
    main()
