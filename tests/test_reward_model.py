"""Reward models: the loss by hand, packed against separate rows, what is written, resumed and refused."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import Any

import pytest
import torch
from online_runs import read_lines
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from visrl.box import Box
from visrl.config import CheckpointConfig, ConfigError, build_config, read_config
from visrl.conversation import Conversation, View, focus_conversation, image_view
from visrl.data.sources import read_preferences
from visrl.images import open_image
from visrl.manifest import read_manifest
from visrl.models.attention import use_tree_attention
from visrl.models.encode import Encoder, TokenPath
from visrl.models.folder import CheckpointError
from visrl.models.load import load_config, load_encoder
from visrl.models.tiny import CHECKPOINT
from visrl.models.value_head import HEAD, load_value_head, value_head
from visrl.packing.forward import branch_scores
from visrl.records import Picture
from visrl.rewards.open_parts import RewardSetting, opened_parts
from visrl.rewards.parts import Attempt, Part
from visrl.rewards.reward_model import RewardModel, open_reward_model
from visrl.rollout.steps import Look, answer_request, cut
from visrl.scenes import scene_samples
from visrl.train import reward_model
from visrl.train.checkpoints import TrainingError
from visrl.train.config import TrainConfig
from visrl.train.data import Preferences
from visrl.train.export import export
from visrl.train.items import Collator, encode_item, select
from visrl.train.reward_model import RewardModelTrainer, bradley_terry
from visrl.train.run import train

# --- the loss ---------------------------------------------------------------------------------------------------------


def test_bradley_terry_by_hand() -> None:
    """Scores 2 and 1: −log σ(1) = log(1 + e⁻¹); held around 0 by 0.1, 0.1 · 3² more. Equal scores: log 2."""
    chosen, rejected = torch.tensor([2.0, 0.5]), torch.tensor([1.0, 0.5])
    plain = [log(1 + exp(-1)), log(2)]
    assert bradley_terry(chosen, rejected).tolist() == pytest.approx(plain)
    assert bradley_terry(chosen, rejected, center=0.1).tolist() == pytest.approx([plain[0] + 0.9, plain[1] + 0.1])


# --- packed equals separate -------------------------------------------------------------------------------------------


def separate(model: nn.Module, encoder: Encoder, path: TokenPath) -> Tensor:
    """The score of a response, its row a sequence by itself: the head on the last hidden state."""
    text: Any = model.model.language_model
    text.config._attn_implementation = "sdpa"
    ids = torch.from_numpy(path.ids)[None]
    pictures = {name: torch.cat([v.inputs[name] for v in path.views]) for name in path.views[0].inputs}
    marks = (ids == encoder.image_token_id).int()
    found = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=marks, **pictures)
    use_tree_attention(model)
    return value_head(model)(found.last_hidden_state[0, -1])


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}


def test_scores_loss_and_gradients_equal_those_of_one_row_per_response(headed: nn.Module, tiny: Path) -> None:
    encoder = load_encoder(tiny)
    dataset = Preferences(encoder, read_preferences("demo_rl_data_stage2"), stage=2)
    items = [dataset[n] for n in range(3)]
    batch = Collator(encoder, bin_length=64, ends=True)(items)["batch"]
    assert batch.packed.tokens < batch.packed.separate_tokens / 2
    assert len(batch.packed.row) == len(batch.branches) == 12
    chosen, rejected = (select(batch.branches, role) for role in ("chosen", "rejected"))
    ours = branch_scores(headed, batch.packed, headed, value_head(headed))
    our_loss = bradley_terry(ours[chosen], ours[rejected], center=0.1).sum()
    our_gradients = gradients(headed, our_loss)
    named = {}
    for item in items:
        paths, branches = encode_item(encoder, 0, item)
        named |= {(b.row, b.role): separate(headed, encoder, path) for path, b in zip(paths, branches, strict=True)}
    theirs = torch.stack([named[branch.row, branch.role] for branch in batch.branches])
    their_loss = bradley_terry(theirs[chosen], theirs[rejected], center=0.1).sum()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-5, atol=0)
    assert bool(((ours[chosen] - ours[rejected]).abs() > 1e-3).all())
    their_gradients = gradients(headed, their_loss)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        assert float((our_gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-9)) < 1e-4, name


# --- training ---------------------------------------------------------------------------------------------------------


def config(model: Path, out: Path, **more: Any) -> TrainConfig:
    values = {
        "model_name_or_path": str(model), "output_dir": str(out), "stage": "rm", "rl_stage": 2, "max_samples": 6,
        "dataset": "demo_rl_data_stage2", "per_device_train_batch_size": 3, "learning_rate": 3e-3, "seed": 3,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
        "processes": 1, **more,
    }  # fmt: skip
    return build_config(TrainConfig, values, where="the test")


def logged(out: Path) -> list[dict[str, Any]]:
    return read_lines(out / "log.jsonl")


@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_a_reward_model_learns_which_is_better_and_says_how(tiny: Path, tmp_path: Path, kind: str) -> None:
    out = train(config(tiny, tmp_path / "out", finetuning_type=kind, num_train_epochs=5, val_size=0.3))
    rows = [row for row in logged(out) if "loss" in row]
    told = {f"{name}/{step}" for name in ("accuracy", "margin", "mean_reward", "min_reward", "max_reward")
            for step in ("box", "answer")}  # fmt: skip
    assert told <= rows[0].keys()
    assert rows[0]["max_reward/box"] == rows[0]["min_reward/answer"] == 0  # the head starts at 0
    assert rows[0]["loss"] == pytest.approx(log(2), abs=1e-4)  # λ of stage 2: half a box pair and half an answer pair
    assert rows[-1]["loss"] < 0.9 * log(2)
    assert rows[-1]["margin/box"] > 0
    assert any("eval_accuracy/answer" in row for row in logged(out))
    head, width = load_file(out / HEAD), load_config(tiny).get_text_config().hidden_size
    assert {name: list(part.shape) for name, part in head.items()} == {
        "v_head.summary.weight": [1, width], "v_head.summary.bias": [1],
    }  # fmt: skip
    assert head["v_head.summary.weight"].abs().sum() > 0
    weights = load_file(out / ("adapter_model.safetensors" if kind == "lora" else "model.safetensors"))
    assert not [name for name in weights if "v_head" in name]
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest["config"]["stage"] == "rm"
    assert not list(out.glob("*.bin"))


@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_stopped_training_goes_on_to_the_same_head(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Stopped at step 3, gone on from the checkpoint of step 2, whose head is not the start's."""
    given = {"finetuning_type": kind, "save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
    whole = train(config(tiny, tmp_path / "whole", **given))
    out, own = tmp_path / "stopped", RewardModelTrainer._log_scores

    def stop(self: RewardModelTrainer, *args: Any) -> None:
        if self.state.global_step == 2:
            raise TrainingError("stopped")
        own(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(reward_model.RewardModelTrainer, "_log_scores", stop)
        with pytest.raises(TrainingError, match="stopped"):
            train(config(tiny, out, **given))
    assert (out / "checkpoint-2" / HEAD).is_file()
    train(config(tiny, out, **given))
    for name in (HEAD, "adapter_model.safetensors" if kind == "lora" else "model.safetensors"):
        one, other = load_file(whole / name), load_file(out / name)
        assert all(one[part].equal(other[part]) for part in one)


@pytest.mark.slow
def test_two_processes_train_to_the_head_of_one(tiny: Path, tmp_path: Path) -> None:
    given = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "train_sampling_strategy": "sequential",
             "max_samples": 8, "num_train_epochs": 1}  # fmt: skip
    whole = train(config(tiny, tmp_path / "whole", **given, per_device_train_batch_size=4))
    parts = train(config(tiny, tmp_path / "parts", **given, per_device_train_batch_size=2, processes=2))
    for name in (HEAD, "adapter_model.safetensors"):
        one, other = load_file(whole / name), load_file(parts / name)
        assert any(weights.abs().max() > 0 for weights in one.values())
        for part, weights in one.items():
            torch.testing.assert_close(weights, other[part], rtol=1e-4, atol=1e-7)


# --- as a reward ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of one step over boxes and answers, an adapter of the embedded model."""
    return train(config(CHECKPOINT, tmp_path_factory.mktemp("trained") / "rm", max_steps=1, max_samples=1))


def look(question: str, whole: View, encoder: Encoder, box: Box | None, answer: str | None) -> Look:
    if box is None:
        return Look(question, whole, "nowhere", None, "box: no box")
    text = encoder.codec.format(box, whole.size, encoder.processed_size(whole.size))
    return replace(cut(Look(question, whole, text, box), "exact"), answer=answer)


def test_a_reward_model_scores_attempts_as_separate_rows(trained: Path) -> None:
    """Two boxes, one of two answers and one of an empty one and one that cannot be shown, and one that is no box."""
    encoder = load_encoder(CHECKPOINT)
    sample = scene_samples("train", 0, 1)[0]
    whole = image_view(Picture(sample.image), open_image(sample.image))
    left, right = Box(0.1, 0.2, 0.5, 0.7), Box(0.5, 0.2, 0.9, 0.7)

    def attempt(*given: tuple[Box | None, str | None]) -> Attempt:
        return Attempt(sample, tuple(look(sample.question, whole, encoder, *one) for one in given))

    tried = [attempt((left, "7"), (left, "42")), attempt((right, ""), (right, "<|im_end|>")), attempt((None, None))]
    setting = RewardSetting(
        CheckpointConfig(model_name_or_path="m"), [], encoder, "exact", None, seed=0, device="cpu", folder=Path("runs")
    )
    with opened_parts(TypeAdapter(list[Part]).validate_python([f"model:{trained}"]), setting) as scorers:
        (scorer,) = scorers.values()
        found = scorer(tried)
    assert isinstance(scorer, RewardModel)
    assert found[2] == [0.0]
    assert found[1][1] is None
    model = scorer.model

    def score(conversation: Conversation, text: str) -> float:
        with torch.no_grad():
            return float(separate(model, encoder, encoder.encode(conversation, [text])[0]).sigmoid())

    for one, (m, n) in ((tried[0], (0, 0)), (tried[0], (0, 1)), (tried[1], (1, 0))):
        own = one.looks[n]
        box = score(focus_conversation(own.question, whole), own.text)
        answer = score(answer_request(own), own.answer or "")
        assert found[m][n] == pytest.approx((box + answer) / 2, abs=1e-6)
    assert found[0][0] != found[0][1] != found[1][0]
    assert scorer(tried[:1]) == [pytest.approx(found[0], abs=1e-6)]
    boxes = RewardModel(model, encoder, boxes_alone=True)(tried)
    of_box = score(focus_conversation(sample.question, whole), tried[0].looks[0].text)
    assert boxes[0] == [pytest.approx(of_box, abs=1e-6)] * 2


def test_an_online_run_is_rewarded_by_a_reward_model(trained: Path, tmp_path: Path) -> None:
    given = {"stage": "grpo", "num_generations": 2, "num_answers": 1, "max_steps": 1, "rewards": [f"model:{trained}"],
             "dataset": "scenes:preference@1/0+2", "per_device_train_batch_size": 1, "rl_stage": 1}  # fmt: skip
    out = train(config(CHECKPOINT, tmp_path / "out", **given))
    (row, *_) = logged(out)
    assert 0 <= row["rewards/model:rm/mean"] <= 1
    assert row["rewards/model:rm/mean"] == pytest.approx(row["reward"])
    manifest = read_manifest(out)
    assert manifest is not None
    assert f"reward model:{trained}" in manifest["parents"]


def test_what_is_no_reward_model_of_this_policy_is_refused(
    trained: Path,
) -> None:
    own = load_encoder(CHECKPOINT).settings
    with pytest.raises(
        CheckpointError, match=r"there is no value_head\.safetensors; name a folder that stage: rm made"
    ):
        open_reward_model(str(CHECKPOINT), own, "exact", "cpu")
    with pytest.raises(ConfigError, match="trained on crops by the rule 'exact', and the policy's are cut by"):
        open_reward_model(str(trained), own, "margin", "cpu")
    with pytest.raises(ConfigError, match=r"reads boxes in the form .* and the policy writes 'viscot'"):
        open_reward_model(str(trained), replace(own, codec="viscot"), "exact", "cpu")


def test_a_reward_model_is_no_policy(trained: Path, tmp_path: Path) -> None:
    told = r"is a reward model, which scores texts and writes none; .*model:"
    with pytest.raises(CheckpointError, match=told):
        export(model_name_or_path=str(CHECKPOINT), adapter_name_or_path=[str(trained)], export_dir=str(tmp_path / "e"))
    given = {"stage": "grpo", "adapter_name_or_path": str(trained), "rl_stage": 1}
    with pytest.raises(CheckpointError, match=told):
        train(config(CHECKPOINT, tmp_path / "out", **given))


# --- what is said and refused -----------------------------------------------------------------------------------------


def test_a_dry_run_says_what_a_reward_model_would_take(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config(tiny, tmp_path / "out", dry_run=True, finetuning_type="full"))
    told = capsys.readouterr().out
    assert "6 items" in told
    assert "6 steps of 3 items" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("said", "told"), [
    (["stage=rm", "pref_loss=ipo"], "pref_loss: stage: rm has one loss"),
    (["stage=rm", "pref_beta=0.2"], "pref_beta: stage: rm has one loss"),
    (["stage=rm", "num_answers=2"], "num_answers: stage: rm samples nothing"),
    (["stage=rm", "rollout_samples=4"], "set val_size"),
    (["stage=dpo", "center_rewards_coefficient=0.1"], "set stage: rm"),
    (["stage=grpo", "center_rewards_coefficient=0.1"], "set stage: rm"),
])  # fmt: skip
def test_keys_without_effect_are_refused(said: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_config(TrainConfig, None, ["model_name_or_path=m", "output_dir=o", *said])


def test_a_head_that_does_not_fit_is_refused(headed: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it is no reward model; train one with stage: rm"):
        load_value_head(headed, tmp_path)
    save_file({"v_head.summary.weight": torch.zeros(1, 7), "v_head.summary.bias": torch.zeros(1)}, tmp_path / HEAD)
    with pytest.raises(CheckpointError, match="belongs to another model"):
        load_value_head(headed, tmp_path)
    (tmp_path / HEAD).write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="damaged"):
        load_value_head(headed, tmp_path)
