"""PPO: GAE and value loss by hand and against TRL's numbers, packed against separate rows, what resumes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from online_runs import online_config, read_lines
from safetensors.torch import load_file
from torch import Tensor, nn

from visrl.box import Box
from visrl.config import ConfigError, read_config
from visrl.conversation import answer_conversation, crop_view, focus_conversation, image_view
from visrl.engines.base import Completion
from visrl.images import open_image
from visrl.manifest import read_manifest
from visrl.models.attention import use_tree_attention
from visrl.models.encode import Encoder, TokenPath
from visrl.models.load import load_encoder
from visrl.models.value_head import HEAD, kept_hidden_states, value_head
from visrl.packing.forward import token_logps, token_values
from visrl.records import Picture
from visrl.rewards.advantages import gae, rewards_alone, whiten
from visrl.scenes import scene_samples
from visrl.train import online_losses
from visrl.train.checkpoints import TrainingError
from visrl.train.config import TrainConfig
from visrl.train.items import Collator
from visrl.train.online_rollouts import OnlineBatch, Response, pack_responses
from visrl.train.ppo import PPOTrainer, token_rewards
from visrl.train.run import train

# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_gae_by_hand() -> None:
    """A reward of 2 at the last of two tokens, values 0.5 and 1, γ = 0.5, λ = 0.5.

    δ₂ = 2 − 1 = 1, δ₁ = 0.5 · 1 − 0.5 = 0; A₂ = 1, A₁ = 0 + 0.25 · 1. λ = 1 and γ = 1: A is what comes less the value.
    """
    assert gae([0, 2], [0.5, 1], gamma=0.5, lam=0.5) == ([0.25, 1], [0.75, 2])
    assert gae([0.25, 2], [0.5, 1], gamma=1, lam=1) == ([1.75, 1], [2.25, 2])
    assert gae([3], [1], gamma=1, lam=0) == ([2], [3])
    assert gae([], []) == ([], [])


def test_whitening_by_hand() -> None:
    """1, 2, 3: mean 2, deviation 1."""
    assert whiten([1, 2, 3]) == pytest.approx([-1, 0, 1], abs=1e-7)
    assert whiten([1, 2, 3], shift_mean=False) == pytest.approx([1, 2, 3], abs=1e-7)
    assert whiten([2, 2]) == [0, 0]


def test_the_reward_of_a_response_comes_at_its_last_token() -> None:
    branch, kl = torch.tensor([1, 1, 0]), torch.tensor([0.5, -1.0, 2.0])
    assert token_rewards(torch.tensor([7.0, 3.0]), kl, branch, 0.1).tolist() == pytest.approx([-0.05, 3.1, 6.8])
    assert [group.flat for group in rewards_alone([[1.0, None], [0.0, 1.0]])] == [True, False]
    assert rewards_alone([[1.0, None]])[0].values == (1.0, None)


def test_the_value_loss_by_hand() -> None:
    """Return 1, value 0 before: at 0.5 it is cut to 0.2 and the loss is ½ · 0.8²; at −0.1, within, ½ · 1.1²; at 1.5
    with return 0, the free one is the larger."""
    values, old = torch.tensor([0.5, -0.1, 1.5]), torch.zeros(3)
    loss, clipped = online_losses.clipped_value(values, old, torch.tensor([1.0, 1.0, 0.0]), cliprange=0.2)
    assert loss.tolist() == pytest.approx([0.32, 0.605, 1.125])
    assert clipped.tolist() == [True, False, False]


# Two responses of three tokens, and what the PPOTrainer of trl.experimental makes of them with kl_coef 0.1, gamma 0.9,
# lam 0.8, cliprange 0.2, cliprange_value 0.1, by kl_estimator and whiten_rewards: advantages, returns, policy and value
# loss.
OLD = torch.tensor([-1.0, -2.0, -0.5, -0.3, -1.5, -0.7])
REF = torch.tensor([-1.2, -1.5, -0.5, -0.3, -1.1, -1.0])
NEW = torch.tensor([-0.7, -2.1, -0.4, -0.3, -1.9, -0.6])
VALUES = torch.tensor([0.2, 0.4, 0.5, 0.1, -0.2, 0.3])
PREDICTED = torch.tensor([0.25, 0.7, 0.45, 0.1, -0.4, 0.35])
SCORES, BRANCH = torch.tensor([1.0, 0.0]), torch.tensor([0, 0, 0, 1, 1, 1])
TRL = {
    ("k1", False): ([0.741863, 0.709438, 0.825243, -0.865142, 0.166312, -1.577714],
                    [0.6712, 0.86, 1.0, 0.016128, 0.0724, -0.03], 0.0088512, 0.0820088),
    ("k1", True): ([0.335661, 0.812147, 1.385153, -1.015134, -0.507214, -1.010613],
                   [0.885198, 1.549695, 2.208281, -0.531605, -0.336467, -0.327198], -0.0217799, 0.4548708),
    ("k3", False): ([0.756314, 0.611289, 0.93154, -0.918549, 0.143309, -1.523902],
                    [0.642619, 0.795128, 1.0, -0.005847, 0.041879, -0.004082], 0.0027424, 0.0729654),
}  # fmt: skip


@pytest.mark.parametrize(("estimator", "whitens"), TRL)
def test_advantages_returns_and_losses_are_trls(estimator: str, whitens: bool) -> None:
    kl = OLD - REF if estimator == "k1" else online_losses.k3(OLD, REF)
    rewards = token_rewards(SCORES, kl, BRANCH, 0.1).tolist()
    rewards = whiten(rewards, shift_mean=False) if whitens else rewards
    found = [gae(rewards[part], VALUES[part].tolist(), gamma=0.9, lam=0.8) for part in (slice(0, 3), slice(3, 6))]
    advantages, returns = whiten(found[0][0] + found[1][0]), found[0][1] + found[1][1]
    wanted = TRL[estimator, whitens]
    assert advantages == pytest.approx(wanted[0], abs=2e-6)
    assert returns == pytest.approx(wanted[1], abs=2e-6)
    loss = online_losses.ONLINE_LOSSES["dapo"]  # the tokens of the step alike: that of PPO
    policy = online_losses.batch_loss(
        loss, NEW, OLD, torch.tensor(advantages), BRANCH, torch.tensor([3.0, 3.0]), parameters={"epsilon": 0.2},
        tokens=6, length=16,
    )  # fmt: skip
    value, _ = online_losses.clipped_value(PREDICTED, VALUES, torch.tensor(returns), cliprange=0.1)
    assert float(policy.total / 6) == pytest.approx(wanted[2], abs=2e-6)
    assert float(value.mean()) == pytest.approx(wanted[3], abs=2e-6)


# --- packed equals separate -------------------------------------------------------------------------------------------


def rollouts_of_a_question(encoder: Encoder) -> list[Response]:
    """Two boxes, and two answers from the crop of the first."""
    chance = torch.Generator().manual_seed(1)
    sample = scene_samples("train", 0, 1)[0]
    whole = image_view(Picture(sample.image), open_image(sample.image))
    detail = crop_view(whole, Picture(sample.image, Box(0.1, 0.2, 0.5, 0.7)))
    focus = encoder.encode(focus_conversation(sample.question, whole), [None])[0]
    shown = encoder.encode(answer_conversation(sample.question, whole, detail), [None])[0]
    found = []
    for n, (prompt, reward) in enumerate(((focus, 1.0), (focus, 0.0), (shown, 1.0), (shown, 0.5))):
        ids = (*torch.randint(20, 60, (2 + n,), generator=chance).tolist(), encoder.end_id)
        told = Completion("", len(ids), ids=ids, logps=(-1.0,) * len(ids))
        found.append(Response(f"{n}", "box" if n < 2 else "answer", told, prompt, reward))
    return found


def separate(model: nn.Module, encoder: Encoder, path: TokenPath) -> tuple[Tensor, Tensor]:
    """Log-probabilities and values of a response's tokens, a sequence by itself under plain causal attention."""
    text: Any = model.model.language_model
    text.config._attn_implementation = "sdpa"
    ids = torch.from_numpy(path.ids)[None]
    pictures = {name: torch.cat([v.inputs[name] for v in path.views]) for name in path.views[0].inputs}
    marks = (ids == encoder.image_token_id).int()
    hidden = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=marks, **pictures)
    use_tree_attention(model)
    before = hidden.last_hidden_state[0, path.start - 1 : -1]
    logps = torch.log_softmax(model.get_output_embeddings()(before).float(), -1)
    return logps.gather(-1, ids[0, path.start :, None])[:, 0], value_head(model)(before)


def ppo_loss(logps: Tensor, values: Tensor, branch: Tensor) -> Tensor:
    """Against an older policy and older values that depend on the new ones alone; scores 1, 0, 1 and 0.5."""
    old, known = (x.detach() + 0.2 * torch.sin(7 * x.detach()) for x in (logps, values))
    scores = token_rewards(torch.tensor([1.0, 0.0, 1.0, 0.5]), torch.zeros_like(logps), branch, 0.0)
    advantages = scores - known
    loss = online_losses.ONLINE_LOSSES["dapo"]
    policy = online_losses.batch_loss(
        loss, logps, old, advantages, branch, torch.bincount(branch).float(), parameters={}, tokens=1, length=16
    ).total
    value, _ = online_losses.clipped_value(values, known, scores, cliprange=0.1)
    return policy + 0.1 * value.sum()


def test_loss_and_gradients_equal_those_of_one_row_per_response(headed: nn.Module, tiny: Path) -> None:
    encoder = load_encoder(tiny)
    responses = rollouts_of_a_question(encoder)
    batch = pack_responses([responses], Collator(encoder, bin_length=64), mask_truncated=False, keep_all=True)
    assert isinstance(batch, OnlineBatch)
    with kept_hidden_states(headed) as hidden:
        logps = token_logps(headed, batch.packed)
    values = token_values(value_head(headed), hidden, batch.packed)
    alone = [separate(headed, encoder, encoder.continued(one.prompt, one.completion.ids)) for one in responses]
    numbers = torch.cat([torch.full((len(one),), n) for n, (one, _) in enumerate(alone)])
    theirs = tuple(torch.cat(list(part)) for part in zip(*alone, strict=True))
    assert float(values.detach().std()) > 1e-3
    found = []
    for told, branch in (((logps, values), batch.packed.branch), (theirs, numbers)):
        headed.zero_grad()
        loss = ppo_loss(*told, branch)
        loss.backward()
        found.append((loss.detach(), {n: w.grad.clone() for n, w in headed.named_parameters() if w.grad is not None}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-7)
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[1][1].items():
        assert float((found[0][1][name] - gradient).norm() / gradient.norm().clamp(min=1e-9)) < 1e-4, name


# --- training ---------------------------------------------------------------------------------------------------------


def config(out: Path, **more: Any) -> TrainConfig:
    return online_config(out, **{"stage": "ppo", "num_generations": 2, "max_steps": 3, "rewards": ["area"], **more})


@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_with_its_values_and_says_how_good_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Stopped after step 2, gone on from its checkpoint: the weights of a run that was never stopped."""
    given = {"finetuning_type": kind, "save_strategy": "steps", "save_steps": 2, "num_iterations": 2, "epsilon": 0.1}
    whole = train(config(tmp_path / "whole", **given))
    out, own = tmp_path / "stopped", PPOTrainer._sample

    def stop(self: PPOTrainer, *args: Any) -> Any:
        if self.state.global_step == 2:
            raise TrainingError("stopped")
        return own(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "_sample", stop)
        with pytest.raises(TrainingError, match="stopped"):
            train(config(out, **given))
    head = load_file(out / "checkpoint-2" / HEAD)
    assert head["v_head.summary.weight"].abs().sum() > 0
    train(config(out, **given))
    name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    one, other = load_file(whole / name), load_file(out / name)
    assert all(one[part].equal(other[part]) for part in one)
    assert not [part for part in one if "v_head" in part]
    assert not (whole / HEAD).exists()
    rows, again = ([row for row in read_lines(path / "log.jsonl") if "loss" in row] for path in (whole, out))
    assert [row["loss"] for row in rows] == [row["loss"] for row in again]
    assert {"loss/policy_avg", "loss/value_avg", "val/clipfrac_avg", "kl", "entropy", "reward"} <= rows[0].keys()
    assert rows[0]["kl"] == 0  # the start of the stage is this policy
    assert rows[0]["val/explained_variance"] == pytest.approx(0, abs=1e-6)  # the head starts at 0
    assert ("reward" in rows[1], "reward" in rows[2]) == (False, True)  # two updates from each rollout
    assert rows[0]["clip_ratio/region_mean"] == 0
    assert rows[2]["kl"] != 0


@pytest.mark.slow
def test_killed_at_any_step_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    given = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    whole, again = train(config(tmp_path / "whole", **given)), tmp_path / "again"
    command = (
        "import sys, json; from visrl.train.run import train; from visrl.train.config import TrainConfig; "
        "from visrl.config import build_config; train(build_config(TrainConfig, json.loads(sys.argv[1]), where='x'))"
    )
    for step in (1, 2):
        process = subprocess.Popen([sys.executable, "-c", command, config(again, **given).model_dump_json()])
        while not (again / f"checkpoint-{step}").is_dir() and process.poll() is None:
            time.sleep(0.02)
        process.kill()
        process.wait()
        assert read_manifest(again) is None, "killed before the end"
    train(config(again, **given))
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (whole, again))
    assert all(one[name].equal(other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("more", [
    {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    {"per_device_train_batch_size": 2, "processes": 2},
])  # fmt: skip
def test_small_batches_and_several_processes_train_to_the_same_weights(tmp_path: Path, more: dict[str, Any]) -> None:
    given = {"optim": "sgd", "learning_rate": 0.1, "train_sampling_strategy": "sequential", "max_grad_norm": 0.0,
             "save_strategy": "steps", "save_steps": 1, "whiten_rewards": True, "max_steps": 2}  # fmt: skip
    heads = []
    for name, batch in (("whole", {"per_device_train_batch_size": 4}), ("parts", more)):
        train(config(tmp_path / name, **given, **batch))
        heads.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert any(weights.abs().max() > 1e-4 for part, weights in heads[0].items() if "lora_B" in part)
    for part, weights in heads[0].items():
        torch.testing.assert_close(weights, heads[1][part], rtol=1e-3, atol=1e-5)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("said", "told"), [
    (["stage=ppo", "beta=0.1"], "set kl_coef"),
    (["stage=ppo", "loss_type=grpo"], "loss_type: stage: ppo has the clipped loss"),
    (["stage=ppo", "importance_sampling_level=sequence"], "a ratio for every token"),
    (["stage=ppo", "scale_rewards=none"], "scale_rewards: ppo has an estimate of its own"),
    (["stage=ppo", "dynamic_sampling=true"], "teach, too, under ppo"),
    (["stage=ppo", "kl_coef=0", "kl_estimator=k3"], "no KL to estimate"),
    (["stage=ppo", "lam=1.5"], "lam"),
    (["stage=ppo", "reward_model=m"], "model:PATH"),
    (["stage=grpo", "vf_coef=0.5"], "vf_coef: stage: grpo trains no value head"),
    (["stage=sft", "gamma=0.5"], "gamma: stage: sft samples nothing"),
])  # fmt: skip
def test_keys_that_do_not_go_together_are_refused(said: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_config(TrainConfig, None, ["model_name_or_path=m", "output_dir=o", *said])


def test_keys_of_trl_and_llama_factory_are_read_under_their_names() -> None:
    given = ["model_name_or_path=m", "output_dir=o", "stage=ppo", "num_ppo_epochs=4", "cliprange=0.1",
             "response_length=32", "ppo_whiten_rewards=true"]  # fmt: skip
    read = read_config(TrainConfig, None, given)
    assert (read.num_iterations, read.epsilon, read.max_completion_length, read.whiten_rewards) == (4, 0.1, 32, True)
