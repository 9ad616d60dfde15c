"""A good client beside hostile ones, through the benchmark itself: it keeps its answers, and memory comes back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "hostile.py"


def figures(folder: Path, **options: int) -> dict[str, Any]:
    told = folder / "hostile.json"
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--json", str(told), *words], timeout=2400, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr  # the server's own words are in it
    assert "was destroyed" not in done.stderr  # no task that nobody ended
    return json.loads(told.read_text())


def test_a_good_client_is_answered_beside_one_attack_of_each_kind(tmp_path: Path) -> None:
    found = figures(tmp_path, requests=30, pictures=8, warm=0, settle=1)
    assert len(found["kinds"]) >= 25
    for span in found["good_client"].values():
        assert span["answered"] == span["asked"] > 0
    for span in found["health"].values():
        assert span["answered"] == span["asked"] > 0


@pytest.mark.slow
def test_three_thousand_hostile_requests_leave_memory_as_it_was_and_so_do_three_thousand_more(tmp_path: Path) -> None:
    found = figures(tmp_path, requests=3000, rounds=2)
    for span in found["good_client"].values():
        assert span["answered"] == span["asked"] > 0
    for before, after, later in (found["memory_mb"]["all"], found["memory_mb"]["server"]):
        assert after <= 1.1 * before
        assert later <= 1.1 * before
        assert later <= 1.03 * after
