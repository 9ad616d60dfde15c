"""CONTRIBUTING.md names files, tables and commands that are there, and folders in their order."""

from __future__ import annotations

import re
from pathlib import Path

from test_architecture import ORDER

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_every_file_and_every_target_that_the_guide_names_is_there() -> None:
    named = set(re.findall(r"(?:visrl|tests|docs|benchmarks)/[\w/]+\.(?:py|md)", TEXT))
    assert len(named) > 25
    assert [path for path in named if not (ROOT / path).is_file()] == []
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make ([\w-]+)", TEXT, flags=re.M)
    assert targets == ["test", "test-full", "test-vllm", "test-lmms", "lint"]
    assert all(f"\n{target}: " in makefile for target in targets)


def test_every_table_that_the_guide_names_is_in_the_file_that_it_names() -> None:
    rows = [line.split("|")[1:-1] for line in TEXT.splitlines() if line.startswith("| ") and "pytest" in line]
    assert len(rows) == 9
    for what, write, table, own, _ in rows:
        names, (file, *_) = re.findall(r"`([A-Z_]+)`", table), re.findall(r"visrl/[\w/]+\.py", table) or [""]
        file = file or re.findall(r"visrl/[\w/]+\.py", write)[0]
        source = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^{names[0]}\b.* = ", source, flags=re.M), what
        whole = "".join(
            (ROOT / path).read_text(encoding="utf-8") for path in {file, *re.findall(r"visrl/[\w/]+\.py", write)}
        )
        assert "module:" not in own or re.search(r"\bload_(plugin|function)\(", whole), what


def test_the_folders_stand_in_the_order_that_is_tested() -> None:
    folders = re.findall(r"^\| `(\w+)/` \|", TEXT, flags=re.M)
    assert folders == [name for name in ORDER if (ROOT / "visrl" / name).is_dir()]
