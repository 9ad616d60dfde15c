"""Online reinforcement on tiny models: packed equals separate, what is skipped, what resumes, what is told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from loud import louder
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
from visrl.models.encode import Encoder
from visrl.models.load import load_encoder, load_model
from visrl.models.tiny import CHECKPOINT
from visrl.packing.forward import token_logps, token_logps_and_entropies
from visrl.records import Picture, Step
from visrl.rewards.reward_function import RewardError
from visrl.scenes import scene_samples
from visrl.train import online_losses
from visrl.train.config import TrainConfig
from visrl.train.items import Collator
from visrl.train.online_losses import ONLINE_LOSSES
from visrl.train.online_rollouts import OnlineBatch, Response, pack_responses
from visrl.train.run import train
from visrl.train.sampler import RepeatedSteps, SameImageSampler

LENGTH = 16

# --- packed equals separate -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny: Path) -> nn.Module:
    """Random weights, loud enough that texts and pictures make a difference."""
    model = load_model(tiny)
    louder(model)
    use_tree_attention(model)
    return model


@pytest.fixture(scope="module")
def collator(tiny: Path) -> Collator:
    return Collator(load_encoder(tiny), bin_length=64)


def sampled(encoder: Encoder, chance: torch.Generator, ended: bool = True) -> Completion:
    """A response of one to six tokens, as random weights sample it."""
    count = int(torch.randint(1, 7, (), generator=chance))
    vocabulary = [n for n in range(20, 200) if n not in (encoder.image_token_id, encoder.end_id)]
    picked = torch.randint(len(vocabulary), (count,), generator=chance)
    ids = [vocabulary[n] for n in picked.tolist()] + [encoder.end_id] * ended
    logps = (-torch.rand(len(ids), generator=chance)).tolist()
    return Completion(encoder.decode(ids), count, "stop" if ended else "length", ids=tuple(ids), logps=tuple(logps))


def rollouts_of_a_question(encoder: Encoder, number: int) -> list[Response]:
    """Three boxes and two answers from the crop of each of two of them; the rewards of the last crop are all equal."""
    chance = torch.Generator().manual_seed(number)
    sample = scene_samples("train", 5 * number, 1)[0]
    whole = image_view(Picture(sample.image), open_image(sample.image))

    def response(step: Step, row: str, prompt: Any, advantage: float | None, ended: bool = True) -> Response:
        return Response(row, step, sampled(encoder, chance, ended), prompt, advantage)

    prompt = encoder.encode(focus_conversation(sample.question, whole), [None])[0]
    found = [response("box", f"{number}/{b}", prompt, a) for b, a in enumerate((1.1, -0.4, 0.3))]
    for b, advantages in enumerate(((0.7, -0.2), (0.0, 0.0))):
        detail = crop_view(whole, Picture(sample.image, Box(0.1 + 0.3 * b, 0.2, 0.5 + 0.3 * b, 0.7)))
        shown = encoder.encode(answer_conversation(sample.question, whole, detail), [None])[0]
        found += [response("answer", f"{number}/{b}/{m}", shown, a, ended=m == 0) for m, a in enumerate(advantages)]
    return found


def separate(model: nn.Module, encoder: Encoder, response: Response) -> Tensor:
    """Log-probabilities of a response's tokens, a sequence by itself under plain causal attention."""
    text = model.model.language_model
    text.config._attn_implementation = "sdpa"
    path = encoder.continued(response.prompt, response.completion.ids)
    ids = torch.from_numpy(path.ids)[None]
    pictures = {name: torch.cat([v.inputs[name] for v in path.views]) for name in path.views[0].inputs}
    marks = (ids == encoder.image_token_id).int()
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=marks, **pictures).logits
    use_tree_attention(model)
    logps = torch.log_softmax(logits[0, path.start - 1 : -1].float(), -1)
    return logps.gather(-1, ids[0, path.start :, None])[:, 0]


def loss_and_gradients(
    model: nn.Module, name: str, logps: Tensor, branch: Tensor, responses: list[Response]
) -> tuple[Tensor, list[Tensor]]:
    """Of the row `name`, against an older policy and a reference that depend on the log-probabilities alone."""
    loss = ONLINE_LOSSES[name]
    given = {"epsilon": 0.1, "epsilon_high": 1.2 if name == "cispo" else 0.15, "delta": None}
    old, ref = (logps.detach() + step * torch.sin(logps.detach() * 7 + step) for step in (0.2, 0.3))
    lengths = torch.tensor([float(len(one.completion.ids)) for one in responses])
    advantages = torch.tensor([one.advantage for one in responses])[branch]
    found = online_losses.batch_loss(
        loss, logps, old, advantages, branch, lengths, parameters={key: given[key] for key in loss.parameters}, ref=ref,
        beta=0.1, tokens=len(branch), length=LENGTH,
    )  # fmt: skip
    loss_of_response = found.total / len(responses)
    model.zero_grad()
    loss_of_response.backward()
    return loss_of_response.detach(), [w.grad.clone() for w in model.parameters() if w.grad is not None]


@pytest.mark.parametrize("name", ONLINE_LOSSES)
def test_loss_and_gradients_equal_those_of_one_row_per_response(
    model: nn.Module, collator: Collator, name: str
) -> None:
    questions = [rollouts_of_a_question(collator.encoder, number) for number in range(2)]
    batch = pack_responses(questions, collator, mask_truncated=False, keep_all=True)
    assert batch is not None
    assert batch.packed.tokens < batch.packed.separate_tokens / 2
    flat = [one for own in questions for one in own]
    assert [branch.row for branch in batch.branches] == [one.row for one in flat]
    ours = loss_and_gradients(model, name, token_logps(model, batch.packed), batch.packed.branch, flat)
    alone = [separate(model, collator.encoder, one) for one in flat]
    numbers = torch.cat([torch.full((len(logps),), n) for n, logps in enumerate(alone)])
    theirs = loss_and_gradients(model, name, torch.cat(alone), numbers, flat)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-7)
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert float((a - b).norm() / b.norm().clamp(min=1e-12)) < 1e-4


def on_policy(model: nn.Module, name: str, batch: OnlineBatch) -> tuple[Tensor, list[Tensor]]:
    logps, _ = token_logps_and_entropies(model, batch.packed)
    loss, branch = ONLINE_LOSSES[name], batch.packed.branch
    found = online_losses.batch_loss(
        loss, logps, logps.detach(), batch.advantages[branch], branch, batch.lengths,
        parameters={"epsilon_high": 5.0} if name == "cispo" else {}, tokens=batch.tokens, length=LENGTH,
    )  # fmt: skip
    model.zero_grad()
    found.total.backward()
    return found.total.detach(), [w.grad.clone() for w in model.parameters() if w.grad is not None]


@pytest.mark.parametrize("name", ONLINE_LOSSES)
def test_what_is_skipped_changes_nothing_but_time(model: nn.Module, collator: Collator, name: str) -> None:
    """Two of seven responses of each question have an advantage of 0: they are counted, and not computed."""
    questions = [rollouts_of_a_question(collator.encoder, number) for number in range(2)]
    some, every = (pack_responses(questions, collator, mask_truncated=False, keep_all=k) for k in (False, True))
    assert some is not None
    assert every is not None
    assert (len(some.branches), len(every.branches)) == (10, 14)
    assert (some.responses, some.tokens) == (every.responses, every.tokens) == (14, int(every.lengths.sum()))
    ours, theirs = on_policy(model, name, some), on_policy(model, name, every)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-6)
    for a, b in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_log_probabilities_and_entropies_at_a_temperature(model: nn.Module, collator: Collator) -> None:
    batch = pack_responses([rollouts_of_a_question(collator.encoder, 0)], collator, mask_truncated=False, keep_all=True)
    assert batch is not None
    with torch.no_grad():
        cold, entropies = token_logps_and_entropies(model, batch.packed, 0.5)
        from visrl.packing.forward import kept_logits

        logps = (kept_logits(model, batch.packed).float() / 0.5).log_softmax(-1)[batch.packed.row]
    torch.testing.assert_close(cold, logps.gather(-1, batch.packed.target[:, None])[:, 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropies, -(logps.exp() * logps).sum(-1), rtol=1e-5, atol=1e-6)


def test_what_is_left_out_of_a_batch_and_of_its_counts(collator: Collator) -> None:
    """An unknown reward and an image's token leave a response out; one that was cut is a response of no tokens."""
    responses = rollouts_of_a_question(collator.encoder, 0)
    whole = pack_responses([responses], collator, mask_truncated=False, keep_all=False)
    masked = pack_responses([responses], collator, mask_truncated=True, keep_all=False)
    assert whole is not None
    assert masked is not None
    cut = [one for one in responses if one.completion.finish_reason == "length"]
    assert (whole.responses, masked.responses) == (7, 7)
    assert whole.tokens - masked.tokens == sum(len(one.completion.ids) for one in cut)
    assert {branch.row for branch in whole.branches} - {branch.row for branch in masked.branches} == {"0/0/1"}
    ids = (collator.encoder.image_token_id, collator.encoder.end_id)
    odd = Response("odd", "box", Completion("", 1, ids=ids, logps=(0.0, 0.0)), responses[0].prompt, 1.0)
    unknown = Response("unknown", "box", responses[0].completion, responses[0].prompt, None)
    again = pack_responses([[*responses, odd, unknown]], collator, mask_truncated=False, keep_all=False)
    assert again is not None
    assert [branch.row for branch in again.branches] == [branch.row for branch in whole.branches]
    assert again.responses == 7
    assert pack_responses([[odd, unknown]], collator, mask_truncated=False, keep_all=False) is None


def test_a_batch_without_a_gradient_is_one_short_response(collator: Collator) -> None:
    flat = [one for one in rollouts_of_a_question(collator.encoder, 0) if one.advantage == 0]
    batch = pack_responses([flat, flat], collator, mask_truncated=False, keep_all=False)
    assert batch is not None
    assert (len(batch.branches), batch.responses) == (1, 4)
    assert batch.advantages.tolist() == [0.0]


def test_the_items_of_a_step_are_repeated_together() -> None:
    inner = SameImageSampler([str(n) for n in range(5)], batch_size=2, seed=1)
    order, repeated = inner.order(0), list(RepeatedSteps(inner, 2, 3))
    assert len(repeated) == len(RepeatedSteps(inner, 2, 3)) == 18
    assert repeated[:6] == order[:2] * 3
    assert repeated[12:] == [order[4], order[0]] * 3  # the last step is filled up


# --- training ---------------------------------------------------------------------------------------------------------


REWARDS = '''
import os

def box_left(box, **kwargs):
    """Rewards boxes on the left; stops where the environment says so."""
    if os.environ.get("VISRL_TEST_STOP") == "now":
        return [float("nan")] * len(box)
    return [None if one is None else 1.0 - one.x0 for one in box]
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"online_rewards_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(REWARDS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_an_adapter_learns_what_is_rewarded_and_says_how(tmp_path: Path, module: str) -> None:
    rewards = [{"name": f"{module}:box_left"}, {"name": "answer", "weight": 0}, {"name": "format", "weight": 0.01}]
    out = train(online_config(tmp_path / "out", rewards=rewards, beta=0.01, num_iterations=2, epsilon=0.1, max_steps=4))
    rows = [row for row in read_lines(out / "log.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    first = rows[0]
    told = {"reward", "reward_std", "frac_reward_zero_std", "box/parsed", "entropy", "kl", "time/rollout", "left_out",
            "rewards/answer/mean", f"rewards/{module}:box_left/std", "clip_ratio/region_mean", "tokens/sampled",
            "completions/mean_length/box", "sampling/logp_difference"}  # fmt: skip
    assert told <= first.keys()
    assert first["kl"] == pytest.approx(0, abs=1e-6)  # the adapter starts as the identity
    assert rows[1]["kl"] > 1e-6
    assert first["clip_ratio/region_mean"] == 0  # on-policy
    assert all(row["sampling/logp_difference"] < 1e-4 for row in rows if "sampling/logp_difference" in row)
    assert ("reward" in rows[1], "reward" in rows[2]) == (False, True)  # rollouts of every second update
    journal = read_lines(out / "rollouts.jsonl")
    assert [row["step"] for row in journal] == [1, 1, 3, 3]
    assert all(len(row["boxes"]) == 3 for row in journal)
    for box in journal[0]["boxes"]:
        assert len(box["answers"]) == len(box["advantages"]) == (2 if box["box"] else 0)
    assert f"reward {module}:box_left" in read_manifest(out)["parents"]
    adapter = load_file(out / "adapter_model.safetensors")
    assert any(adapter[name].abs().sum() > 0 for name in adapter if "lora_B" in name)


def test_a_fault_of_a_reward_stops_before_a_step_and_the_rest_resumes(
    tmp_path: Path, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at step 3, gone on from the checkpoint of step 2: the weights of a run that was never stopped."""
    given = {"rewards": f"{module}:box_left", "finetuning_type": "full", "save_strategy": "steps", "save_steps": 2,
             "max_steps": 3}  # fmt: skip
    whole = train(online_config(tmp_path / "whole", **given))
    before = read_lines(whole / "rollouts.jsonl")
    from visrl.train import online

    score = online.score_rollouts
    calls = []

    def score_and_stop(*args: Any) -> Any:
        calls.append(1)
        monkeypatch.setenv("VISRL_TEST_STOP", "now" if len(calls) == 3 else "")
        return score(*args)

    monkeypatch.setattr(online, "score_rollouts", score_and_stop)
    with pytest.raises(RewardError, match="is no number"):
        train(online_config(tmp_path / "again", **given))
    assert read_manifest(tmp_path / "again") is None
    assert max(row["step"] for row in read_lines(tmp_path / "again" / "rollouts.jsonl")) == 2
    again = train(online_config(tmp_path / "again", **given))
    assert len(calls) == 4
    one, other = load_file(whole / "model.safetensors"), load_file(again / "model.safetensors")
    assert all(one[name].equal(other[name]) for name in one)
    assert read_lines(again / "rollouts.jsonl") == before
    start = load_model(CHECKPOINT).state_dict()
    assert any(not start[name].equal(value) for name, value in load_model(again).state_dict().items())


@pytest.mark.parametrize("stage", ["rloo", "reinforce++"])
def test_the_other_estimators_train(tmp_path: Path, stage: str) -> None:
    out = train(
        online_config(tmp_path / "out", stage=stage, max_steps=1, rewards=["area", "crop_gain"], finetuning_type="full")
    )
    (row, *_) = read_lines(out / "log.jsonl")
    assert row["grad_norm"] > 0
    assert "rewards/crop_gain/mean" in row


def test_fine_tuning_on_the_best_raises_its_likelihood(tmp_path: Path) -> None:
    """RAFT: nothing is pushed down, so the loss is a likelihood; what is all worth the same was sampled again."""
    out = train(
        online_config(tmp_path / "out", stage="raft", max_steps=2, dynamic_sampling=True, rewards=["iou", "answer"])
    )
    rows = [row for row in read_lines(out / "log.jsonl") if "loss" in row]
    assert all(row["loss"] <= 0 for row in rows)  # −ratio × 1, as far as there are best ones
    assert all(row["resampled"] >= 0 for row in rows)
    advantages = {a for row in read_lines(out / "rollouts.jsonl") for box in row["boxes"] for a in box["advantages"]}
    assert advantages <= {0.0, 1.0}


def test_what_is_all_worth_the_same_is_sampled_again(tmp_path: Path) -> None:
    """Every box can be read, so every reward is 1: three times again, and then nothing is left to learn."""
    given = {"rewards": ["format"], "dynamic_sampling": True, "max_resample_times": 2, "max_steps": 1}
    out = train(online_config(tmp_path / "out", num_generations=2, num_answers=1, temperature=0.01, **given))
    (row, *_) = read_lines(out / "log.jsonl")
    assert row["box/parsed"] == row["frac_reward_zero_std"] == 1
    assert row["resampled"] == 2
    assert row["grad_norm"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("more", [
    {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    {"per_device_train_batch_size": 2, "processes": 2},
])  # fmt: skip
def test_small_batches_and_several_processes_train_to_the_same_weights(tmp_path: Path, more: dict[str, Any]) -> None:
    """Two steps of four questions, with the statistics of the whole step, and two updates from what is sampled once."""
    given = {"stage": "reinforce++", "rewards": ["iou", "answer"], "optim": "sgd", "learning_rate": 1.0,
             "train_sampling_strategy": "sequential", "max_grad_norm": 0.0, "num_iterations": 2}  # fmt: skip
    whole = train(online_config(tmp_path / "whole", **given, per_device_train_batch_size=4))
    parts = train(online_config(tmp_path / "parts", **given, **more))
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (whole, parts))
    assert any(weights.abs().max() > 1e-3 for name, weights in one.items() if "lora_B" in name)
    for name, weights in one.items():
        torch.testing.assert_close(weights, other[name], rtol=1e-3, atol=1e-5)
    texts = [
        sorted((row["step"], row["id"], [box["text"] for box in row["boxes"]]) for row in read_lines(path))
        for path in (whole / "rollouts.jsonl", parts / "rollouts.jsonl")
    ]
    assert texts[0] == texts[1]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("said", "told"), [
    (["stage=grpo", "num_generation=8"], "did you mean 'num_generations'"),
    (["stage=grpo", "num_generations=1"], "num_generations"),
    (["stage=grpo", "pref_beta=0.2"], "pref_beta: stage: grpo learns from no preferences"),
    (["stage=grpo", "rl_stage=2"], "rl_stage: stage: grpo learns from no preferences"),
    (["stage=grpo", "val_size=0.1"], "rollout_samples roll the policy out"),
    (["stage=grpo", "dry_run=true"], "max_steps=1"),
    (["stage=grpo", "loss_type=ppo"], "'grpo', 'bnpo'"),
    (["stage=grpo", "loss_type=cispo"], "epsilon_high: for loss_type: cispo"),
    (["stage=grpo", "loss_type=cispo", "epsilon_high=5", "epsilon=0.1"], "epsilon: loss_type: cispo does not read it"),
    (["stage=grpo", "loss_type=rloo", "importance_sampling_level=sequence"], "has a ratio of its own"),
    (["stage=grpo", "delta=1.1"], "delta: 1.1 would cut below"),
    (["stage=grpo", "use_bias_correction_kl=false"], "there is no KL to correct"),
    (["stage=grpo", "num_iterations=2", "save_strategy=steps", "save_steps=5"], "a multiple of num_iterations=2"),
    (["stage=reinforce++", "dynamic_sampling=true"], "teach, too"),
    (["stage=grpo", "max_resample_times=2"], "nothing is sampled again"),
    (["stage=grpo", "normalize_advantages=true"], "is of stage: rloo"),
    (["stage=rloo", "scale_rewards=none"], "scale_rewards: rloo has an estimate of its own"),
    (["stage=grpo", "rewards=[anser]"], r"rewards.0.name: Input should be 'answer'"),
    (["stage=grpo", "rewards=[]"], "at least one part"),
    (["stage=dpo", "num_answers=2"], "num_answers: stage: dpo samples nothing"),
    (["stage=sft", "rewards=[iou]"], "rewards: stage: sft samples nothing"),
])  # fmt: skip
def test_keys_that_do_not_go_together_are_refused(said: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_config(TrainConfig, None, ["model_name_or_path=m", "output_dir=o", *said])


def test_keys_of_trl_are_read_as_it_reads_them() -> None:
    given = ["model_name_or_path=m", "output_dir=o", "stage=grpo", "scale_rewards=false", "rewards=answer"]
    read = read_config(TrainConfig, None, given)
    assert read.scale_rewards == "none"
    assert [part.name for part in read.rewards] == ["answer"]
    assert read.online_loss[0] == "dapo"


def test_a_reward_that_is_not_there_is_refused_before_a_folder_is_claimed(tmp_path: Path) -> None:
    assert not os.environ.get("VISRL_TEST_STOP")
    with pytest.raises(ConfigError, match="there is no module 'no_such_module'"):
        train(online_config(tmp_path / "out", rewards="no_such_module:reward"))
    assert not (tmp_path / "out" / "started.json").exists()
