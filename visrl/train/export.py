"""`visrl export`: merge an adapter into its base model, in fp32, and say how far the merged model deviates."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from visrl.config import Config
from visrl.manifest import claim_folder, hash_checkpoint, hash_files, hold, write_manifest
from visrl.models.load import CheckpointError, load_encoder, load_model
from visrl.models.settings import ModelSettings


class ExportConfig(Config):
    """What `visrl export` takes, with the names of LLaMA-Factory's merge configs."""

    model_name_or_path: str
    adapter_name_or_path: str
    export_dir: Path
    template: str | None = None  # the checkpoint's own chat template is kept; here for the reference's configs
    finetuning_type: Literal["lora"] = "lora"
    export_size: float = 5.0  # GB a shard
    export_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    export_device: Literal["cpu", "auto"] = "cpu"  # where the fp32 copy is merged; auto: on a GPU where there is one
    export_legacy_format: bool = False
    trust_remote_code: bool = False


def export(config: ExportConfig) -> Path:
    """Merge, check on a few real prompts, cast last, write; the folder.

    Raises:
        CheckpointError: no model or no adapter at the paths given.
        ConfigError: pickled weights are asked for.
        HeldError: another process writes the folder.
    """
    with hold(config.export_dir):
        return _export(config)


def _export(config: ExportConfig) -> Path:
    from peft import PeftModel

    from visrl.config import ConfigError

    if config.export_legacy_format:
        raise ConfigError("export_legacy_format: weights are written as safetensors only")
    adapter = Path(config.adapter_name_or_path)
    if not (adapter / "adapter_config.json").is_file():
        raise CheckpointError(f"{adapter} holds no adapter (no adapter_config.json)")
    identity = {
        **config.model_dump(mode="json", exclude={"export_dir"}),
        "adapter": hash_files(*sorted(adapter.glob("*.safetensors"))),
    }
    if claim_folder(config.export_dir, identity):
        print(f"{config.export_dir} is already complete")
        return config.export_dir
    settings_from = adapter if (adapter / "visrl.json").is_file() else config.model_name_or_path
    settings = ModelSettings.load(settings_from)
    encoder = load_encoder(config.model_name_or_path, settings, trust_remote_code=config.trust_remote_code)
    device = "cuda" if config.export_device == "auto" and torch.cuda.is_available() else "cpu"
    base = load_model(config.model_name_or_path, trust_remote_code=config.trust_remote_code).to(device).eval()
    adapted = PeftModel.from_pretrained(base, adapter).eval()
    probe = _probe(encoder).to(device)
    before = _logps(adapted, probe)
    merged = adapted.merge_and_unload()
    deviation = float((_logps(merged, probe) - before).abs().max())
    dtype: torch.dtype = getattr(torch, config.export_dtype)
    merged = merged.to(dtype)
    after_cast = float((_logps(merged, probe) - before).abs().max())
    merged.save_pretrained(config.export_dir, max_shard_size=f"{config.export_size}GB")
    encoder.processor.save_pretrained(config.export_dir)
    settings.save(config.export_dir)
    facts: dict[str, Any] = {"max_logp_deviation": deviation, f"max_logp_deviation_{config.export_dtype}": after_cast}
    parents = {"adapter": identity["adapter"], "model": hash_checkpoint(config.model_name_or_path)}
    write_manifest(config.export_dir, verb="export", config=identity, parents=parents, **facts)
    print(
        f"merged; token log-probabilities deviate by at most {deviation:.1e} in fp32 and "
        f"{after_cast:.1e} as {config.export_dtype} → {config.export_dir}"
    )
    return config.export_dir


def _probe(encoder: Any) -> Any:
    """A packed batch of drawn scenes, to compare log-probabilities on."""
    from visrl.data.scenes import scene_samples
    from visrl.train.data import sft_rows
    from visrl.train.items import Collator, Item

    samples = scene_samples("validation", 0, 4, with_box=True)
    items = [Item(sample.id, tuple(sft_rows(encoder, sample))) for sample in samples]
    return Collator(encoder)(items)["batch"].packed


@torch.no_grad()
def _logps(model: torch.nn.Module, packed: Any) -> torch.Tensor:
    from visrl.models.attention import attending_trees
    from visrl.train.forward import token_logps

    with attending_trees(model):
        return token_logps(model, packed)
