"""Losses as pure functions of log-probabilities, and `LOSSES`, the table of those that `pref_loss` names.

Every function returns one loss per row, [rows]; weighting and normalising are the trainer's. `chosen` and `rejected`
are log-probabilities of whole responses under the policy, `ref_*` the same under the reference, in nats, all [rows].
A loss that reads the log-probabilities of single tokens is a row of the table, too: with a further word for `reads`.

Nothing here is imported from torch before a loss is computed: configs are checked against the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from visrl.config import ConfigError
from visrl.plugins import is_plugin, load_plugin

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Loss:
    """A row of the table: a loss with what its function reads. A loss of your own is one, too: `pref_loss=module:NAME`.

    The function gets, each [rows]: chosen, then rejected where it reads pairs, then the same under the reference
    where it needs one; and by keyword `beta` [rows], `kl` [rows] and its parameters. It returns [rows].
    """

    function: Callable[..., Tensor]
    source: str  # the paper, in a line
    reads: Literal["pair", "response"] = "pair"  # chosen and rejected, or chosen alone
    reference: bool = True  # whether it reads log-probabilities under the reference
    averages: bool = False  # log-probabilities over a response's tokens, instead of summing them
    kl: bool = False  # whether it reads an estimate of KL(policy ‖ reference), from mismatched responses
    beta: float | None = 0.1  # where `pref_beta` is not given; None: it has none
    parameters: Mapping[str, str] = field(default_factory=dict)  # further keywords → the keys of the config they are

    def __post_init__(self) -> None:
        if self.reads not in ("pair", "response"):
            raise ConfigError(f"a loss reads 'pair' or 'response', not {self.reads!r}")

    def arguments(self, pair: tuple[Tensor, Tensor], ref_pair: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """What the function reads of log-probabilities (chosen, rejected) under the policy and under the reference."""
        sides = 2 if self.reads == "pair" else 1
        return (*pair[:sides], *(ref_pair[:sides] if self.reference else ()))


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
    return -(1 - label_smoothing) * _logsigmoid(scaled) - label_smoothing * _logsigmoid(-scaled)


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
    return (-(1 - eps) * _logsigmoid(scaled) + eps * _logsigmoid(-scaled)) / (1 - 2 * eps)


def ipo(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float | Tensor = 0.1
) -> Tensor:
    """Identity preference optimisation (Azar et al. 2023, eq. 17), on log-probabilities averaged over tokens."""
    return (margin(chosen, rejected, ref_chosen, ref_rejected) - 1 / (2 * beta)) ** 2


def hinge(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float | Tensor = 0.1
) -> Tensor:
    """Hinge loss on the DPO margin (SLiC, Zhao et al. 2023, as normalised in Liu et al. 2023). Summed."""
    return (1 - beta * margin(chosen, rejected, ref_chosen, ref_rejected)).relu()


def simpo(chosen: Tensor, rejected: Tensor, *, beta: float | Tensor = 2.0, gamma: float = 0.5) -> Tensor:
    """SimPO (Meng et al. 2024, eq. 6): no reference, log-probabilities averaged over tokens, target margin γ."""
    return -_logsigmoid(beta * (chosen - rejected) - gamma)


def orpo(chosen: Tensor, rejected: Tensor, *, beta: float | Tensor = 0.1) -> Tensor:
    """ORPO (Hong et al. 2024, eq. 6–7): NLL of chosen plus β times the log odds ratio, averaged over tokens.

    The NLL is that of the response, as in the paper; TRL's trainer takes that of the prompt too.
    """
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -chosen - beta * _logsigmoid(log_odds)


def _logsigmoid(x: Tensor) -> Tensor:
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 − eˣ) for x < 0, without losing digits near 0."""
    return (-x.clamp(max=-1e-7).expm1()).log()


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
    good = desirable_weight * (1 - (beta * (ratio - kl)).sigmoid())
    bad = undesirable_weight * (1 - (beta * (kl - ratio)).sigmoid())
    return good.where(desirable, bad)


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
    good = 1 - (beta * (chosen - ref_chosen - kl)).sigmoid()
    bad = 1 - (beta * (kl - (rejected - ref_rejected))).sigmoid()
    return (good + bad) / 2


def kto_kl(mismatched: Tensor, ref_mismatched: Tensor) -> Tensor:
    """KTO's estimate of KL(policy ‖ reference): a scalar, clamped at 0, without gradient (section 4.1 of the paper).

    Both are summed log-probabilities of mismatched completions, each row's prompt with another row's response, under
    policy and reference.
    """
    return (mismatched - ref_mismatched).mean().detach().clamp(min=0)


LOSSES = {
    "sigmoid": Loss(
        dpo,
        "DPO (Rafailov et al. 2023; conservative: Mitchell 2023)",
        parameters={"label_smoothing": "dpo_label_smoothing"},
    ),
    "ipo": Loss(ipo, "IPO (Azar et al. 2023)", averages=True),
    "hinge": Loss(hinge, "SLiC (Zhao et al. 2023)"),
    "robust": Loss(
        robust_dpo, "robust DPO (Chowdhury et al. 2024)", parameters={"label_smoothing": "dpo_label_smoothing"}
    ),
    "simpo": Loss(
        simpo, "SimPO (Meng et al. 2024)", reference=False, averages=True, parameters={"gamma": "simpo_gamma"}
    ),
    "orpo": Loss(orpo, "ORPO (Hong et al. 2024)", reference=False, averages=True),
    "kto": Loss(kto_pair, "KTO (Ethayarajh et al. 2024)", kl=True),
    "sft": Loss(sft, "SFT on the chosen response", reads="response", reference=False, averages=True, beta=None),
}


def find_loss(name: str) -> Loss:
    """The loss that `pref_loss` names: a row of the table, or one of the user's own.

    Raises:
        ConfigError: there is none of that name, or what is there is no `Loss`.
    """
    if name in LOSSES:
        return LOSSES[name]
    if not is_plugin(name):
        *others, last = map(repr, LOSSES)
        raise ConfigError(f"Input should be {', '.join(others)} or {last}, or one of your own as module:NAME")
    loss = load_plugin(name, "loss")
    if not isinstance(loss, Loss):
        raise ConfigError(f"{name} is of type {type(loss).__name__}; a loss of your own is a visrl.train.losses.Loss")
    return loss
