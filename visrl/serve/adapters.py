"""LoRA adapters that clients have loaded while the server runs, by vLLM's two end points: off unless a folder is named.

An adapter is read from below that folder, as safetensors, within bounds of number and size, and held against the model
before anything is asked of it. It is a model of its own name then. Knows no engine: a backend checks what fits.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from visrl.models.adapters import WEIGHTS, Adapter, read_adapter
from visrl.models.folder import CheckpointError
from visrl.serve.errors import RequestError

Name = Annotated[str, Field(min_length=1, max_length=200)]
PLAIN_NAME = re.compile(r"[\w.@/-]+")
Asked = TypeVar("Asked", bound=BaseModel)
Check = Callable[[Adapter], None]


class LoadAdapter(BaseModel):
    """The body of `POST /v1/load_lora_adapter`, as vLLM has it."""

    model_config = ConfigDict(extra="forbid")

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False
    is_3d_lora_weight: bool = False


class UnloadAdapter(BaseModel):
    """The body of `POST /v1/unload_lora_adapter`, as vLLM has it."""

    model_config = ConfigDict(extra="forbid")

    lora_name: Name
    lora_int_id: int | None = None


@dataclass(frozen=True, slots=True)
class HeldAdapter:
    """An adapter under the name that clients ask for."""

    adapter: Adapter
    created: int


@dataclass(slots=True)
class RuntimeAdapters:
    """The adapters of a server: at most `most`, read from below `folder`, of at most so many bytes each."""

    base: str  # the model's own name
    folder: Path
    most: int
    most_bytes: int
    held: dict[str, HeldAdapter] = field(default_factory=dict)
    _loading: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def load(self, asked: LoadAdapter, check: Check) -> str:
        """Read an adapter, hold it against the model, and hold it.

        Raises:
            RequestError: 400 for a name that is taken, a path outside the folder, or one adapter more than may be; 404
                for a folder that is not there; 400 for what is no adapter of this model.
        """
        name = asked.lora_name
        async with self._loading:  # one at a time: each is read into memory
            self._check_name(asked)
            folder = self._folder_of(asked)
            try:
                adapter = await asyncio.to_thread(self._read, folder, check)
            except CheckpointError as error:
                raise RequestError(400, str(error)) from error
            self.held[name] = HeldAdapter(adapter, int(time.time()))
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, name: str) -> str:
        """Forget an adapter; what is being sampled under it is sampled to its end.

        Raises:
            RequestError: 404 where there is none of this name.
        """
        if self.held.pop(name, None) is None:
            raise RequestError(404, f"The lora adapter '{name}' cannot be found.", "model_not_found")
        return f"Success: LoRA adapter '{name}' removed successfully."

    def _check_name(self, asked: LoadAdapter) -> None:
        name = asked.lora_name
        if asked.is_3d_lora_weight:
            raise RequestError(400, "is_3d_lora_weight: no such weights are read here; leave it out")
        if not PLAIN_NAME.fullmatch(name):
            raise RequestError(400, f"lora_name {name[:80]!r}: letters, digits and . _ - @ / make a name")
        if name == self.base:
            raise RequestError(400, f"The lora adapter '{name}' conflicts with a served base model.")
        if name in self.held and not asked.load_inplace:
            raise RequestError(
                400,
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
                "'load_inplace' to True.",
            )
        if name not in self.held and len(self.held) >= self.most:
            raise RequestError(
                400, f"{len(self.held)} adapters are loaded, as many as may be (max_loras); unload one first"
            )

    def _folder_of(self, asked: LoadAdapter) -> Path:
        """The folder that a path names, links followed."""
        allowed, path = self.folder.resolve(), asked.lora_path
        if "\0" in path:
            raise RequestError(400, "lora_path holds a NUL character")
        folder = (allowed / path).resolve()
        if not folder.is_relative_to(allowed):
            raise RequestError(400, f"lora_path: adapters are read from below {allowed} alone (runtime_lora_folder)")
        if not folder.is_dir():
            raise RequestError(404, f"Loading lora {asked.lora_name} failed: there is no folder {path[:200]}")
        return folder

    def _read(self, folder: Path, check: Check) -> Adapter:
        file = folder / WEIGHTS
        if file.is_file() and file.stat().st_size > self.most_bytes:
            raise CheckpointError(
                f"{file} has {file.stat().st_size:,} bytes, and {self.most_bytes:,} are allowed here (max_lora_bytes)"
            )
        adapter = read_adapter(folder)
        if adapter.config.peft_type != "LORA":
            raise CheckpointError(f"{folder} holds an adapter of the type {adapter.config.peft_type}, and no LoRA")
        check(adapter)
        return adapter


def add_routes(app: FastAPI, adapters: RuntimeAdapters | None, check: Check) -> None:
    """The two end points; without `adapters` each says that it is switched off."""

    async def load(request: Request) -> Response:
        asked = await _read(request, LoadAdapter)
        return PlainTextResponse(await _on(adapters).load(asked, check))

    async def unload(request: Request) -> Response:
        asked = await _read(request, UnloadAdapter)
        return PlainTextResponse(_on(adapters).unload(asked.lora_name))

    app.post("/v1/load_lora_adapter")(load)
    app.post("/v1/unload_lora_adapter")(unload)


def _on(adapters: RuntimeAdapters | None) -> RuntimeAdapters:
    if adapters is None:
        raise RequestError(
            404,
            "this server loads no adapters while it runs; start it with runtime_lora_folder: the folder they lie in",
        )
    return adapters


async def _read(request: Request, kind: type[Asked]) -> Asked:
    body: Awaitable[Any] = request.receive()
    try:
        return kind.model_validate_json((await body)["body"])
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:80] for part in first["loc"])
        raise RequestError(400, f"{where}: {first['msg']}" if where else first["msg"], param=where or None) from error
