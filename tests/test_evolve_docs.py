"""Every command of docs/EVOLVE.md runs, on fewer questions than it names; every config it speaks of is read."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from visrl.cli import main
from visrl.config import read_config
from visrl.evolve.config import EvolveConfig, FilterConfig, GenerateConfig

ROOT = Path(__file__).parent.parent
FEWER = {
    "generate": ["max_samples=4", "batch_size=2", "rounds=1"],
    "filter": [],
    "evolve": ["max_samples=4", "rounds=1", "iterations=1", "eval_samples=4", "controls=false", "train={max_steps: 1}"],
}


def documented_commands() -> list[list[str]]:
    text = (ROOT / "docs" / "EVOLVE.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.S)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


@pytest.mark.slow
def test_every_command_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    commands = documented_commands()
    assert len(commands) == 15
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "visrl"):
        (tmp_path / name).symlink_to(ROOT / name)
    for command in commands:
        program, verb, *words = command
        assert program == "visrl"
        with pytest.raises(SystemExit) as ended:
            main([verb, *words, *FEWER[verb]])
        assert ended.value.code == 0, (command, capsys.readouterr().err)
    assert (tmp_path / "runs/tiny/filter/pairs.html").is_file()
    assert (tmp_path / "runs/tiny/evolve/report.html").is_file()


@pytest.mark.parametrize("folder", ["", "tiny/"])
def test_shipped_configs_are_read(folder):
    kinds = {"generate": GenerateConfig, "filter": FilterConfig, "evolve": EvolveConfig}
    for name, kind in kinds.items():
        read_config(kind, ROOT / "configs" / f"{folder}{name}.yaml")


def test_every_key_of_the_documentation_is_known():
    text = (ROOT / "docs" / "EVOLVE.md").read_text(encoding="utf-8")
    known = GenerateConfig.known_keys() | FilterConfig.known_keys() | EvolveConfig.known_keys() | {"critic.box"}
    said = set(re.findall(r"`([a-z_.]+)(?:: |=)", text)) | set(re.findall(r"`(\w+_(?:url|path|attempts))`", text))
    assert len(said) > 15
    assert said - {"score"} <= known  # the form of a critic's reply
