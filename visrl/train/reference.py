"""Reference log-probabilities: computed once, by the same packed path, and kept on disk under a key of everything
that can change them. A cache under another key is never used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import Dataset

from visrl.images import image_path, names_file
from visrl.manifest import PACKAGES, hash_files, package_versions
from visrl.models.modes import evaluating
from visrl.packing.forward import branch_logps
from visrl.progress import progress
from visrl.records import write_text
from visrl.sequences import batched
from visrl.train.distributed import gather_dicts, shard_batches, whole_weights
from visrl.train.features import FeatureCache
from visrl.train.items import Collator, Item, TrainingBatch


def reference_key(parts: dict[str, Any]) -> str:
    """The key of a cache: a hash over what `parts` says of weights, rows, images and settings, and over versions."""
    everything = {**parts, "names": "by place", "versions": package_versions(PACKAGES)}
    return hashlib.blake2b(json.dumps(everything, sort_keys=True).encode(), digest_size=16).hexdigest()


def hash_images(refs: Iterable[str], root: str | Path | None = None) -> str:
    """One short hash over the bytes of all image files that `refs` name, each read once. Drawn scenes and data URLs
    are what their names say."""
    names = sorted({ref for ref in refs if names_file(ref)})
    paths = (image_path(name, root) for name in names)
    return hash_files(*(path for path in paths if path is not None))


@torch.no_grad()
def reference_logps(
    model: torch.nn.Module,
    items: Dataset[Item],
    collator: Collator,
    *,
    batch_size: int,
    cache: Path,
    key: str,
    features: FeatureCache | None = None,
) -> dict[str, float]:
    """Summed log-probability of every response under `model` as it is now, by `row key/role`. Processes that train
    together share the work."""
    state = PartialState()
    if cache.is_file():
        stored = json.loads(cache.read_text(encoding="utf-8"))
        if stored.get("key") == key:
            return stored["logps"]
    device = next(model.parameters()).device
    logps: dict[str, float] = {}
    batches = batched(range(len(items)), batch_size)  # type: ignore[arg-type]
    with whole_weights(model), evaluating(model):
        for members, _ in progress(shard_batches(batches), "reference log-probabilities", units="batches"):
            batch: TrainingBatch = collator([items[n] for n in members])["batch"]
            if features is not None:
                features.fill(batch.packed, device)
            sums = branch_logps(model, batch.packed.to(device)).sums.tolist()
            named = {f"{b.row}/{b.role}": value for b, value in zip(batch.branches, sums, strict=True)}
            assert len(named) == len(sums), "two responses of one name"
            assert not named.keys() & logps.keys(), "two responses of one name"
            logps |= named
    logps = gather_dicts(logps)
    if state.is_main_process:
        write_text(cache, json.dumps({"key": key, "logps": logps}))
    state.wait_for_everyone()
    return logps
