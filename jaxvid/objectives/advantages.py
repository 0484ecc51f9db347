"""From the rewards of groups to advantages: what a recipe names, computed by ops.duality.

`valid` marks branches that count; rewards of pairs [pairs, 2, G], side 0 real, 1 counterfactual.
`pair_reward` is added to both of the branches i of a pair that are both `correct`. A branch whose
reward is not finite leaves its group, and the others have the advantages they would have without
it.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxvid.ops import duality as op
from jaxvid.ops.duality import Advantages, duality

Rewards = Float[Array | np.ndarray, "pairs 2 G"]
Flags = Bool[Array | np.ndarray, "pairs 2 G"]


@functools.partial(jax.jit, static_argnames=("pair_reward", "eps"))
def by_batch(
    rewards: Rewards, valid: Flags, correct: Flags | None, pair_reward: float, eps: float
) -> Advantages:
    """R - mean of its group, over the sample std of all valid rewards + eps."""
    settings = dict(normalise="none", std="none", pair_reward=pair_reward)
    found = duality(rewards, valid, correct, **settings)
    valid = valid & jnp.isfinite(rewards)
    if pair_reward:
        rewards = rewards + op.pair_reward(correct, valid, pair_reward)
    n = jnp.maximum(valid.sum(), 1)
    centred = jnp.where(valid, rewards - jnp.where(valid, rewards, 0.0).sum() / n, 0.0)
    scale = jnp.sqrt((centred**2).sum() / jnp.maximum(n - 1, 1)) + eps
    return found._replace(advantage=found.advantage / scale, signal=found.signal / scale)


@dataclass(frozen=True)
class Duality:
    """DNA-Train (https://arxiv.org/abs/2512.24271): both groups of a pair carry equal signal."""

    std: Literal["sample", "population", "none"] = "sample"
    eps: float = 1e-6
    lonely: Literal["keep", "halve", "drop"] = "keep"
    scope: Literal["pair", "batch"] = "pair"

    def __call__(
        self,
        rewards: Rewards,
        valid: Flags,
        correct: Flags | None = None,
        pair_reward: float = 0.0,
    ) -> Advantages:
        return duality(
            rewards,
            valid,
            correct,
            std=self.std,
            eps=self.eps,
            lonely=self.lonely,
            scope=self.scope,
            pair_reward=pair_reward,
        )


@dataclass(frozen=True)
class GRPO:
    """(R - mean) / (std + eps) within each group (https://arxiv.org/abs/2402.03300).

    std "batch" is the sample std of all rewards of the update, with the mean still the group's
    (https://arxiv.org/abs/2508.08221): a group that is nearly all right or wrong is not blown up.
    """

    std: Literal["sample", "population", "batch"] = "sample"
    eps: float = 1e-6

    def __call__(
        self,
        rewards: Rewards,
        valid: Flags,
        correct: Flags | None = None,
        pair_reward: float = 0.0,
    ) -> Advantages:
        if self.std == "batch":
            return by_batch(rewards, valid, correct, pair_reward, self.eps)
        settings = dict(std=self.std, eps=self.eps, pair_reward=pair_reward)
        return duality(rewards, valid, correct, normalise="none", **settings)


@dataclass(frozen=True)
class DAPO(GRPO):
    """GRPO's advantages (https://arxiv.org/abs/2503.14476): DAPO differs by its filter of groups,
    its clip bounds and its token mean, which are settings of the run and of policy.Policy."""


@dataclass(frozen=True)
class DrGRPO:
    """R - mean within each group, not divided by std (https://arxiv.org/abs/2503.20783)."""

    def __call__(
        self,
        rewards: Rewards,
        valid: Flags,
        correct: Flags | None = None,
        pair_reward: float = 0.0,
    ) -> Advantages:
        return duality(
            rewards, valid, correct, normalise="none", std="none", pair_reward=pair_reward
        )
