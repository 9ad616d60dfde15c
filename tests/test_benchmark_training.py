"""The benchmarks of training run at a tiny shape and give every figure that their descriptions promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "training.py"


@pytest.mark.slow
def test_the_training_benchmark_at_a_tiny_shape(tmp_path: Path) -> None:
    out = tmp_path / "training.json"
    command = [sys.executable, str(SCRIPT), "--shapes", "tiny", "--repeats", "1", "--pictures", "1", "--plain"]
    done = subprocess.run([*command, "--json", str(out)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (shape,) = json.loads(out.read_text())["shapes"]
    assert shape["logp_rel_error"] < 1e-5
    assert shape["grad_rel_error"] < 1e-4
    assert 1 <= shape["flops_over_floor"] < 1.2  # a tenth of so few tokens is padding
    assert shape["flops_ratio_reference"] > 2
    assert shape["flops_ratio_trl"] > 2
    assert 1.5 < shape["flops_ratio_plain"] < shape["flops_ratio_reference"]  # its reference is computed once, too
    assert shape["tokens"] < shape["separate_tokens"] / 2
    measured = ("time_ratio_reference", "time_ratio_trl", "time_ratio_plain", "peak_memory_ratio_reference")
    assert all(shape[name] > 0 for name in measured)
    assert "tiny" in done.stdout


@pytest.mark.slow
def test_the_online_benchmark_at_a_tiny_shape(tmp_path: Path) -> None:
    out = tmp_path / "online.json"
    command = [sys.executable, str(SCRIPT.with_name("online.py")), "--shapes", "tiny", "--repeats", "1"]
    done = subprocess.run(
        [*command, "--run-steps", "1", "--json", str(out)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(out.read_text())
    assert sum(told["run"][f"share_{part}"] for part in ("rollout", "reward", "update")) == pytest.approx(1)
    (shape,) = told["shapes"]
    assert (shape["boxes"], shape["answers"]) == (8, 4)
    assert shape["loss_rel_error"] < 1e-5
    assert shape["grad_rel_error"] < 1e-4
    assert shape["flops_ratio_rows"] > 4
    assert shape["prefill_ratio"] > 5
    assert 1 <= shape["over_floor"] < 1.2  # a tenth of so few tokens is padding
    assert min(shape[name] for name in ("time_ratio_trl", "cpu_ratio_trl", "peak_memory_ratio_rows")) > 0


@pytest.mark.slow
def test_the_benchmark_of_several_looks_at_a_tiny_shape(tmp_path: Path) -> None:
    out = tmp_path / "looks.json"
    command = [sys.executable, str(SCRIPT.with_name("looks.py")), "--shapes", "tiny", "--repeats", "1"]
    done = subprocess.run([*command, "--json", str(out)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    shapes = json.loads(out.read_text())["shapes"]
    kinds = [(shape["form"], shape["forked"], shape["turns"]) for shape in shapes]
    assert kinds == [
        (form, forked, 30 if forked else 40) for form in ("question", "dialog") for forked in (False, True)
    ]
    for shape in shapes:
        assert shape["grad_rel_error"] < 1e-5
        assert 1 <= shape["over_floor"] < 1.3
        assert shape["flops_ratio_turn"] > 2.5
        if shape["form"] == "dialog":
            assert 1 < shape["flops_ratio_rollout"] < shape["flops_ratio_turn"]
        if not shape["forked"]:
            assert shape["prefill_ratio"] > 4
            assert shape["dpo_flops_ratio"] > shape["dpo_policy_flops_ratio"] > 3
            assert min(shape[name] for name in ("cpu_ours", "cpu_turn", "peak_mb_ours", "peak_mb_turn")) > 0


@pytest.mark.slow
def test_the_gpu_benchmark_at_a_tiny_shape_on_the_cpu(tmp_path: Path) -> None:
    """Every layout runs; the figures themselves say something on a GPU only."""
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(SCRIPT.with_name("gpu.py")), "--shapes", "tiny", "--steps", "4", "--json", str(out)]
    done = subprocess.run([*command, "--peak-tflops", "1"], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [(row["layout"], row["checkpointing"]) for row in rows] == [
        (layout, checkpointing) for checkpointing in (False, True) for layout in ("dense", "flex", "trl")
    ]
    for row in rows:
        assert "failed" not in row, row
        assert min(row[name] for name in ("seconds", "items_per_second", "peak_mb", "utilisation")) > 0
