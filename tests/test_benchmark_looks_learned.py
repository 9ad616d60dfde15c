"""The benchmark of several looks compares what it says it compares, on rows that are made up here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    folder = Path(__file__).parent.parent / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    spec = importlib.util.spec_from_file_location("benchmark_looks_learned", folder / "looks_learned.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(kind: str, right: list[int], looks: list[int]) -> list[dict]:
    return [
        {"id": f"{kind}{n}", "dataset": f"scenes-{kind}", "exact": one, "looks": [[0, 0, 1, 1]] * count}
        for n, (one, count) in enumerate(zip(right, looks, strict=True))
    ]


def test_arms_are_compared_question_by_question_and_by_seed(monkeypatch):
    bench = script(monkeypatch)
    one, two = rows("both", [0, 0, 1, 0], [1] * 4), rows("both", [1, 0, 1, 1], [2, 2, 2, 1])
    large = rows("large", [1, 1, 0, 1], [0, 0, 0, 1]) + rows("colour", [1, 1], [1, 0])
    seeds = [{"one, 1": one, "two, 2": two, "priced, 3": large}, {"one, 1": two, "two, 2": two, "priced, 3": large}]
    runs = [{"rows": seed, "cpu_seconds": {"two": 9.0}, "steps": {"two": 3}} for seed in seeds]
    found = bench.result(runs)
    difference = found["differences"]["two looks − one"]
    assert (difference["difference"], difference["by_seed"]) == (0.25, [0.5, 0.0])
    assert found["differences"]["priced − free"] is None
    priced = found["without a look"]["priced"]
    assert (priced["at_once"]["mean"], priced["by_seed"]) == (0.75, [0.75, 0.75])
    assert (priced["right"], priced["others_looked_at"]) == (0.75, 0.5)
    assert found["by_kind"]["two, 2"]["both"] == {"n": 8, "right": 0.75, "looks": {1: 2, 2: 6}}
    said = bench.table(found)
    assert "two looks − one      0.500 → 0.750   +0.250" in said
    assert "priced  answers 0.750" in said
    assert "processor time, seed 1: two 3 steps in 9 s" in said


def test_both_arms_are_shown_the_same_questions_with_their_own_looks(monkeypatch, tmp_path):
    bench = script(monkeypatch)
    two, one = (bench.warm_up(name, 2, tmp_path) for name in ("two", "one"))
    assert [phase.max_looks for phase in two.curriculum] == [None, None]
    assert [phase.max_looks for phase in one.curriculum] == [1, 1]
    alike = [phase.model_copy(update={"max_looks": None}) for phase in one.curriculum]
    assert alike == two.curriculum
    other = bench.warm_up("two", 3, tmp_path).curriculum
    steps = sum(phase.steps for phase in two.curriculum) * two.trainer_values()["per_device_train_batch_size"]
    assert other[0].start - two.curriculum[0].start > 10 * steps
