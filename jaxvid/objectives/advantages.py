"""From the rewards of groups to advantages: what a recipe names, computed by ops.duality.

`valid` marks branches that count; rewards of pairs [pairs, 2, G], side 0 real, 1 counterfactual.
A reward that is not finite was not given: its branch counts as not valid (`paid`), and the others
of its group and of its pair have the advantages they would have without it.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxvid.ops.duality import Advantages, duality

Rewards = Float[Array | np.ndarray, "pairs 2 G"]
Valid = Bool[Array | np.ndarray, "pairs 2 G"]


@jax.jit
def paid(rewards: Rewards, valid: Valid) -> tuple[Rewards, Valid]:
    """The rewards with 0 where none was given (NaN or infinite), and the branches that have one."""
    given = valid & jnp.isfinite(rewards)
    return jnp.where(given, rewards, 0.0), given


@functools.partial(jax.jit, static_argnames="eps")
def by_batch(rewards: Rewards, valid: Valid, eps: float) -> Advantages:
    """R - mean of its group, over the sample std of all valid rewards + eps."""
    found = duality(rewards, valid, normalise="none", std="none")
    n = valid.sum()
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

    def __call__(self, rewards: Rewards, valid: Valid) -> Advantages:
        return duality(
            *paid(rewards, valid), std=self.std, eps=self.eps, lonely=self.lonely, scope=self.scope
        )


@dataclass(frozen=True)
class GRPO:
    """(R - mean) / (std + eps) within each group (https://arxiv.org/abs/2402.03300).

    std "batch" is the sample std of all rewards of the update, with the mean still the group's
    (https://arxiv.org/abs/2508.08221): a group that is nearly all right or wrong is not blown up.
    """

    std: Literal["sample", "population", "batch"] = "sample"
    eps: float = 1e-6

    def __call__(self, rewards: Rewards, valid: Valid) -> Advantages:
        if self.std == "batch":
            return by_batch(*paid(rewards, valid), self.eps)
        return duality(*paid(rewards, valid), normalise="none", std=self.std, eps=self.eps)


@dataclass(frozen=True)
class DAPO(GRPO):
    """GRPO's advantages (https://arxiv.org/abs/2503.14476): DAPO differs by its filter of groups,
    its clip bounds and its token mean, which are settings of the run and of policy.Policy."""


@dataclass(frozen=True)
class DrGRPO:
    """R - mean within each group, not divided by std (https://arxiv.org/abs/2503.20783)."""

    def __call__(self, rewards: Rewards, valid: Valid) -> Advantages:
        return duality(*paid(rewards, valid), normalise="none", std="none")
