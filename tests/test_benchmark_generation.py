"""The generation benchmark runs on a small random model and gives the figures that its description promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "generation.py"


@pytest.mark.slow
def test_the_generation_benchmark_at_a_small_shape(tmp_path: Path) -> None:
    out = tmp_path / "generation.json"
    command = [sys.executable, str(SCRIPT), "--shapes", "small", "--repeats", "1", "--questions", "1", "--batch", "1"]
    done = subprocess.run([*command, "--plain", "--json", str(out)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (shape,) = json.loads(out.read_text())["shapes"]
    assert shape["prefill_ratio"] > 5  # a count, not a time
    assert shape["prefilled_tokens_per_question"]["plain"] == shape["each_call_by_itself"]
    assert shape["answered"] == {"ours": 1.0, "loop": 1.0, "plain": 1.0}
    assert min(shape["speedup"], shape["plain_speedup"]) > 0
