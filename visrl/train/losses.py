"""Losses as pure functions of per-branch log-probabilities. Each says its paper, and whether it sums or averages.

Every function returns one loss per row, shape [rows]; weighting and normalising are the trainer's. `chosen` and
`rejected` are log-probabilities of whole responses under the policy, `ref_*` the same under the reference, all [rows].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu


def margin(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    """How much more the policy prefers chosen over rejected than the reference does, in nats."""
    return (chosen - rejected) - (ref_chosen - ref_rejected)


def sft(logps: Tensor) -> Tensor:
    """Negative log-likelihood of each response. Divide by tokens for the usual mean."""
    return -logps


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float | Tensor = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7), on summed log-probabilities.

    `label_smoothing` ε gives conservative DPO (Mitchell 2023): −(1−ε) log σ(βm) − ε log σ(−βm).
    """
    scaled = beta * margin(chosen, rejected, ref_chosen, ref_rejected)
    return -(1 - label_smoothing) * logsigmoid(scaled) - label_smoothing * logsigmoid(-scaled)


def robust_dpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float | Tensor = 0.1,
    label_smoothing: float = 0.1,
) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024, eq. 10): unbiased where a share ε of the labels is flipped. Summed."""
    scaled = beta * margin(chosen, rejected, ref_chosen, ref_rejected)
    eps = label_smoothing
    return (-(1 - eps) * logsigmoid(scaled) + eps * logsigmoid(-scaled)) / (1 - 2 * eps)


def ipo(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float | Tensor = 0.1
) -> Tensor:
    """Identity preference optimisation (Azar et al. 2023, eq. 17), on log-probabilities averaged over tokens."""
    return (margin(chosen, rejected, ref_chosen, ref_rejected) - 1 / (2 * beta)) ** 2


def hinge(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float | Tensor = 0.1
) -> Tensor:
    """Hinge loss on the DPO margin (SLiC, Zhao et al. 2023, as normalised in Liu et al. 2023). Summed."""
    return relu(1 - beta * margin(chosen, rejected, ref_chosen, ref_rejected))


def simpo(chosen: Tensor, rejected: Tensor, *, beta: float | Tensor = 2.0, gamma: float = 0.5) -> Tensor:
    """SimPO (Meng et al. 2024, eq. 6): no reference, log-probabilities averaged over tokens, target margin γ."""
    return -logsigmoid(beta * (chosen - rejected) - gamma)


def orpo(chosen: Tensor, rejected: Tensor, *, beta: float | Tensor = 0.1) -> Tensor:
    """ORPO (Hong et al. 2024, eq. 6–7): NLL of chosen plus β times the log odds ratio, averaged over tokens.

    The NLL is that of the response, as in the paper; TRL's trainer takes that of the prompt too.
    """
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -chosen - beta * logsigmoid(log_odds)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 − eˣ) for x < 0, without losing digits near 0."""
    return torch.log(-torch.expm1(torch.clamp(x, max=-1e-7)))


def kto(
    logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: float | Tensor = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO (Ethayarajh et al. 2024, eq. 8), on summed log-probabilities, one loss per response.

    `kl` is the estimate of KL(policy ‖ reference) that `kto_kl` gives, a scalar or one per row; `desirable` [rows] is
    true for chosen responses.
    """
    ratio = logps - ref_logps
    good = desirable_weight * (1 - torch.sigmoid(beta * (ratio - kl)))
    bad = undesirable_weight * (1 - torch.sigmoid(beta * (kl - ratio)))
    return torch.where(desirable, good, bad)


def kto_pair(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    kl: Tensor,
    *,
    beta: float | Tensor = 0.1,
) -> Tensor:
    """KTO on pairs: the mean of the losses of both responses, one desirable and one not. `kl` as in `kto`."""
    desirable = torch.ones_like(chosen, dtype=torch.bool)
    return (
        kto(chosen, ref_chosen, desirable, kl, beta=beta) + kto(rejected, ref_rejected, ~desirable, kl, beta=beta)
    ) / 2


def kto_kl(mismatched: Tensor, ref_mismatched: Tensor) -> Tensor:
    """KTO's estimate of KL(policy ‖ reference): a scalar, clamped at 0, without gradient (section 4.1 of the paper).

    Both are summed log-probabilities of mismatched completions, each row's prompt with another row's response, under
    policy and reference.
    """
    return (mismatched - ref_mismatched).mean().detach().clamp(min=0)
