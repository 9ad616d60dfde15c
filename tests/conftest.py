"""What several tests share: a tiny random model, made once. No network, no shared state but this."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "VISRL_CACHE" not in os.environ:  # what trials find is kept for one run of the tests, and in no folder of the user's
    _cache = TemporaryDirectory(prefix="visrl-cache-")
    os.environ["VISRL_CACHE"] = _cache.name

import pytest


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised tiny Qwen2-VL with its processor, on disk."""
    from visrl.models.tiny.make import make_tiny

    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def headed(tiny: Path) -> Any:
    """The tiny model with a random value head, its weights loud enough that texts and pictures make a difference."""
    from loud import louder

    from visrl.models.attention import use_tree_attention
    from visrl.models.load import load_model
    from visrl.models.value_head import add_value_head

    model = load_model(tiny)
    add_value_head(model)
    louder(model)
    use_tree_attention(model)
    return model
