"""Images that rows hold as data URLs, written as files beside an output. A file is named by what is in it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from pathlib import Path
from typing import Any

_ENDINGS = {"jpeg": "jpg", "octet-stream": "bin"}


class EmbeddedImages:
    """The folder `<stem of the output>_pictures`. Rows name its files relative to the output's folder.

    What was written is taken away again where the work with it fails.
    """

    def __init__(self, out: Path) -> None:
        self.folder = out.with_name(f"{out.stem}_pictures")
        self.count = 0
        self._made: list[Path] = []
        self._seen: set[str] = set()

    def placed(self, value: Any) -> Any:
        """`value` with the path of a file in the place of every data URL of an image, however deep."""
        if isinstance(value, str):
            return self._placed(value) if value.startswith("data:image/") else value
        if isinstance(value, list):
            return [self.placed(inner) for inner in value]
        if isinstance(value, dict):
            return {key: self.placed(inner) for key, inner in value.items()}
        return value

    def _placed(self, url: str) -> str:
        head, _, body = url.partition(";base64,")
        try:
            data = base64.b64decode(body, validate=True)
        except (binascii.Error, ValueError):
            return url  # no image: who reads the row says so
        kind = head.removeprefix("data:image/")
        name = f"{hashlib.blake2b(data, digest_size=12).hexdigest()}.{_ENDINGS.get(kind, kind)}"
        path = self.folder / name
        if name not in self._seen:
            self._seen.add(name)
            self.count += 1
            if not path.is_file():
                self.folder.mkdir(parents=True, exist_ok=True)
                part = path.with_name(f".{name}.{os.getpid()}.part")
                self._made.append(path)
                try:
                    part.write_bytes(data)
                    os.replace(part, path)
                finally:
                    part.unlink(missing_ok=True)
        return f"{self.folder.name}/{name}"

    def __enter__(self) -> EmbeddedImages:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            return
        for path in self._made:
            path.unlink(missing_ok=True)
        if self._made and not any(self.folder.iterdir()):
            self.folder.rmdir()
