"""What several tests share: a tiny random model, made once. No network, no shared state but this."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised tiny Qwen2-VL with its processor, on disk."""
    from visrl.models.tiny.make import make_tiny

    # Two heads share keys and values, as in every real model of the family; the embedded one is too small for it.
    return make_tiny(tmp_path_factory.mktemp("tiny"), num_key_value_heads=2)
