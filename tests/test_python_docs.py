"""docs/PYTHON.md: its reference is that of the docstrings, and every block runs on the embedded model."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from python_reference import PAGE, page
from waiting import wait_until

import visrl

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```(python|text|sh)\n(.*?)```\n", re.S)
WORKED = PAGE.read_text(encoding="utf-8").partition("## Reference")[0]


def test_the_reference_is_that_of_the_docstrings():
    assert PAGE.read_text(encoding="utf-8") == page(), "write it anew with `python tests/python_reference.py`"


def test_the_reference_tells_every_public_name():
    text = page()
    for name in visrl.NAMES:
        assert f"#### `visrl.{name}`\n" in text
    assert "0x" not in text
    for verb in ("train", "evaluate", "generate", "filter", "evolve", "export", "serve", "demo"):
        part = text.split(f"#### `visrl.{verb}`\n")[1].split("\n#### ")[0]
        assert all(f"*{heading}*" in part for heading in ("Args", "Raises")), verb
        assert "refused with the nearest known one" in part


@contextmanager
def served(command: str, folder: Path) -> Iterator[str]:
    """The address of the server that `visrl api …` starts, on a port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = command.replace("port=8000", f"port={port}").split()[1:]
    process = subprocess.Popen([sys.executable, "-m", "visrl.cli", *words], cwd=folder, stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}/v1"

    def is_ready() -> bool:
        try:
            return httpx.get(f"{address}/models").status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_until(is_ready)
        yield address
    finally:
        process.terminate()
        process.wait()


def test_every_block_runs_and_prints_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "visrl").symlink_to(ROOT / "visrl")  # where the command of the page finds the checkpoint
    monkeypatch.chdir(tmp_path)
    (command,) = (text for kind, text in BLOCK.findall(WORKED) if kind == "sh")
    names: dict[str, Any] = {}
    with served(command, tmp_path) as address:
        blocks = [(kind, text.replace("http://127.0.0.1:8000/v1", address)) for kind, text in BLOCK.findall(WORKED)]
        for (kind, text), (after, output) in zip(blocks, [*blocks[1:], ("", "")], strict=True):
            if kind != "python":
                continue
            capsys.readouterr()
            exec(compile(text, "docs/PYTHON.md", "exec"), names)
            printed = capsys.readouterr().out
            if after == "text":
                assert printed.endswith(output), text
    assert (tmp_path / "runs" / "stage2-merged" / "README.md").is_file()
    assert names["pairs"].kept


def test_the_lines_of_the_readme_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(ROOT)
    (block,) = re.findall(r"```python\n(.*?)```\n", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    exec(block, {})
    assert re.fullmatch(r"\(([\d.]+, ){3}[\d.]+\) \d+\n", capsys.readouterr().out)
