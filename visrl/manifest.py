"""What made a file or a folder: a manifest beside every output, written last, so that its presence means "complete"."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from visrl import __version__
from visrl.records import write_text

NAME, STARTED = "manifest.json", "started.json"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "pillow", "numpy")


class ManifestError(ValueError):
    """An output folder that belongs to something else than what is asked for."""


def write_manifest(
    folder: str | os.PathLike[str], *, verb: str, config: dict[str, Any], parents: dict[str, str], **facts: Any
) -> dict[str, Any]:
    """Write the manifest of `folder`: what ran, on what, with which versions. Replaces an older one at once."""
    manifest = {
        "verb": verb,
        "config": config,
        "parents": parents,
        "versions": {"visrl": __version__, **package_versions(PACKAGES)},
        **facts,
    }
    write_text(Path(folder) / NAME, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return manifest


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """The installed version of each package."""
    return {name: importlib.metadata.version(name) for name in names}


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The manifest of `folder`, or None where none was written (nothing is complete there)."""
    path = Path(folder) / NAME
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def hash_files(*paths: str | os.PathLike[str]) -> str:
    """One short hash over the names and bytes of files and of all files under folders, manifests left out."""
    digest = hashlib.blake2b(digest_size=16)
    for path in map(Path, paths):
        files = sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else [path]
        for file in files:
            if file.name in (NAME, STARTED):
                continue
            digest.update(file.name.encode() + b"\0")
            with open(file, "rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
    return digest.hexdigest()


def hash_checkpoint(path: str | os.PathLike[str]) -> str:
    """One short hash over a checkpoint's folder: weights, settings, tokenizer and processor. A hub name is its own."""
    folder = Path(path)
    if not folder.is_dir():
        return str(path)
    return hash_files(*(file for kind in ("*.safetensors", "*.json", "*.jinja") for file in sorted(folder.glob(kind))))


def claim_folder(folder: str | os.PathLike[str], identity: dict[str, Any]) -> bool:
    """Claim `folder` for the work that `identity` describes; True where that work is already complete there.

    Raises:
        ManifestError: the folder belongs to other work, begun or complete.
    """
    if is_complete(folder, identity):
        return True
    write_text(Path(folder) / STARTED, json.dumps(_plain(identity), indent=1, ensure_ascii=False) + "\n")
    return False


def is_complete(folder: str | os.PathLike[str], identity: dict[str, Any]) -> bool:
    """Whether the work that `identity` describes is complete in `folder`; claims nothing.

    Raises:
        ManifestError: the folder belongs to other work, begun or complete.
    """
    path = Path(folder) / STARTED
    complete = (Path(folder) / NAME).is_file()
    if path.is_file():
        found, wanted = json.loads(path.read_text(encoding="utf-8")), _plain(identity)
        if found != wanted:
            differ = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
            raise ManifestError(
                f"{folder} holds other work ({', '.join(differ)} differ); give another output folder or remove this one"
            )
        return complete
    if complete:
        raise ManifestError(f"{folder} holds finished work of unknown origin; give another output folder")
    return False


def _plain(identity: dict[str, Any]) -> Any:
    """`identity` as it comes back from a JSON file."""
    return json.loads(json.dumps(identity, default=str))
