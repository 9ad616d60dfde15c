"""An adapter is put on its base by every verb alike: each tensor finds its place and shape, or one sentence says so."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from visrl.cli import main
from visrl.config import ConfigError, build_config
from visrl.engines.local import LocalEngine
from visrl.engines.open import PolicyConfig, opened_policy
from visrl.manifest import ManifestError, hash_checkpoint, write_manifest
from visrl.models.adapters import attach_adapter, merge_adapter, read_adapter
from visrl.models.chain import described
from visrl.models.folder import CheckpointError
from visrl.models.load import load_model
from visrl.models.settings import ModelSettings
from visrl.serve.config import ServeConfig
from visrl.serve.runner import load_local
from visrl.train.config import TrainConfig
from visrl.train.export import STAGE, ExportConfig, export
from visrl.train.model import check_policy, prepare_model

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
OLD = {"model.language_model.": "model.", "model.visual.": "visual."}


def put_on(model: Path, folder: Path, config: Any, *, still: bool = False) -> Path:
    """An adapter for `model`, written as PEFT does, with weights that change it (not with `still`)."""
    torch.manual_seed(0)
    wrapped = get_peft_model(load_model(model), config)
    for weight in wrapped.parameters():
        if weight.requires_grad and not still:
            weight.data += 0.05 * torch.randn_like(weight)
    wrapped.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put_on(tiny, tmp_path_factory.mktemp("adapter") / "lora", LoraConfig(**LORA))


def changed(adapter: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """A copy of an adapter with other tensors."""
    shutil.copytree(adapter, to)
    save_file(change(load_file(adapter / "adapter_model.safetensors")), to / "adapter_model.safetensors")
    return to


def configured(adapter: Path, to: Path, **values: Any) -> Path:
    """A copy of an adapter with other settings."""
    shutil.copytree(adapter, to)
    settings = json.loads((to / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps({**settings, **values}))
    return to


def by_export(model: Path, adapter: Path, out: Path) -> Any:
    given = {"model_name_or_path": str(model), "adapter_name_or_path": str(adapter), "export_dir": out}
    return load_model(export(ExportConfig(**given, export_dtype="float32")))


def by_engine(model: Path, adapter: Path, out: Path) -> Any:
    return LocalEngine.load(model, "cpu", adapter=adapter).model


def by_api(model: Path, adapter: Path, out: Path) -> Any:
    given = {"model_name_or_path": str(model), "adapter_name_or_path": str(adapter), "device": "cpu"}
    return load_local(ServeConfig(**given)).engine.model  # type: ignore[arg-type]


def by_policy(model: Path, adapter: Path, out: Path) -> Any:
    """As generate, eval and ask open it."""
    with opened_policy(PolicyConfig(model_name_or_path=str(model), adapter_name_or_path=str(adapter))) as opened:
        return opened.policy.model  # type: ignore[attr-defined]


def by_train(model: Path, adapter: Path, out: Path) -> Any:
    given = {"model_name_or_path": str(model), "adapter_name_or_path": str(adapter), "output_dir": str(out)}
    config = build_config(TrainConfig, {**given, "finetuning_type": "full"}, "the test")
    check_policy(config)
    return prepare_model(config)


LOADERS = [by_export, by_engine, by_api, by_policy, by_train]
every_loader = pytest.mark.parametrize("load", LOADERS, ids=lambda load: load.__name__)


def same_weights(found: torch.nn.Module, wanted: torch.nn.Module) -> bool:
    weights = wanted.state_dict()
    return all(torch.allclose(weight, weights[name], atol=1e-6) for name, weight in found.state_dict().items())


@every_loader
def test_names_of_an_older_release_are_today_s_and_said(
    tiny: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], load: Any
) -> None:
    old = changed(adapter, tmp_path / "old", lambda tensors: {_old(name): value for name, value in tensors.items()})
    wanted = merge_adapter(load_model(tiny), read_adapter(adapter), tiny)
    assert same_weights(load(tiny, old, tmp_path / "out"), wanted)
    assert not same_weights(load_model(tiny), wanted)
    assert "names layers as an older release did; model.layers.* are model.language_model." in capsys.readouterr().err


def _old(name: str) -> str:
    for new, old in OLD.items():
        name = name.replace(f"base_model.model.{new}", f"base_model.model.{old}")
    return name


# What no base of this kind has room for, and what the sentence says.
MISFITS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "all elsewhere": (lambda t: {name.replace("layers", "stages"): v for name, v in t.items()}, "24 of 24 tensors"),
    "one elsewhere": (lambda t: {**t, "base_model.model.extra.lora_A.weight": torch.ones(4, 8)}, "1 of 25 tensors"),
    "half missing": (lambda t: dict(list(t.items())[::2]), "12 of 24 that adapter_config.json asks for are not"),
    "other rank": (lambda t: {name: v.repeat(2, 1) if "lora_A" in name else v for name, v in t.items()}, "12 have an"),
    "more layers": (lambda t: {**t, **{n.replace("s.0", "s.9"): v.clone() for n, v in t.items()}}, "4 of 28 tensors"),
    "not a number": (lambda t: {name: v * float("nan") for name, v in t.items()}, "in 24 tensors"),
    "infinite": (lambda t: {name: v / 0 if "layers.0.self_attn.q_proj.lora_B" in name else v for name, v in t.items()},
                 "NaN or infinite) in 1 tensors: base_model.model.model.language_model.layers.0.self_attn.q_proj"),
}  # fmt: skip


@every_loader
@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_counted_and_named(
    tiny: Path, adapter: Path, tmp_path: Path, load: Any, misfit: str
) -> None:
    change, told = MISFITS[misfit]
    other = changed(adapter, tmp_path / "other", change)
    with pytest.raises(CheckpointError) as refused:
        load(tiny, other, tmp_path / "out")
    assert str(other) in str(refused.value)
    assert told in str(refused.value)
    assert not (tmp_path / "out").exists()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "PROMPT_TUNING"}, "of the type PROMPT_TUNING are not merged here; known: LORA"),
    ({"peft_type": "VERA"}, "of the type VERA"),
    ({"peft_type": None}, "of the type None"),
    ({"turbo_rank": 8}, "asks for turbo_rank, which the installed peft does not know"),
    ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens cannot be merged"),
    ({"r": "four"}, "fit|cannot be read"),
    ({"target_modules": ["w_qkv"]}, "the adapter does not fit .*w_qkv"),
]


@pytest.mark.parametrize(("values", "told"), REFUSED, ids=lambda value: str(value)[:30])
def test_settings_that_cannot_be_honoured_are_refused(
    tiny: Path, adapter: Path, tmp_path: Path, values: dict[str, Any], told: str
) -> None:
    with pytest.raises(CheckpointError, match=told):
        by_engine(tiny, configured(adapter, tmp_path / "other", **values), tmp_path)


FILES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"), "a pickle"),
    (lambda folder: (folder / "adapter_model.safetensors").unlink(), "holds no adapter weights"),
    (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\0" * 40), "damaged"),
    (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json is damaged"),
    (lambda folder: (folder / "adapter_config.json").write_bytes(b"\xff\xfe"), "not UTF-8"),
    (lambda folder: (folder / "adapter_config.json").unlink(), "holds no adapter"),
    (lambda folder: (folder / "started.json").write_text("{}"), "unfinished training"),
    (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is damaged"),
    (shutil.rmtree, "there is no such folder; did you mean .*broken1"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "told"), FILES, ids=[told[:25] for _, told in FILES])
def test_a_damaged_folder_is_a_sentence(tiny: Path, adapter: Path, tmp_path: Path, damage: Any, told: str) -> None:
    (tmp_path / "broken1").mkdir()
    damage(shutil.copytree(adapter, tmp_path / "broken"))
    with pytest.raises((CheckpointError, ManifestError), match=told):
        by_engine(tiny, tmp_path / "broken", tmp_path)


METHODS = {
    "dora": LoraConfig(**LORA, use_dora=True),
    "rank patterns": LoraConfig(**LORA, use_rslora=True, rank_pattern={"layers.1.self_attn.q_proj": 2}),
    "whole modules": LoraConfig(**LORA, modules_to_save=["visual.merger"]),
    "output layer": LoraConfig(**LORA, modules_to_save=["embed_tokens", "lm_head"]),
    "tokens": LoraConfig(**LORA, trainable_token_indices=[3, 5]),
    "pissa": LoraConfig(**LORA, init_lora_weights="pissa"),
    "ia3": IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(target_modules=["q_proj"]),
    "lokr": LoKrConfig(target_modules=["q_proj"]),
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_merged_as_peft_computes_them(tiny: Path, tmp_path: Path, method: str) -> None:
    put_on(tiny, tmp_path / "adapter", METHODS[method])
    merged = by_export(tiny, tmp_path / "adapter", tmp_path / "out")
    told = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert told["max_logp_deviation_float32"] < 1e-4 < told["max_logp_change"]
    assert not same_weights(merged, load_model(tiny))


def test_a_change_to_shared_weights_is_refused(tiny: Path, tmp_path: Path) -> None:
    shared = put_on(tiny, tmp_path / "adapter", LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    with pytest.raises(CheckpointError, match=r"changes .*embed_tokens, whose weights are those of lm_head"):
        by_engine(tiny, shared, tmp_path)


def test_a_larger_vocabulary_is_another_base(tiny: Path, tmp_path: Path) -> None:
    model: Any = load_model(tiny)
    model.resize_token_embeddings(model.get_input_embeddings().weight.shape[0] + 5)
    get_peft_model(model, LoraConfig(**LORA, modules_to_save=["embed_tokens", "lm_head"])).save_pretrained(
        tmp_path / "a"
    )
    with pytest.raises(CheckpointError, match=r"2 have another shape: .* is \[466, 128\], not \[461, 128\]"):
        by_engine(tiny, tmp_path / "a", tmp_path)


def test_old_names_in_a_config_are_today_s(tiny: Path, tmp_path: Path) -> None:
    """Whole names, a regular expression and rank patterns of an adapter from before the decoder moved."""
    full = "model.language_model.layers.1.self_attn.q_proj"
    named = put_on(tiny, tmp_path / "now", LoraConfig(r=4, target_modules=[full], rank_pattern={full: 2}))
    old = changed(named, tmp_path / "old", lambda tensors: {_old(name): value for name, value in tensors.items()})
    wanted = merge_adapter(load_model(tiny), read_adapter(named), tiny)
    for number, targets in enumerate(([_whole(full)], r"^model\.layers\.1\..*q_proj")):
        mine = configured(old, tmp_path / f"old{number}", target_modules=targets, rank_pattern={_whole(full): 2})
        assert same_weights(merge_adapter(load_model(tiny), read_adapter(mine), tiny), wanted)


def _whole(name: str) -> str:
    return name.replace("model.language_model.", "model.")


def test_an_adapter_that_changes_nothing_is_said(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    still = put_on(tiny, tmp_path / "adapter", LoraConfig(**LORA), still=True)
    by_export(tiny, still, tmp_path / "out")
    assert f"{still} changes nothing" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["max_logp_change"] == 0


def test_another_base_than_the_adapter_names_is_said(
    tiny: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attach_adapter(load_model(tiny), read_adapter(adapter), tiny)
    assert "was trained on" not in capsys.readouterr().err
    copy = shutil.copytree(tiny, tmp_path / "copy")
    attach_adapter(load_model(copy), read_adapter(adapter), copy)
    assert f"was trained on {tiny}, and is put on {copy}" in capsys.readouterr().err


def test_an_adapter_below_is_merged_once(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    """A second stage's adapter was trained on the base with the first one's merged in."""
    first = merge_adapter(load_model(tiny), read_adapter(adapter), tiny)
    first.save_pretrained(tmp_path / "merged")  # type: ignore[operator]
    second = put_on(tmp_path / "merged", tmp_path / "second", LoraConfig(r=2, target_modules=["o_proj"]))
    wanted = merge_adapter(load_model(tmp_path / "merged"), read_adapter(second), tmp_path / "merged")
    made_of = {"model_name_or_path": str(tiny), "adapter_name_or_path": [str(adapter)]}
    parents = {"model": hash_checkpoint(tiny), "adapter": hash_checkpoint(adapter)}
    write_manifest(second, verb="train", config=made_of, parents=parents, adapters=described([str(adapter)]))
    for load in LOADERS:
        assert same_weights(load(tiny, second, tmp_path / load.__name__), wanted), load


def test_an_adapters_own_settings_come_first(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(adapter, tmp_path / "adapter")
    ModelSettings(crop_rule="viscot_square").save(mine)
    with opened_policy(PolicyConfig(model_name_or_path=str(tiny), adapter_name_or_path=str(mine))) as opened:
        assert opened.settings.crop_rule == "viscot_square"


# --- Export's folder --------------------------------------------------------------------------------------------------


def _config(tiny: Path, adapter: Path, out: Path, **values: Any) -> ExportConfig:
    given = {"model_name_or_path": str(tiny), "adapter_name_or_path": str(adapter), "export_dir": out}
    return ExportConfig(**{**given, **values})


def test_export_goes_over_no_other_files(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    for out, told in ((tmp_path / "mine", "holds other files"), (tmp_path / "file", "is a file"), (tiny, "itself")):
        with pytest.raises(ConfigError, match=told):
            export(_config(tiny, adapter, out))
    assert (tmp_path / "mine" / "config.json").read_text() == "{}"


def test_a_full_disk_is_a_sentence_and_leaves_nothing(
    tiny: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [f"model_name_or_path={tiny}", f"adapter_name_or_path={adapter}", f"export_dir={out}"]
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(SystemExit) as end:
            main(["export", *words])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    said = capsys.readouterr().err
    assert end.value.code == 1
    assert "cannot be written" in said
    assert "Traceback" not in said
    assert not out.exists()
    export(_config(tiny, adapter, out))  # with room again, the same command
    assert (out / "manifest.json").is_file()
    assert not (out / STAGE).exists()


def test_a_merge_that_deviates_is_none(
    tiny: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visrl.train.export.MOST_APART", -1.0)
    with pytest.raises(CheckpointError, match="is not merged: the merged model deviates from the adapter by"):
        export(_config(tiny, adapter, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_half_precision_cannot_hold_is_refused(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    large = changed(
        adapter, tmp_path / "large", lambda t: {n: v * (1e4 if "lora_B" in n else 1e3) for n, v in t.items()}
    )
    with pytest.raises(CheckpointError, match=r"float16 the merged weights are not numbers|deviates"):
        export(_config(tiny, large, tmp_path / "out", export_dtype="float16"))
    assert not (tmp_path / "out").exists()
