"""The generation of one iteration at scale: in shards, and behind a server that is started for its policy."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from visrl.config import ConfigError
from visrl.evolve.config import GenerateConfig, ServerConfig
from visrl.evolve.generate import (
    TRAJECTORIES,
    VERDICTS,
    format_counts,
    generate,
    generation_identity,
    generation_questions,
)
from visrl.evolve.tokens import add_tokens
from visrl.manifest import claim_folder, hold, is_complete, read_manifest, write_manifest
from visrl.records import RecordError

SERVED_NAME = "policy"  # how the policy is called at a server of our own starting
PIXEL_LIMITS = ("image_max_pixels", "crop_max_pixels")


def generate_in_shards(asked: GenerateConfig, shards: int, server: ServerConfig) -> None:
    """Generate, in as many shards, those that other machines have made left as they are, and join them."""
    if shards == 1:
        generate_served(asked, server)
        return
    parts = [shard_config(asked, number, shards) for number in range(1, shards + 1)]
    for part in parts:
        generate_served(part, server)
    merge_shards([part.output_dir for part in parts], asked.output_dir)


def shard_config(asked: GenerateConfig, number: int, of: int) -> GenerateConfig:
    """One shard of a generation, in a folder beside it."""
    folder = asked.output_dir.with_name(f"generate-{number}-of-{of}")
    return asked.model_copy(update={"shard": f"{number}/{of}", "output_dir": folder})


def merge_shards(folders: Sequence[Path], out: Path) -> Path:
    """The files of complete shards, given in their order, one after another in `out`, with their counts added up.

    Raises:
        RecordError: a shard that is not complete.
    """
    with hold(out):
        return _merge_shards(folders, out)


def _merge_shards(folders: Sequence[Path], out: Path) -> Path:
    manifests = [read_manifest(folder) for folder in folders]
    for folder, manifest in zip(folders, manifests, strict=True):
        if manifest is None:
            raise RecordError(f"the shard {folder} is not complete")
    found = [manifest for manifest in manifests if manifest is not None]
    identity = {**found[0]["config"], "shard": "1/1", "shards": len(folders)}
    if claim_folder(out, identity):
        return out
    for name in (TRAJECTORIES, VERDICTS):
        with open(out / f"{name}.part", "wb") as whole:
            for folder in folders:
                with open(folder / name, "rb") as part:
                    shutil.copyfileobj(part, whole)
        os.replace(out / f"{name}.part", out / name)
    counts: Counter[str] = Counter()
    requests: dict[str, Counter[str]] = {}
    for manifest in found:
        counts.update(manifest["counts"])
        for role, ended in manifest["requests"].items():
            requests.setdefault(role, Counter()).update(ended)
    facts: dict[str, Any] = {
        key: sum(manifest[key] for manifest in found) for key in ("questions", "trajectories", "seconds")
    }
    same = {key: found[0][key] for key in ("crop_rule", "critic", "seed")}
    facts |= {"counts": dict(counts), "requests": requests, **add_tokens(found)}
    write_manifest(out, verb="generate", config=identity, parents=found[0]["parents"], **facts, **same)
    print(f"{len(folders)} shards, {facts['questions']} questions: {format_counts(counts)} → {out}")
    return out


# --- Behind a server --------------------------------------------------------------------------------------------------


def generate_served(asked: GenerateConfig, server: ServerConfig) -> None:
    """Generate, with the policy behind a server where one is configured and there is work left for it.

    Raises:
        EndpointError: the server does not come up.
    """
    if server.server is None:
        generate(asked)
        return
    # Any address will do to ask whether the work is done: it is no part of what a generation is.
    asked = asked.model_copy(update={"policy_url": ("http://127.0.0.1/v1",), "policy_served_name": SERVED_NAME})
    if is_complete(asked.output_dir, generation_identity(asked, generation_questions(asked))):
        generate(asked)
        return
    with _served_policy(asked, server) as url:
        generate(asked.model_copy(update={"policy_url": (url,)}))


@contextmanager
def _served_policy(asked: GenerateConfig, server: ServerConfig) -> Iterator[str]:
    from visrl.engines.server_process import free_port, served

    port = free_port()
    command = server_command(asked, server, port)
    print(f"starting {' '.join(command)}", flush=True)
    with served(command, port, SERVED_NAME, asked.output_dir / "server.log", server.server_start_s) as url:
        yield url


def server_command(asked: GenerateConfig, server: ServerConfig, port: int) -> list[str]:
    """The command line that serves the policy of a generation under the name "policy" on a local port.

    Raises:
        ConfigError: a limit of pixels that the command does not pass on, or passes on and nobody has set.
    """
    from visrl.engines.open import model_settings, open_served_encoder

    settings = model_settings(asked)
    if server.server == "vllm":
        from visrl.engines.server_process import vllm_command

        return vllm_command(
            asked.model_name_or_path,
            open_served_encoder(asked, settings),
            port,
            served_name=SERVED_NAME,
            max_images=2 if asked.max_looks is None else 1 + asked.max_looks,
            trust_remote_code=asked.trust_remote_code,
            more=server.server_args,
        )
    assert server.server is not None
    words = [*server.server, *server.server_args]
    values: dict[str, object] = {"model": asked.model_name_or_path, "name": SERVED_NAME, "port": port}
    for key in PIXEL_LIMITS:
        passed_on = any(f"{{{key}}}" in word for word in words)
        if not passed_on and getattr(asked, key) is not None:
            raise ConfigError(f"server: {key} is set, so the command must pass it on: put {{{key}}} where it belongs")
        values[key] = getattr(settings, key)
        if passed_on and values[key] is None:
            raise ConfigError(f"server: the command passes {{{key}}} on, and neither config nor checkpoint sets it")
    for key, value in values.items():
        words = [word.replace(f"{{{key}}}", str(value)) for word in words]
    return words
