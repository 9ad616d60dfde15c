"""The wheel holds what it needs: every command runs from an empty folder with nothing of the source beside it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ("visrl", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this source, built from a copy, so that nothing is left in the tree or taken from an older build."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCE:
        path, ignore = ROOT / name, shutil.ignore_patterns("__pycache__")
        if path.is_dir():
            shutil.copytree(path, folder / "source" / name, ignore=ignore)
        else:
            shutil.copy(path, folder / "source")
    _pip("wheel", "--no-build-isolation", "--wheel-dir", folder, folder / "source")
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """A folder that the wheel is installed into, apart from everything else."""
    _pip("install", "--target", wheel.parent / "installed", wheel)
    return wheel.parent / "installed"


def _pip(verb: str, *arguments: object) -> None:
    command = [sys.executable, "-m", "pip", verb, "--quiet", "--no-deps", "--no-index", *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def run(installed: Path, folder: Path, *words: str) -> str:
    """What the installed `visrl` prints in an empty folder."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    program = [sys.executable, installed / "bin" / "visrl", *words]
    ran = subprocess.run(program, capture_output=True, text=True, cwd=folder, env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_wheel_holds_every_file_of_the_package_and_every_config_and_no_more(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {path for path in (ROOT / "visrl").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    configs = {path for path in (ROOT / "configs").rglob("*") if path.is_file()}
    wanted = {str(path.relative_to(ROOT)) for path in files} | {f"visrl/{path.relative_to(ROOT)}" for path in configs}
    assert held == wanted
    assert {"visrl/py.typed", "visrl/configs/tiny/train_rl.yaml", "visrl/pages/page.css"} <= held


def test_an_installed_program_asks_the_embedded_model_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    where = "import visrl.config, visrl.models.tiny as t; print(visrl.config.CONFIGS, t.CHECKPOINT, sep='\\n')"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    said = subprocess.check_output([sys.executable, "-c", where], text=True, cwd=tmp_path, env=environment).split()
    assert said == [str(installed / "visrl" / "configs"), str(installed / "visrl" / "models" / "tiny" / "checkpoint")]
    assert "export" in run(installed, tmp_path, "--help")
    question = "Which number is on the green tag?"
    answered = run(installed, tmp_path, "ask", "--model", said[1], "--image", "scene:test/20", question)
    assert re.search(r"checkpoint: \S+ \((right|wrong: it is 7), IoU \d", answered), answered
    assert sorted(os.listdir(tmp_path)) == ["ask.png"]


@pytest.mark.slow
def test_an_installed_program_runs_the_demo_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    fewer = ("questions=48", "test_questions=8", "iterations=1", "rounds=3", "controls=false", "threads=1")
    printed = run(installed, tmp_path, "demo", *fewer)
    assert "report: runs/demo/report.html" in printed
    summary = json.loads((tmp_path / "runs" / "demo" / "summary.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == ["sft", "stage1", "stage2"]
    assert summary["pairs"][0]["kept"] > 0
