"""How fast a benchmark of gigabytes is checked, and in how much memory: a TSV of the size of HR-Bench 8K.

`python benchmarks/tables.py` writes 800 rows with pictures in base64 into a temporary folder (4.6 GB, deleted after),
reads the file's bytes and no more, and checks it with `visrl eval … dry_run=true` in a process of its own, each from
the disk and again from memory. `--gigabytes N` makes another size.
"""

from __future__ import annotations

import argparse
import base64
import csv
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS = 800
LETTERS = "ABCD"


def write_table(path: Path, gigabytes: float) -> None:
    """The columns of HR-Bench, pictures of random bytes: what they show is not looked at."""
    size = int(gigabytes * 1e9 / ROWS * 3 / 4)
    with open(path, "w", encoding="ascii", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["index", "question", "answer", "category", *LETTERS, "cycle_category", "image"])
        for row in range(ROWS):
            asked, turn = divmod(row, 4)
            options = [f"option {(place + turn) % 4}" for place in range(4)]
            part = "single" if row < ROWS // 2 else "cross"
            picture = base64.b64encode(os.urandom(size)).decode()
            writer.writerow([row, f"What is number {asked}?", LETTERS[-turn % 4], part, *options, turn, picture])
    with open(path, "rb") as written:
        os.fsync(written.fileno())


def forget(path: Path) -> None:
    """Drop the file from the page cache, so that it comes from the disk."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_bytes(path: Path) -> float:
    """Seconds that reading the file's bytes takes."""
    started = time.monotonic()
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 22):
            pass
    return time.monotonic() - started


def check(folder: Path, shown: bool) -> float:
    """Seconds that the check takes, its start included."""
    command = [
        sys.executable, "-m", "visrl.cli", "eval", "benchmark=hrbench8k", f"dataset={folder}", "dry_run=true",
        "model_name_or_path=visrl/models/tiny/checkpoint", f"output_dir={folder / 'run'}",
    ]  # fmt: skip
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=None if shown else subprocess.DEVNULL)
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.6)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "hr_bench_8k.tsv")
        write_table(path, given.gigabytes)
        megabytes = path.stat().st_size / 1e6
        print(f"{ROWS} rows, {megabytes:,.0f} MB", flush=True)
        for whence in ("disk", "memory"):
            seconds = {}
            for what in ("bytes", "check"):
                if whence == "disk":
                    forget(path)
                seconds[what] = read_bytes(path) if what == "bytes" else check(Path(name), whence == "disk")
            rates = ", ".join(f"{what} {megabytes / took:,.0f} MB/s ({took:.1f} s)" for what, took in seconds.items())
            print(f"from {whence}: {rates}", flush=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(f"peak memory of a check: {peak:,.0f} MB")


if __name__ == "__main__":
    main()
