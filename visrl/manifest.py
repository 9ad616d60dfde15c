"""What made a file or a folder: a manifest beside every output, written last, so that its presence means "complete".
And who writes it now: one process at a time, which holds the output while it works."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from visrl import __version__
from visrl.errors import UserError
from visrl.records import write_text

NAME, STARTED = "manifest.json", "started.json"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "pillow", "numpy")


class ManifestError(UserError, ValueError):
    """An output folder that belongs to something else than what is asked for."""


class HeldError(ManifestError):
    """An output that another process is writing."""


@contextlib.contextmanager
def hold(output: str | os.PathLike[str], *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold an output folder or file for this process while it writes there; the output itself is not touched.

    The lock is the kernel's, on a hidden file beside the output: it ends with the process that has it, however that
    ends, and programs started from this one do not inherit it. `wait_s` is how long to wait for another holder.

    Raises:
        HeldError: another process has it; the message says which.
        OSError: no file can be made beside the output.
    """
    path = Path(output).resolve()
    lock = path.with_name(_lock_name(path.name))
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    lock.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and not os.access(lock.parent, os.W_OK):
        lock = path / _lock_name("")  # a mounted folder: nothing can be written beside it
    descriptor = _locked(lock, output, time.monotonic() + wait_s)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # while it is held: whoever waits for it looks whether the file is still this one
        os.close(descriptor)
        for folder in made:  # for nothing, where nothing was written
            with contextlib.suppress(OSError):
                folder.rmdir()


def _lock_name(name: str) -> str:
    long = len(os.fsencode(name)) > 240  # a file's name has 255 bytes at most
    return f".{hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest() if long else name}.lock"


def _locked(lock: Path, output: str | os.PathLike[str], until: float) -> int:
    """The descriptor of `lock`, locked and with this process's name in it."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 4096).decode(errors="replace") or "another process, just started,"
            os.close(descriptor)
            if time.monotonic() >= until:
                raise HeldError(
                    f"{output} is being written by {holder}; wait until it ends, or give another output"
                ) from None
            time.sleep(0.05)
            continue
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                os.close(descriptor)
                raise
            print(f"{lock.parent} lies on a file system without locks: let no other command write {output} meanwhile")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                break
        os.close(descriptor)  # the last holder has removed this file: take the one that is there now
    # Only words that are no key=value and no address: those may hold passwords.
    words = [Path(sys.argv[0]).name, *(word for word in sys.argv[1:] if "=" not in word and "://" not in word)]
    holder = (
        f"process {os.getpid()} on {socket.gethostname()} ({' '.join(words)[:200]}, since {time.strftime('%H:%M:%S')})"
    )
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, holder.encode(errors="replace"), 0)
    return descriptor


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
    """The manifest of `folder`, or None where none was written (nothing is complete there).

    Raises:
        ManifestError: it is damaged.
    """
    path = Path(folder) / NAME
    return _read(path) if path.is_file() else None


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path} is damaged ({error}); remove it to have the work done again") from error
    if not isinstance(values, dict):
        raise ManifestError(f"{path} is damaged; remove it to have the work done again")
    return values


def hash_files(*paths: str | os.PathLike[str]) -> str:
    """One short hash over the names and bytes of files and of all files under folders, manifests and locks left out."""
    digest = hashlib.blake2b(digest_size=16)
    for path in map(Path, paths):
        files = sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else [path]
        for file in files:
            if file.name in (NAME, STARTED) or (file.name.startswith(".") and file.suffix == ".lock"):
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


def release_folder(folder: str | os.PathLike[str]) -> None:
    """Give a claim back, where the work that began came to nothing that is worth keeping."""
    (Path(folder) / STARTED).unlink(missing_ok=True)


def is_complete(folder: str | os.PathLike[str], identity: dict[str, Any]) -> bool:
    """Whether the work that `identity` describes is complete in `folder`; claims nothing.

    Raises:
        ManifestError: the folder belongs to other work, begun or complete.
    """
    path = Path(folder) / STARTED
    complete = (Path(folder) / NAME).is_file()
    if path.is_file():
        found, wanted = _read(path), _plain(identity)
        if found != wanted and not complete and _holds_nothing(path.parent):
            return False  # what was begun there ended before it had done anything
        if found != wanted:
            differ = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
            raise ManifestError(
                f"{folder} holds other work ({', '.join(differ)} differ); give another output folder or remove this one"
            )
        return complete
    if complete:
        raise ManifestError(f"{folder} holds finished work of unknown origin; give another output folder")
    return False


def _holds_nothing(folder: Path) -> bool:
    """Whether nothing lies in `folder` beside the claim: no file with a byte in it, and no folder."""
    others = (entry for entry in folder.iterdir() if entry.name not in (STARTED, _lock_name("")))
    return all(entry.is_file() and entry.stat().st_size == 0 for entry in others)


def _plain(identity: dict[str, Any]) -> Any:
    """`identity` as it comes back from a JSON file."""
    return json.loads(json.dumps(identity, default=str))
