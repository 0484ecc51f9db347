"""Preference losses: direct preference optimisation and its kin.

The array functions take the log-ratio margin of pairs,

    c = sum_t log pi(chosen) - log ref(chosen),   r = the same of the rejected,   margin = c - r

and give one loss per pair. `DPO` applies one of them to every rejected branch of a batch and the
chosen branch that is its mate; several rejected branches may share one chosen (VideoPASTA,
https://arxiv.org/abs/2504.14096).
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxvid.batch import Batch, Loss, Scores
from jaxvid.objectives.slots import at_slot, by_slot, lengths

AXES = ("spatial", "temporal", "crossframe")  # Branches.axis 1, 2, 3


def sigmoid(margin: Float[Array, "*n"], beta: float) -> Float[Array, "*n"]:
    """-log sigmoid(beta margin): DPO, eq. 7 of https://arxiv.org/abs/2305.18290."""
    return -jax.nn.log_sigmoid(beta * margin)


def conservative(margin: Float[Array, "*n"], beta: float, smoothing: float) -> Float[Array, "*n"]:
    """cDPO (https://arxiv.org/abs/2305.18290, sec. 3 of https://ericmitchell.ai/cdpo.pdf): each
    label is wrong with probability `smoothing`."""
    return (1 - smoothing) * sigmoid(margin, beta) + smoothing * sigmoid(-margin, beta)


def robust(margin: Float[Array, "*n"], beta: float, smoothing: float) -> Float[Array, "*n"]:
    """rDPO, eq. 12 of https://arxiv.org/abs/2403.00409: unbiased under labels flipped with
    probability `smoothing` < 1/2."""
    flipped = (1 - smoothing) * sigmoid(margin, beta) - smoothing * sigmoid(-margin, beta)
    return flipped / (1 - 2 * smoothing)


def ipo(margin: Float[Array, "*n"], beta: float) -> Float[Array, "*n"]:
    """(margin - 1 / (2 beta))^2: eq. 17 of https://arxiv.org/abs/2310.12036."""
    return (margin - 1 / (2 * beta)) ** 2


def hinge(margin: Float[Array, "*n"], beta: float) -> Float[Array, "*n"]:
    """max(0, 1 - beta margin): SLiC (https://arxiv.org/abs/2305.10425) on the DPO margin."""
    return jax.nn.relu(1 - beta * margin)


@dataclass(frozen=True)
class DPO:
    """Mean over pairs of axis weight x loss, plus `ce_weight` x mean NLL per token of the chosen.

    "ipo" and "sigmoid_norm" take log-ratios per token (sum / length), the others sums; both as TRL.
    `axis_weights` are VideoPASTA's l_s, l_t, l_c; a pair without an axis has 1. `label_smoothing`
    belongs to "conservative" and "robust".
    """

    beta: float = 0.1
    kind: Literal["sigmoid", "conservative", "robust", "ipo", "hinge", "sigmoid_norm"] = "sigmoid"
    label_smoothing: float = 0.0
    axis_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    ce_weight: float = 0.0

    def __post_init__(self):
        if self.beta <= 0:
            raise ValueError(f"DPO beta is {self.beta}; the margin's scale must be above 0")
        if self.label_smoothing and self.kind not in ("conservative", "robust"):
            raise ValueError(
                f"label_smoothing {self.label_smoothing} means nothing to kind={self.kind!r}; set "
                "kind to 'conservative' or 'robust', or label_smoothing to 0"
            )
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing {self.label_smoothing} is not in [0, 0.5)")

    def _loss(self, margin):
        match self.kind:
            case "sigmoid" | "sigmoid_norm":
                return sigmoid(margin, self.beta)
            case "conservative":
                return conservative(margin, self.beta, self.label_smoothing)
            case "robust":
                return robust(margin, self.beta, self.label_smoothing)
            case "ipo":
                return ipo(margin, self.beta)
            case "hinge":
                return hinge(margin, self.beta)
        raise ValueError(f"unknown kind {self.kind!r}")

    def __call__(self, scores: Scores, batch: Batch) -> Loss:
        slot, branches = batch.tokens.slot, batch.branches
        columns = branches.weight.shape[1]
        logp, n = by_slot(scores.logp, slot, columns), lengths(slot, columns)
        ratio = logp - by_slot(batch.ref, slot, columns)
        per_token = lambda x: x / jnp.maximum(n, 1)
        mate = lambda x: jnp.take_along_axis(x, jnp.maximum(branches.mate - 1, 0), axis=1)
        chosen, rejected = mate(ratio), ratio  # [B, M], read on rejected branches only
        scaled = per_token(ratio) if self.kind in ("ipo", "sigmoid_norm") else ratio
        pair = jnp.where((branches.mate > 0) & (n > 0), branches.weight, 0.0)
        axis_weight = jnp.asarray((1.0, *self.axis_weights))[branches.axis]
        loss = axis_weight * self._loss(mate(scaled) - scaled)
        loss = loss - self.ce_weight * mate(per_token(logp))

        real = jnp.where(pair > 0, 1.0, 0.0)
        mean = lambda x, of=real: (jnp.where(of > 0, x, 0.0).sum(), of.sum())
        right = jnp.where(chosen > rejected, 1.0, 0.0)  # strict: 0 where nothing was learned yet
        scored = at_slot(branches.weight, slot)
        metrics = {
            "rewards/chosen": mean(self.beta * chosen),
            "rewards/rejected": mean(self.beta * rejected),
            "rewards/margins": mean(self.beta * (chosen - rejected)),
            "rewards/accuracies": mean(right),
            "logps/chosen": mean(mate(logp)),
            "logps/rejected": mean(logp),
            "entropy": mean(scores.entropy, jnp.where(scored > 0, 1.0, 0.0)),
        }
        for i, name in enumerate(AXES, 1):
            of = jnp.where(branches.axis == i, real, 0.0)
            metrics[f"rewards/accuracies/{name}"] = mean(right, of)
            metrics[f"rewards/margins/{name}"] = mean(self.beta * (chosen - rejected), of)
        return Loss(jnp.where(pair > 0, pair * loss, 0.0).sum(), pair.sum(), metrics)
