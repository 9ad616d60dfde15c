"""One process at a time writes an output: who comes second is told who is there, and a killed holder holds nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from visrl.cli import main
from visrl.manifest import HeldError, ManifestError, claim_folder, hash_files, hold
from visrl.models.tiny import CHECKPOINT

HOLDER = """
import subprocess, sys, time
from visrl.manifest import hold
with hold(sys.argv[1]):
    if len(sys.argv) > 2:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])  # outlives the holder
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """A process that holds `tmp_path / "runs" / "out"`."""
    out = tmp_path / "runs" / "out"
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process, out
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_second_is_told_who_is_there_and_a_killed_holder_holds_nothing(holder) -> None:
    process, out = holder
    told = rf"out is being written by process {process.pid} on .*; wait until it ends"
    with pytest.raises(HeldError, match=told), hold(out):
        pass
    process.kill()
    process.wait()
    with hold(out):
        assert not out.exists()
    assert not out.parent.exists() or not list(out.parent.iterdir())


def test_a_program_that_a_holder_started_does_not_inherit_the_lock(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [sys.executable, "-c", HOLDER, str(out), "child"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        process.kill()
        process.wait()
        with hold(out):
            pass
        os.killpg(process.pid, signal.SIGKILL)  # its child


def test_every_way_to_one_folder_meets_one_lock(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with hold(tmp_path / "real"):
        for other in (tmp_path / "link", tmp_path / "real" / ".", tmp_path / "link" / ".." / "real"):
            with pytest.raises(HeldError), hold(other):
                pass
        with hold(tmp_path / "real" / "inner"), hold(tmp_path / ("x" * 255)):
            pass


def test_whoever_waits_gets_its_turn(holder) -> None:
    process, out = holder
    waiter = subprocess.Popen(
        [sys.executable, "-c", f"from visrl.manifest import hold\nwith hold({str(out)!r}, wait_s=60): pass"]
    )
    process.kill()
    assert waiter.wait(60) == 0


def test_what_nothing_was_written_to_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), hold(tmp_path / "a" / "b" / "out"):
        raise ValueError("mine")
    assert not list(tmp_path.iterdir())


def test_a_lock_is_no_part_of_a_folder_s_hash(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    alone = hash_files(tmp_path)
    with hold(tmp_path / "rows.jsonl"):
        assert len(list(tmp_path.iterdir())) == 2
        assert hash_files(tmp_path) == alone


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "dataset=scenes:preference/0+8"],
        ["eval", "benchmark=samples", "dataset=scenes:test/0+4"],
        ["train", "curriculum=[{steps: 1}]"],
        ["export", f"adapter_name_or_path={CHECKPOINT}"],
        ["filter"],
        ["demo"],
        ["evolve", "dataset=scenes:preference/0+8", "critic=oracle"],
        ["data", "convert", "--from", "visrl", "--to", "visrl"],
    ],
    ids=lambda words: words[0],
)
def test_every_verb_that_writes_holds_its_output(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": "a", "image": "scene:test/1", "question": "Q?", "answer": "1"}\n')
    out = tmp_path / "out"
    if words[0] == "data":
        given = [str(rows), str(out)]
    else:
        given = [f"{'export_dir' if words[0] == 'export' else 'output_dir'}={out}"]
        given += [] if words[0] == "filter" else [f"model_name_or_path={CHECKPOINT}"]
    if words[0] == "filter":
        for name in ("trajectories.jsonl", "verdicts.jsonl"):
            (tmp_path / name).write_text("")
        given += [f"input_dir={tmp_path}", f"dataset={rows}"]
    with hold(out), pytest.raises(SystemExit) as end:
        main([*words, *given])
    assert end.value.code == 1
    assert f"{out} is being written by process" in capsys.readouterr().err
    assert not out.exists()


def test_a_start_that_ended_before_it_did_anything_leaves_the_folder_free(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert not claim_folder(out, {"key": 1})
    (out / "log.jsonl").touch()
    with hold(out):
        assert not claim_folder(out, {"key": 2})
    (out / "log.jsonl").write_text("{}\n")
    with pytest.raises(ManifestError, match="holds other work"):
        claim_folder(out, {"key": 1})
    assert not claim_folder(out, {"key": 2})
