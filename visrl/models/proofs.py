"""The cache of what trials found: a JSON file for each processor, config and release of what computes."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from visrl import __version__
from visrl.models.found import Found, NotFound

FOLDER = "VISRL_CACHE"  # the environment variable that says where the cache lies
# What a config says of where it came from, and not of its model.
ELSEWHERE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


def cache_folder() -> Path:
    """Where the cache lies: `$VISRL_CACHE`, else `visrl` in the user's own cache folder."""
    given = os.environ.get(FOLDER)
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "visrl"


def key_of(processor: Any, config: Any) -> str:
    """The name under which a trial of this processor and config is kept: their settings and all releases count."""
    values = {
        "config": _plain(json.loads(config.to_json_string(use_diff=False))),
        "processor": [type(processor).__name__, json.loads(processor.image_processor.to_json_string())],
        "template": str(getattr(processor, "chat_template", None)),
        "tokens": len(processor.tokenizer),
        "releases": [__version__, transformers.__version__, torch.__version__],
    }
    digest = hashlib.blake2b(json.dumps(values, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
    return f"{config.model_type}-{digest}"


def _plain(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _plain(value) for name, value in values.items() if name not in ELSEWHERE}
    return values


def kept(key: str) -> Found | NotFound | None:
    """What was found before, or why nothing was; None where it was not tried, or cannot be read."""
    try:
        values = json.loads(_file(key).read_text(encoding="utf-8"))
        return NotFound(**values["not_found"]) if "not_found" in values else Found.of_json(values["found"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def keep(key: str, found: Found | NotFound) -> None:
    """Write down what was found, or why nothing was. Where no file can be written it is tried again next time."""
    values = {"not_found": asdict(found)} if isinstance(found, NotFound) else {"found": found.as_json()}
    with suppress(OSError):
        path = _file(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        part.replace(path)


def _file(key: str) -> Path:
    return cache_folder() / "proofs" / f"{key}.json"
