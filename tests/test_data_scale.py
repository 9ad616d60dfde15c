"""The whole training file's length: speed, memory, progress, and being interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from data_rows import viscot
from waiting import PATIENCE_S

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-c", "from visrl.cli.data import app; app()"]


def test_an_interrupted_conversion_leaves_no_half_file(tmp_path):
    source, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    os.mkfifo(source)
    arguments = ["convert", "--from", "viscot", "--to", "rl-pool", str(source), str(out)]
    # A shell starts what runs in the background deaf to interrupts, the tests and their children too.
    hearing = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        [*COMMAND, *arguments], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=hearing
    )
    with open(source, "w") as rows:
        # Far more than a pipe holds: once they are written the command is at work on them, and waits for more.
        rows.writelines(json.dumps(viscot(number, (1, 1, 50, 50), (100, 100))) + "\n" for number in range(2_000))
        rows.flush()
        assert Path(f"{out}.part").exists()
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) != 0
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert b"Traceback" not in process.stderr.read()


@pytest.mark.slow
def test_the_length_of_the_whole_training_file(tmp_path):
    """438,000 rows: at least 20,000 a second of processor time and under 500 MB, with progress on standard error."""
    benchmark = [sys.executable, "benchmarks/data.py"]
    make = "import data, pathlib, sys; data.make_files(pathlib.Path(sys.argv[1]), 438_000)"
    search = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    subprocess.run([sys.executable, "-c", make, tmp_path], check=True, cwd=ROOT, env=search)
    for task in ("read", "check"):
        run = subprocess.run(
            [*benchmark, "--task", tmp_path, task], check=True, cwd=ROOT, capture_output=True, text=True
        )
        figures = json.loads(run.stdout)
        assert figures["good"] == 438_000
        assert 438_000 / figures["cpu_s"] >= 20_000, figures
        assert figures["peak_mb"] < 500, figures
    arguments = ["check", "--from", "viscot", "--sizes", str(tmp_path / "sizes.jsonl"), "--json"]
    run = subprocess.run(
        [*COMMAND, *arguments, tmp_path / "train.json"], check=True, cwd=ROOT, capture_output=True, text=True
    )
    assert json.loads(run.stdout)["good"] == 438_000
    assert "400,000 rows" in run.stderr
