"""Reference log-probabilities: computed once, by the same packed path, and kept on disk under a key of everything
that can change them. A cache under another key is never used."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from visrl.manifest import PACKAGES, package_versions
from visrl.train.forward import branch_logps
from visrl.train.items import Batch, Collator, Item


def reference_key(parts: dict[str, Any]) -> str:
    """The key of a cache: a hash over weights, rows, settings and package versions given in `parts`."""
    everything = {**parts, "versions": package_versions(PACKAGES)}
    return hashlib.blake2b(json.dumps(everything, sort_keys=True).encode(), digest_size=16).hexdigest()


@torch.no_grad()
def reference_logps(
    model: torch.nn.Module,
    items: Dataset[Item],
    collator: Collator,
    *,
    batch_size: int,
    cache: Path | None,
    key: str,
) -> dict[str, float]:
    """Summed log-probability of every response under `model` as it is now, by `row key/role`."""
    if cache is not None and cache.is_file():
        stored = json.loads(cache.read_text(encoding="utf-8"))
        if stored.get("key") == key:
            return stored["logps"]
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    logps: dict[str, float] = {}
    count = len(items)  # type: ignore[arg-type]
    for start in range(0, count, batch_size):
        members: Sequence[Item] = [items[n] for n in range(start, min(start + batch_size, count))]
        batch: Batch = collator(members)["batch"]
        sums = branch_logps(model, batch.packed.to(device)).sums.tolist()
        logps.update({f"{b.row}/{b.role}": value for b, value in zip(batch.branches, sums, strict=True)})
    model.train(training)
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        part = cache.with_suffix(".part")
        part.write_text(json.dumps({"key": key, "logps": logps}), encoding="utf-8")
        os.replace(part, cache)
    return logps
