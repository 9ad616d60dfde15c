"""A checkpoint's folder, damaged in every way we could think of: loaded as it is meant, or one sentence, and soon."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from visrl.cli import main
from visrl.config import ConfigError
from visrl.engines.local import LocalEngine
from visrl.models.folder import CheckpointError
from visrl.models.load import load_encoder, load_model

WEIGHTS = "model.safetensors"
INDEX, SHARD = "model.safetensors.index.json", "model-00001-of-00001.safetensors"
SETTINGS = ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "visrl.json")
LIMIT_S = 45
Damage = Callable[[Path], Any]


def _to(file: str, content: bytes | str) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / file).write_bytes(data)


def _with(file: str, *keys: str, value: Any = None, gone: bool = False) -> Damage:
    """Another value in a file of settings, or none."""

    def damage(folder: Path) -> None:
        settings = json.loads((folder / file).read_text())
        place = settings
        for key in keys[:-1]:
            place = place[key]
        place.pop(keys[-1]) if gone else place.update({keys[-1]: value})
        (folder / file).write_text(json.dumps(settings))

    return damage


def _link(file: str, to: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).symlink_to(to)

    return damage


def _pipe(file: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).unlink()
        os.mkfifo(folder / file)

    return damage


def _half(file: str) -> Damage:
    def damage(folder: Path) -> None:
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: len(data) // 2])

    return damage


def _header(change: Callable[[dict[str, Any], list[str]], Any]) -> Damage:
    """Another header before the same bytes of weights."""

    def damage(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        change(header, [name for name in header if name != "__metadata__"])
        new = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])

    return damage


def _tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    def damage(folder: Path) -> None:
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def _index(places: Any, **more: Any) -> Damage:
    """The weights in a shard, and an index over it; `places` may be what to make of its right map."""

    def damage(folder: Path) -> None:
        right = dict.fromkeys(load_file(folder / WEIGHTS), SHARD)
        (folder / WEIGHTS).rename(folder / SHARD)
        made = places(right) if callable(places) else places
        (folder / INDEX).write_text(made if isinstance(made, str) else json.dumps({"weight_map": made, **more}))

    return damage


def _layer(tensors: dict[str, Any], part: str = "layers.1.mlp.down") -> str:
    return next(name for name in tensors if part in name)


def _template(text: str) -> Damage:
    return _to("chat_template.jinja", text)


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _loop(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder)


SHOWN = "<|image_pad|>"
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"

# What each sentence must say. The fast ones are those of kinds that differ in how they fail.
FAST: dict[str, tuple[Damage, str]] = {
    "empty folder": (_empty, "no config.json"),
    "no folder": (shutil.rmtree, "there is no such folder"),
    "a loop of links": (_loop, "there is no such folder"),
    "unknown family": (_with("config.json", "model_type", value="bert"), "'bert' is not supported: transformers"),
    "a look-alike": (_with("config.json", "model_type", value="qwen2vl"), "the nearest are qwen2_vl"),
    "encoder and decoder": (_with("config.json", "is_encoder_decoder", value=True), "is an encoder–decoder"),
    "family of another type": (_with("config.json", "model_type", value=["qwen2_vl"]), "is not supported"),
    "nested deeply": (_to("config.json", '{"a":' + "[" * 90_000 + "]" * 90_000 + "}"), "nested too deeply"),
    "not UTF-8": (_to("config.json", b'{"model_type": "\xff"}'), "is not UTF-8 text"),
    "billions of layers": (_with("config.json", "text_config", "num_hidden_layers", value=10**9), "is 1000000000"),
    "wide beyond memory": (_with("config.json", "text_config", "hidden_size", value=10**8), r"numbers, they hold \d"),
    "more layers than weights": (_with("config.json", "vision_config", "depth", value=4000), "4000 layers"),
    "fewer layers than weights": (_with("config.json", "vision_config", "depth", value=1), "config.json does not know"),
    "no heads": (_with("config.json", "text_config", "num_attention_heads", value=0), "ZeroDivisionError"),
    "another image token": (_with("config.json", "image_token_id", value=7), "puts pictures at token 7"),
    "first token fails": (
        _with("config.json", "text_config", "rope_parameters", "mrope_section", value=[9, 9, 9]), "first token"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no processor can be loaded"),
    "tokenizer cut": (_half("tokenizer.json"), "no processor can be loaded"),
    "a pipe for a file": (_pipe("tokenizer.json"), "it is no regular file"),
    "an endless file": (_link("tokenizer_config.json", "/dev/zero"), "it is no regular file"),
    "a link to nothing": (_link("tokenizer.json", "gone"), "a link to nothing"),
    "pictures beyond memory": (
        _with("processor_config.json", "image_processor", "size", "shortest_edge", value=10**12),
        "shortest_edge is 1000000000000, which no memory holds"),
    "patches beyond memory": (
        _with("processor_config.json", "image_processor", "patch_size", value=10**6), "patch_size is 1000000"),
    "no patches": (_with("processor_config.json", "image_processor", "patch_size", value=0), "boxes|no prompt"),
    "settings unknown": (_with("visrl.json", "zoom", value=2), "keys that are not known here: zoom"),
    "settings of another type": (_with("visrl.json", "crop_max_pixels", value="many"), "crop_max_pixels must be"),
    "settings cut": (_half("visrl.json"), "visrl.json is damaged"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "holds no weights"),
    "pickled weights": (lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"), "a pickle"),
    "weights cut": (_half(WEIGHTS), "the file is damaged"),
    "weights of zeros": (_to(WEIGHTS, b"\0" * 64), "the file is damaged"),
    "a header beyond memory": (_to(WEIGHTS, struct.pack("<Q", 2**60) + b"{}"), "the file is damaged"),
    "a tensor missing": (_tensors(lambda t: {n: v for n, v in t.items() if n != _layer(t)}), "1 of the model's"),
    "tensors renamed": (_tensors(lambda t: {n.replace("down_proj", "low"): v for n, v in t.items()}), "6 of the mod"),
    "a tensor of another shape": (_tensors(lambda t: {**t, _layer(t): torch.ones(3, 5)}), r"is \[3, 5\], not \[128, "),
    "not a number": (_tensors(lambda t: {**t, _layer(t): t[_layer(t)] * float("nan")}), "infinite. in 1 tensors"),
    "infinite": (_tensors(lambda t: {**t, _layer(t): t[_layer(t)] / 0}), "NaN or infinite"),
    "all bits set": (lambda folder: _ones(folder / WEIGHTS), "are not numbers .* tensors"),
    "index without a shard": (_index(lambda right: {**right, _layer(right): "model-2.safetensors"}), "names model-2"),
    "index out of the folder": (_index(lambda right: {**right, _layer(right): "../../etc/passwd"}), "names ../../etc"),
    "index of another type": (_index(None), "weight_map must name"),
    "index cut": (_index('{"weight_map":'), "index.json is damaged"),
    "no template": (lambda folder: (folder / "chat_template.jinja").unlink(), "there is no chat template"),
    "a template of text alone": (_template("{% for m in messages %}{{ m.role }}{% endfor %}"), "shows 0 of 1 pictures"),
    "a template without the text": (
        _template("{% for part in messages[0].content if part.type == 'image' %}" + SHOWN + "{% endfor %}"),
        "leaves out what the user says"),
    "a template that is none": (_template("{% for %}"), "no prompt can be made"),
    "a template that refuses": (_template("{{ raise_exception('only text') }}"), "only text"),
    "a template that grows": (_template("{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}"), "takes too much"),
    "a template beyond memory": (_template("{{ 'a' * 10 ** 11 }}"), "takes too much"),
    "a template that calls itself": (_template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), "takes too much"),
}  # fmt: skip

SLOW: dict[str, tuple[Damage, str]] = {
    "a template that loops": (_template(LOOPS), "does not end within"),
    "a template that computes": (_template("{{ 9 ** (9 ** 9) }}"), "does not end within|takes too much"),
    **{f"{file} {name}": (damage, "") for file in SETTINGS for name, damage in {
        "cut": _half(file), "empty": _to(file, ""), "gone": lambda folder, file=file: (folder / file).unlink(),
        "a list": _to(file, "[1]"), "null": _to(file, "null"), "an empty object": _to(file, "{}"),
        "noise": _to(file, bytes(range(256)) * 9), "a pipe": _pipe(file), "endless": _link(file, "/dev/zero"),
        "itself": _link(file, file), "deep": _to(file, "[" * 99_999),
    }.items()},
    **{f"config.json {part}.{key} is {value}": (_with("config.json", part, key, value=value), "")
       for part, keys in {
           "text_config": ("hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "rope_parameters",
                           "intermediate_size", "layer_types", "hidden_act", "rms_norm_eps", "model_type"),
           "vision_config": ("depth", "embed_dim", "patch_size", "spatial_merge_size", "num_heads", "in_channels"),
       }.items() for key in keys for value in (None, "x", -1, 0, 10**9, [], {})},
    **{f"image processor's {key} is {value}": (_with("processor_config.json", "image_processor", key, value=value), "")
       for key in ("size", "patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std", "resample",
                   "rescale_factor", "image_processor_type")
       for value in (None, "x", -1, 0, 10**9, 1e300, [])},
    **{f"header: {name}": (_header(change), "") for name, change in {
        "type": lambda h, names: h[names[3]].update(dtype="I64"),
        "no type": lambda h, names: h[names[3]].update(dtype="Q9"),
        "shape": lambda h, names: h[names[3]].update(shape=[10**12, 10**6]),
        "overlap": lambda h, names: h[names[3]].update(data_offsets=h[names[4]]["data_offsets"]),
        "negative": lambda h, names: h[names[3]].update(data_offsets=[-5, 7]),
        "one fewer": lambda h, names: h.pop(names[-1]),
        "no metadata": lambda h, names: h.pop("__metadata__", None),
        "swapped": lambda h, names: h.update({names[2]: h[names[5]], names[5]: h[names[2]]}),
    }.items()},
}  # fmt: skip


def _ones(file: Path) -> None:
    data = file.read_bytes()
    length = 8 + struct.unpack("<Q", data[:8])[0]
    file.write_bytes(data[:length] + b"\xff" * (len(data) - length))


@contextmanager
def in_time(seconds: int) -> Iterator[None]:
    """Fail what hangs."""

    def ring(*_: Any) -> None:
        pytest.fail(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", FAST)
def test_a_damaged_checkpoint_is_a_sentence(tiny: Path, tmp_path: Path, name: str) -> None:
    damage, told = FAST[name]
    model = shutil.copytree(tiny, tmp_path / "model")
    damage(model)
    with in_time(LIMIT_S), pytest.raises((CheckpointError, ConfigError), match=told) as refused:
        LocalEngine.load(model, "cpu")
    assert str(refused.value).startswith(str(model)) or "no model at" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_any_damage_is_a_sentence_or_none(tiny: Path, tmp_path: Path, name: str) -> None:
    """Some of these change nothing that is used; what is not refused must answer."""
    damage, told = SLOW[name]
    model = shutil.copytree(tiny, tmp_path / "model")
    damage(model)
    with in_time(LIMIT_S):
        said = _refusal(model)
    if said is None:
        assert not told
    else:
        assert any(part in said for part in told.split("|"))
        assert "\n" not in said


def _refusal(model: Path) -> str | None:
    """What is said of a checkpoint that is refused; any other exception would fail the test."""
    try:
        LocalEngine.load(model, "cpu")
    except (CheckpointError, ConfigError) as error:
        return str(error)
    return None


# --- Not there, or of another family: every verb says so at once ------------------------------------------------------


def said_by(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The standard error of a command that is refused, in time."""
    with in_time(LIMIT_S), pytest.raises(SystemExit) as end:
        main(words)
    said = capsys.readouterr().err
    assert end.value.code == 1, said
    return said


def verbs(model: Path | str, out: Path) -> dict[str, list[str]]:
    """Every verb that loads a model, asked to use this one."""
    named, rows = f"model_name_or_path={model}", "dataset=scenes:test/0+2"
    return {
        "train": ["train", named, f"output_dir={out}"],
        "generate": ["generate", named, rows, "rounds=1", f"output_dir={out}"],
        "eval": ["eval", named, rows, f"output_dir={out}"],
        "export": ["export", named, f"adapter_name_or_path={model}", f"export_dir={out}"],
        "ask": ["ask", "--model", str(model), "--image", "scene:test/3", "--out", f"{out}.png", "What is it?"],
        "api": ["api", named, "port=0"],
        "api before vllm": ["api", named, "port=0", "infer_backend=vllm"],
    }


@pytest.mark.parametrize("verb", verbs("", Path()))
def test_another_family_is_one_sentence_in_every_verb(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    _with("config.json", "model_type", value="blip_2")(model)
    # For export, which reads the adapter first.
    shutil.copy(tiny / WEIGHTS, model / "adapter_model.safetensors")
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}')
    said = said_by(verbs(model, tmp_path / "out")[verb], capsys)
    assert f"{model}: the model type 'blip_2' is not supported: transformers " in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", verbs("", Path()))
@pytest.mark.parametrize("place", ["runs/merged", "./merged", "runs/deep/merged", "nowhere"])
def test_a_folder_that_is_not_there_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "merged2").mkdir(parents=True)
    began = time.monotonic()
    said = said_by(verbs(place, tmp_path / "out")[verb], capsys)
    assert f"at {place}: there is no such folder" in said
    assert ("did you mean runs/merged2?" in said) == (place == "runs/merged")
    assert time.monotonic() - began < 5
    assert not (tmp_path / "out").exists()


def test_a_hub_name_offline_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="no copy of a hub's model of that name on this machine"):
        load_encoder("someone/no-such-model")
    assert time.monotonic() - began < 2


def test_a_hub_that_answers_nothing_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="there is no such folder, and the hub gives none"):
        load_model("someone/no-such-model")
    assert time.monotonic() - began < 5


def test_unfinished_work_is_no_model(tiny: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    (model / "started.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds unfinished work"):
        load_model(model)
    (model / "manifest.json").write_text("{}")
    assert load_model(model)


def test_tensors_without_a_place_are_said(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    _tensors(lambda tensors: {**tensors, "value_head.weight": torch.ones(3)})(model)
    load_model(model)
    assert "1 tensors have no place in the model and are not used: value_head.weight" in capsys.readouterr().err


def test_another_type_than_the_weights_is_said(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LocalEngine.load(tiny, "cpu")
    assert "written as" not in capsys.readouterr().err
    LocalEngine.load(tiny, "cpu", dtype=torch.bfloat16)
    assert "written as float32, used as bfloat16" in capsys.readouterr().err


def test_the_tokenizers_template_is_used(tiny: Path, tmp_path: Path) -> None:
    """Where fine-tuned folders keep it: in tokenizer_config.json alone, as it is or under a name."""
    template = (tiny / "chat_template.jinja").read_text()
    for number, kept in enumerate((template, [{"name": "default", "template": template}])):
        model = shutil.copytree(tiny, tmp_path / f"model{number}")
        (model / "chat_template.jinja").unlink()
        _with("tokenizer_config.json", "chat_template", value=kept)(model)
        assert load_encoder(model).chat_template == template == load_encoder(tiny).chat_template
