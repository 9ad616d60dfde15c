"""A benchmark from outside the package, named as module:NAME: that of docs/EVALUATION.md, through the command line."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from visrl.box import Box
from visrl.codecs import CODECS
from visrl.config import ConfigError, build_config
from visrl.evaluate.benchmarks import BENCHMARKS, Benchmark, read_benchmark
from visrl.evaluate.config import EvalConfig
from visrl.evaluate.questions import BenchmarkQuestion
from visrl.evaluate.results import read_results
from visrl.models.tiny import CHECKPOINT
from visrl.records import RecordError, Sample
from visrl.rewards.results import Result, summarise, summarise_measures
from visrl.scenes import scene_samples

ROOT = Path(__file__).parents[1]
SECTION = (ROOT / "docs" / "EVALUATION.md").read_text(encoding="utf-8").partition("## A benchmark of your own")[2]
SAMPLE = Sample("1", "a.png", "Which?", "7", Box(0, 0, 0.5, 0.5), "toy")


def visrl(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "visrl.cli", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_documented_benchmark_runs_on_the_embedded_model(tmp_path: Path) -> None:
    (module,), (line,) = (re.findall(rf"```{kind}\n(.*?)```", SECTION, flags=re.S) for kind in ("python", "bash"))
    (tmp_path / "my_benchmark.py").write_text(module, encoding="utf-8")
    (tmp_path / "visrl").symlink_to(ROOT / "visrl")
    setting, program, *words = shlex.split(line)
    assert (setting, program) == ("PYTHONPATH=.", "visrl")
    ended = visrl(tmp_path, *words, "limit=3")
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "3 questions of 1 data sets" in ended.stdout
    out = tmp_path / "runs" / "tags"
    rows = read_results(out)
    assert [row["dataset"] for row in rows] == ["tags"] * 3
    right = [row["prediction"] is not None and row["prediction"].split()[:1] == [row["answer"]] for row in rows]
    assert [row["correct_published"] for row in rows] == list(map(float, right))
    scores = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    assert scores["columns"]["correct_published"]["counted"]["mean"] == pytest.approx(sum(right) / 3)
    # A module that says something else now is another run.
    (tmp_path / "my_benchmark.py").write_text(module + "\n# changed\n", encoding="utf-8")
    again = visrl(tmp_path, *words, "limit=3")
    assert again.returncode == 1
    assert "benchmark_module" in again.stderr, again.stderr


def settings(benchmark: str, **given: object) -> EvalConfig:
    values = {"model_name_or_path": str(CHECKPOINT), "dataset": "scenes:test/0+2", "output_dir": "out"}
    return build_config(EvalConfig, {**values, "benchmark": benchmark, **given}, where="the test")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vbench", "there are samples, viscot, viscot-detection, refcoco, vstar, hrbench4k"),
        ("vbench", "chartqa, or one of your own as module:NAME"),
        ("no_such_module:TAGS", "no module 'no_such_module'"),
        ("visrl.scenes:SIDE", "is a int, not a visrl.evaluate.benchmarks.Benchmark"),
    ],
)
def test_what_is_no_benchmark_is_refused_with_the_key(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        settings(name)


def test_every_row_of_the_table_says_what_is_scored_and_how_it_may_be_asked() -> None:
    boxes = {name for name, benchmark in BENCHMARKS.items() if benchmark.scores == "boxes"}
    assert boxes == {"viscot-detection", "refcoco"}
    several = {"viscot": ["viscot", "visrl"], "viscot-detection": ["viscot-detection", "visrl"],
               "refcoco": ["refcoco", "visrl"]}  # fmt: skip
    assert {name: list(benchmark.protocols) for name, benchmark in BENCHMARKS.items()} == {
        name: several.get(name, ["visrl"]) for name in BENCHMARKS
    }
    for name, benchmark in BENCHMARKS.items():  # what has several readings has ours, and says where it comes from
        assert not benchmark.readings or ("ours" in benchmark.readings and benchmark.origin.startswith("http")), name
    for name, benchmark in BENCHMARKS.items():  # without an answer there is nothing to judge
        assert (benchmark.scores == "boxes") == all(one.answer is None for one in benchmark.protocols.values()), name


def test_the_questions_of_a_data_set_take_its_name_and_come_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = [BenchmarkQuestion(Sample(str(number), "a.png", "Which?", "7")) for number in range(3)]
    monkeypatch.setitem(BENCHMARKS, "toy", Benchmark(lambda files: {"a": iter(plain), "b": [*plain[:1]] * 2}))
    found = read_benchmark("toy", "-", limit=1)
    assert [(one.sample.source, one.sample.id) for one in found] == [("a", "0"), ("b", "0")]
    with pytest.raises(RecordError, match="question 0 of b is there twice"):
        read_benchmark("toy", "-")


def test_a_benchmark_cannot_score_what_failed_or_what_nobody_knows() -> None:
    question, codec = BenchmarkQuestion(SAMPLE), CODECS["visrl"]
    whole = Benchmark(lambda files: {}, score=lambda *_: {"correct": 1.0})
    good = Result(SAMPLE, prediction="7", box_text="[0, 0, 0.5, 0.5]", box=SAMPLE.box)
    vague = Result(SAMPLE, box_text="on the left", error="box: no box in the form …")
    lost = Result(SAMPLE, box_text="", error="engine: connection lost")
    assert [whole.row_of(question, one, codec)["correct"] for one in (good, vague, lost)] == [1.0, 0.0, None]
    with pytest.raises(ConfigError, match="a column 'points'"):
        Benchmark(lambda files: {}, score=lambda *_: {"points": 1.0}).row_of(question, good, codec)
    with pytest.raises(ConfigError, match=r"correct = 7\.0"):
        Benchmark(lambda files: {}, score=lambda *_: {"correct": 7.0}).row_of(question, good, codec)


def test_both_rows_of_a_result_say_the_same_where_both_say_anything() -> None:
    good = Result(SAMPLE, prediction="7.", box_text="[0, 0, 0.5, 0.25]", box=Box(0, 0, 0.5, 0.25))
    lost = Result(SAMPLE, box_text="", error="engine: connection lost")
    for one in (good, lost):
        evaluated, looped = one.eval_row(), one.loop_row()
        shared = evaluated.keys() & looped.keys() - {"iou", "grounded"}
        assert {name: evaluated[name] for name in shared} == {name: looped[name] for name in shared}
    assert good.eval_row()["iou"] == good.loop_row()["iou"] == 0.5
    assert (lost.eval_row()["grounded"], lost.loop_row()["grounded"]) == (None, False)
    assert (lost.eval_row()["iou"], lost.loop_row()["iou"]) == (None, 0.0)  # null where it failed, or counted as wrong
    # An IoU of one half is not above it: one rule for both.
    assert good.eval_row()["hit"] == summarise_measures([good.loop_row()])["box_accuracy_50"]["mean"] == 0


def test_the_measures_of_a_loop_are_the_columns_of_an_evaluation() -> None:
    """One summary: of the same results both give the same mean and interval, whatever shape the rows have."""
    overlaps = (0.9, 0.6, 0.5, 0.2, 0.1)
    results = [Result(SAMPLE, "7" if x > 0.3 else "8", "[…]", Box(0, 0, 0.5, 0.5 * x)) for x in overlaps]
    measures = summarise_measures([one.loop_row() for one in results])
    columns = summarise([one.eval_row() for one in results])["columns"]
    for measure, column in (("answer_accuracy", "exact"), ("box_iou", "iou"), ("box_accuracy_50", "hit")):
        assert {"n": 5, **measures[measure]} == columns[column]["left_out"]
    assert measures["answer_accuracy"]["mean"] == pytest.approx(3 / 5)
    assert measures["box_iou"]["mean"] == pytest.approx(sum(overlaps) / 5)
    assert measures["box_accuracy_50"]["mean"] == pytest.approx(2 / 5)


def test_the_published_columns_of_a_control_are_nobodys() -> None:
    (sample,) = scene_samples("test", 0, 1, with_box=True)
    control = Result(sample, "7", "[0, 0, 1, 1]", Box(0, 0, 1, 1), mode="no_crop")
    assert (control.written, control.shown) == (None, None)
    assert "iou" not in control.eval_row()
    assert control.loop_row()["box"] == [0, 0, 1, 1]
