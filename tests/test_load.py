"""What is refused when a checkpoint is loaded: boxes that its processor, codec and crop rule would move."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_families import MAKERS

from visrl.codecs import CODECS
from visrl.config import ConfigError, build_config
from visrl.engines.local import LocalEngine
from visrl.models.encode import Encoder
from visrl.models.load import CheckpointError, load_encoder
from visrl.models.settings import ModelSettings
from visrl.serve.config import ServeConfig
from visrl.serve.runner import load_local
from visrl.train.config import TrainConfig
from visrl.train.run import train

# Wrong in one direction, and wrong in both, which a round trip alone would not show.
BROKEN = [
    replace(CODECS["visrl"], y_first=True),
    replace(CODECS["visrl"], scales=CODECS["viscot"].scales),
    replace(CODECS["visrl"], decimals=1),
]


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_is_taken_with_a_processor_that_says_its_sizes(tiny: Path, codec: str) -> None:
    assert load_encoder(tiny, replace(ModelSettings.load(tiny), codec=codec)).codec.name == codec


def _train(model: Path, out: Path) -> Any:
    return train(build_config(TrainConfig, {"model_name_or_path": str(model), "output_dir": str(out)}, "the test"))


@pytest.mark.parametrize(
    "load",
    [
        lambda model, out: LocalEngine.load(model, "cpu"),
        _train,
        lambda model, out: load_local(ServeConfig(model_name_or_path=str(model), device="cpu")),
    ],
    ids=["engine", "train", "api"],
)
@pytest.mark.parametrize("codec", BROKEN, ids=["one way", "both ways", "coarse"])
def test_a_broken_codec_is_refused_wherever_a_checkpoint_is_loaded(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: Any, load: Callable[[Path, Path], Any]
) -> None:
    monkeypatch.setitem(CODECS, "visrl", codec)
    with pytest.raises(CheckpointError, match="boxes cannot be trusted here: the box codec 'visrl'"):
        load(tiny, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_size_that_the_processor_does_not_give_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(ModelSettings.load(tiny), codec="qwen2_5_vl")
    monkeypatch.setattr(Encoder, "processed_size", lambda self, size, is_crop=False: (size[0] // 4, size[1] // 4))
    with pytest.raises(CheckpointError, match="boxes cannot be trusted here"):
        load_encoder(tiny, settings)


def test_pixels_of_a_processor_that_does_not_say_its_sizes_are_refused(tmp_path: Path) -> None:
    model, processor = MAKERS["llava"]()
    model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert load_encoder(tmp_path).family.name == "llava"
    with pytest.raises(CheckpointError, match="its own is box_codec=viscot"):
        load_encoder(tmp_path, ModelSettings(codec="qwen2_5_vl"))


@pytest.mark.parametrize(("key", "value"), [("crop_rule", "exakt"), ("codec", "qwen")])
def test_settings_that_name_nothing_are_refused(tmp_path: Path, key: str, value: str) -> None:
    (tmp_path / "visrl.json").write_text(json.dumps({key: value}))
    with pytest.raises(ConfigError, match=f"{key} must be one of .*, not '{value}'"):
        ModelSettings.load(tmp_path)
