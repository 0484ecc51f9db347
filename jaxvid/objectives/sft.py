"""Supervised fine-tuning: the negative log-likelihood of answers. Questions are context only."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxvid.batch import Batch, Loss, Scores
from jaxvid.objectives.slots import at_slot, by_slot, lengths


def nll(logp: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """-log p of each token."""
    return -logp


@dataclass(frozen=True)
class SFT:
    """Weighted mean of the tokens' NLL, or of the branches' mean NLL (a short answer counts as much
    as a caption). A branch of weight 0 is context.
    """

    aggregation: Literal["token", "branch"] = "token"

    def __call__(self, scores: Scores, batch: Batch) -> Loss:
        slot, weight = batch.tokens.slot, batch.branches.weight
        token_weight = at_slot(weight, slot)
        counted = jnp.where(token_weight > 0, 1.0, 0.0)
        # where, not times: padding may hold anything finite or not
        loss = jnp.where(counted > 0, nll(scores.logp), 0.0)
        if self.aggregation == "token":
            numerator, denominator = (token_weight * loss).sum(), token_weight.sum()
        else:
            n = lengths(slot, weight.shape[1])
            mean = by_slot(loss, slot, weight.shape[1]) / jnp.maximum(n, 1)
            weight = jnp.where(n > 0, weight, 0.0)
            numerator, denominator = (weight * mean).sum(), weight.sum()
        tokens = counted.sum()
        metrics = {
            "nll": (loss.sum(), tokens),
            "entropy": (jnp.where(counted > 0, scores.entropy, 0.0).sum(), tokens),
        }
        return Loss(numerator, denominator, metrics)
