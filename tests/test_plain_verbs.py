"""The plain form in every verb: for a model without an entry, for a checkpoint's own code, and against the tree; and
what is told of it.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import torch
import transformers as tf
from PIL import Image
from safetensors.torch import load_file, save_file
from serve_help import body, post, serving
from tiny_families import MEAN, TEXT, VISION, template, tokenizer

from visrl.config import ConfigError, build_config
from visrl.conversation import View, focus_conversation
from visrl.engines.base import Sampling
from visrl.engines.local import LocalEngine
from visrl.engines.open import PolicyConfig, opened_policy
from visrl.evaluate.ask import ask
from visrl.evaluate.config import EvalConfig
from visrl.evaluate.run import evaluate
from visrl.evolve.config import GenerateConfig
from visrl.evolve.generate import generate
from visrl.models.folder import CheckpointError
from visrl.models.load import load_encoder, load_model
from visrl.models.tiny import CHECKPOINT
from visrl.serve.config import ServeConfig
from visrl.serve.metrics import Metrics
from visrl.serve.runner import make_backend, serve
from visrl.train.config import TrainConfig
from visrl.train.export import ExportConfig, export
from visrl.train.run import train

PLAIN = {"layout": "plain"}


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Mistral 3, which has no entry in the table of families."""
    folder = tmp_path_factory.mktemp("mistral3")
    words = tokenizer(bos="<s>", eos="</s>", image_token="[IMG]", image_break_token="[IMG_BREAK]", end="[IMG_END]")
    text = {"model_type": "mistral", **TEXT, "vocab_size": len(words), "head_dim": 16, "sliding_window": None}
    vision = {"model_type": "pixtral", **VISION, "image_size": 112, "patch_size": 14, "head_dim": 16}
    config = tf.Mistral3Config(
        text_config=text, vision_config=vision, spatial_merge_size=2, image_token_index=words.image_token_id
    )
    torch.manual_seed(0)
    model = tf.Mistral3ForConditionalGeneration(config)
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(torch.randn_like(weights) * 0.1)
    pictures = tf.PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 28, "width": 28}, **MEAN)
    processor = tf.PixtralProcessor(
        pictures, words, patch_size=14, spatial_merge_size=2, chat_template=template("[IMG]", "<s>")
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def config(model: Path, out: Path, **more: Any) -> TrainConfig:
    values = {
        "model_name_or_path": str(model), "output_dir": str(out), "per_device_train_batch_size": 2, "logging_steps": 1,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_strategy": "no", "disable_tqdm": True, "seed": 3,
        "processes": 1, **PLAIN, **more,
    }  # fmt: skip
    return build_config(TrainConfig, values, where="the test")


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- a model without an entry -----------------------------------------------------------------------------------------


def test_a_model_without_an_entry_warms_up_merges_and_is_asked(
    strange: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phases = [{"steps": 2}]
    out = train(config(strange, tmp_path / "sft", curriculum=phases, gradient_checkpointing=True))
    assert len(log(out)) >= 2
    adapter = load_file(out / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)
    assert "plain form, as layout: plain asks for it" in capsys.readouterr().err
    merged = export(
        ExportConfig(
            model_name_or_path=str(strange), adapter_name_or_path=(str(out),), export_dir=tmp_path / "m", **PLAIN
        )
    )
    with opened_policy(PolicyConfig(model_name_or_path=str(merged), **PLAIN)) as opened:
        (answer,) = ask(opened.policy, "it", "scene:test/0", ["What?"], "exact")
    assert answer.lines()[0].startswith("it: ")
    assert answer.look.fault is None or "no box in the form" in answer.look.fault  # it was asked, whatever it says
    assert "question and pictures again for each response and each sample" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_without_an_entry_learns_from_preferences_and_online(strange: Path, tmp_path: Path) -> None:
    for stage in (1, 2):
        given = {"stage": "dpo", "rl_stage": stage, "dataset": f"demo_rl_data_stage{stage}", "max_samples": 4}
        out = train(config(strange, tmp_path / f"stage{stage}", num_train_epochs=1, **given))
        assert all(row["loss"] == row["loss"] for row in log(out) if "loss" in row)
        assert load_file(out / "adapter_model.safetensors")
    given = {"stage": "grpo", "num_generations": 2, "num_answers": 2, "max_completion_length": 8}
    out = train(
        config(strange, tmp_path / "online", max_steps=8, dataset="scenes:preference@1/0+8", **given)
    )  # fmt: skip
    assert len([row for row in log(out) if "reward" in row]) == 8
    assert len(rows(out / "rollouts.jsonl")) == 16


@pytest.mark.slow
def test_a_model_without_an_entry_generates_is_evaluated_and_served(strange: Path, tmp_path: Path) -> None:
    here: dict[str, Any] = {"model_name_or_path": str(strange), **PLAIN}
    out = generate(
        GenerateConfig(output_dir=tmp_path / "g", dataset="scenes:preference/0+2", rounds=1, critic="oracle", **here)
    )
    assert len(rows(out / "trajectories.jsonl")) == 4
    scores = evaluate(EvalConfig(output_dir=tmp_path / "e", dataset="scenes:test/0+3", **here))
    assert (Path(scores) / "scores.json").is_file()
    metrics, asked = Metrics(), [body(f"What {n}?", max_tokens=4 + n, model="it") for n in range(3)]
    with serving(make_backend(ServeConfig(**here, served_model_name="it"), metrics), metrics, name="it") as url:
        with ThreadPoolExecutor(3) as callers:  # two of them join while the first is decoded, and wait for its end
            replies = [reply.json() for reply in callers.map(lambda fields: post(url, fields), asked)]
        alone = [post(url, fields).json() for fields in asked]
        focus = post(url, body(max_tokens=4, model="it:focus"))
        streamed = post(url, asked[0] | {"stream": True}).text
    assert [reply["choices"] for reply in replies] == [reply["choices"] for reply in alone]
    assert focus.status_code == 200
    assert streamed.endswith("data: [DONE]\n\n")


# --- against the tree, through verbs ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_generation_and_evaluation_are_those_of_the_tree(tmp_path: Path) -> None:
    found = {}
    for layout in ("tree", "plain"):
        here: dict[str, Any] = {"model_name_or_path": str(CHECKPOINT), "layout": layout, "batch_size": 4}
        made = generate(
            GenerateConfig(output_dir=tmp_path / f"g {layout}", dataset="scenes:preference/0+6", rounds=1, **here)
        )
        scored = evaluate(EvalConfig(output_dir=tmp_path / f"e {layout}", dataset="scenes:test/0+6", **here))
        results = [{**row, "model": ""} for row in rows(Path(scored) / "results.jsonl")]
        found[layout] = (made / "trajectories.jsonl").read_text(), results
    assert found["plain"] == found["tree"]


@pytest.mark.slow
@pytest.mark.parametrize("given", [
    {"stage": "sft", "dataset": "demo_sft_data", "max_samples": 6},
    {"stage": "dpo", "rl_stage": 1, "dataset": "demo_rl_data_stage1", "max_samples": 6},
    {"stage": "dpo", "rl_stage": 2, "dataset": "demo_rl_data_stage2", "max_samples": 6},
    {"stage": "dpo", "rl_stage": 2, "dataset": "demo_rl_data_stage2", "max_samples": 6, "pref_loss": "kto"},
], ids=["sft", "stage1", "stage2", "kto"])  # fmt: skip
def test_training_is_that_of_the_tree(tiny: Path, tmp_path: Path, given: dict[str, Any]) -> None:
    """Losses and weights after steps of SGD, where a rounding error stays one."""
    made = {}
    for layout in ("tree", "plain"):
        own = {"layout": layout, "optim": "sgd", "max_steps": 3, "max_grad_norm": 0.0, **given}
        out = train(config(tiny, tmp_path / layout, **own))
        made[layout] = load_file(out / "adapter_model.safetensors"), [row["loss"] for row in log(out) if "loss" in row]
    assert made["plain"][1] == pytest.approx(made["tree"][1], rel=1e-5)
    for name, tensor in made["tree"][0].items():
        torch.testing.assert_close(made["plain"][0][name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_online_steps_sample_what_the_tree_samples(tmp_path: Path) -> None:
    """Eight steps of steps so small that no draw falls otherwise; every text is the tree's."""
    texts = {}
    for layout in ("tree", "plain"):
        out = train(
            config(
                CHECKPOINT, tmp_path / layout, layout=layout, stage="grpo", num_generations=3, num_answers=2,
                max_steps=8, dataset="scenes:preference@1/0+8", learning_rate=1e-6,
            )
        )  # fmt: skip
        texts[layout] = [
            [(box["text"], box["answers"]) for box in row["boxes"]] for row in rows(out / "rollouts.jsonl")
        ]
        assert len([row for row in log(out) if "reward" in row]) == 8
    assert texts["plain"] == texts["tree"]


# --- code that comes with a checkpoint --------------------------------------------------------------------------------

CONFIGURATION = """
from pathlib import Path
from transformers import LlavaConfig

Path({ran!r}).touch()


class TrialConfig(LlavaConfig):
    model_type = "trial_vlm"
"""
MODELING = """
from transformers import LlavaForConditionalGeneration
from .configuration_trial import TrialConfig


class TrialModel(LlavaForConditionalGeneration):
    config_class = TrialConfig
"""


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    """A checkpoint whose classes are code in its own folder, which leaves the file `ran` where it is run."""
    folder = tmp_path / "shipped"
    model, encoder = tiny_families.make("llava")
    model.save_pretrained(folder)
    encoder.processor.save_pretrained(folder)
    save_file({name: weight.contiguous() for name, weight in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "configuration_trial.py").write_text(CONFIGURATION.format(ran=str(tmp_path / "ran")))
    (folder / "modeling_trial.py").write_text(MODELING)
    written = json.loads((folder / "config.json").read_text())
    written |= {
        "model_type": "trial_vlm", "architectures": ["TrialModel"],
        "auto_map": {
            "AutoConfig": "configuration_trial.TrialConfig",
            "AutoModelForCausalLM": "modeling_trial.TrialModel",
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def test_code_of_a_checkpoint_is_not_run_unasked(shipped: Path) -> None:
    for open_it in (load_encoder, load_model, LocalEngine.load):
        with pytest.raises(
            CheckpointError, match=r"'trial_vlm' is code that comes with the checkpoint.*trust_remote_code"
        ):
            open_it(shipped)
    with pytest.raises(ConfigError, match="allow_remote_code=true"):
        serve(model_name_or_path=str(shipped), trust_remote_code=True)
    assert not (shipped.parent / "ran").exists()


def test_code_of_a_checkpoint_that_is_trusted_runs_in_the_plain_form(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    engine = LocalEngine.load(shipped, trust_remote_code=True)
    assert (shipped.parent / "ran").exists()
    assert engine.encoder.family.plain
    talk = focus_conversation("Where?", View("v", Image.new("RGB", (80, 60), "red")))
    (said,) = engine.complete([talk], Sampling(max_tokens=5), [[0]])
    model, encoder = tiny_families.make("llava")
    (known,) = LocalEngine(model, encoder).complete([talk], Sampling(max_tokens=5), [[0]])
    assert said[0].ids == known[0].ids
    out = train(config(shipped, tmp_path / "sft", trust_remote_code=True, curriculum=[{"steps": 1}]))
    assert load_file(out / "adapter_model.safetensors")


# --- what is told -----------------------------------------------------------------------------------------------------


def test_a_layout_that_a_model_does_not_take_is_refused(tiny: Path, strange: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layout"):
        build_config(TrainConfig, {"model_name_or_path": "m", "output_dir": "o", "layout": "rows"}, where="the test")
    for key, value in (("attention", "dense"), ("bin_length", 256), ("feature_cache_gb", 1.0)):
        with pytest.raises(ConfigError, match=f"{key}: it is about prefix trees, and layout: plain asks for it"):
            train(config(tiny, tmp_path / "out", curriculum=[{"steps": 1}], **{key: value}))
    model, encoder = tiny_families.make("paligemma")
    folder = tmp_path / "paligemma"
    model.save_pretrained(folder)
    encoder.processor.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="it has no plain form"):
        LocalEngine.load(folder, layout="plain")


@pytest.mark.parametrize(("written", "told"), [
    (
        {"model_type": "minicpmo", "auto_map": {"AutoModel": "modeling_minicpmo.MiniCPMO"}},
        r"trust_remote_code: true runs it, in the plain form; or take a successor.*MiniCPM-V 4\.6",
    ),
    ({"model_type": "llava", "mm_vision_tower": "./vit"}, r"own program \(mm_vision_tower\).*Yi-VL has neither"),
    ({"model_type": "no_such_vlm"}, "has no model of images and text by that name"),
], ids=["MiniCPM-o", "Yi-VL", "unknown"])  # fmt: skip
def test_bases_without_a_class_are_told_with_what_to_take(tmp_path: Path, written: dict[str, Any], told: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match=told):
        load_encoder(tmp_path)
