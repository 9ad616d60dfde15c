"""Many clients at once, through the benchmark itself: faster than one after another, no error, memory that stays."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "serving.py"


@pytest.mark.slow
def test_many_clients_are_served_faster_and_in_bounded_memory(tmp_path: Path) -> None:
    figures = tmp_path / "serving.json"
    command = [sys.executable, str(BENCHMARK), "--json", str(figures), "--requests", "640", "--turns", "2"]
    subprocess.run(command, check=True, timeout=1200, capture_output=True)
    found = json.loads(figures.read_text())
    for way in found["ways"].values():
        assert way["failed"] == 0
        # What a busy machine still shows, by the clock and in the server's own time; the goal on an idle one is 4.
        assert way["speedup"] > 2
        assert min(way["server_speedups"]) > 3
    memory = found["memory"]
    assert memory["failed"] == 0
    assert max(memory["rss_mb"][5:]) - max(memory["rss_mb"][:5]) < 100
