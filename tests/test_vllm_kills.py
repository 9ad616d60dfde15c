"""What becomes of a real vLLM and of whoever started it, when either is ended: no process is left, a sentence is said,
the status is right, and the same command goes on. The commands are those that users type.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from serve_help import body, get
from test_rollout_servers import read_lines
from vllm_here import ARGUMENTS, START_S, needs_vllm, surroundings
from waiting import PATIENCE_S, wait_until

from visrl.engines.server_process import free_port
from visrl.evolve.config import GenerateConfig
from visrl.evolve.generate import generate
from visrl.models.tiny import CHECKPOINT

pytestmark = needs_vllm
Processes = list[psutil.Process]
API, CORE = "/bin/vllm serve", "VLLM::EngineCore"  # how vLLM calls its two processes


@dataclass
class Command:
    """A command of ours in a process of its own, with what it says."""

    process: psutil.Popen
    log: Path

    def family(self) -> Processes:
        """It and all that came of it."""
        found = psutil.Process(self.process.pid)
        return [found, *found.children(recursive=True)]

    def one(self, called: str) -> psutil.Process:
        """The process of vLLM of this name."""
        return next(
            one for one in self.family() if called in " ".join(one.cmdline()) and "keeper" not in str(one.cmdline())
        )

    def until(self, said: str) -> None:
        """Wait until it has said something; it must not end before."""
        ends = time.monotonic() + START_S
        while said not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < ends, self.log.read_text()
            time.sleep(0.1)

    def ended(self) -> tuple[int, str]:
        return self.process.wait(PATIENCE_S), self.log.read_text()


@contextmanager
def running(log: Path, *words: str) -> Iterator[Command]:
    with open(log, "wb") as said:
        process = psutil.Popen(
            [sys.executable, "-m", "visrl.cli", *words],
            env=os.environ | surroundings(),
            stdout=said,
            stderr=subprocess.STDOUT,
        )
    try:
        yield Command(process, log)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(PATIENCE_S)


def assert_gone(processes: Processes) -> None:
    """Also by `create_time`: a number may be given to another process."""
    wait_until(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes), "gone")


def api(port: int) -> list[str]:
    given = [f"model_name_or_path={CHECKPOINT}", "infer_backend=vllm", f"port={port}", "served_model_name=tiny"]
    return ["api", *given, f"vllm_args={ARGUMENTS}"]


GIVEN: dict[str, Any] = {
    "dataset": "scenes:preference@1/0+160", "rounds": 2, "temperature": 0, "diversity": False, "batch_size": 16,
}  # fmt: skip


def evolve(out: Path) -> list[str]:
    """One shard of one: the generation of an iteration and nothing after it."""
    given = {**GIVEN, "model_name_or_path": CHECKPOINT, "output_dir": out, "iterations": 1, "server": "vllm"}
    said = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in given.items()]
    return ["evolve", *said, f"server_args={ARGUMENTS}", "--shard", "1/1"]


# --- Our server in front ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_the_server_in_front_takes_vllm_with_it(ending: signal.Signals, tmp_path: Path) -> None:
    with running(tmp_path / "log", *api(free_port())) as command:
        command.until("Serving tiny")
        family = command.family()
        assert {CORE in " ".join(one.cmdline()) for one in family} == {False, True}
        command.process.send_signal(ending)
        status, said = command.ended()
    assert_gone(family)
    assert status == (0 if ending == signal.SIGTERM else -ending)
    assert "visrl: " not in said


def test_the_server_in_front_is_told_to_end_while_vllm_starts(tmp_path: Path) -> None:
    with running(tmp_path / "log", *api(free_port())) as command:
        command.until("EngineCore pid=")
        family = command.family()
        command.process.terminate()
        command.ended()
    assert_gone(family)


@pytest.mark.parametrize("killed", [API, CORE])
def test_a_crash_of_vllm_ends_the_server_in_front_in_a_sentence(killed: str, tmp_path: Path) -> None:
    port = free_port()
    with running(tmp_path / "log", *api(port)) as command:
        command.until("Serving tiny")
        family = command.family()
        assert get(f"http://127.0.0.1:{port}/health").status_code == 200
        command.one(killed).kill()
        try:  # what comes meanwhile is told that the server behind it failed, or finds nobody
            reply = httpx.post(
                f"http://127.0.0.1:{port}/v1/chat/completions", json=body(model="tiny"), timeout=PATIENCE_S
            )
            assert reply.status_code in (502, 503)
        except httpx.TransportError:
            pass
        status, said = command.ended()
    assert_gone(family)
    assert status == 1
    assert "cannot be served: the vLLM server behind this one ended with status" in said
    assert said.count("Traceback") == said.partition("visrl: ")[0].count("Traceback")  # vLLM's own, none of ours


# --- The loop ---------------------------------------------------------------------------------------------------------


ENDINGS: tuple[signal.Signals | str, ...] = (signal.SIGTERM, signal.SIGKILL, API, CORE)


def test_the_loop_goes_on_after_signals_and_crashes_as_if_there_had_been_none(tmp_path: Path) -> None:
    """Four endings in a row over one folder, of ours and of both of vLLM's processes; then to the end."""
    out = tmp_path / "out"
    made = out / "iter0" / "generate-1-of-1"
    rows = made / "trajectories.jsonl"
    for number, ending in enumerate(ENDINGS):
        before = rows.read_bytes() if rows.exists() else b""
        with running(tmp_path / str(number), *evolve(out)) as command:
            while not rows.exists() or len(rows.read_bytes()) <= len(before):
                assert command.process.poll() is None, command.log.read_text()
                time.sleep(0.01)
            family = command.family()
            victim = command.one(ending) if isinstance(ending, str) else command.process
            victim.send_signal(signal.SIGKILL if isinstance(ending, str) else ending)
            status, said = command.ended()
        assert_gone(family)
        assert rows.read_bytes().startswith(before)
        assert not (made / "manifest.json").exists()
        if isinstance(ending, str):
            assert status == 1
            assert "visrl: vllm ended with status" in said
            assert f"{made}/server.log ends with" in said
            assert "Traceback" not in said.partition("server.log ends with")[0]
        else:
            assert status == -ending
    with running(tmp_path / "last", *evolve(out)) as command:
        assert command.process.wait(START_S) == 0
    config = GenerateConfig(model_name_or_path=str(CHECKPOINT), output_dir=tmp_path / "here", **GIVEN)
    here = read_lines(generate(config) / "trajectories.jsonl")
    assert [{**row, "engine": ""} for row in read_lines(rows)] == [{**row, "engine": ""} for row in here]
