"""What must be true of a checkpoint's folder before any library reads it: its files are there, readable, of one size.

Every refusal is a `CheckpointError` whose message names the file. Imports no torch: a slip is refused at once.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visrl.errors import UserError
from visrl.manifest import NAME as MANIFEST
from visrl.manifest import STARTED, read_manifest

ADAPTER = "adapter_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
READ = (".json", ".jinja", ".safetensors", ".model", ".txt")  # what loading reads of a folder
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_WAIT_S = 10
LARGEST_JSON = 64_000_000  # bytes; settings are a few thousand, the longest lists of added tokens some millions
MOST_PARTS = 4096  # of anything that a config counts: layers, heads, experts, labels
COUNTS = re.compile(r"depth|(?:num|n)_(?!.*(?:embeddings|tokens)$).*|.*_layers|.*_depth")  # entries of a table are none


class CheckpointError(UserError, ValueError):
    """A folder or name that holds no model this program can load; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What the headers of a folder's safetensors files say: tensors, numbers in all, and the commonest type."""

    tensors: int
    numbers: int
    dtype: str


def read_object(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint.

    Raises:
        CheckpointError: no such file, or something else in it.
    """
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise CheckpointError(f"{path} is larger than any file of settings ({path.stat().st_size:,} bytes)")
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is damaged: it is not UTF-8 text") from error
    except RecursionError as error:
        raise CheckpointError(f"{path} is damaged: it is nested too deeply") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is damaged: it holds no object of settings")
    return values


def check_folder(path: str | Path) -> None:
    """Refuse early and clearly what is no checkpoint folder, and a hub name under which nothing is found.

    Raises:
        CheckpointError: nothing there, an adapter only, unfinished work, or files that cannot be read.
    """
    folder = Path(path)
    if not folder.exists():
        check_hub_name(str(path), "model", "config.json")
        return
    if not folder.is_dir():
        raise CheckpointError(f"{path} is a file; name the folder that holds config.json and *.safetensors")
    if (folder / ADAPTER).is_file() and not (folder / "config.json").is_file():
        base = read_object(folder / ADAPTER).get("base_model_name_or_path")
        raise CheckpointError(
            f"{path} holds an adapter without its base model; set model_name_or_path={base} and "
            f"adapter_name_or_path={path}, or merge it first with `visrl export`"
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{path} is no model folder: it has no config.json")
    if (folder / STARTED).is_file() and not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"{path} holds unfinished work: it has no {MANIFEST}; run the command that writes it to its end"
        )
    check_files(folder)
    _check_counts(folder / "config.json", read_object(folder / "config.json"))


def refuse_reward_model(path: str | Path) -> None:
    """Refuse a reward model where a policy is wanted: its weights say how good a text is, and write none.

    Raises:
        CheckpointError: `stage: rm` made the folder.
    """
    manifest = read_manifest(path) if Path(path).is_dir() else None
    trained = manifest.get("config") if manifest is not None else None
    if isinstance(trained, dict) and trained.get("stage") == "rm":
        raise CheckpointError(
            f"{path} is a reward model, which scores texts and writes none; name it among the rewards of an online "
            f"training, as model:{path}"
        )


def check_files(folder: Path) -> None:
    """Every file that loading reads must be one (no pipe, no link to nothing), and every JSON in it an object.

    Raises:
        CheckpointError: the first file of which this is not so.
    """
    for file in sorted(folder.iterdir()):
        if file.suffix not in READ:
            continue
        if not file.is_file():
            what = "a link to nothing" if file.is_symlink() and not file.exists() else "no regular file"
            raise CheckpointError(f"{file} cannot be read: it is {what}")
        if file.suffix == ".json" and file.name not in ("tokenizer.json", "vocab.json"):
            read_object(file)


def check_hub_name(name: str, what: str, file: str) -> None:
    """Whether the hub has `name` (or this machine a copy of it); what is no such name is a missing folder.

    Raises:
        CheckpointError: one sentence, after one question to the hub at most.
    """
    if not HUB_NAME.fullmatch(name):
        raise CheckpointError(f"no {what} at {name}: there is no such folder{_near(name)}")
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, file), str):
        return
    if Path(name).parent.is_dir():
        raise CheckpointError(f"no {what} at {name}: there is no such folder{_near(name)}")
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(
            f"no {what} at {name}: there is no such folder, and no copy of a hub's {what} of that name on this machine "
            "(HF_HUB_OFFLINE is set)"
        )
    try:
        HfApi().model_info(name, timeout=HUB_WAIT_S)
    except Exception as error:  # whichever HTTP library the hub's client uses, its errors share no other base
        raise CheckpointError(
            f"no {what} at {name}: there is no such folder, and the hub gives none ({first_line(error)})"
        ) from error


def _near(name: str) -> str:
    """What to add to a sentence about a missing folder: the nearest one that is there."""
    parent = Path(name).expanduser().parent
    there = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    near = difflib.get_close_matches(Path(name).name, there, n=1)
    return f"; did you mean {parent / near[0]}?" if near else ""


def _check_counts(file: Path, values: Any, key: str = "") -> None:
    """Refuse numbers of parts that no model has, before a list of so many is made."""
    if isinstance(values, dict):
        for name, value in values.items():
            _check_counts(file, value, name)
    elif isinstance(values, int) and abs(values) > MOST_PARTS and COUNTS.fullmatch(key):
        raise CheckpointError(f"{file} is damaged: {key} is {values}")


def read_weights(path: str | Path) -> Weights | None:
    """What the folder's safetensors hold, by their headers alone; None for a hub name.

    Raises:
        CheckpointError: no weights, pickled ones only, or a file that is missing, cut or damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        return None
    return read_headers([folder / SINGLE] if (folder / SINGLE).is_file() else _shards(folder))


def read_headers(files: list[Path]) -> Weights:
    """What the headers of safetensors files say.

    Raises:
        CheckpointError: a file that is missing, cut or damaged.
    """
    from safetensors import SafetensorError, safe_open

    tensors = numbers = 0
    dtypes: Counter[str] = Counter()
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (no mapping)
                    part = opened.get_slice(name)
                    size = 1
                    for side in part.get_shape():
                        size *= side
                    tensors, numbers = tensors + 1, numbers + size
                    dtypes[part.get_dtype()] += size
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read ({error.strerror or error})") from error
        except SafetensorError as error:
            raise CheckpointError(f"{file}: the weights cannot be loaded, the file is damaged ({error})") from error
    if not tensors:
        raise CheckpointError(f"{', '.join(map(str, files))}: no weights in it")
    return Weights(tensors, numbers, dtypes.most_common(1)[0][0])


def _shards(folder: Path) -> list[Path]:
    """The files that a folder's index names."""
    if not (folder / INDEX).is_file():
        pickled = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(kind))
        if pickled:
            raise CheckpointError(
                f"{folder} holds its weights as {pickled[0]}, a pickle, which could run anything and is not read; "
                "write them as safetensors with the program that made them (save_pretrained of a current transformers)"
            )
        raise CheckpointError(f"{folder} holds no weights: neither {SINGLE} nor {INDEX}")
    places = read_object(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()) or not places:
        raise CheckpointError(f"{folder / INDEX} is damaged: weight_map must name the file of every tensor")
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{folder / INDEX} names {name}, and there is no such file beside it")
    return [folder / name for name in names]


def first_line(error: BaseException) -> str:
    """An error of a library in one line: its first, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
