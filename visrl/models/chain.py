"""Which adapters a model is made of. A stage trains an adapter on the model that the stage before left, so an adapter
alone says nothing without those below it: its manifest knows them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visrl.manifest import hash_checkpoint, read_manifest
from visrl.models.folder import ADAPTER, CheckpointError, check_hub_name


def adapter_chain(model: str | Path, adapters: str | Path | Sequence[str | Path] | None) -> tuple[str, ...]:
    """The adapters to merge into `model`, the first one first: those given, with what each was trained on before it.

    Of an adapter without a manifest of `visrl train` nothing is known, and it is taken as it is. What `model` has in it
    already, as its own manifest of `visrl export` says, is left out.

    Raises:
        CheckpointError: an adapter that is not there, that was trained on another model, or on one that has changed.
    """
    given = [adapters] if isinstance(adapters, str | Path) else list(adapters or ())
    whole: list[str] = []
    for adapter in map(str, given):
        whole = _with_those_below(model, adapter, whole)
    return tuple(whole)


def described(chain: Sequence[str]) -> list[dict[str, str]]:
    """A chain as a manifest has it: each adapter's path, and the hash of what lay there."""
    return [{"path": adapter, "hash": hash_checkpoint(adapter)} for adapter in chain]


def _with_those_below(model: str | Path, adapter: str, before: list[str]) -> list[str]:
    """`before` with `adapter` after it, and with the adapters that it was trained on where they were not given."""
    if not Path(adapter).is_dir():
        check_hub_name(adapter, "adapter", ADAPTER)
        return [*before, adapter]
    if not (Path(adapter) / ADAPTER).is_file():
        raise CheckpointError(f"{adapter} holds no adapter (no {ADAPTER}); name the folder of a finished training")
    manifest = read_manifest(adapter)
    if manifest is None or manifest.get("verb") != "train":
        return [*before, adapter]
    below = _not_yet_in(model, adapter, manifest)
    for one in below:
        if one["hash"] == one["path"]:  # a hub's, known by its name alone
            continue
        if not Path(one["path"]).is_dir():
            raise CheckpointError(f"{adapter} was trained on the adapter {one['path']}, which is not there any more")
        if hash_checkpoint(one["path"]) != one["hash"]:
            raise CheckpointError(f"{adapter} was trained on the adapter {one['path']}, which has changed since")
    paths = [one["path"] for one in below]
    if before and [Path(one).resolve() for one in before] != [Path(one).resolve() for one in paths]:
        raise CheckpointError(
            f"{adapter} was trained on {' + '.join([_base(manifest), *paths])} and not on {' + '.join(before)}; "
            f"give adapter_name_or_path={adapter} alone"
        )
    return [*paths, adapter]


def _named_below(manifest: dict[str, Any]) -> list[dict[str, str]]:
    """The adapters that one was trained on; earlier releases named one at most."""
    if "adapters" in manifest:
        return manifest["adapters"]
    named, digest = manifest["config"].get("adapter_name_or_path"), manifest["parents"].get("adapter")
    return [{"path": str(named), "hash": str(digest)}] if named and digest else []


def _not_yet_in(model: str | Path, adapter: str, manifest: dict[str, Any]) -> list[dict[str, str]]:
    """The adapters below `adapter` that are still to be merged into `model`.

    Raises:
        CheckpointError: `model` is neither the one under `adapter`, nor that one with its first adapters merged into
            it. A model of a hub is known by its name alone, and is taken for the right one.
    """
    below = _named_below(manifest)
    trained_on = str(manifest["parents"].get("model", ""))
    if trained_on == hash_checkpoint(model):
        return below
    exported = (read_manifest(model) if Path(model).is_dir() else None) or {}
    merged = [one["hash"] for one in exported.get("adapters", ())]
    if exported.get("verb") == "export" and exported["parents"].get("model") == trained_on:
        if [one["hash"] for one in below[: len(merged)]] == merged:
            return below[len(merged) :]
    elif "/" in trained_on or not Path(model).is_dir():
        return below
    raise CheckpointError(
        f"{adapter} was trained on {_base(manifest)} and what was merged into it then, and {model} is another model"
    )


def _base(manifest: dict[str, Any]) -> str:
    return str(manifest["config"].get("model_name_or_path"))
