"""`visrl export`: merge an adapter into its base model, in fp32, and say how far the merged model deviates."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError

from visrl.config import Adapters, CheckpointConfig, ConfigError, as_config
from visrl.engines.open import open_encoder
from visrl.engines.server_process import vllm_command
from visrl.manifest import NAME as MANIFEST
from visrl.manifest import STARTED, claim_folder, hash_checkpoint, hash_files, hold, is_complete, write_manifest
from visrl.models.adapters import Adapter, attach_adapter, load_merged, read_adapter
from visrl.models.chain import adapter_chain, described
from visrl.models.encode import Encoder
from visrl.models.folder import CheckpointError, first_line, refuse_reward_model
from visrl.models.load import check_finite, load_model, quiet, some
from visrl.models.settings import ModelSettings
from visrl.train.card import Card, card_text, history, trainings

MOST_APART = 1e-3  # of token log-probabilities, in the same type: rounding stays far below
STAGE = "unfinished"  # the folder inside the output in which everything is written first


class ExportConfig(CheckpointConfig):
    """What `visrl export` takes, with the names of LLaMA-Factory's merge configs."""

    adapter_name_or_path: Adapters = Field(min_length=1)
    """Merged one after another; with the last of a chain named, those that it was trained on come by themselves."""
    export_dir: Path
    finetuning_type: Literal["lora"] = "lora"
    export_size: float = 5.0  # GB a shard
    export_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    export_device: Literal["cpu", "auto"] = "cpu"  # where the fp32 copy is merged; auto: on a GPU where there is one
    export_legacy_format: bool = False


def export(config: ExportConfig | str | Path | None = None, /, **keys: Any) -> Path:
    """Merge LoRA adapters into their base model: in fp32, checked on a few real prompts, cast last, written, read back.

    Args:
        config: an `ExportConfig`, the path of a YAML file of its keys, or nothing where `keys` say it all.
        keys: keys of `ExportConfig`, over what `config` says; an unknown one is refused with the nearest known one.

    Returns:
        `export_dir`: weights as safetensors, processor, settings, a model card (`README.md`) and manifest, with the
        largest deviation of the merged model from the adapter in token log-probabilities (nats).

    Raises:
        CheckpointError: no model or no adapter at the paths given, one that does not fit the other, a merged model that
            deviates from the adapter, or a disk that takes no more. Nothing is called merged, then.
        ConfigError: an unknown key, pickled weights asked for, or a folder that holds something else.
        ManifestError: the folder belongs to other work, or another process writes it.
    """
    config = as_config(ExportConfig, config, keys)
    if config.export_legacy_format:
        raise ConfigError("export_legacy_format: weights are written as safetensors only")
    with hold(config.export_dir):
        chain = adapter_chain(config.model_name_or_path, config.adapter_name_or_path)
        for path in (config.model_name_or_path, *chain):
            refuse_reward_model(path)
        *below, adapter = [read_adapter(one) for one in chain]
        _check_place(config)
        identity = {
            **config.model_dump(mode="json", exclude={"export_dir"}),
            "adapter": hash_files(*sorted(adapter.folder.glob("*.safetensors"))),
            "adapters": described(chain),
        }
        if is_complete(config.export_dir, identity):
            print(f"{config.export_dir} is already complete")
        else:
            _export(config, below, adapter, identity)
    return config.export_dir


def _export(config: ExportConfig, below: list[Adapter], adapter: Adapter, identity: dict[str, Any]) -> None:
    settings = ModelSettings.load(config.model_name_or_path, adapter.folder)
    encoder = open_encoder(config, settings)
    device = "cuda" if config.export_device == "auto" and torch.cuda.is_available() else "cpu"
    base = load_merged(config.model_name_or_path, below, device, trust_remote_code=config.trust_remote_code)
    probe = _probe(encoder).to(device)
    of_base = _logps(base, probe, encoder)
    adapted = attach_adapter(base, adapter, config.model_name_or_path)
    of_adapter = _logps(adapted, probe, encoder)
    merged = adapted.merge_and_unload()
    deviation = _largest(_logps(merged, probe, encoder) - of_adapter)
    if not deviation <= MOST_APART:  # NaN is not, either
        raise CheckpointError(
            f"{adapter.folder} is not merged: the merged model deviates from the adapter by {deviation:.1e} in token "
            f"log-probabilities, more than {MOST_APART:.0e}"
        )
    dtype: torch.dtype = getattr(torch, config.export_dtype)
    merged = merged.to(dtype)
    check_finite(f"as {config.export_dtype} the merged weights", merged.state_dict())
    parents = {"adapter": identity["adapter"], "model": hash_checkpoint(config.model_name_or_path)}
    out = config.export_dir
    with _staged(out) as stage, quiet():
        merged.save_pretrained(stage, max_shard_size=f"{config.export_size}GB")
        encoder.processor.save_pretrained(stage)
        settings.save(stage)
        written = load_model(stage, dtype=dtype, trust_remote_code=config.trust_remote_code).to(device).eval()
        _check_written(out, written, merged)
        facts: dict[str, Any] = {
            "adapters": identity["adapters"],
            "max_logp_change": _largest(of_adapter - of_base),
            "max_logp_deviation": deviation,
            f"max_logp_deviation_{config.export_dtype}": _largest(_logps(written, probe, encoder) - of_adapter),
        }
        (stage / "README.md").write_text(card_text(_card(config, encoder, facts)), encoding="utf-8")
        claim_folder(out, identity)
        for file in sorted(stage.iterdir()):
            file.replace(out / file.name)
    write_manifest(out, verb="export", config=identity, parents=parents, **facts)
    print(
        f"merged; token log-probabilities move by at most {facts['max_logp_change']:.1e}, and deviate by at most "
        f"{deviation:.1e} in fp32 and {facts[f'max_logp_deviation_{config.export_dtype}']:.1e} as "
        f"{config.export_dtype} → {out}"
    )


def _card(config: ExportConfig, encoder: Encoder, facts: Mapping[str, Any]) -> Card:
    """What the model card of this export is made of."""
    base, before = history(config.model_name_or_path)
    folder = str(config.export_dir)
    return Card(
        folder=folder,
        base=base,
        trainings=[*before, *trainings([one["path"] for one in facts["adapters"]])],
        settings=encoder.settings,
        dtype=config.export_dtype,
        deviation=facts[f"max_logp_deviation_{config.export_dtype}"],
        size=encoder.limits() if encoder.family.pixel_limits else None,
        vllm=vllm_command(folder, encoder, 8000, served_name=folder, max_images=2),
    )


def _check_place(config: ExportConfig) -> None:
    """Refuse to write over what is not an export's.

    Raises:
        ConfigError: names the folder.
    """
    out = config.export_dir
    for used in (config.model_name_or_path, *config.adapter_name_or_path):
        if out.resolve() == Path(used).resolve():
            raise ConfigError(f"export_dir: {out} is what is merged itself; give another folder")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"export_dir: {out} is a file; give a folder")
    ours = out.is_dir() and any((out / name).is_file() for name in (STARTED, MANIFEST))
    if out.is_dir() and not ours and any(entry.name != STAGE for entry in out.iterdir()):
        raise ConfigError(f"export_dir: {out} holds other files; give a new folder")


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A folder inside `out` to write into; gone afterwards, whatever happens.

    Raises:
        CheckpointError: it cannot be written, as on a full disk.
    """
    stage = out / STAGE
    new = not out.exists()
    shutil.rmtree(stage, ignore_errors=True)
    try:
        stage.mkdir(parents=True)
        yield stage
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out} cannot be written ({first_line(error)}); nothing is merged there") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if new and out.is_dir() and not any(out.iterdir()):
            out.rmdir()


def _check_written(out: Path, written: torch.nn.Module, merged: torch.nn.Module) -> None:
    """What is read back must be what was written: tied weights of which an adapter changed one are not.

    Raises:
        CheckpointError: counts and names the tensors that differ.
    """
    found = written.state_dict()
    differ = [name for name, tensor in merged.state_dict().items() if not torch.equal(found[name], tensor)]
    if differ:
        raise CheckpointError(f"{out}: {len(differ)} tensors are read back otherwise than merged: {some(differ)}")


def _largest(differences: torch.Tensor) -> float:
    return float(differences.abs().max())


def _probe(encoder: Any) -> Any:
    """A packed batch of drawn scenes, to compare log-probabilities on."""
    from visrl.scenes import scene_samples
    from visrl.train.items import Collator, Item
    from visrl.train.rows import sft_rows

    samples = scene_samples("validation", 0, 4, with_box=True)
    items = [Item(sample.id, tuple(sft_rows(encoder, sample))) for sample in samples]
    return Collator(encoder)(items)["batch"].packed


@torch.no_grad()
def _logps(model: torch.nn.Module, packed: Any, encoder: Encoder) -> torch.Tensor:
    from visrl.models.attention import attending
    from visrl.packing.forward import token_logps

    with attending(model, encoder.family):
        return token_logps(model, packed)
