"""What a token weighs that another policy sampled: π_old / π_sampling, cut off where it is large. Pure functions.

Another engine, other kernels or an adapter some steps old: what a server samples is not of the policy that learns.
Names are those of TRL's `GRPOConfig`. Nothing here is imported from torch before a weight is computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Mode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


def importance_weights(
    old: Tensor,
    sampled: Tensor,
    branch: Tensor,
    branches: int,
    *,
    mode: Mode,
    clip_min: float | None = None,
    clip_max: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The weight of each of T sampled tokens, [T], and whether it was cut, [T].

    The ratio of a token, or (sequence_*) the product of those of its whole response, on every token of it. Outside
    [clip_min, clip_max] a ratio is set to the bound (*_truncate: Yao et al. 2025, "Your efficient RL framework secretly
    brings you off-policy RL training") or to 0 (*_mask). `old` and `sampled` are log-probabilities in nats under the
    policy that learns, before its update, and under the one that sampled; `branch` is the number of each token's
    response, of so many `branches`.
    """
    difference = old - sampled
    if mode.startswith("sequence"):
        difference = difference.new_zeros(branches).index_add(0, branch, difference)[branch]
    ratios = difference.exp()
    low, high = 0.0 if clip_min is None else clip_min, float("inf") if clip_max is None else clip_max
    cut = (ratios < low) | (ratios > high)
    return ratios.clamp(low, high) if mode.endswith("truncate") else ratios.masked_fill(cut, 0.0), cut
