"""`dataset_info.json`: the data sets of a folder by name, as LLaMA-Factory and the reference describe them.

An entry names a file's columns and, for ours, its `box_space`: whether three-decimal boxes are fractions of the image
or of Visual-CoT's padded square. What an entry says is honoured or refused by name, and refused where it is used: a
folder may describe data sets that are of no use here. Knows no row.
"""

from __future__ import annotations

import difflib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visrl.codecs import BOX_SPACES, BoxSpace
from visrl.plugins import is_plugin
from visrl.records import RecordError

INFO = "dataset_info.json"
STEP_COLUMNS = {name: name for name in ("chosen", "rejected", "chosen_step", "rejected_step")}
# What a column is called where an entry does not say.
SHAREGPT_COLUMNS = {"messages": "conversations", "images": "images"}
ALPACA_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "images": "images"}
TAGS = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
    "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip

_COLUMNS = {
    "prompt", "query", "response", "history", "messages", "system", "tools", "images", "videos", "audios", "kto_tag",
    "weight", *STEP_COLUMNS,
}  # fmt: skip
_KEYS = {"file_name", "formatting", "ranking", "columns", "tags", "box_space", "split"}
_FAR = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_REMEDIES = {
    "num_samples": "give max_samples to the verb instead",
    "subset": "it is of data sets on the hub: name the file of the subset",
    "folder": "it is of data sets on the hub: name the file in the folder",
}


@dataclass(frozen=True, slots=True)
class DatasetEntry:
    """What `dataset_info.json` says of one data set. `box_space` is None where nothing is said, `columns` is empty
    where it names none (`formatting` too where no entry describes the file), and `refusal` says why the data set cannot
    be used, where it cannot."""

    name: str
    path: Path
    ranking: bool = False
    columns: dict[str, str] = field(default_factory=lambda: dict(SHAREGPT_COLUMNS))
    tags: dict[str, str] = field(default_factory=lambda: dict(TAGS))
    box_space: BoxSpace | None = None
    formatting: str = "sharegpt"
    refusal: str = ""

    def column(self, name: str) -> str:
        return self.columns.get(name, "")


def read_info(folder: str | os.PathLike[str]) -> dict[str, DatasetEntry]:
    """The data sets of a folder's `dataset_info.json`, by name; those of no use here say why in `refusal`.

    Raises:
        RecordError: no such file, or no JSON object.
    """
    path = Path(folder) / INFO
    return {name: _entry(name, value, path) for name, value in read_values(path).items()}


def read_values(path: Path) -> dict[str, Any]:
    """What a `dataset_info.json` holds, as it stands.

    Raises:
        RecordError: no such file, or no JSON object.
    """
    try:
        info = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RecordError(f"no {path} ({error.strerror}): it names the data sets of this folder") from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path} is not JSON: {error}") from error
    if not isinstance(info, dict):
        what = "a list, as ms-swift has it" if isinstance(info, list) else f"{type(info).__name__}"
        raise RecordError(f"{path} must hold an object of data sets by name, not {what}")
    return info


def find_entry(path: str | os.PathLike[str], name: str | None = None) -> DatasetEntry:
    """The entry for a data file, from the `dataset_info.json` beside it; without columns where there is none.

    `path` may be the folder and `name` the data set's. Of several entries for one file that with most columns is taken.

    Raises:
        RecordError: no data set of that name, with the names there are, or one that cannot be used.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    entries = read_info(folder) if (folder / INFO).is_file() else {}
    if name is not None:
        if name not in entries:
            raise RecordError(f"{folder / INFO} has no data set {name!r}; it has: {_near(name, entries)}")
        return _usable(entries[name])
    if path.is_dir():
        raise RecordError(f"{path} is a folder: name one of its data sets: {_near('', entries)}")
    of_file = [entry for entry in entries.values() if entry.path == path]
    if not of_file:
        return DatasetEntry(path.stem, path, columns={}, formatting="")
    return _usable(max(of_file, key=lambda entry: (not entry.refusal, len(entry.columns))))


def is_named(name: str, folder: str | os.PathLike[str]) -> bool:
    """Whether every part of `name` (several are given with commas) is named in the folder's `dataset_info.json`.

    Raises:
        RecordError: the `dataset_info.json` cannot be read, and `name` is no file.
    """
    if not (Path(folder) / INFO).is_file():
        return False
    try:
        known = read_info(folder)
    except RecordError:
        if Path(name).exists():
            return False
        raise
    return all(part.strip() in known for part in name.split(","))


def check_names(name: str, folder: str | os.PathLike[str]) -> None:
    """Refuse a list of data sets that knows some of its names and not others.

    Raises:
        RecordError: with the first name that there is not, and those there are.
    """
    known = read_info(folder) if (Path(folder) / INFO).is_file() else {}
    parts = [part.strip() for part in name.split(",")]
    if any(part in known for part in parts):
        for part in parts:
            find_entry(folder, part)


def _usable(entry: DatasetEntry) -> DatasetEntry:
    if entry.refusal:
        raise RecordError(entry.refusal)
    return entry


def _near(name: str, entries: dict[str, DatasetEntry]) -> str:
    """The names there are, the most similar first."""
    names = sorted(entries, key=lambda each: (-difflib.SequenceMatcher(None, name, each).ratio(), each))
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) + more) or "none"


def _entry(name: str, value: Any, path: Path) -> DatasetEntry:
    """The entry that `value` describes, or one with the reason why it cannot be used."""
    if refusal := _refusal(value):
        return DatasetEntry(name, path.parent / name, refusal=f"{path}, data set {name!r}: {refusal}")
    formatting = value.get("formatting", "alpaca")
    columns, tags = value.get("columns", {}), value.get("tags", {})
    usual = SHAREGPT_COLUMNS if formatting == "sharegpt" else ALPACA_COLUMNS
    return DatasetEntry(
        name,
        path.parent / value["file_name"],
        value.get("ranking", False),
        usual | columns if columns or tags else {},  # without either, rows are read by the names in common use
        TAGS | tags,
        value.get("box_space"),
        formatting,
    )


def _refusal(value: Any) -> str:
    """Why an entry cannot be used; nothing where it can."""
    if not isinstance(value, dict):
        return f"an entry must be an object, this is {type(value).__name__}"
    for far in _FAR:
        if value.get(far):
            return f"it lies elsewhere ({far}): download it and give its file as file_name, without {far}"
    if not isinstance(value.get("file_name"), str):
        return "file_name must name its file"
    formatting = value.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt") and not (isinstance(formatting, str) and is_plugin(formatting)):
        return f'formatting must be "alpaca" or "sharegpt", or module:NAME of a format of your own, not {formatting!r}'
    if is_plugin(formatting) and (unread := sorted({"columns", "tags", "ranking", "box_space"} & set(value))):
        return f"{unread[0]!r} says nothing to {formatting}, which reads its rows by itself"
    columns, tags = value.get("columns", {}), value.get("tags", {})
    for part, known, what in ((columns, _COLUMNS, "columns"), (tags, set(TAGS), "tags")):
        if not (isinstance(part, dict) and all(isinstance(text, str) for text in part.values())):
            return f"{what!r} must map names to names"
        if unknown := sorted(set(part) - known):
            return f"{what} has no {unknown[0]!r}; it has {', '.join(sorted(known))}"
    speakers = [(TAGS | tags)[f"{role}_tag"] for role in ("user", "assistant", "system", "observation", "function")]
    if twice := next((name for name in speakers if speakers.count(name) > 1), None):
        return f"two roles of tags are called {twice!r}"
    if not isinstance(value.get("ranking", False), bool):
        return '"ranking" must be true or false'
    if not value.get("ranking") and (pairs := sorted(set(STEP_COLUMNS) & set(columns))):
        return f'it names a column {pairs[0]!r}, of preferences, but not "ranking": true'
    if value.get("box_space") is not None and value["box_space"] not in tuple(BOX_SPACES):
        return f"box_space must be one of {', '.join(BOX_SPACES)}, not {value['box_space']!r}"
    if value.get("split", "train") != "train":
        return f"split {value['split']!r}: a file has no splits; name the file of the split"
    for key in sorted(set(value) - _KEYS - set(_FAR)):
        if value[key] is not None:
            return f"{key!r} is not understood: " + _REMEDIES.get(key, f"there are {', '.join(sorted(_KEYS))}")
    return ""
