"""Every class of images and text that transformers has ends in the tree, in the plain form or in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from every_class import CLASSES, apart
from family_table import MADE

LONG = ("granite_docling",)  # minutes each
TEXT = (Path(__file__).parent.parent / "docs" / "FAMILIES.md").read_text(encoding="utf-8")
ROWS = [line.strip("| ").split(" | ", 1) for line in TEXT.splitlines() if line.startswith("| ")]
WRITTEN = {row[0]: row[1] for row in ROWS if len(row) == 2}
OTHERS = sorted(set(CLASSES) - set(MADE))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OTHERS if name not in LONG])
def test_a_class_ends_as_the_docs_say(name: str) -> None:
    told = apart(name)
    assert told.split(":")[0] == WRITTEN[name].split(":")[0]
    assert not told.startswith("traceback")


def test_the_docs_have_every_class() -> None:
    assert [name for name in OTHERS if name not in WRITTEN] == []
