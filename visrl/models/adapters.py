"""Putting an adapter on a base model, for every verb alike: each of its tensors finds its place and shape there, or
one sentence says which do not. PEFT computes; what fits is decided here, before a weight is set.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from visrl.manifest import NAME as MANIFEST
from visrl.manifest import STARTED, hash_checkpoint, read_manifest
from visrl.models.folder import ADAPTER, CheckpointError, check_files, check_hub_name, read_headers, read_object
from visrl.models.load import check_finite, load_model, reading, some
from visrl.models.parts import older_names
from visrl.progress import note

METHODS = ("LORA", "IA3", "LOHA", "LOKR")  # whose merge is tested here; DoRA and rank patterns are LoRA's
UNMERGED = ("alora_invocation_tokens", "layer_replication", "arrow_config")  # of LoRA: no weight holds what they do
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """An adapter as its folder has it: PEFT's config, and the tensors under the names of the file."""

    folder: Path
    config: Any
    tensors: dict[str, torch.Tensor]


def read_adapter(path: str | Path) -> Adapter:
    """The adapter in a folder (or under a hub name), before any base is loaded.

    Raises:
        CheckpointError: no adapter there, one of another method than can be merged, a damaged or pickled file, or
            weights that are not numbers.
    """
    from safetensors.torch import load_file

    folder = _folder(path)
    if not (folder / ADAPTER).is_file():
        raise CheckpointError(f"{path} holds no adapter (no {ADAPTER})")
    if (folder / STARTED).is_file() and not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{path} holds an unfinished training (no {MANIFEST}); run it to its end")
    check_files(folder)
    config = _config(folder)
    file = folder / WEIGHTS
    if not file.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise CheckpointError(
                f"{path} holds its weights as adapter_model.bin, a pickle, which could run anything and is not read; "
                f"write {WEIGHTS} with the program that made it (save_pretrained with safe_serialization=True)"
            )
        raise CheckpointError(f"{path} holds no adapter weights (no {WEIGHTS})")
    read_headers([file])
    with reading(path, f"{WEIGHTS} cannot be read"):
        tensors = load_file(file)
    check_finite(f"{file}: the adapter's weights", tensors)
    return Adapter(folder, config, tensors)


def load_merged(
    path: str | Path, adapters: Iterable[Adapter], device: str | None = None, **options: Any
) -> torch.nn.Module:
    """The model of a checkpoint on a device, with adapters merged into its weights, the first one first; `options` are
    those of `load_model`.

    Raises:
        CheckpointError: a model that cannot be loaded or put there, or an adapter that does not fit it.
    """
    model = load_model(path, **options)
    if device is not None:
        with reading(path, f"the model cannot be put on {device}"):
            model = model.to(device)
    for adapter in adapters:
        model = merge_adapter(model, adapter, path)
    return model.eval()


def merge_adapter(model: torch.nn.Module, adapter: Adapter, base: str | Path) -> torch.nn.Module:
    """`model`, loaded from `base`, with the adapter in its weights.

    Raises:
        CheckpointError: the adapter does not fit the model, or the sum is not a number.
    """
    merged = attach_adapter(model, adapter, base).merge_and_unload()
    check_finite(f"{base} with {adapter.folder} merged: the weights", merged.state_dict())
    return merged


def attach_adapter(model: torch.nn.Module, adapter: Adapter, base: str | Path) -> Any:
    """`model`, loaded from `base`, as PEFT wraps it, every tensor of the adapter in its place.

    What it was trained on below it must be in the model already: chain.py says what that is.

    Raises:
        CheckpointError: counts and names the tensors that have no place, another shape, or are not there.
    """
    _note_base(adapter, base)
    wrapped = place_adapter(model, adapter, base)
    if changes_nothing(adapter):
        note(f"{adapter.folder} changes nothing: its weights are as they were before the first step of training")
    return wrapped


def place_adapter(model: torch.nn.Module, adapter: Adapter, base: str | Path) -> Any:
    """`attach_adapter` without a word. On a model of the `meta` device nothing is computed, and all is checked.

    Raises:
        CheckpointError: as `attach_adapter`.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    adapter = replace(adapter, config=deepcopy(adapter.config))  # PEFT writes into it, and it may be placed again
    tensors = _at_home(adapter, model)
    _check_shared(adapter.folder, tensors, model)
    with reading(adapter.folder, f"the adapter does not fit {base}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's hints on what is checked here
        wrapped = get_peft_model(model, adapter.config)  # type: ignore[arg-type]
        wanted = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        _check_places(adapter.folder, base, tensors, wanted, wrapped.state_dict())
        placed: Any = set_peft_model_state_dict(wrapped, tensors)
    if left := placed.unexpected_keys:
        raise CheckpointError(f"{adapter.folder}: {len(left)} tensors have no place in {base}: {some(left)}")
    return wrapped.eval()


def changes_nothing(adapter: Adapter) -> bool:
    """Whether the adapter leaves its base as it is: a factor of every product is zero (or, for IA3, all are ones)."""
    ones = adapter.config.peft_type == "IA3"
    modules: dict[str, list[bool]] = defaultdict(list)
    for name, tensor in adapter.tensors.items():
        module, found, factor = _parted(name)
        if not found or "magnitude" in factor:
            return False
        modules[module].append(not bool((tensor - 1 if ones else tensor).any()))
    return all(any(idle) for idle in modules.values())


# --- What the folder says ---------------------------------------------------------------------------------------------


def _folder(path: str | Path) -> Path:
    """The folder of an adapter, fetched where it is a hub's."""
    if Path(path).is_dir():
        return Path(path)
    if Path(path).exists():
        raise CheckpointError(f"{path} is a file; name the folder that holds {ADAPTER} and {WEIGHTS}")
    check_hub_name(str(path), "adapter", ADAPTER)
    from huggingface_hub import snapshot_download

    with reading(path, "the adapter cannot be fetched"):
        return Path(snapshot_download(str(path), allow_patterns=["adapter_*"]))


def _config(folder: Path) -> Any:
    """PEFT's config of the adapter; what this release of PEFT does not know is refused, not left out."""
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    file = folder / ADAPTER
    values = read_object(file)
    method = str(values.get("peft_type"))
    if method not in METHODS:
        raise CheckpointError(
            f"{file}: adapters of the type {method} are not merged here; known: {', '.join(METHODS)} (DoRA is LORA's)"
        )
    known = set(PEFT_TYPE_TO_CONFIG_MAPPING[method].__dataclass_fields__)  # type: ignore[index]
    unknown = sorted(key for key, value in values.items() if value and key not in {*known, "runtime_config"})
    if unknown:
        raise CheckpointError(
            f"{file} asks for {', '.join(unknown)}, which the installed peft does not know; update it"
        )
    if asked := [key for key in UNMERGED if values.get(key)]:
        raise CheckpointError(f"{file}: {', '.join(asked)} cannot be merged into weights")
    with reading(folder, f"{ADAPTER} cannot be read"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of keys without a value that this release does not know
        config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    return config


def _note_base(adapter: Adapter, base: str | Path) -> None:
    """Say in a line where the adapter names another base than the one it is put on."""
    named = adapter.config.base_model_name_or_path
    if not named or str(named) == str(base) or Path(named).resolve() == Path(base).resolve():
        return
    manifest = read_manifest(adapter.folder) or {}
    if manifest.get("parents", {}).get("model") != hash_checkpoint(base):
        note(f"{adapter.folder} was trained on {named}, and is put on {base}")


# --- Where its tensors belong -----------------------------------------------------------------------------------------


def _check_places(
    folder: Path,
    base: str | Path,
    tensors: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.Tensor],
    there: Mapping[str, torch.Tensor],
) -> None:
    """Hold the file's tensors against those that the adapter has on this base, and the base's own (embeddings that
    were saved along)."""
    places = {**there, **wanted}
    faults = []
    if homeless := [name for name in tensors if name not in places]:
        faults.append(f"{len(homeless)} of {len(tensors)} tensors have no place in it: {some(homeless)}")
    differ = [
        f"{name} is {list(tensor.shape)}, not {list(places[name].shape)}"
        for name, tensor in tensors.items()
        if name in places and tensor.shape != places[name].shape
    ]
    if differ:
        faults.append(f"{len(differ)} have another shape: {some(differ)}")
    if missing := [name for name in wanted if name not in tensors]:
        faults.append(f"{len(missing)} of {len(wanted)} that {ADAPTER} asks for are not in the file: {some(missing)}")
    if faults:
        raise CheckpointError(
            f"{folder}: the adapter does not fit {base}: {'; '.join(faults)}. Give the model that it was trained on"
        )


def _check_shared(folder: Path, tensors: Iterable[str], model: torch.nn.Module) -> None:
    """Refuse a change to weights that two layers share: merged, it would change both."""
    owners = defaultdict(list)
    for name, module in model.named_modules():
        for weight in module.parameters(recurse=False):
            owners[id(weight)].append(name)
    shared = {name: names for names in owners.values() if len(names) > 1 for name in names}
    for tensor in tensors:
        layer, found, _ = _parted(tensor.removeprefix(PREFIX))
        if found and layer in shared:
            raise CheckpointError(
                f"{folder}: the adapter changes {layer}, whose weights are those of "
                f"{' and '.join(name for name in shared[layer] if name != layer)}, too (tie_word_embeddings); merging "
                "would change both"
            )


def _parted(name: str) -> tuple[str, bool, str]:
    """The layer in the name of an adapter's tensor, whether it is a factor of a change to it, and the rest."""
    found = re.search(r"\.(lora|ia3|hada|lokr)_", name)
    return (name[: found.start()], True, name[found.start() + 1 :]) if found else (name, False, "")


def _at_home(adapter: Adapter, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors, those of older releases' names under today's, and its config changed alike.

    Only what has no place by its own name is renamed, and only where the new name is a layer of the model.
    """
    layers = {name for name, module in model.named_modules() if not list(module.children())}
    moves = [move for move in older_names(model) if not any(name.startswith(move[0]) for name in layers)]
    tensors, used = {}, set()
    for name, tensor in adapter.tensors.items():
        inner = name.removeprefix(PREFIX)
        move = next((move for move in moves if inner.startswith(move[0])), None)
        if move and _layer_of(moved := move[1] + inner.removeprefix(move[0]), layers):
            name = PREFIX + moved
            used.add(move)
        tensors[name] = tensor
    if used and len(tensors) == len(adapter.tensors):
        renamed = ", ".join(f"{old}* are {new}* now" for old, new in sorted(used))
        note(f"{adapter.folder}: the adapter names layers as an older release did; {renamed}")
        _move_config(adapter.config, sorted(used), layers)
    return tensors


def _layer_of(name: str, layers: set[str]) -> str | None:
    """The layer to which a tensor of this name belongs."""
    parts = name.split(".")
    return next((start for n in range(len(parts), 0, -1) if (start := ".".join(parts[:n])) in layers), None)


def _move_config(config: Any, moves: Iterable[tuple[str, str]], layers: set[str]) -> None:
    """Give the layers that an adapter's config names by older names their present ones."""

    def moved(name: str) -> str:
        for old, new in moves:
            bare = name.removeprefix("^").replace("\\.", ".")
            if bare.startswith(old):
                return new + bare.removeprefix(old)
        return name

    def before(layer: str) -> str:
        return next((old + layer.removeprefix(new) for old, new in moves if layer.startswith(new)), layer)

    for key in ("target_modules", "exclude_modules", "modules_to_save", "feedforward_modules"):
        named = getattr(config, key, None)
        if isinstance(named, str) and named != "all-linear":
            setattr(config, key, sorted(layer for layer in layers if re.fullmatch(named, before(layer))))
        elif named and not isinstance(named, str):
            setattr(config, key, sorted(moved(name) for name in named))
    for key in ("rank_pattern", "alpha_pattern"):
        if pattern := getattr(config, key, None):
            setattr(config, key, {moved(name): value for name, value in pattern.items()})
