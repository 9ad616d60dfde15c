"""The benchmarks of pairs: each variant of ablation.py is a config, and losers.py compares what it says it compares."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

from visrl.evolve.config import DemoConfig
from visrl.records import write_records, write_text


def script(name: str) -> ModuleType:
    """A benchmark as a module; they are no package."""
    path = Path(__file__).parent.parent / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ablation, losers = script("ablation"), script("losers")


@pytest.mark.parametrize("name", ablation.VARIANTS)
def test_a_variant_is_the_papers_method_with_its_own_keys(name, tmp_path):
    demo = DemoConfig(iterations=1, questions=4, test_questions=4)
    config = ablation.variant_config(name, demo, tmp_path)
    wanted = {**ablation.PAPERS, **ablation.VARIANTS[name]}
    assert {key: getattr(config, key) for key in wanted} == wanted
    assert config.eval_dataset == demo.evolution().eval_dataset
    assert " " not in config.output_dir.name


# Held-out questions answered right of four, by learning rate and method; 3e-4 and 1e-3 are the best rates on seed 1.
RIGHT = {("dpo", 3e-4): 3, ("dpo", 1e-3): 2, ("chosen side", 3e-4): 1, ("chosen side", 1e-3): 2}


def test_each_way_runs_at_its_best_rate_on_seeds_that_did_not_choose_it(tmp_path, monkeypatch):
    ran = []

    def run_method(method, rate, seed, given):
        ran.append((method, rate, seed))
        rows = [{"correct": n < RIGHT[method, rate], "iou": 0.5} for n in range(4)]
        write_text(given.out / f"seed{seed}" / "pairs" / "filter" / "manifest.json", '{"counts": {"kept": 3}}')
        return dict.fromkeys(losers.CHECKPOINTS, rows)

    monkeypatch.setattr(losers, "run_method", run_method)
    given = Namespace(seeds=2, tuning_seed=1, rates=[3e-4, 1e-3], dpo={}, out=tmp_path)
    found = losers.compare(given)
    assert {(method, rate, 1) for method, rate in RIGHT} == set(ran[:4]), "every rate, on the seed that is not counted"
    assert sorted(ran[4:]) == [("chosen side", 1e-3, 0), ("chosen side", 1e-3, 2), ("dpo", 3e-4, 0), ("dpo", 3e-4, 2)]
    assert found["questions"] == 8
    assert found["dpo − chosen side"]["iter0-stage2"]["correct"]["difference"] == 0.25
    assert "pairs by seed: [3, 3]" in losers.table(found)


def test_what_was_made_is_taken_over_whole_and_once(tmp_path):
    write_records(tmp_path / "a" / "rows.jsonl", [{"n": 1}])
    for _ in range(2):
        losers.take_over(tmp_path / "a", tmp_path / "b" / "c")
        losers.take_over(tmp_path / "a" / "rows.jsonl", tmp_path / "d.jsonl")
    assert (tmp_path / "b" / "c" / "rows.jsonl").read_text() == (tmp_path / "d.jsonl").read_text() == '{"n": 1}\n'
    assert not list(tmp_path.rglob("*.part"))
