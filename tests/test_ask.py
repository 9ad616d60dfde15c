"""`visrl ask`: the two steps as text, and as a picture that shows what was really looked at."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageColor
from test_evaluate_rollouts import Listener
from typer.testing import CliRunner

from visrl.cli import app, main
from visrl.evaluate.ask import COLOURS, CROP_SIDE, WHOLE_SIDE, answer_sheet, ask, short_names

ROOT = Path(__file__).parent.parent


@pytest.fixture
def picture(tmp_path) -> str:
    """Grey, but for a red quarter at the lower left."""
    image = Image.new("RGB", (400, 200), "#808080")
    image.paste("#ff0000", (0, 100, 200, 200))
    image.save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


def colours_of(image: Image.Image) -> dict[tuple[int, ...], int]:
    return {colour: count for count, colour in image.getcolors(1 << 24)}


def test_each_checkpoint_is_shown_with_its_box_its_crop_and_its_answer(picture):
    looking = ask(Listener("[0.000, 0.500, 0.500, 1.000]"), "red-eyed", picture, ["What colour?", "And why?"], "exact")
    vague = ask(Listener("to the left"), "vague", picture, ["What colour?", "And why?"], "exact")
    assert looking[0].lines() == [
        "red-eyed: red",
        "  looked at [0, 100, 200, 200] px of 400 × 200 ([0.000, 0.500, 0.500, 1.000]), crop 200 × 100 px",
    ]
    assert vague[1].lines()[0].startswith("vague: no box (box: no box in the form")
    sheet = answer_sheet([list(pair) for pair in zip(looking, vague, strict=True)])
    seen = colours_of(sheet)
    first, second = (ImageColor.getrgb(colour) for colour in COLOURS[:2])
    # The first box is drawn on both pictures; the crop beside it is red throughout, and larger than it was.
    assert seen[first] > 2 * (200 + 100)
    beside = sheet.crop((WHOLE_SIDE, 0, sheet.width, sheet.height))
    assert colours_of(beside)[255, 0, 0] == 2 * CROP_SIDE * CROP_SIDE // 2
    assert colours_of(beside)[second] > 0
    assert not any(colours_of(sheet.crop((0, 0, WHOLE_SIDE, sheet.height))).get(colour) for colour in [second])


def test_the_command_asks_every_model_every_question(tiny, picture, tmp_path):
    out = tmp_path / "out" / "ask.png"
    given = ["ask", "--model", tiny, "--compare", tiny, "--image", picture, "--out", out, "What?", "Where?"]
    result = CliRunner().invoke(app, [str(word) for word in given])
    assert result.exit_code == 0, result.output
    assert result.stdout.count(f"  {tiny.name}: ") == 4
    assert result.stdout.index("What?") < result.stdout.index("Where?")
    assert Image.open(out).width > WHOLE_SIDE + CROP_SIDE


def test_a_picture_or_model_that_is_not_there_is_one_sentence(tiny, tmp_path, capsys):
    for given, said in (
        (["--model", str(tiny), "--image", "nowhere.png"], "visrl: no picture at nowhere.png"),
        (["--model", str(tmp_path / "none"), "--image", "scene:test/0"], "there is no such folder"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["ask", *given, "What?"])
        assert ended.value.code == 1
        assert said in capsys.readouterr().err


def test_names_are_as_short_as_they_stay_different():
    assert short_names(["runs/a/stage1", "runs/b/stage1"]) == ["a/stage1", "b/stage1"]
    assert short_names(["runs/sft", "org/model"]) == ["sft", "model"]
    assert short_names(["runs/sft", "runs/sft"]) == ["sft", "sft"]
