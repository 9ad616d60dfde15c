"""How verbs end: a sentence for what the user can mend and for an interruption, a traceback for what nobody foresaw."""

from __future__ import annotations

import importlib
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from visrl.cli import app
from visrl.cli.verbs import Verbs
from visrl.config import ConfigError, split_arguments
from visrl.errors import UserError
from visrl.progress import next_command
from visrl.records import VisrlWarning


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ConfigError("mend this"), 1, "visrl: mend this\n"),
        (PermissionError(13, "not yours", "a.txt"), 1, "visrl: [Errno 13] not yours: 'a.txt'\n"),
        (KeyboardInterrupt(), 130, "visrl: interrupted; the same command goes on where this one stopped\n"),
        (ZeroDivisionError("ours"), 1, ""),
    ],
)
def test_a_verb_ends_with_one_sentence(error: BaseException, status: int, said: str) -> None:
    app = typer.Typer(cls=Verbs)

    @app.command()
    def work() -> None:
        raise error

    @app.command()
    def rest() -> None:
        pass

    ended = CliRunner().invoke(app, ["work"])
    assert (ended.exit_code, ended.stderr) == (status, said)
    assert isinstance(ended.exception, SystemExit if said else ZeroDivisionError)


USER_ERRORS = {
    "visrl.box": "BoxError",
    "visrl.config": "ConfigError",
    "visrl.conversation": "PromptError",
    "visrl.engines.openai_server": "EndpointError",
    "visrl.failures": "FailedRun",
    "visrl.images": "ImageError",
    "visrl.manifest": "ManifestError",
    "visrl.models.folder": "CheckpointError",
    "visrl.records": "RecordError",
    "visrl.report.shapes": "ReportError",
    "visrl.train.distributed": "ProcessError",
    "visrl.train.trainer": "TrainingError",
}


def test_every_error_for_users_is_one() -> None:
    for module, name in USER_ERRORS.items():
        assert issubclass(getattr(importlib.import_module(module), name), UserError)


@pytest.mark.parametrize("words", [["--help"], ["data", "check", "--from", "visrl", "many.jsonl"]])
def test_a_reader_that_has_had_enough_is_no_fault(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "many.jsonl").write_text('{"image": "a.png", "question": "What?"}\n')
    reader, writer = os.pipe()
    os.close(reader)
    program = [sys.executable, "-m", "visrl.cli", *words]
    ended = subprocess.run(program, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_a_warning_of_ours_is_a_line_without_the_place_in_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    app = typer.Typer(cls=Verbs)

    @app.command()
    def work() -> None:
        for warning in (VisrlWarning("in 3 rows a column is passed by"), UserWarning("of a library")):
            typer.echo(warnings.formatwarning(warning, type(warning), "a.py", 7), nl=False)

    @app.command()
    def rest() -> None:
        pass

    told = CliRunner().invoke(app, ["work"]).stdout.splitlines()
    assert told == ["in 3 rows a column is passed by", "a.py:7: UserWarning: of a library"]


def test_the_next_command_can_be_typed_as_it_is_printed():
    line = next_command("serve it", "visrl", "api", "model_name_or_path=my runs/merged")
    assert line == "next, serve it: visrl api 'model_name_or_path=my runs/merged'"
    assert shlex.split(line.partition(": ")[2]) == ["visrl", "api", "model_name_or_path=my runs/merged"]


def test_the_first_argument_may_be_an_address_with_its_slashes() -> None:
    assert split_arguments("policy_url=http://x/v1", ["a=1"]) == (None, ["policy_url=http://x/v1", "a=1"])
    assert split_arguments("a.yaml", None) == (Path("a.yaml"), [])
    said = CliRunner().invoke(app, ["eval", "policy_url=http://x/v1", "dataset=scenes:test/0+1"]).stderr
    assert "does not say http://" not in said
