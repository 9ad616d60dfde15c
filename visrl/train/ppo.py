"""Proximal policy optimisation: online reinforcement with a value head, which says what a token is compared with.

The head reads the hidden states that predict the sampled tokens, in the packed pass of the loss. A response's reward
comes at its last token, the KL to the start of the stage is taken off at every token, and GAE spreads both over the
tokens. Everything else is `OnlineTrainer`'s.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from visrl.models.modes import evaluating
from visrl.models.value_head import kept_hidden_states
from visrl.packing.forward import token_logps, token_logps_and_entropies, token_values
from visrl.records import Sample
from visrl.rewards.advantages import deviation, gae, whiten
from visrl.train import online_losses
from visrl.train.items import TrainingBatch
from visrl.train.online import OnlineTrainer
from visrl.train.online_rollouts import OnlineBatch, TokenEstimates
from visrl.train.value_head import ValueHeadTrainer


def token_rewards(scores: Tensor, kl: Tensor, branch: Tensor, kl_coef: float) -> Tensor:
    """The reward of every token, [T]: −kl_coef · KL [T], and at the last token of each response its score [branches].

    `branch` [T] is the number of each token's response, whose tokens follow each other.
    """
    ends = torch.cat([branch[1:] != branch[:-1], branch.new_ones(1, dtype=torch.bool)])
    return -kl_coef * kl + scores[branch] * ends


class PPOTrainer(ValueHeadTrainer, OnlineTrainer):
    """`OnlineTrainer` that compares a response's tokens with the values of a head. The head is in checkpoints, to go on
    from, and not beside what the training makes."""

    keeps_head = False

    def _sample(self, questions: Sequence[Sequence[Sample]]) -> list[OnlineBatch]:
        batches = super()._sample(questions)
        started = time.perf_counter()
        self._estimate(batches)
        self._add_time("values", time.perf_counter() - started, 1)
        return batches

    # --- values, advantages and returns, as the policy that sampled has them

    @torch.no_grad()
    def _estimate(self, batches: Sequence[OnlineBatch]) -> None:
        """Set what every token of a step is compared with: whitened over all of them, those of other processes too."""
        config = self.visrl_config
        values: list[Tensor] = []
        rewards: list[Tensor] = []
        with evaluating(self.policy):
            for batch in batches:
                batch.packed = batch.packed.to(self.args.device)
                values.append(self._values(batch))
                rewards.append(self._rewards(batch))
        if config.whiten_rewards:
            rewards = self._whitened(rewards, shift_mean=False)
        found = [
            _gae(reward, value, batch.packed.branch, config.gamma, config.lam)
            for reward, value, batch in zip(rewards, values, batches, strict=True)
        ]
        advantages = self._whitened([one for one, _ in found])
        for batch, before, whitened, (_, returns) in zip(batches, values, advantages, found, strict=True):
            batch.estimates = TokenEstimates(before, whitened, returns)
        self._log_values(torch.cat(values), torch.cat([returns for _, returns in found]))

    def _values(self, batch: OnlineBatch) -> Tensor:
        """The value of every token, [T]; the same pass tells the log-probabilities of the policy that sampled."""
        with kept_hidden_states(self.policy) as hidden:
            self._set_old(batch, token_logps(self.policy, batch.packed, self.visrl_config.temperature))
        return token_values(self.head, hidden, batch.packed)

    def _rewards(self, batch: OnlineBatch) -> Tensor:
        """The reward of every token, [T]; a response's score is what credit was given by."""
        assert batch.old is not None
        config, kl = self.visrl_config, torch.zeros_like(batch.old)
        if config.kl_coef:
            ref = self._ref_logps(batch)
            kl = batch.old - ref if config.kl_estimator == "k1" else online_losses.k3(batch.old, ref)
            self._meters.add("kl", kl.sum(), len(kl))
        return token_rewards(batch.advantages.to(kl.device), kl, batch.packed.branch, config.kl_coef)

    def _whitened(self, parts: Sequence[Tensor], *, shift_mean: bool = True) -> list[Tensor]:
        """The tokens of each batch, whitened over those of all batches and processes of a step."""
        everyone = gather_object([torch.cat(list(parts)).tolist()])
        before = sum(map(len, everyone[: self.args.process_index]))
        whole = whiten([value for own in everyone for value in own], shift_mean=shift_mean)
        sizes = [len(part) for part in parts]
        return list(parts[0].new_tensor(whole[before : before + sum(sizes)]).split(sizes))

    # --- the loss

    def _row_losses(self, model: nn.Module, batch: TrainingBatch) -> Tensor:
        """The policy's loss and the value's, [1], to be divided by the tokens of the step."""
        assert isinstance(batch, OnlineBatch)
        config, told = self.visrl_config, batch.estimates
        assert told is not None
        with kept_hidden_states(self.policy) as hidden:
            logps, entropies = token_logps_and_entropies(model, batch.packed, config.temperature)
        values = token_values(self.head, hidden, batch.packed)
        policy = self._policy_loss(batch, logps, entropies, told.advantages)
        value, clipped = online_losses.clipped_value(
            values, told.values, told.returns, cliprange=config.cliprange_value
        )
        for name, mean in (("loss/policy_avg", policy), ("loss/value_avg", value.sum()),
                           ("val/clipfrac_avg", clipped.float().sum())):  # fmt: skip
            self._meters.add(name, mean, len(values))
        return (policy + config.vf_coef * value.sum()).reshape(1)

    def _log_values(self, values: Tensor, returns: Tensor) -> None:
        """Add to the running means how well the head knew what would come: 1 is all of it, 0 no more than the mean."""
        spread = deviation(returns.tolist())
        if spread:
            self._add("val/explained_variance", 1 - (deviation((returns - values).tolist()) / spread) ** 2)


def _gae(rewards: Tensor, values: Tensor, branch: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns of the tokens of a batch, each [T], response by response."""
    sizes = torch.unique_consecutive(branch, return_counts=True)[1].tolist()
    advantages, returns = [], []
    for own, known in zip(rewards.split(sizes), values.split(sizes), strict=True):
        told = gae(own.tolist(), known.tolist(), gamma=gamma, lam=lam)
        advantages += told[0]
        returns += told[1]
    return rewards.new_tensor(advantages), rewards.new_tensor(returns)
