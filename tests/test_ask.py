"""`visrl ask`: the two steps as text, and as a picture that shows what was really looked at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageColor
from test_evaluate_rollouts import Listener
from typer.testing import CliRunner

from visrl.box import iou
from visrl.cli import app, main
from visrl.evaluate.ask import (
    BAD,
    COLOURS,
    CROP_SIDE,
    GOOD,
    WHOLE_SIDE,
    answer_sheet,
    ask,
    hint,
    known_truth,
    printable,
    short_names,
)
from visrl.pages.draw import TRUE_COLOUR

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


def test_of_a_drawn_scene_the_sheet_says_what_is_right_and_how_the_box_lies():
    scene = "scene:test@1/5"  # a red diamond with a 7
    ask_red = ["Which number is on the red tag?"]
    box = known_truth(scene, ask_red[0]).box
    text = "[" + ", ".join(f"{value:.3f}" for value in box.as_list()) + "]"
    (wrong,) = ask(Listener(text), "a", scene, ask_red, "exact")
    assert wrong.lines()[0] == f"a: red (wrong: it is 7, IoU {iou(wrong.look.box, box):.2f})"
    assert iou(wrong.look.box, box) > 0.98
    right = replace(wrong, look=replace(wrong.look, answer="7."))
    assert right.lines()[0].startswith("a: 7. (right, IoU ")
    (vague,) = ask(Listener("to the left"), "v", scene, ask_red, "exact")
    assert vague.lines()[0].endswith("(wrong: it is 7, no box)")
    colours = colours_of(answer_sheet([[right, wrong, vague]]))
    assert {ImageColor.getrgb(colour) for colour in (GOOD, BAD, TRUE_COLOUR)} <= colours.keys()


def test_what_a_scene_does_not_answer_is_not_judged_and_gets_a_hint(picture):
    (reply,) = ask(
        Listener("[0.1, 0.1, 0.5, 0.5]"), "a", "scene:test@1/5", ["Which number is on the blue tag?"], "exact"
    )
    assert reply.truth is None
    assert reply.lines()[0] == "a: red"
    assert "Which number is on the red tag?" in hint("scene:test@1/5", reply.question)
    assert hint("scene:test@1/5", "Which number is on the red tag?") == hint(picture, "What colour?") == ""


@pytest.mark.parametrize(
    "text", ["a\ud83db", "\0\x1b[31m\x9b", "x" * 100_000, "ما هو الرقم", "🏷️ 7️⃣", "a\nb\tc", "", " "]
)
def test_odd_texts_are_drawn_and_printed(text, picture):
    (reply,) = ask(Listener("[0.1, 0.1, 0.5, 0.5]"), "a", picture, ["What?"], "exact")
    odd = replace(reply, model=text, question=text, look=replace(reply.look, answer=text))
    assert answer_sheet([[odd]]).height < 2_000
    assert "\x1b" not in printable(text)
    printable(text).encode()


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


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["Why?", "--out", "sheet.xyz"], "out: sheet.xyz is no picture's name; end it in .png"),
        (["Why?", "--out", "sheet"], "out: sheet is no picture's name"),
        ([" "], "'question' is empty"),
        (["Why?", "<image>\n"], "'question' is empty"),
        (["<image> or <image>?"], "holds 2 <image> marks"),
    ],
)
def test_what_cannot_be_asked_or_written_is_refused_before_a_model_is_opened(picture, words, told, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["ask", "--model", "no/such/model", "--image", picture, *words])
    assert ended.value.code == 1
    assert told in " ".join(capsys.readouterr().err.split())
