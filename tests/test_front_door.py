"""`import visrl`: what it gives, what it costs, and the few lines that load a checkpoint and ask it."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import visrl
from visrl.callable_package import CallablePackage
from visrl.models.tiny import CHECKPOINT

ROOT = Path(__file__).parents[1]
SCENE, QUESTION = "scene:test/20", "Which number is on the green tag?"


def fresh(code: str) -> str:
    """What `code` prints in a new process."""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return ran.stdout


def test_the_front_door_costs_no_torch_and_not_one_module_of_the_package():
    code = """
import json, sys, time
before, start = set(sys.modules), time.perf_counter()
import visrl
seconds = time.perf_counter() - start
names = dir(visrl)
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
inside = [name for name in sys.modules if name.startswith("visrl.")]
visrl.Box, visrl.Sample, visrl.TrainConfig, visrl.train, visrl.evaluate, visrl.serve, visrl.report
heavy = sorted(loaded & {"torch", "transformers", "pydantic", "PIL"})
print(json.dumps([seconds, heavy, inside, "torch" in sys.modules]))
"""
    seconds, loaded, inside, torch = json.loads(fresh(code))
    assert (loaded, inside, torch) == ([], [], False)
    assert seconds < 0.5


def test_every_public_name_is_there_and_is_what_type_checkers_see():
    tree = ast.parse((ROOT / "visrl" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for renamed in (node for node in block.body if isinstance(node, ast.Assign)):
        for new, old in zip(renamed.targets[0].elts, renamed.value.elts, strict=True):
            typed[new.id] = typed.pop(old.id)
    assert typed.keys() == visrl.NAMES.keys()
    assert set(visrl.__all__) <= set(dir(visrl))
    for name, (module, attribute) in typed.items():
        defined = getattr(importlib.import_module(module), attribute)
        given = getattr(visrl, name)
        assert (given.function() if isinstance(given, CallablePackage) else given) is defined, name
        assert defined.__module__ == module, f"{name} is named where it is defined"
        assert defined.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'loadpolicy'"):
        visrl.loadpolicy  # noqa: B018


@pytest.mark.parametrize("name", [name for name, path in visrl.NAMES.items() if path == f"visrl.{name}"])
def test_a_verb_that_is_a_package_can_be_called_and_imported_from(name):
    """Whatever was imported of the package before: that makes it an attribute of `visrl`, in place of any function."""
    package = importlib.import_module(f"visrl.{name}")
    assert getattr(visrl, name) is package
    function = package.function()
    assert function.__name__ in (name, f"run_{name}")
    assert callable(package)
    assert package.__signature__ == inspect.signature(function)


@pytest.fixture(scope="module")
def policy():
    with visrl.load_policy(CHECKPOINT) as policy:
        yield policy


def test_five_lines_load_a_checkpoint_and_ask(policy):
    look = policy.ask(SCENE, QUESTION)
    assert look.error is None
    assert look.answer.isdigit()
    left, top, right, bottom = look.box_pixels
    assert visrl.Box.from_pixels(look.box_pixels, look.whole.size).as_list() == pytest.approx(look.box.as_list())
    assert abs(look.crop.width - (right - left)) < 2 or look.crop.width == 28  # rounded outward, 28 px at least
    assert abs(look.crop.height - (bottom - top)) < 2 or look.crop.height == 28


def test_a_picture_may_be_a_path_a_data_url_or_in_memory(policy, tmp_path):
    from visrl.engines.endpoint import data_url
    from visrl.images import open_image

    image = open_image(SCENE)
    image.save(tmp_path / "scene.png")
    asked = [SCENE, image, tmp_path / "scene.png", str(tmp_path / "scene.png"), data_url(image)]
    looks = [policy.ask(one, QUESTION) for one in asked]
    assert looks[0].error is None
    assert len({(look.box, look.answer, look.crop.tobytes()) for look in looks}) == 1


def test_an_image_in_memory_may_have_any_mode(policy, tmp_path):
    from visrl.images import open_image

    image = open_image(SCENE)
    clear = image.convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    for given in (image.convert("CMYK"), image.convert("L"), image.convert("I;16"), image.convert("F"), clear):
        assert policy.ask(given, QUESTION).whole.image.mode == "RGB"
    with Image.open(tmp_path / "clear.png") as opened:
        assert policy.ask(opened, QUESTION).whole.image.getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(visrl.UserError, match="the image"):
        policy.ask(Image.new("F", (64, 64), float("nan")), QUESTION)


def test_what_cannot_be_asked_is_refused_in_a_sentence(policy, tmp_path):
    with pytest.raises(visrl.UserError, match="no picture at"):
        policy.ask(tmp_path / "none.png", QUESTION)
    with pytest.raises(visrl.UserError, match="ask a question about the picture"):
        policy.ask(Image.new("RGB", (64, 64)), " ")
    with pytest.raises(visrl.UserError, match="did you mean 'image_max_pixels'"):
        visrl.load_policy(CHECKPOINT, image_maxpixels=3136)
    with pytest.raises(visrl.UserError, match=r"no model|no such|nothing"):
        visrl.load_policy(tmp_path / "none")


@pytest.mark.parametrize(
    ("image", "question", "said"),
    [
        (b"PNG", QUESTION, "an image is a path, .* not bytes"),
        (None, QUESTION, "an image is a path, .* not NoneType"),
        (SCENE, None, "a question is a text, not NoneType"),
    ],
)
def test_what_is_no_image_and_no_question_is_named(policy, image, question, said):
    with pytest.raises(visrl.UserError, match=said):
        policy.ask(image, question)


def test_a_truncated_image_in_memory_is_refused(policy, tmp_path):
    Image.effect_noise((300, 300), 50).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    with Image.open(tmp_path / "half.png") as opened, pytest.raises(visrl.UserError, match="cannot be read"):
        policy.ask(opened, QUESTION)


@pytest.mark.parametrize("keys", [{"rounds": 0}, {"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"trigger": 2}])
def test_settings_of_a_rollout_outside_their_range_are_refused(policy, keys):
    with pytest.raises(visrl.UserError, match=next(iter(keys))):
        policy.roll_out(visrl.read_samples("scenes:preference/0+1"), **keys)


def test_an_unknown_crop_rule_is_refused():
    with pytest.raises(visrl.UserError, match="crop_rule must be one of exact, margin, viscot_square"):
        visrl.load_policy(CHECKPOINT, crop_rule="square")


def test_one_call_asks_as_a_loaded_policy_does(policy):
    look = visrl.ask(visrl.PolicyConfig(model_name_or_path=str(CHECKPOINT)), SCENE, QUESTION)
    here = policy.ask(SCENE, QUESTION)
    assert (look.box, look.answer, look.error) == (here.box, here.answer, None)


def test_a_policy_rolls_out_questions_as_generate_does(policy):
    samples = visrl.read_samples("scenes:preference/0+3")
    trajectories = policy.roll_out(samples, rounds=2, seed=3)
    assert [(t.sample_id, t.round, t.branch) for t in trajectories] == [
        (sample.id, r, b) for sample in samples for r in (0, 1) for b in (0, 1)
    ]
    assert policy.roll_out(samples[1:2], rounds=2, seed=3) == trajectories[4:8]
    assert policy.roll_out(samples[1:2], rounds=2, seed=4) != trajectories[4:8]
    settings = visrl.RolloutSettings(rounds=2, crop_rule=policy.crop_rule, seed=3)
    assert visrl.roll_out(policy.engine, samples[2:], settings) == trajectories[8:]


def test_a_verb_takes_a_config_a_file_or_keys(tmp_path):
    from visrl.config import ConfigError, as_config

    (tmp_path / "train.yaml").write_text(
        "model_name_or_path: a\noutput_dir: out\nstage: dpo\nstage2: {pref_beta: 0.3}\n"
    )
    said = {"model_name_or_path": "a", "output_dir": "out", "stage": "dpo"}
    by_keys = as_config(visrl.TrainConfig, None, {**said, "rl_stage": 2, "pref_beta": 0.3})
    by_file = as_config(visrl.TrainConfig, tmp_path / "train.yaml", {"rl_stage": 2})
    by_config = as_config(visrl.TrainConfig, visrl.TrainConfig(**said), {"rl_stage": 2, "pref_beta": 0.3})
    assert by_keys == by_file == by_config
    assert as_config(visrl.TrainConfig, by_keys, {}) is by_keys
    with pytest.raises(ConfigError, match="TrainConfig: unknown key 'datset'; did you mean 'dataset'"):
        visrl.train(**said, datset="x")
    with pytest.raises(ConfigError, match="no config at"):
        visrl.evaluate(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"EvalConfig: max_samples: .*greater than or equal to 1"):
        visrl.evaluate(model_name_or_path="a", dataset="b", output_dir="c", max_samples=0)
    with pytest.raises(TypeError, match="give a TrainConfig, the path of a YAML file or keys, not dict"):
        visrl.train(said)


def test_five_lines_roll_out_and_score(policy):
    samples = visrl.read_samples("scenes:preference/0+6")
    trajectories = policy.roll_out(samples, rounds=3)
    verdicts = visrl.score(samples, trajectories, policy)
    pairs = visrl.make_pairs(samples, trajectories, verdicts)
    assert [(v.sample_id, v.round, v.branch) for v in verdicts] == [
        (t.sample_id, t.round, t.branch) for t in trajectories
    ]
    assert pairs.kept + sum(pairs.dropped.values()) == len(samples)
    assert all(isinstance(one, visrl.Preference) for one in pairs.preferences)
    assert visrl.score(samples[::-1], trajectories[:4], policy, critic="oracle") == verdicts[:4]
    with pytest.raises(visrl.UserError, match="is not among the samples"):
        visrl.score(samples[1:], trajectories, policy)
    with pytest.raises(visrl.UserError, match="did you mean 'critic_url'"):
        visrl.score(samples, trajectories, policy, critic_ur="http://localhost:1/v1")


@pytest.mark.slow
def test_a_type_checker_sees_the_types_of_what_the_front_door_gives(tmp_path):
    (tmp_path / "use.py").write_text(
        """import visrl
look = visrl.load_policy("checkpoint").ask("image.png", "What?")
reveal_type(look.box_pixels)
reveal_type(visrl.train(stage="dpo"))
reveal_type(visrl.make_pairs([], [], []).preferences)
visrl.load_policy(7)
visrl.loadpolicy
"""
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--ignore-missing-imports"]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    ran = subprocess.run([*command, "use.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert re.findall(r'Revealed type is "(?:builtins\.)?(.+)"', ran.stdout) == [
        "tuple[float, float, float, float] | None", "pathlib.Path", "list[visrl.records.Preference]",
    ]  # fmt: skip
    assert re.findall(r"use.py:(\d+): error: .*\[(.+)\]", ran.stdout) == [("6", "arg-type"), ("7", "attr-defined")]
