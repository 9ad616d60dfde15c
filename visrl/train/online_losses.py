"""Losses of online reinforcement as pure functions of token log-probabilities, and `ONLINE_LOSSES`, the table of those
that `loss_type` names.

A function returns one loss per response token, [T]; `divide` of its row says what the sum over tokens is divided by.
`logps`, `old` and `ref` are log-probabilities of the T sampled tokens under the policy, the policy that sampled them
and the reference, in nats; `branch` [T] is the number of the response that a token belongs to, `advantages` [T] that
response's advantage. Formulas and names are those of TRL's GRPOTrainer.

Nothing here is imported from torch before a loss is computed: configs are checked against the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Level = Literal["token", "sequence", "sum"]
Divide = Literal["responses", "tokens", "batch_tokens", "length"]


@dataclass(frozen=True, slots=True)
class OnlineLoss:
    """A row of the table.

    The function gets logps, ratios and advantages, each [T], and `parameters` by keyword. `level` is that of its ratios
    where it has one of its own. `divide`, what the sum over tokens is divided by: "responses", each token by the length
    of its response and the sum by the number of responses; "tokens", by that of all tokens of the step; "batch_tokens",
    by that of the batch that is computed at once; "length", by responses × `max_completion_length`.
    """

    function: Callable[..., Tensor]
    source: str  # the paper, in a line
    divide: Divide
    level: Level | None = None
    parameters: tuple[str, ...] = ("epsilon", "epsilon_high", "delta")


def log_ratios(logps: Tensor, old: Tensor, branch: Tensor, lengths: Tensor, level: Level) -> Tensor:
    """log π/π_old of each token, [T]: its own ("token"), or that of its whole response, averaged over its tokens
    ("sequence": GSPO, Zheng et al. 2025, eq. 7) or summed ("sum": RLOO). `lengths` [branches] are tokens."""
    ratios = logps - old
    if level == "token":
        return ratios
    sums = ratios.new_zeros(len(lengths)).index_add(0, branch, ratios)
    return (sums / lengths if level == "sequence" else sums)[branch]


def clipped(
    logps: Tensor,
    ratios: Tensor,
    advantages: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
) -> Tensor:
    """−min(ρ A, clip(ρ, 1 − ε, 1 + ε_high) A), PPO's clipped objective (Schulman et al. 2017, eq. 7).

    ε_high is ε where it is not given; above it, "clip higher" (DAPO: Yu et al. 2025, eq. 10). `delta` caps the ratio of
    the unclipped side, too, which a negative advantage leaves without a bound (INTELLECT-2, 2025).
    """
    high = epsilon if epsilon_high is None else epsilon_high
    free = ratios if delta is None else ratios.clamp(max=delta)
    return -(free * advantages).minimum(ratios.clamp(1 - epsilon, 1 + high) * advantages)


def cispo(logps: Tensor, ratios: Tensor, advantages: Tensor, *, epsilon_high: float) -> Tensor:
    """−sg(min(ρ, ε_high)) A log π (CISPO: MiniMax-M1, 2025, eq. 4): the ratio is a weight and no token's gradient is
    cut off. As in TRL, ε_high is the cap itself."""
    return -ratios.clamp(max=epsilon_high).detach() * advantages * logps


def k3(logps: Tensor, ref: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(policy ‖ reference) at each token, [T]: e^d − d − 1 with d = ref − logps. ≥ 0."""
    difference = ref - logps
    return difference.exp() - difference - 1


def clip_shares(
    ratios: Tensor, advantages: Tensor, *, epsilon: float = 0.2, epsilon_high: float | None = None
) -> tuple[Tensor, Tensor]:
    """Where the clipping of `clipped` has taken the gradient away, below and above: two truth values per token, [T]."""
    high = epsilon if epsilon_high is None else epsilon_high
    return (ratios < 1 - epsilon) & (advantages < 0), (ratios > 1 + high) & (advantages > 0)


def clipped_value(values: Tensor, old: Tensor, returns: Tensor, *, cliprange: float) -> tuple[Tensor, Tensor]:
    """½ max((V − R)², (clip(V, V_old − ε, V_old + ε) − R)²), the value loss of PPO, and where the clipped one is the
    larger, each [T]. `old` are the values when the tokens were sampled. It is that of the code which came with the
    paper (Schulman et al. 2017; OpenAI baselines, ppo2), as in TRL's PPOTrainer."""
    free = (values - returns) ** 2
    held = (old + (values - old).clamp(-cliprange, cliprange) - returns) ** 2
    return 0.5 * free.maximum(held), held > free


def summed(per_token: Tensor, branch: Tensor, lengths: Tensor, divide: Divide, *, tokens: float, length: int) -> Tensor:
    """The sum over a batch's tokens, a scalar, each divided by what `divide` divides it by, counts of the step aside.

    `tokens` is how many response tokens the batch stands for, those that need no computation (of an advantage 0) among
    them; `length` is `max_completion_length`.
    """
    if divide == "responses":
        return (per_token / lengths[branch]).sum()
    return per_token.sum() / {"tokens": 1.0, "batch_tokens": max(tokens, 1.0), "length": float(length)}[divide]


class BatchLoss(NamedTuple):
    """The loss of a batch, a scalar, to be divided by the step's count; its ratios and its KL, if any, each [T]."""

    total: Tensor
    ratios: Tensor
    kl: Tensor | None


def batch_loss(
    loss: OnlineLoss,
    logps: Tensor,
    old: Tensor,
    advantages: Tensor,
    branch: Tensor,
    lengths: Tensor,
    *,
    parameters: Mapping[str, Any],
    level: Level = "token",
    ref: Tensor | None = None,
    beta: float = 0.0,
    correct_kl: bool = True,
    tokens: float,
    length: int,
    weights: Tensor | None = None,
) -> BatchLoss:
    """A row of the table put together: ratios, the loss of each token, `beta` × KL where there is a reference, the sum.

    `correct_kl` weighs the KL by the ratio, for it is of tokens that another policy sampled (TRL's
    `use_bias_correction_kl`). `weights` [T] are those of the tokens, the KL's aside, where another engine sampled them
    (importance.py). The rest as in the functions above.
    """
    ratios = log_ratios(logps, old, branch, lengths, loss.level or level).exp()
    per_token, kl = loss.function(logps, ratios, advantages, **parameters), None
    if weights is not None:
        per_token = per_token * weights
    if ref is not None:
        kl = k3(logps, ref)
        per_token = per_token + beta * (ratios * kl if correct_kl else kl)
    return BatchLoss(summed(per_token, branch, lengths, loss.divide, tokens=tokens, length=length), ratios, kl)


ONLINE_LOSSES = {
    "grpo": OnlineLoss(clipped, "GRPO (Shao et al. 2024)", "responses"),
    "bnpo": OnlineLoss(clipped, "GRPO over the tokens of a batch (TRL's bnpo)", "batch_tokens"),
    "dr_grpo": OnlineLoss(clipped, "Dr. GRPO (Liu et al. 2025)", "length"),
    "dapo": OnlineLoss(clipped, "DAPO (Yu et al. 2025)", "tokens"),
    "gspo": OnlineLoss(clipped, "GSPO (Zheng et al. 2025)", "responses", level="sequence"),
    "cispo": OnlineLoss(cispo, "CISPO (MiniMax-M1, 2025)", "tokens", parameters=("epsilon_high",)),
    "rloo": OnlineLoss(clipped, "RLOO (Ahmadian et al. 2024)", "responses", level="sum"),
}
