"""A grader from outside the package: `critic=module:function`, what it is given, and what is refused of it."""

import math
import os
import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from typer.testing import CliRunner

from visrl.box import Box
from visrl.cli import app
from visrl.config import ConfigError
from visrl.data.native import read_records
from visrl.evolve.config import GenerateConfig
from visrl.evolve.generate import TRAJECTORIES, VERDICTS, generate
from visrl.manifest import ManifestError, read_manifest
from visrl.models.tiny import CHECKPOINT
from visrl.records import Sample, Trajectory, Verdict
from visrl.rewards.grader import FunctionCritic, GraderError, grade
from visrl.rewards.metrics import exact_match
from visrl.rewards.open import CRITICS

ROOT = Path(__file__).parent.parent
SECTION = (ROOT / "docs" / "EVOLVE.md").read_text(encoding="utf-8").partition("### A reward of your own")[2]

GRADER = '''
def small_and_right(samples, trajectories):
    """A small box is a good one; an answer is right or wrong."""
    assert all(sample.box is None for sample in samples)
    return [
        (1.0 - one.box.area, float(one.answer.strip() == sample.answer))
        for sample, one in zip(samples, trajectories, strict=True)
    ]

def of_answers_alone(samples, trajectories):
    return [(None, 0.5) for _ in trajectories]

def stops(samples, trajectories):
    return [{}["colour"] for _ in trajectories]

number = 3
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with graders, on the path that Python imports from."""
    name = f"graders_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(GRADER, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def config_of(out: Path, critic: str, **given: object) -> GenerateConfig:
    return GenerateConfig(
        model_name_or_path=str(CHECKPOINT), dataset="scenes:preference/0+4", rounds=1, critic=critic,
        output_dir=out, **given,
    )  # fmt: skip


def test_a_grader_scores_a_generation_and_a_changed_one_is_another(module: str, tmp_path: Path) -> None:
    critic, out = f"{module}:small_and_right", tmp_path / "generate"
    generate(config_of(out, critic))
    trajectories = list(read_records(Trajectory, out / TRAJECTORIES))
    verdicts = list(read_records(Verdict, out / VERDICTS))
    assert len(trajectories) == len(verdicts) == 8
    graded = 0
    for tried, verdict in zip(trajectories, verdicts, strict=True):
        assert tried.place == verdict.place
        if tried.box is None or tried.answer is None:
            assert (verdict.box_score, verdict.answer_score) == (None, None)
        else:
            graded += 1
            assert verdict.box_score == pytest.approx(1 - tried.box.area, abs=1e-6)
            assert verdict.answer_score in (0.0, 1.0)
    assert graded
    assert (read_manifest(out) or {})["critic"] == critic

    # The same command is complete; the work of another grader is another's, and so is that of a changed one.
    generate(config_of(out, critic))
    with pytest.raises(ManifestError, match="critic"):
        generate(config_of(out, f"{module}:of_answers_alone"))
    (tmp_path / f"{module}.py").write_text(GRADER + "\n# another rule\n", encoding="utf-8")
    with pytest.raises(ManifestError, match="critic"):
        generate(config_of(out, critic))


def test_the_documented_reward_scores_a_generation(tmp_path: Path) -> None:
    (module,), (line,) = (re.findall(rf"```{kind}\n(.*?)```", SECTION, flags=re.S) for kind in ("python", "bash"))
    (tmp_path / "my_rewards.py").write_text(module, encoding="utf-8")
    for name in ("configs", "visrl"):
        (tmp_path / name).symlink_to(ROOT / name)
    setting, program, *words = shlex.split(line)
    assert (setting, program) == ("PYTHONPATH=.", "visrl")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "visrl.cli", *words, "max_samples=4", "rounds=1"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    out = tmp_path / "runs" / "tiny" / "rewarded"
    verdicts = list(read_records(Verdict, out / VERDICTS))
    assert len(verdicts) == 8
    graded = [one for one in verdicts if one.answer_score is not None]
    assert graded
    assert all(0 < one.box_score < 1 and one.answer_score in (0.0, 1.0) for one in graded)
    assert read_manifest(out)["critic"] == "my_rewards:small_and_right"


def test_a_row_of_the_table_is_a_critic_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = FunctionCritic("half", lambda samples, trajectories: [(0.5, 0.5)] * len(trajectories))
    monkeypatch.setitem(CRITICS, "half", lambda config, grading: nullcontext(half))
    generate(config_of(tmp_path / "out", "half"))
    scores = {(one.box_score, one.answer_score) for one in read_records(Verdict, tmp_path / "out" / VERDICTS)}
    assert (0.5, 0.5) in scores
    assert scores <= {(0.5, 0.5), (None, None)}


def test_a_grader_that_cannot_be_had_is_a_sentence_before_anything_is_written(module: str, tmp_path: Path) -> None:
    for critic, said in (
        ("nowhere_at_all:f", "critic 'nowhere_at_all:f': there is no module 'nowhere_at_all'"),
        (f"{module}:nothing", "has no 'nothing'"),
        (f"{module}:number", "is no function of samples and trajectories"),
    ):
        with pytest.raises(ConfigError, match=said):
            generate(config_of(tmp_path / "out", critic))
    for number, text in enumerate(("half = 1 / 0\n", "def half(:\n", "import json\njson.halves\n")):
        (tmp_path / f"{module}{number}.py").write_text(text, encoding="utf-8")
        said = rf"critic '{module}{number}:half': .* stopped with (Zero|Syntax|Attribute).*{module}{number}.py, line"
        with pytest.raises(ConfigError, match=said):
            generate(config_of(tmp_path / "out", f"{module}{number}:half"))
    with pytest.raises(ConfigError, match=r"critic_model_name_or_path: critic=.* asks no model"):
        generate(config_of(tmp_path / "out", f"{module}:of_answers_alone", critic_model_name_or_path="m"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(
        ValueError, match="'auto', 'oracle', 'model', 'outcome', or module:function for one of your own"
    ):
        config_of(tmp_path, "orakel")


def test_a_grader_that_stops_ends_the_run_in_a_sentence(module: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(
        app, ["generate", f"model_name_or_path={CHECKPOINT}", "dataset=scenes:preference/0+4", "rounds=1",
              f"critic={module}:stops", f"output_dir={out}"],
    )  # fmt: skip
    assert done.exit_code == 1
    assert f"critic {module}:stops stopped with KeyError: 'colour' ({tmp_path / module}.py, line 14)" in " ".join(
        done.stderr.split()
    )
    assert read_manifest(out) is None


BOX = Box(0.1, 0.1, 0.4, 0.4)


def tried(branch: int, box: Box | None = BOX, answer: str | None = "7") -> Trajectory:
    error = None if box is not None else "box: none"
    return Trajectory("a", 0, branch, "", box, "sampled", answer, "test", 0, error)


SAMPLE = Sample("a", "a.png", "How many?", "7", None, "test")


def test_only_whole_trajectories_are_graded_and_the_order_is_kept() -> None:
    seen = []

    def grader(samples, trajectories):
        seen.extend(trajectories)
        return [(0.25, exact_match(one.answer, [of.answer])) for of, one in zip(samples, trajectories, strict=True)]

    rolled = [tried(0), tried(1, box=None, answer=None), tried(2, answer="8")]
    verdicts = FunctionCritic("mine", grader).judge([SAMPLE] * 3, rolled)
    assert seen == [rolled[0], rolled[2]]
    assert [(v.branch, v.box_score, v.answer_score, v.raw) for v in verdicts] == [
        (0, 0.25, 1.0, ""), (1, None, None, "box: none"), (2, 0.25, 0.0, ""),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([(1.0, 1.0)], "gave back 1 pairs for 2 trajectories"),
        ([(1.0, 1.0)] * 3, "gave back 3 pairs for 2 trajectories"),
        (None, "gave back NoneType, and not a list of pairs"),
        ([0.5, 0.5], "give the scores of box and answer as a pair, not 0.5"),
        ([(1.0, 1.0, 1.0)] * 2, "as a pair"),
        ([(0.5, math.nan)] * 2, "round 0, branch 0: the answer score nan is no number from 0 to 1; None says"),
        ([(None, 1.0), (1.5, None)], "branch 1: the box score 1.5 is not from 0 to 1"),
        ([(None, None), (None, -0.1)], "the answer score -0.1 is not from 0 to 1"),
        ([("good", None)] * 2, "the box score 'good' is no number from 0 to 1"),
    ],
)
def test_what_is_no_scores_is_refused_and_never_a_silent_zero(given: object, said: str) -> None:
    with pytest.raises(GraderError, match=said):
        grade("mine", lambda samples, trajectories: given, [SAMPLE] * 2, [tried(0), tried(1)])  # type: ignore[arg-type, return-value]


def test_scores_may_be_truth_values_and_numbers_of_numpy() -> None:
    import numpy as np

    given = [(True, np.float32(0.5)), [None, 0]]
    assert grade("mine", lambda *_: given, [SAMPLE] * 2, [tried(0), tried(1)]) == [(1.0, 0.5), (None, 0.0)]
