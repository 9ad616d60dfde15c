"""Router losses of mixtures of experts: over trees and plain rows they are the model's own over separate sequences,
they are honoured in training, and a checkpoint that asks for them opens everywhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_table import MADE
from PIL import Image
from safetensors.torch import load_file
from test_families import gradients, talks
from test_plain import opened
from tiny_families import plain

from visrl.config import ConfigError, build_config
from visrl.conversation import View, focus_conversation
from visrl.engines.base import Sampling
from visrl.engines.local import LocalEngine
from visrl.models.attention import use_tree_attention
from visrl.models.encode import Encoder
from visrl.models.router import experts_of_a_token, kept_router_logits, router_loss
from visrl.packing.forward import branch_logps
from visrl.packing.lay_out import lay_out
from visrl.train.config import TrainConfig
from visrl.train.run import train

MOE = [
    "qwen3_vl_moe",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("ernie4_5_vl_moe", "glm4v_moe", "qwen3_5_moe")),
]


def loss_of(model: Any, encoder: Encoder, alike: bool = False) -> torch.Tensor:
    """The router loss of the sequences of two pictures as `encoder` lays them out; with `alike` every computed token
    counts once."""
    items = [
        [path for talk, responses in talks(seed, questions) for path in encoder.encode(talk, responses)]
        for seed, questions in ((1, 2), (2, 1))
    ]
    packed, _ = lay_out(items, encoder)
    with kept_router_logits(model) as routed:
        branch_logps(model, packed)
    chosen = experts_of_a_token(model.config)
    assert chosen is not None
    uses = [call.uses.clamp(max=1) if alike else call.uses for call in packed.calls]
    assert sum(int(call.uses.sum()) for call in packed.calls) == packed.separate_tokens
    return router_loss(routed, uses, chosen)


@pytest.mark.parametrize("name", MOE)
def test_a_router_loss_is_the_models_own_over_separate_sequences(name: str) -> None:
    model, tree = opened(name)
    if experts_of_a_token(model.config) is None:
        pytest.skip(f"transformers {transformers.__version__} gives no router logits of {name}")
    rows = plain(model, tree)
    paths = [
        path
        for seed, questions in ((1, 2), (2, 1))
        for talk, responses in talks(seed, questions)
        for path in rows.encode(talk, responses)
    ]
    theirs = model(**rows.rows(paths), use_cache=False, output_router_logits=True).aux_loss
    native = gradients(model, theirs[None])
    whole = torch.cat([gradient.flatten() for gradient in native.values()]).norm()
    for encoder in (rows, tree):
        if encoder is tree:
            use_tree_attention(model)
        ours = loss_of(model, encoder)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
        mine = gradients(model, ours[None])
        for key, gradient in native.items():
            assert (mine[key] - gradient).norm() < 1e-4 * max(gradient.norm(), 1e-2 * whole), key
    assert abs(loss_of(model, tree, alike=True) - theirs) > 1e-4


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random mixture of experts whose config asks for its router loss."""
    folder = tmp_path_factory.mktemp("moe")
    torch.manual_seed(0)
    model, processor = MADE["qwen3_vl_moe"]()
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(torch.randn_like(weights) * 0.05)
    model.config.text_config.output_router_logits = True
    model.config.text_config.router_aux_loss_coef = 0.25
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def trained(model: Path, out: Path, **more: Any) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    values = {
        "model_name_or_path": str(model), "output_dir": str(out), "stage": "dpo", "rl_stage": 2, "max_steps": 2,
        "dataset": "demo_rl_data_stage2", "max_samples": 4, "per_device_train_batch_size": 2, "logging_steps": 1,
        "learning_rate": 1e-2, "optim": "sgd", "max_grad_norm": 0.0, "save_strategy": "no", "disable_tqdm": True,
        "processes": 1, "finetuning_type": "full", **more,
    }  # fmt: skip
    train(build_config(TrainConfig, values, where="the test"))
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row], load_file(out / "model.safetensors")


@pytest.mark.slow
def test_a_router_loss_is_trained_as_it_is_asked_for(
    asking: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree, weights = trained(asking, tmp_path / "tree", gradient_checkpointing=True)
    assert "with the weight 0.25 (router_aux_loss_coef)" in capsys.readouterr().out
    rows, others = trained(asking, tmp_path / "plain", layout="plain")
    for name in ("loss", "aux_loss"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in tree], rel=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-4, atol=1e-6)
    without, _ = trained(asking, tmp_path / "without", router_aux_loss_coef=0)
    assert "aux_loss" not in without[0]
    assert tree[0]["loss"] == pytest.approx(without[0]["loss"] + 0.25 * tree[0]["aux_loss"], rel=1e-5)
    online, _ = trained(
        asking, tmp_path / "online", stage="grpo", rl_stage=1, num_generations=2, num_answers=2,
        max_completion_length=6, dataset="scenes:preference@1/0+4", moe_aux_loss_coef=0.5,
    )  # fmt: skip
    assert all(row["aux_loss"] > 0 for row in online)


def test_a_checkpoint_that_asks_for_a_router_loss_decodes_in_trees(asking: Path) -> None:
    engine = LocalEngine.load(asking)
    assert engine.encoder.family.found
    talk = focus_conversation("Where?", View("v", Image.new("RGB", (80, 60), "red")))
    (said,) = engine.complete([talk], Sampling(max_tokens=3), [[0]])
    assert said[0].text is not None


def test_a_weight_without_a_router_loss_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"router_aux_loss_coef: qwen2_vl gives no router logits.*leave the key out"):
        trained(tiny, tmp_path / "out", router_aux_loss_coef=0.01)
    assert not (tmp_path / "out").exists()
