"""Losses of online reinforcement by hand arithmetic, and against TRL's own trainers on the same log-probabilities."""

from __future__ import annotations

from collections import defaultdict
from math import exp, log
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from visrl.train import online_losses as losses
from visrl.train.online_losses import ONLINE_LOSSES, Level

# Two responses, of two tokens and of one: advantages +1 and −2.
LOGPS = torch.tensor([-1.0, -2.0, -0.5])
OLD = torch.tensor([-1.0 - log(1.5), -2.0, -0.5 - log(0.5)])  # ratios 1.5, 1, 0.5
BRANCH, LENGTHS = torch.tensor([0, 0, 1]), torch.tensor([2.0, 1.0])
ADVANTAGES = torch.tensor([1.0, 1.0, -2.0])


def close(ours: Tensor, theirs: Tensor | list[float]) -> None:
    torch.testing.assert_close(ours, torch.as_tensor(theirs), rtol=1e-6, atol=1e-7)


def ratios(level: Level) -> Tensor:
    return losses.log_ratios(LOGPS, OLD, BRANCH, LENGTHS, level).exp()


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_ratios_of_tokens_and_of_whole_responses() -> None:
    close(ratios("token"), [1.5, 1.0, 0.5])
    close(ratios("sequence"), [1.5**0.5, 1.5**0.5, 0.5])
    close(ratios("sum"), [1.5, 1.5, 0.5])


def test_clipping_by_hand() -> None:
    """min(1.5, 1.2)·1 and 1·1 count; of min(0.5·−2, 0.8·−2) the clipped one is smaller, so that no gradient is left."""
    close(losses.clipped(LOGPS, ratios("token"), ADVANTAGES, epsilon=0.2), [-1.2, -1.0, 1.6])
    close(losses.clipped(LOGPS, ratios("token"), ADVANTAGES, epsilon=0.2, epsilon_high=0.28), [-1.28, -1.0, 1.6])
    low, high = losses.clip_shares(ratios("token"), ADVANTAGES, epsilon=0.2, epsilon_high=0.28)
    assert low.tolist() == [False, False, True]
    assert high.tolist() == [True, False, False]


def test_delta_bounds_what_a_negative_advantage_costs() -> None:
    """Ratio 8 at advantage −1 costs 8, or delta 3; a positive one is clipped before."""
    ratio, advantages = torch.tensor([8.0, 8.0]), torch.tensor([-1.0, 1.0])
    close(losses.clipped(ratio.log(), ratio, advantages), [8.0, -1.2])
    close(losses.clipped(ratio.log(), ratio, advantages, delta=3.0), [3.0, -1.2])


def test_cispo_by_hand() -> None:
    """−min(ρ, 1.2) A log π: 1.2·1·1, 1·1·2, 0.5·−2·0.5."""
    close(losses.cispo(LOGPS, ratios("token"), ADVANTAGES, epsilon_high=1.2), [1.2, 2.0, -0.5])


def test_k3_by_hand_and_never_below_0() -> None:
    close(losses.k3(LOGPS, LOGPS + 1), [exp(1) - 2] * 3)
    close(losses.k3(LOGPS, LOGPS - 1), [exp(-1)] * 3)
    close(losses.k3(LOGPS, LOGPS), [0.0] * 3)


def test_what_a_sum_is_divided_by() -> None:
    """Tokens 1 and 3 of one response and 5 of another: means 2 + 5; or 9 in all, over the batch's 3, or length 8."""
    values = torch.tensor([1.0, 3.0, 5.0])
    given = {"tokens": 3, "length": 8}
    wanted = {"responses": 7.0, "tokens": 9.0, "batch_tokens": 3.0, "length": 9 / 8}
    for divide, total in wanted.items():
        close(losses.summed(values, BRANCH, LENGTHS, divide, **given), total)


@pytest.mark.parametrize(("name", "slopes"), [
    ("grpo", [-0.5, -0.5, 2.0]), ("dapo", [-1.0, -1.0, 2.0]), ("cispo", [-1.0, -1.0, 2.0]),
    ("gspo", [-0.5, -0.5, 2.0]), ("rloo", [-1.0, -1.0, 2.0]), ("dr_grpo", [-0.125, -0.125, 0.25]),
    ("bnpo", [-1 / 3, -1 / 3, 2 / 3]),
])  # fmt: skip
def test_gradients_on_policy_by_hand(name: str, slopes: list[float]) -> None:
    """At ratio 1 every loss is a weighted sum of −A ∇log π: the weights are its own."""
    loss, logps = ONLINE_LOSSES[name], LOGPS.clone().requires_grad_()
    ratio = losses.log_ratios(logps, LOGPS, BRANCH, LENGTHS, loss.level or "token").exp()
    keywords = {"epsilon_high": 5.0} if loss.parameters == ("epsilon_high",) else {}
    per_token = loss.function(logps, ratio, ADVANTAGES, **keywords)
    losses.summed(per_token, BRANCH, LENGTHS, loss.divide, tokens=3, length=8).backward()
    assert logps.grad is not None
    close(logps.grad, slopes)


# --- against TRL ------------------------------------------------------------------------------------------------------
# TRL's own loss methods are run as they are, on a trainer whose model "computes" the log-probabilities given here.

COUNTS = [5, 1, 3, 4]
LENGTH = 9  # max_completion_length


def drawn() -> dict[str, Tensor]:
    """Log-probabilities [4, 5] of four responses under policy, sampling policy and reference, and advantages [4]."""
    chance = torch.Generator().manual_seed(3)
    logps = -torch.rand(4, 5, generator=chance, dtype=torch.float64) * 3
    return {
        "logps": logps,
        "old": logps + torch.randn(4, 5, generator=chance, dtype=torch.float64) * 0.4,
        "ref": logps + torch.randn(4, 5, generator=chance, dtype=torch.float64) * 0.3,
        "advantages": torch.tensor([1.3, -0.7, -1.1, 0.5], dtype=torch.float64),
        "mask": (torch.arange(5) < torch.tensor(COUNTS)[:, None]).double(),
    }


def trl_state(data: dict[str, Tensor], logps: Tensor, **fields: object) -> SimpleNamespace:
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x
    )
    options = SimpleNamespace(delta=fields.pop("delta", None), use_bias_correction_kl=True, steps_per_generation=1)
    return SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=accelerator, args=options, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, aux_loss_enabled=False, use_vllm=False, _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1, max_completion_length=LENGTH, _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *a, **k: (logps, torch.zeros_like(logps), None), **fields,
    )  # fmt: skip


def trl_grpo(data: dict[str, Tensor], logps: Tensor, **fields: object) -> Tensor:
    from trl import GRPOTrainer

    ids = torch.ones(4, 5, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": data["mask"],
        "advantages": data["advantages"], "old_per_token_logps": data["old"], "ref_per_token_logps": data["ref"],
        "num_items_in_batch": data["mask"].sum(),
    }  # fmt: skip
    return GRPOTrainer._compute_loss(trl_state(data, logps, **fields), None, inputs)


def trl_rloo(data: dict[str, Tensor], logps: Tensor, epsilon: float) -> Tensor:
    from trl import RLOOTrainer

    ids = torch.ones(4, 5, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": data["mask"],
        "advantages": data["advantages"], "old_logps": (data["old"] * data["mask"]).sum(1),
    }  # fmt: skip
    state = trl_state(data, logps, epsilon_low=epsilon, epsilon_high=epsilon)
    return RLOOTrainer._compute_loss(state, None, inputs)


def ours(
    data: dict[str, Tensor], logps: Tensor, name: str, level: Level = "token", beta: float = 0.0, **keywords: float
) -> Tensor:
    """The loss of the table as the trainer puts it together: flat tokens, their sum over what it is divided by."""
    loss, kept = ONLINE_LOSSES[name], data["mask"].bool()
    branch = torch.arange(4).repeat_interleave(torch.tensor(COUNTS))
    lengths, now, advantages = torch.tensor(COUNTS).double(), logps[kept], data["advantages"][branch]
    total = losses.batch_loss(
        loss, now, data["old"][kept], advantages, branch, lengths, level=level, beta=beta,
        parameters={key: value for key, value in keywords.items() if key in loss.parameters},
        ref=data["ref"][kept] if beta else None, tokens=sum(COUNTS), length=LENGTH,
    ).total  # fmt: skip
    return total / {"responses": 4, "length": 4, "tokens": sum(COUNTS), "batch_tokens": 1}[loss.divide]


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize(("name", "trl_name", "level", "given"), [
    ("grpo", "grpo", "token", {"epsilon": 0.2, "epsilon_high": 0.2}),
    ("grpo", "grpo", "token", {"epsilon": 0.2, "epsilon_high": 0.2, "delta": 1.1}),
    ("bnpo", "bnpo", "token", {"epsilon": 0.1, "epsilon_high": 0.28}),
    ("dr_grpo", "dr_grpo", "token", {"epsilon": 0.2, "epsilon_high": 0.2}),
    ("dapo", "dapo", "token", {"epsilon": 0.2, "epsilon_high": 0.28}),
    ("dapo", "dapo", "sequence", {"epsilon": 0.2, "epsilon_high": 0.28}),
    ("gspo", "grpo", "sequence", {"epsilon": 0.03, "epsilon_high": 0.04}),
    ("cispo", "cispo", "token", {"epsilon": 0.2, "epsilon_high": 1.3}),
])  # fmt: skip
def test_equal_to_trl_grpo(name: str, trl_name: str, level: Level, given: dict[str, float], beta: float) -> None:
    data = drawn()
    one, other = (data["logps"].clone().requires_grad_() for _ in range(2))
    fields = {"loss_type": trl_name, "importance_sampling_level": level, "beta": beta, "epsilon_low": given["epsilon"]}
    theirs = trl_grpo(data, other, **fields, **{key: value for key, value in given.items() if key != "epsilon"})
    mine = ours(data, one, name, level, beta, **given)
    close(mine, theirs)
    mine.backward()
    theirs.backward()
    assert one.grad is not None
    assert other.grad is not None
    close(one.grad, other.grad)


def test_equal_to_trl_rloo() -> None:
    data = drawn()
    one, other = (data["logps"].clone().requires_grad_() for _ in range(2))
    mine, theirs = ours(data, one, "rloo", epsilon=0.2), trl_rloo(data, other, 0.2)
    close(mine, theirs)
    mine.backward()
    theirs.backward()
    assert one.grad is not None
    assert other.grad is not None
    close(one.grad, other.grad)
