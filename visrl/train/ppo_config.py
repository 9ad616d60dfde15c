"""The keys of PPO, under the names of TRL's `PPOConfig`. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from visrl.config import Config
from visrl.train.fields import NotNegative, Positive
from visrl.train.online_config import OnlineFields, given_keys


class PPOFields(Config):
    """What `visrl train` takes where a value head says what a token is compared with (`stage: ppo`)."""

    gamma: float = Field(1.0, gt=0, le=1)  # discount from a token to the next
    lam: float = Field(0.95, ge=0, le=1)  # of GAE: 0 trusts the values, 1 the rewards
    vf_coef: NotNegative = 0.1  # weight of the value loss
    cliprange_value: Positive = 0.2  # how far a value may go from what it was when the tokens were sampled
    whiten_rewards: bool = False  # rewards of tokens get deviation 1 over the step
    kl_coef: NotNegative = 0.05  # of the KL to the model at the start of the stage, taken off each token's reward
    kl_estimator: Literal["k1", "k3"] = "k1"


IN_ANOTHER_WAY = {
    "beta": "is of losses that hold the KL; with stage: ppo it is a part of the reward: set kl_coef",
    "loss_type": "stage: ppo has the clipped loss of its paper; leave the key out",
    "importance_sampling_level": "stage: ppo has a ratio for every token; leave the key out",
}


def check_ppo(config: OnlineFields, stage: str) -> None:
    """Refuse keys of PPO in other stages, and those of others in `stage: ppo`.

    Raises:
        ValueError: so it is; the message names the key.
    """
    if stage != "ppo":
        if unread := given_keys(config, PPOFields.model_fields):
            raise ValueError(f"{unread[0]}: stage: {stage} trains no value head; set stage: ppo, or leave the key out")
        return
    if unread := given_keys(config, IN_ANOTHER_WAY):
        raise ValueError(f"{unread[0]}: {IN_ANOTHER_WAY[unread[0]]}")
    if isinstance(config, PPOFields) and config.kl_estimator != "k1" and not config.kl_coef:
        raise ValueError("kl_estimator: there is no KL to estimate; set kl_coef, or leave the key out")
