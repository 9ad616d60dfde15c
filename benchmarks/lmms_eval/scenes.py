"""What the task `visrl_scenes` needs in lmms-eval's own environment, where visrl is not installed."""

from __future__ import annotations

from typing import Any


def images(doc: dict[str, Any]) -> list[Any]:
    """The one image of a question, as PIL has it."""
    return [doc["image"].convert("RGB")]
