"""What several tests share: a tiny random model, made once. No network, no shared state but this."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised tiny Qwen2-VL with its processor, on disk."""
    from visrl.models.tiny.make import make_tiny

    return make_tiny(tmp_path_factory.mktemp("tiny"))
