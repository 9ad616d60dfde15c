"""Losses by hand arithmetic, and against the formulas that TRL's trainers run on the same log-probabilities."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from math import exp, log
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from visrl.train import losses

CHOSEN = torch.tensor([-3.0, -8.5, -1.25, -20.0])
REJECTED = torch.tensor([-4.0, -2.5, -1.5, -35.0])
REF_CHOSEN = torch.tensor([-3.5, -8.0, -1.0, -22.0])
REF_REJECTED = torch.tensor([-3.0, -3.5, -1.5, -30.0])
COUNTS = (torch.tensor([3.0, 7.0, 1.0, 17.0]), torch.tensor([4.0, 2.0, 1.0, 17.0]))
FOUR = (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)
MARGINS = [1.5, -1.5, -0.25, 7.0]  # (w − l) − (ref w − ref l), worked out by hand


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def by_hand(formula: Callable[[float], float]) -> Tensor:
    return torch.tensor([formula(m) for m in MARGINS])


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-7)


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_margin_by_hand() -> None:
    close(losses.margin(*FOUR), torch.tensor(MARGINS))


def test_sft_is_the_negative_log_likelihood() -> None:
    close(losses.sft(CHOSEN), torch.tensor([3.0, 8.5, 1.25, 20.0]))


def test_dpo_by_hand() -> None:
    close(losses.dpo(*FOUR, beta=0.1), by_hand(lambda m: -log(sigmoid(0.1 * m))))
    assert losses.dpo(*[torch.zeros(1)] * 4).item() == pytest.approx(log(2))


def test_conservative_dpo_mixes_both_labels() -> None:
    ours = losses.dpo(*FOUR, beta=0.5, label_smoothing=0.2)
    close(ours, by_hand(lambda m: -0.8 * log(sigmoid(0.5 * m)) - 0.2 * log(sigmoid(-0.5 * m))))


def test_robust_dpo_by_hand_and_unbiased() -> None:
    ours = losses.robust_dpo(*FOUR, beta=0.5, label_smoothing=0.2)
    close(ours, by_hand(lambda m: (-0.8 * log(sigmoid(0.5 * m)) + 0.2 * log(sigmoid(-0.5 * m))) / 0.6))
    # The mean over labels flipped with probability ε is the loss of the true labels: that is what robust means.
    flipped = losses.robust_dpo(REJECTED, CHOSEN, REF_REJECTED, REF_CHOSEN, beta=0.5, label_smoothing=0.2)
    close(0.8 * ours + 0.2 * flipped, losses.dpo(*FOUR, beta=0.5))


def test_ipo_by_hand() -> None:
    close(losses.ipo(*FOUR, beta=0.25), by_hand(lambda m: (m - 2) ** 2))


def test_hinge_by_hand() -> None:
    close(losses.hinge(*FOUR, beta=0.2), torch.tensor([0.7, 1.3, 1.05, 0.0]))


def test_simpo_by_hand() -> None:
    chosen, rejected = torch.tensor([-0.5, -2.0]), torch.tensor([-1.0, -0.25])
    wanted = torch.tensor([-log(sigmoid(2.0 * 0.5 - 0.5)), -log(sigmoid(2.0 * -1.75 - 0.5))])
    close(losses.simpo(chosen, rejected, beta=2.0, gamma=0.5), wanted)


def test_orpo_by_hand() -> None:
    chosen, rejected = torch.tensor([log(0.5)]), torch.tensor([log(0.2)])
    odds_ratio = (0.5 / 0.5) / (0.2 / 0.8)  # 4
    wanted = -log(0.5) - 0.1 * log(sigmoid(log(odds_ratio)))
    close(losses.orpo(chosen, rejected, beta=0.1), torch.tensor([wanted]))


def test_orpo_stays_finite_for_certain_and_impossible_responses() -> None:
    chosen = torch.tensor([0.0, -1e-9, -200.0], requires_grad=True)
    rejected = torch.tensor([-200.0, -1e-9, 0.0], requires_grad=True)
    loss = losses.orpo(chosen, rejected)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert chosen.grad is not None
    assert chosen.grad.isfinite().all()
    assert rejected.grad is not None
    assert rejected.grad.isfinite().all()


def test_kto_by_hand() -> None:
    logps, reference = torch.tensor([-3.0, -8.0]), torch.tensor([-4.0, -6.0])
    ours = losses.kto(
        logps, reference, torch.tensor([True, False]), torch.tensor(0.5), beta=0.2, desirable_weight=1.5,
        undesirable_weight=0.5,
    )  # fmt: skip
    close(ours, torch.tensor([1.5 * (1 - sigmoid(0.2 * (1 - 0.5))), 0.5 * (1 - sigmoid(0.2 * (0.5 + 2)))]))


def test_kto_kl_is_a_mean_clamped_at_zero_without_gradient() -> None:
    policy = torch.tensor([-1.0, -2.0], requires_grad=True)
    kl = losses.kto_kl(policy, torch.tensor([-2.0, -2.5]))
    assert kl.item() == pytest.approx(0.75)
    assert not kl.requires_grad
    assert losses.kto_kl(policy, torch.zeros(2)).item() == 0.0


@pytest.mark.parametrize(
    ("loss", "slope"),
    [
        (losses.dpo, -0.1 * sigmoid(-0.15)),
        (losses.ipo, 2 * (1.5 - 5)),
        (losses.hinge, -0.1),
        (losses.robust_dpo, (-0.9 * 0.1 * sigmoid(-0.15) - 0.1 * 0.1 * sigmoid(0.15)) / 0.8),
    ],
)
def test_gradients_by_hand(loss: Callable[..., Tensor], slope: float) -> None:
    """d loss / d chosen log-probability at margin 1.5 and β 0.1; the rejected one gets the opposite."""
    chosen, rejected = CHOSEN[:1].clone().requires_grad_(), REJECTED[:1].clone().requires_grad_()
    loss(chosen, rejected, REF_CHOSEN[:1], REF_REJECTED[:1], beta=0.1).sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(slope, rel=1e-5)
    assert rejected.grad.item() == pytest.approx(-slope, rel=1e-5)


def test_beta_may_differ_per_row() -> None:
    beta = torch.tensor([0.1, 0.2, 0.3, 0.4])
    together = losses.dpo(*FOUR, beta=beta)
    alone = [losses.dpo(*(x[n : n + 1] for x in FOUR), beta=float(beta[n])) for n in range(4)]
    close(together, torch.cat(alone))


# --- against TRL ------------------------------------------------------------------------------------------------------
# TRL's own loss methods are run as they are, on a model whose "forward" hands over the log-probabilities above.


def per_token(sums: Tensor, counts: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Token log-probabilities [rows, width] whose sums are `sums` over `counts` tokens, and their mask."""
    mask = (torch.arange(width) < counts[:, None]).float()
    return mask * (sums / counts)[:, None], mask


def stand_in(logps: Tensor, mask: Tensor) -> Callable[..., SimpleNamespace]:
    zeros = torch.zeros_like(logps)
    facts = {"entropy": zeros, "mean_logits": zeros, "is_top1": mask.bool(), "aux_loss": None}
    return lambda **_: SimpleNamespace(log_probs=logps, **facts)


def trainer_state(**fields: object) -> SimpleNamespace:
    """What TRL's loss methods read of their trainer."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x, autocast=nullcontext
    )
    return SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=accelerator, precompute_ref_logps=True,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1, **fields,
    )  # fmt: skip


def trl_dpo(loss_type: str, beta: float, label_smoothing: float) -> Tensor:
    """The loss of TRL's DPOTrainer for every pair alone, [rows]."""
    from trl import DPOTrainer

    state = trainer_state(
        ld_alpha=None, f_divergence_type="reverse_kl", loss_types=[loss_type], loss_weights=[1.0], beta=beta,
        label_smoothing=label_smoothing, use_weighting=False, args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )  # fmt: skip
    rows = []
    for n in range(len(CHOSEN)):
        counts = torch.stack([COUNTS[0][n], COUNTS[1][n]])
        width = int(counts.max())
        logps, mask = per_token(torch.stack([CHOSEN[n], REJECTED[n]]), counts, width)
        full = torch.cat([torch.zeros(2, 1), mask], dim=1)
        inputs = {
            "input_ids": torch.ones(2, width + 1, dtype=torch.long), "attention_mask": torch.ones(2, width + 1),
            "completion_mask": full.long(), "ref_chosen_logps": REF_CHOSEN[n : n + 1],
            "ref_rejected_logps": REF_REJECTED[n : n + 1],
        }  # fmt: skip
        rows.append(DPOTrainer._compute_loss(state, stand_in(logps, mask), inputs, False))
    return torch.stack(rows)


def averaged() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return CHOSEN / COUNTS[0], REJECTED / COUNTS[1], REF_CHOSEN / COUNTS[0], REF_REJECTED / COUNTS[1]


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("sigmoid", lambda: losses.dpo(*FOUR, beta=0.3)),
        ("hinge", lambda: losses.hinge(*FOUR, beta=0.3)),
        ("ipo", lambda: losses.ipo(*averaged(), beta=0.3)),
        ("robust", lambda: losses.robust_dpo(*FOUR, beta=0.3, label_smoothing=0.15)),
        ("sft", lambda: losses.sft(CHOSEN / COUNTS[0])),
    ],
)
def test_equal_to_trl_dpo(name: str, ours: Callable[[], Tensor]) -> None:
    close(ours(), trl_dpo(name, 0.3, 0.15 if name == "robust" else 0.0))


@pytest.mark.parametrize(("loss_type", "smoothing"), [("simpo", 0.0), ("sigmoid", 0.1)])
def test_equal_to_trl_cpo(loss_type: str, smoothing: float) -> None:
    """SimPO, and the label smoothing of the sigmoid loss: TRL 1.16 keeps the latter in its CPO trainer only."""
    from trl.experimental.cpo import CPOTrainer

    state = trainer_state(alpha=0.0, beta=2.0, simpo_gamma=0.7, label_smoothing=smoothing, loss_type=loss_type)
    chosen, rejected = averaged()[:2] if loss_type == "simpo" else FOUR[:2]
    theirs = CPOTrainer.cpo_loss(state, chosen, rejected)[0]
    if loss_type == "simpo":
        ours = losses.simpo(chosen, rejected, beta=2.0, gamma=0.7)
    else:
        zero = torch.zeros_like(chosen)
        ours = losses.dpo(chosen, rejected, zero, zero, beta=2.0, label_smoothing=smoothing)
    close(ours, theirs)


def test_equal_to_trl_orpo() -> None:
    """The odds-ratio term. TRL adds the NLL of prompt and response; ours is over the response, as in the paper."""
    from trl.experimental.orpo import ORPOTrainer

    chosen, rejected = averaged()[:2]
    theirs = ORPOTrainer.odds_ratio_loss(trainer_state(beta=0.4), chosen, rejected)[0]
    close(losses.orpo(chosen, rejected, beta=0.4), -chosen - theirs)


@pytest.mark.parametrize("kl_gain", [2.0, -2.0])
def test_equal_to_trl_kto(kl_gain: float) -> None:
    from trl import KTOTrainer

    logps, reference = torch.cat([CHOSEN, REJECTED]), torch.cat([REF_CHOSEN, REF_REJECTED])
    labels = torch.tensor([True] * 4 + [False] * 4)
    token_logps, mask = per_token(logps, torch.cat(COUNTS), 17)
    mismatched, ref_mismatched = logps.roll(1), logps.roll(1) - kl_gain
    state = trainer_state(
        beta=0.3, loss_type="kto", calculate_KL=True, desirable_weight=1.2, undesirable_weight=0.8,
        _compute_kl_logps=lambda model, batch: mismatched,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.ones(8, 18, dtype=torch.long), "attention_mask": torch.ones(8, 18),
        "completion_mask": torch.cat([torch.zeros(8, 1), mask], dim=1).long(), "label": labels, "ref_logps": reference,
        "ref_KL_logps": ref_mismatched,
    }  # fmt: skip
    theirs = KTOTrainer._compute_loss(state, stand_in(token_logps, mask), inputs, False)
    kl = losses.kto_kl(mismatched, ref_mismatched)
    ours = losses.kto(logps, reference, labels, kl, beta=0.3, desirable_weight=1.2, undesirable_weight=0.8)
    close(ours.mean(), theirs)
