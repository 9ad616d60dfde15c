"""The embedded model's pre-training: rows with branches are the model's own plain calls, and a kill changes nothing."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from visrl.box import with_sides_moved
from visrl.config import read_config
from visrl.conversation import answer_conversation, crop_view, focus_conversation, open_view
from visrl.manifest import ManifestError, read_manifest
from visrl.models.load import load_model
from visrl.models.tiny.pretrain import Pretraining, pretrain, rate_share
from visrl.models.tiny.readouts import BINS, box_loss, soft_bins
from visrl.models.tiny.recipe import PretrainConfig
from visrl.models.tiny.rows import RowBranch, batch_of, cell_shares
from visrl.records import Picture
from visrl.scenes import KINDS, SIDE, close_up, make_scene, questions_of, true_box

ROOT = Path(__file__).parents[1]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]},
}


def recipe(tmp_path, **keys):
    phases = [
        {"steps": 3, "zoom": [0.0, 0.5]},
        {"steps": 3, "boxes": ["colour", "count"], "loose": 0.2, "square": 0.5},
    ]
    given = {"scenes": 3, "window": 8, "fresh": 2, "bf16": False, "eval_scenes": 2, "eval_steps": 6, "save_steps": 2}
    return PretrainConfig(**{"output_dir": tmp_path / "out", "phases": phases, "logging_steps": 1, **given, **keys})


def test_a_row_with_branches_is_the_models_own_plain_calls(tmp_path):
    """Token by token, boxes and answers as training, decoding and serving encode them; pixels are equal to the bit."""
    training = Pretraining(recipe(tmp_path), **SMALL)
    encoder = training.lessons.encoder
    asked = []
    for index in (0, 5):
        scene = make_scene("train", index)
        whole = open_view(Picture(scene.ref))
        questions = questions_of(scene)[:3]
        box = with_sides_moved(close_up(scene, questions[0], 0.4), 0.3, -0.1, 0.2, 0.0)
        asked.append((scene, [
            *(RowBranch(question, true_box(scene, question)) for question in questions),
            RowBranch(questions[0], crop=crop_view(whole, Picture(scene.ref, box))),
        ]))  # fmt: skip
    batch = batch_of(training.lessons.prompts, asked)
    with torch.no_grad():
        last = training.hidden_states(batch)[-1]
        length = batch.ids.shape[1]
        images = 0
        for n, (scene, branches) in enumerate(asked):
            for number, one in enumerate(branches, 1):
                whole = open_view(Picture(scene.ref))
                if one.crop:
                    talk, said = answer_conversation(one.question.text, whole, one.crop), one.question.answer
                else:
                    text = encoder.codec.format(one.box, whole.size, encoder.processed_size(whole.size))
                    talk, said = focus_conversation(one.question.text, whole), text
                path = encoder.encode(talk, [said])[0]
                own = (batch.branches[n] == 0) | (batch.branches[n] == number)
                assert batch.ids[n][own].tolist() == path.ids.tolist()
                assert torch.equal(batch.positions[:, n][:, own], torch.from_numpy(path.positions))
                pixels = torch.cat([view.inputs["pixel_values"] for view in path.views])
                grids = torch.cat([view.inputs["image_grid_thw"].view(-1, 3) for view in path.views])
                plain = training.model.model(
                    input_ids=torch.from_numpy(path.ids)[None], position_ids=torch.from_numpy(path.positions)[:, None],
                    pixel_values=pixels, image_grid_thw=grids,
                )  # fmt: skip
                mine = last[n * length : (n + 1) * length][own]
                assert torch.allclose(mine, plain.last_hidden_state[0], atol=1e-4)
                images += int(one.crop is not None)
        assert images == 2


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def logged(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_a_killed_run_goes_on_to_the_same_weights_and_log(tmp_path, monkeypatch):
    whole = pretrain(recipe(tmp_path), **SMALL)
    cut = recipe(tmp_path, output_dir=tmp_path / "cut")
    step = Pretraining.step

    def killed_in_the_last_step(self, number):
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(Pretraining, "step", killed_in_the_last_step)
    with pytest.raises(KeyboardInterrupt):
        pretrain(cut, **SMALL)
    assert [path.name for path in (tmp_path / "cut" / "state").iterdir()] == ["step-4.safetensors"]
    assert read_manifest(tmp_path / "cut") is None
    monkeypatch.setattr(Pretraining, "step", step)
    pretrain(cut, **SMALL)
    assert (whole / "model.safetensors").read_bytes() == (tmp_path / "cut" / "model.safetensors").read_bytes()
    assert logged(whole) == logged(tmp_path / "cut")
    assert not (tmp_path / "cut" / "state").exists()
    before = files(whole)
    assert pretrain(recipe(tmp_path), **SMALL) == whole  # complete: nothing is done again
    assert files(whole) == before


def test_a_run_leaves_this_process_as_it_was(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        pretrain(recipe(tmp_path), **SMALL)
        assert torch.get_num_threads() == 2
        assert (torch.tensor([1e-39]) / 2).item() > 0, "numbers below the normal ones are still numbers"
    finally:
        torch.set_num_threads(threads)


def test_what_comes_out_is_a_plain_qwen2_vl_that_has_learned(tmp_path):
    start = Pretraining(recipe(tmp_path), **SMALL).model.state_dict()
    out = pretrain(recipe(tmp_path), **SMALL)
    found = load_model(out).state_dict()
    assert start.keys() == found.keys()
    assert not [name for name, value in start.items() if value.equal(found[name])]
    assert {"step", "cover", "cell", "shape", "word", "mark", "crop", "read", "box"} <= logged(out)[-1].keys()
    assert logged(out)[-1]["selection"].keys() <= set(KINDS)
    manifest = read_manifest(out)
    assert (manifest["verb"], manifest["steps"], manifest["config"]["seed"]) == ("pretrain", 6, 0)


def test_a_folder_of_another_recipe_is_refused(tmp_path):
    pretrain(recipe(tmp_path), **SMALL)
    with pytest.raises(ManifestError, match="config differ"):
        pretrain(recipe(tmp_path, seed=1), **SMALL)
    command = [sys.executable, "-m", "visrl.models.tiny.pretrain", "configs/tiny/pretrain.yaml", "sed=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "did you mean 'seed'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"word_layer": 5}, "word_layer=5: the language model has 4 layers"),
        ({"save_steps": 3, "logging_steps": 2}, "save_steps=3 must be a multiple of logging_steps=2"),
        ({"kinds": {"colour": 0}}, "at least one kind"),
        ({"phases": [{"steps": 1, "zoom": [0.5, 1.5]}]}, "less than or equal to 1"),
    ],
)
def test_recipes_that_cannot_be_run_are_refused(tmp_path, keys, message):
    with pytest.raises(ValueError, match=message):
        pretrain(recipe(tmp_path, **keys), **SMALL)


def test_a_batch_is_a_function_of_seed_and_step_and_seeds_share_no_scene(tmp_path):
    one, again, other = (Pretraining(recipe(tmp_path, seed=seed), **SMALL).lessons for seed in (0, 0, 1))
    again.batch(0)
    for step in (4, 1):
        for name in ("ids", "positions", "pixel_values"):
            assert torch.equal(getattr(one.batch(step), name), getattr(again.batch(step), name))
        assert one.batch(step).marks == again.batch(step).marks
    assert not torch.equal(one.batch(4).pixel_values[:64], other.batch(4).pixel_values[:64])


def test_rows_go_on_to_a_box_for_the_kinds_that_have_boxes(tmp_path):
    lessons = Pretraining(recipe(tmp_path, scenes=8), **SMALL).lessons
    assert not lessons.batch(0).boxes.at
    tokens = len(lessons.batch(3).boxes.at)
    assert tokens % 18 == 0  # sixteen of the coordinates, the bracket, the end of the turn
    assert 0 < tokens // 18 < len(lessons.batch(3).marks.at)


# --- Targets and losses by hand ---------------------------------------------------------------------------------------


def test_soft_bins_share_a_value_between_its_neighbours():
    bins = soft_bins(torch.tensor([0.06, 1.0, -0.2]))
    assert bins.shape == (3, BINS)
    assert bins[0, 1].item() == pytest.approx(0.8, abs=1e-6)
    assert bins[0, 2].item() == pytest.approx(0.2, abs=1e-6)
    assert bins[1, -1] == bins[2, 0] == 1
    assert torch.allclose(bins.sum(-1), torch.ones(3))


def test_the_loss_of_a_box_is_the_mean_cross_entropy_of_its_corners():
    """Uniform logits give log 21 whatever the box; a weight of 3 against 1 counts three quarters."""
    boxes = [(0.0, 0.0, SIDE / 2, SIDE), (0.0, 0.0, SIDE, SIDE)]
    logits = torch.zeros(2, 4 * BINS)
    assert box_loss(logits, boxes, [1.0, 1.0]).item() == pytest.approx(math.log(BINS))
    logits[1].view(4, BINS)[range(4), [0, 0, 20, 20]] = 100.0  # sure, and right
    assert box_loss(logits, boxes, [3.0, 1.0]).item() == pytest.approx(0.75 * math.log(BINS), rel=1e-5)


def test_cells_tell_what_share_of_them_a_tag_covers():
    scene = make_scene("train", 3)
    shares = cell_shares(scene, (1, 4, 4))
    for tag, row in zip(scene.tags, shares, strict=True):
        x0, y0, x1, y1 = (corner / SIDE for corner in tag.box)
        assert row.sum() / 16 == pytest.approx((x1 - x0) * (y1 - y0))  # shares of a sixteenth each
        middle = int(tag.center[1] / SIDE * 4) * 4 + int(tag.center[0] / SIDE * 4)
        assert row[middle] > 0


def test_the_rate_rises_stays_and_falls(tmp_path):
    given = recipe(tmp_path, phases=[{"steps": 100}], warmup_steps=10, decay_from=0.6, min_lr_ratio=0.1)
    assert [round(rate_share(step, given), 3) for step in (0, 9, 59, 80, 99)] == [0.1, 1.0, 1.0, 0.55, 0.123]


def test_the_shipped_recipe_fits_its_budget():
    given = read_config(PretrainConfig, ROOT / "configs" / "tiny" / "pretrain.yaml")
    assert set(given.kinds) == set(KINDS)
    assert not given.phases[0].boxes, "it starts with short rows"
    assert given.phases[-1].boxes
    tiny = Pretraining(given)
    assert sum(parameter.numel() for parameter in tiny.model.parameters()) <= 3_000_000
