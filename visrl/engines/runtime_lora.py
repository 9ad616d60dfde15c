"""LoRA adapters of a running server: which it holds, load one, unload one, by vLLM's run-time end points.

An adapter is a model by its own name at the server that holds it. Its folder is read by the server, so both must see it
under the same path. Knows neither how an adapter is trained nor who asks for it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai

from visrl.engines.openai_server import EndpointError, Server

LOAD, UNLOAD = "/load_lora_adapter", "/unload_lora_adapter"
START = (
    "start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment, or `visrl api` with "
    "runtime_lora_folder"
)


async def adapters_of(server: Server) -> set[str]:
    """The names of the adapters that a server lists: the models that name another as their parent.

    Raises:
        EndpointError: it does not answer, or lists nothing.
    """
    try:
        raw = await server.api.models.with_raw_response.list()
        listed = json.loads(raw.content)["data"]
        return {str(model["id"]) for model in listed if model.get("parent")}
    except openai.OpenAIError as error:
        raise EndpointError(fault(server, error)) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EndpointError(f"{server.shown} lists no models, so that its adapters are not known") from error


async def load_adapter(server: Server, name: str, folder: Path) -> None:
    """Have a server hold the adapter in `folder` under a name.

    Raises:
        EndpointError: it has no such end point, or does not take the adapter; the message says what it said.
    """
    try:
        await _post(server, LOAD, {"lora_name": name, "lora_path": str(folder)})
    except openai.NotFoundError as error:
        if name not in str(error):
            raise EndpointError(no_end_point(server)) from error
        raise EndpointError(f"{fault(server, error)}; it must see {folder} under this very path") from error
    except openai.OpenAIError as error:
        raise EndpointError(f"the adapter {name} was not taken: {fault(server, error)}") from error


async def unload_adapter(server: Server, name: str) -> bool:
    """Have a server forget an adapter; whether it held one of this name.

    Raises:
        EndpointError: it has no such end point, or failed.
    """
    try:
        await _post(server, UNLOAD, {"lora_name": name})
    except openai.NotFoundError as error:
        if name not in str(error):
            raise EndpointError(no_end_point(server)) from error
        return False
    except openai.OpenAIError as error:
        raise EndpointError(f"the adapter {name} was not unloaded: {fault(server, error)}") from error
    return True


async def _post(server: Server, path: str, body: dict[str, Any]) -> None:
    await server.api.post(path, cast_to=str, body=body)


def no_end_point(server: Server) -> str:
    """What is said of a server that loads no adapters."""
    return f"{server.shown} loads no adapters at run time (it has no {LOAD}); {START}"


def fault(server: Server, error: openai.OpenAIError) -> str:
    """What went wrong with a request to a server, in a sentence."""
    if isinstance(error, openai.APIStatusError):
        return server.refusal(error)
    return server.unreached(error.__cause__ or error)
