"""The model card of an exported folder: what its manifests say and no more, and code that runs as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import visrl
from visrl.images import open_image
from visrl.models.settings import ModelSettings
from visrl.models.tiny import CHECKPOINT
from visrl.train.card import QUESTION, Card, Training, card_text, history, trainings


def card(base: str = "Qwen/Qwen2-VL-2B-Instruct", made: Any = (), **facts: Any) -> Card:
    given = {"settings": ModelSettings(), "dtype": "bfloat16", "deviation": 2e-6, "size": None, "vllm": ["vllm"]}
    return Card(folder="out/model", base=base, trainings=made, **(given | facts))


def front_matter(text: str) -> dict[str, Any]:
    _, matter, _ = text.split("---\n", 2)
    return yaml.safe_load(matter)


def test_the_front_matter_names_a_base_of_the_hub_and_no_folder_as_one():
    assert front_matter(card_text(card())) == {
        "base_model": "Qwen/Qwen2-VL-2B-Instruct",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["visrl", "visual-grounding"],
    }
    for local in ("runs/sft/merged", str(CHECKPOINT), "model"):
        assert "base_model" not in front_matter(card_text(card(local)))
        assert f"- Base model: `{local}`" in card_text(card(local))


def test_an_online_training_is_told_by_what_it_learned_from():
    given = {"stage": "grpo", "num_generations": 8, "num_answers": 4, "loss_type": None, "finetuning_type": "full",
             "rewards": [{"name": "answer", "weight": 1.0, "metric": "anls", "when": None},
                         {"name": "format", "weight": 0.1, "metric": None, "when": None},
                         {"name": "iou", "weight": 0.0, "metric": None, "when": None}]}  # fmt: skip
    text = card_text(card(made=[Training({"config": given, "steps": 90})]))
    said = "- 1. Online reinforcement (`stage: grpo`): 8 boxes a question, 4 answers a crop"
    assert f"{said}, reward answer_anls + 0.1 format, `dapo`, DAPO (Yu et al. 2025); all weights, 90 steps" in text


def test_every_training_is_told_by_its_manifest():
    sft = {"stage": "sft", "finetuning_type": "lora", "lora_rank": 8, "dataset": "viscot"}
    dpo = {"stage": "dpo", "rl_stage": 2, "pref_loss": "ipo", "pref_beta": 0.2, "finetuning_type": "full"}
    asked = {"rollout_samples": 64, "rollout_dataset": "held-out"}
    made = [
        Training({"config": sft, "items": 30_000, "steps": 250, "seed": 88}),
        Training({"config": dpo | asked}, {"accuracy": 0.5, "iou": 0.25}),
    ]
    text = card_text(card(made=made))
    said = "- 1. Warm-up, supervised (`stage: sft`) on `viscot`"
    assert f"{said}; LoRA of rank 8, 30,000 items, 250 steps, seed 88" in text
    said = "- 2. Preferences over boxes and answers (`stage: dpo`, `rl_stage: 2`): `ipo`, IPO (Azar et al. 2023)"
    assert f"{said}, beta 0.2; all weights\n" in text
    assert "64 held-out questions of `held-out`, at the end of the last training" in text
    assert "| answers right | 0.500 |\n| mean IoU | 0.250 |\n" in text
    assert "## Scores" not in card_text(card(made=made[:1]))
    assert "None" not in text.replace("is not None", "")


def test_what_a_checkpoint_was_made_from_is_followed_by_manifests_until_they_end(tmp_path):
    def folder(name: str, verb: str, model: str, **facts: Any) -> str:
        path = tmp_path / name
        path.mkdir()
        said = {"verb": verb, "config": {"model_name_or_path": model, "stage": name}, "parents": {}, **facts}
        (path / "manifest.json").write_text(json.dumps(said))
        return str(path)

    full = folder("full", "train", "hub/model")
    adapter, gone = folder("adapter", "train", full), str(tmp_path / "gone")
    merged = folder("merged", "export", full, adapters=[{"path": adapter}, {"path": gone}])
    base, made = history(merged)
    assert base == "hub/model"
    assert [one.manifest["config"]["stage"] for one in made] == ["full", "adapter"]
    assert trainings([gone]) == []
    itself = folder("itself", "train", str(tmp_path / "itself"))
    assert history(itself)[0] == itself
    assert history("hub/other") == ("hub/other", [])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model after a step of training at other pixel limits than its processor's, merged."""
    run = tmp_path_factory.mktemp("card")
    visrl.train(
        model_name_or_path=str(CHECKPOINT), stage="sft", dataset="scenes:train/0+2", max_steps=1, lora_rank=2,
        image_min_pixels=15_680, image_max_pixels=15_680, output_dir=run / "adapter", rollout_samples=2,
        rollout_dataset="scenes:validation/0+2", eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    return visrl.export(
        model_name_or_path=str(CHECKPOINT), adapter_name_or_path=str(run / "adapter"), export_dir=run / "model",
        export_dtype="float32",
    )  # fmt: skip


def test_the_code_of_an_exported_card_runs_and_transformers_writes_what_visrl_reads(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (exported / "README.md").read_text(encoding="utf-8")
    assert "- 2. Warm-up, supervised (`stage: sft`) on `scenes:train/0+2`; LoRA of rank 2, 2 items, 1 steps" in text
    assert "2 held-out questions of `scenes:validation/0+2`, at the end of the last training" in text
    assert "`image_max_pixels: 15,680`" in text
    asked = text.replace(QUESTION, "Which number is on the green tag?")  # of the drawn scene, which holds no sign
    ours, theirs, over_vllm = re.findall(r"```python\n(.*?)```", asked, flags=re.S)
    (served,) = re.findall(r"```sh\n(.*?)```", text, flags=re.S)
    assert f"vllm serve {exported} --host 127.0.0.1 --port 8000 --served-model-name {exported} " in served
    compile(over_vllm, "card", "exec")
    monkeypatch.chdir(tmp_path)
    open_image("scene:test/20").save("image.png")
    names: dict[str, Any] = {}
    capsys.readouterr()
    exec(ours, names)
    assert Path("crop.png").is_file()
    look = names["look"]
    assert look.box is not None
    capsys.readouterr()
    exec(theirs, names)
    assert capsys.readouterr().out.strip() == look.text
