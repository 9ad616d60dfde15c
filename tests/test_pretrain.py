"""The embedded model's pre-training: rows with branches are the model's own plain calls, and a kill changes nothing."""

import torch

from visrl.box import with_sides_moved
from visrl.conversation import answer_conversation, crop_view, focus_conversation, open_view
from visrl.models.tiny.lessons import Asked
from visrl.models.tiny.pretrain import Pretraining
from visrl.models.tiny.recipe import PretrainConfig
from visrl.records import Picture
from visrl.scenes import close_up, make_scene, questions_of, true_box

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
            *(Asked(question, true_box(scene, question)) for question in questions),
            Asked(questions[0], crop=crop_view(whole, Picture(scene.ref, box))),
        ]))  # fmt: skip
    batch = training.lessons._assemble(asked)
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
