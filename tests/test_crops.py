"""One checkpoint crops one way: generation, stage 2, warm-up, serving and evaluation show the model the same pixels.

And what it costs not to: text of the padded square cropped as if it were text of the image.
"""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from data_rows import good_boxes
from PIL import Image
from serve_help import body, data_url, post, serving

from visrl.box import Box, CropRule, Window, crop_window, iou
from visrl.codecs import BOX_SPACES, CODECS
from visrl.data.native import read_records
from visrl.engines.base import Completion
from visrl.engines.decoding import DecodeBatch, RunningSequence
from visrl.evaluate.run import EvalConfig, evaluate
from visrl.evolve.config import GenerateConfig
from visrl.evolve.generate import generate
from visrl.evolve.losers import Contrast
from visrl.evolve.pairs import preferences_of
from visrl.models.encode import Encoder
from visrl.models.load import load_encoder
from visrl.models.settings import ModelSettings
from visrl.records import Trajectory
from visrl.scenes import draw_ref, scene_samples
from visrl.serve.config import ServeConfig
from visrl.serve.metrics import Metrics
from visrl.serve.runner import make_backend
from visrl.train.config import TrainConfig
from visrl.train.data import Preferences
from visrl.train.items import Collator
from visrl.train.rows import sft_rows
from visrl.train.run import train

POOL = "scenes:test/0+1"
(SAMPLE,) = scene_samples("test", 0, 1, with_box=True)
SCENE = draw_ref(SAMPLE.image)
BOX = Box(0.1, 0.2, 0.35, 0.3)
THIN = Box(0.5, 0.1, 0.504, 0.9)  # must be widened to be a picture at all


@pytest.fixture
def checkpoint(tiny: Path, tmp_path: Path, rule: CropRule, codec: str) -> Path:
    """A checkpoint made for one crop rule and one way to write boxes."""
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    replace(ModelSettings.load(tiny), crop_rule=rule, codec=codec).save(folder)
    return folder


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Image.Image]:
    """Every crop that reaches a processor, in this process, from whichever side."""
    crops: list[Image.Image] = []
    encode_views = Encoder.encode_views

    def spy(self: Encoder, views: Any, **options: Any) -> Any:
        crops.extend(view.image for view in views if view.is_crop)
        return encode_views(self, views, **options)

    monkeypatch.setattr(Encoder, "encode_views", spy)
    return crops


def write_box(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Let every engine answer step 1 with `text`; step 2 is the model's own."""
    complete = DecodeBatch.complete

    def complete_with_box(self: DecodeBatch, drawn: RunningSequence, **how: bool) -> Completion:
        said = text if len(drawn.request.conversation.views) == 1 else "7"
        return replace(complete(self, drawn, **how), text=said)

    monkeypatch.setattr(DecodeBatch, "complete", complete_with_box)


def generated(checkpoint: Path, out: Path) -> list[Trajectory]:
    folder = generate(
        GenerateConfig(
            model_name_or_path=str(checkpoint), dataset=POOL, output_dir=out / "generated", rounds=1, diversity=False
        )
    )
    return list(read_records(Trajectory, folder / "trajectories.jsonl"))


def stage_2(checkpoint: Path, trajectories: list[Trajectory]) -> None:
    winner, loser = trajectories
    encoder = load_encoder(checkpoint)
    assert winner.answer is not None
    answers = Contrast(winner, winner.answer, "0")
    data = Preferences(encoder, preferences_of(SAMPLE, winner, loser, answers), stage=2)
    Collator(encoder)([data[0]])


def warm_up(checkpoint: Path, box: Box) -> None:
    encoder = load_encoder(checkpoint)
    for row in sft_rows(encoder, replace(SAMPLE, box=box), ["read"]):
        encoder.encode(row.conversation, [text for _, text in row.responses])


def served(checkpoint: Path) -> tuple[Window, Image.Image]:
    """The window and the crop of a reply in two steps."""
    metrics = Metrics()
    config = ServeConfig(model_name_or_path=str(checkpoint), served_model_name="m", device="cpu")
    with serving(make_backend(config, metrics), metrics, name="m") as url:
        picture = io.BytesIO()
        SCENE.save(picture, "PNG")
        reply: httpx.Response = post(
            url, body(SAMPLE.question, [data_url(picture.getvalue())]) | {"model": "m:focus", "max_tokens": 2}
        )
    focus = reply.json()["choices"][0]["message"]["focus"]
    crop = Image.open(io.BytesIO(base64.b64decode(focus["crop"].partition(",")[2])))
    return tuple(focus["crop_window"]), crop


def evaluated(checkpoint: Path, out: Path) -> None:
    evaluate(EvalConfig(model_name_or_path=str(checkpoint), dataset=POOL, output_dir=out / "evaluated"))


@pytest.mark.parametrize(
    ("rule", "codec", "meant"),
    [
        ("exact", "visrl", BOX),
        ("exact", "qwen2_5_vl", THIN),
        ("margin", "viscot", THIN),
        ("viscot_square", "visrl", BOX),
    ],
    ids=lambda value: "" if isinstance(value, Box) else value,
)
def test_every_part_crops_alike(
    checkpoint: Path,
    rule: CropRule,
    meant: Box,
    shown: list[Image.Image],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = load_encoder(checkpoint)
    processed = encoder.processed_size(SCENE.size)
    text = encoder.codec.format(meant, SCENE.size, processed)
    window = crop_window(encoder.codec.parse(text, SCENE.size, processed), SCENE.size, rule)
    write_box(monkeypatch, text)
    trajectories: list[Trajectory] = []

    def served_alike() -> None:
        in_reply, crop = served(checkpoint)
        assert in_reply == window
        assert crop.tobytes() == SCENE.crop(window).tobytes()

    parts: dict[str, Callable[[], Any]] = {
        "generation": lambda: trajectories.extend(generated(checkpoint, tmp_path)),
        "stage 2": lambda: stage_2(checkpoint, trajectories),
        "warm-up": lambda: warm_up(checkpoint, meant),
        "serving": served_alike,
        "evaluation": lambda: evaluated(checkpoint, tmp_path),
    }
    for name, run in parts.items():
        shown.clear()
        run()
        assert shown, f"{name} showed no crop"
        assert {(crop.size, crop.tobytes()) for crop in shown} == {
            (SCENE.crop(window).size, SCENE.crop(window).tobytes())
        }, name


@pytest.mark.parametrize(("rule", "codec"), [("margin", "visrl")])
def test_work_under_another_rule_than_the_checkpoints_says_so(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"model_name_or_path": str(checkpoint), "dataset": POOL}
    notice = "crops are cut by the rule 'exact'; the checkpoint was made for 'margin'"
    generate(GenerateConfig(**given, crop_rule="exact", rounds=1, output_dir=tmp_path / "generate"))
    assert notice in capsys.readouterr().out
    evaluate(EvalConfig(**given, crop_rule="exact", output_dir=tmp_path / "eval"))
    assert notice in capsys.readouterr().out
    keys = {"max_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    train(TrainConfig(**given, **keys, crop_rule="exact", output_dir=tmp_path / "train"))
    assert f"{notice}, and what comes out is made for 'exact'" in capsys.readouterr().out
    assert ModelSettings.load(tmp_path / "train").crop_rule == "exact"


def test_the_rules_do_crop_differently() -> None:
    """Else the test above could not fail."""
    for box in (BOX, THIN):
        rules: tuple[CropRule, ...] = ("exact", "margin", "viscot_square")
        assert len({crop_window(box, SCENE.size, rule) for rule in rules}) == 3


# --- What mixed conventions cost ------------------------------------------------------------------------------------


def overlaps() -> Iterator[tuple[float, float]]:
    """IoU with the box that was meant: of padded-square text cropped as of the image, and of the same read rightly."""
    for corners, size in good_boxes(300):
        meant = Box.from_pixels(corners, size)
        text = CODECS["viscot"].format(meant, size, size)
        mixed, ours = (
            crop_window(BOX_SPACES[space].parse(text, size, size), size) for space in ("image", "padded_square")
        )
        window = crop_window(meant, size)
        yield tuple(iou(Box.from_pixels(one, size), Box.from_pixels(window, size)) for one in (mixed, ours))


def test_what_the_mixed_conventions_of_the_reference_cost() -> None:
    mixed, ours = zip(*overlaps(), strict=True)
    assert sum(mixed) / len(mixed) < 0.75
    assert sum(overlap < 0.5 for overlap in mixed) > 60
    assert sum(ours) / len(ours) > 0.98
