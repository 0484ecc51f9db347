"""From the rewards of groups to advantages: what a recipe names, computed by ops.duality.

`valid` marks branches that count; rewards of pairs [pairs, 2, G], side 0 real, 1 counterfactual.
`pair_reward` is added to both of the branches i of a pair that are both `correct`.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Array, Bool, Float

from jaxvid.ops.duality import Advantages, duality


@dataclass(frozen=True)
class Duality:
    """DNA-Train (https://arxiv.org/abs/2512.24271): both groups of a pair carry equal signal."""

    std: Literal["sample", "population", "none"] = "sample"
    eps: float = 1e-6
    lonely: Literal["keep", "halve", "drop"] = "keep"
    scope: Literal["pair", "batch"] = "pair"

    def __call__(
        self,
        rewards: Float[Array | np.ndarray, "pairs 2 G"],
        valid: Bool[Array | np.ndarray, "pairs 2 G"],
        correct: Bool[Array | np.ndarray, "pairs 2 G"] | None = None,
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
    """(R - mean) / (std + eps) within each group (https://arxiv.org/abs/2402.03300)."""

    std: Literal["sample", "population"] = "sample"
    eps: float = 1e-6

    def __call__(
        self,
        rewards: Float[Array | np.ndarray, "pairs 2 G"],
        valid: Bool[Array | np.ndarray, "pairs 2 G"],
        correct: Bool[Array | np.ndarray, "pairs 2 G"] | None = None,
        pair_reward: float = 0.0,
    ) -> Advantages:
        return duality(
            rewards,
            valid,
            correct,
            normalise="none",
            std=self.std,
            eps=self.eps,
            pair_reward=pair_reward,
        )


@dataclass(frozen=True)
class DAPO(GRPO):
    """GRPO's advantages (https://arxiv.org/abs/2503.14476): DAPO differs by its filter of groups,
    its clip bounds and its token mean, which are settings of the run and of policy.Policy."""


@dataclass(frozen=True)
class DrGRPO:
    """R - mean within each group, not divided by std (https://arxiv.org/abs/2503.20783)."""

    def __call__(
        self,
        rewards: Float[Array | np.ndarray, "pairs 2 G"],
        valid: Bool[Array | np.ndarray, "pairs 2 G"],
        correct: Bool[Array | np.ndarray, "pairs 2 G"] | None = None,
        pair_reward: float = 0.0,
    ) -> Advantages:
        return duality(
            rewards, valid, correct, normalise="none", std="none", pair_reward=pair_reward
        )
