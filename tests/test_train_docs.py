"""Every command of docs/TRAINING.md, on the embedded model and few steps; every key it speaks of is known."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from visrl.cli import main
from visrl.models.tiny import CHECKPOINT
from visrl.train.config import SECTIONS, Phase, TrainConfig
from visrl.train.losses import LOSSES, Loss

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "TRAINING.md").read_text(encoding="utf-8")
FEWER = [f"model_name_or_path={CHECKPOINT}", "max_steps=1", "max_samples=8", "gradient_accumulation_steps=1"]


@pytest.mark.slow
def test_every_command_of_the_documentation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(r"```sh\n(.*?)```", TEXT, flags=re.S)
    commands = [shlex.split(line) for line in block.splitlines()]
    assert len(commands) == 4
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    for command in commands:
        assert command[:2] == ["visrl", "train"]
        with pytest.raises(SystemExit) as ended:
            main([*command[1:], *FEWER])
        assert ended.value.code == 0, (command, capsys.readouterr().err)
    for name in ("sft", "kto", "two"):
        assert (tmp_path / "runs" / name / "manifest.json").is_file()


def test_every_key_and_config_of_the_documentation_exists() -> None:
    table = [line.split("|")[1] for line in TEXT.splitlines() if line.startswith("| `")]
    said = {key for cell in table for key in re.findall(r"`(\w+)`", cell)}
    assert len(said) > 8
    assert said <= TrainConfig.known_keys() | set(SECTIONS) | Phase.model_fields.keys()
    assert Phase.model_fields.keys() <= said
    for named in re.findall(r"configs/[\w/]+\.yaml", TEXT):
        assert (ROOT / named).is_file()


def test_the_table_of_losses_is_that_of_the_code() -> None:
    def row(name: str, loss: Loss) -> str:
        cells = [
            loss.source, f"`{name}`", loss.reads + ", KL" * loss.kl, "yes" if loss.reference else "no",
            "averaged" if loss.averages else "summed", str(loss.beta or ""),
            ", ".join(f"`{key}`" for key in loss.parameters.values()),
        ]  # fmt: skip
        return "".join(f"| {cell} ".replace("  ", " ") for cell in cells) + "|"

    first = TEXT.index("| loss | `pref_loss` |")
    assert TEXT[first:].splitlines()[2 : 2 + len(LOSSES)] == [row(name, loss) for name, loss in LOSSES.items()]
    assert not TEXT[first:].splitlines()[2 + len(LOSSES)]
