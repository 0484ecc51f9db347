"""Preference losses: direct preference optimisation and its kin.

The array functions take the log-ratio margin of pairs,

    c = sum_t log pi(chosen) - log ref(chosen),   r = the same of the rejected,   margin = c - r

and give one loss per pair. `DPO` applies one of them to every rejected branch of a batch and the
chosen branch that is its mate; several rejected branches may share one chosen (VideoPASTA,
https://arxiv.org/abs/2504.14096). `PDPO` compares alternatives of a step, whose expected
correctness says which of the two is preferred, and how surely.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxvid.batch import Batch, Loss, Scores
from jaxvid.objectives.slots import at_slot, by_slot, lengths

AXES = ("spatial", "temporal", "crossframe")  # Branches.axis 1, 2, 3
MU = 0.1  # scale of a soft label; open in the paper


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


def labelled(
    margin: Float[Array, "*n"], label: Float[Array, "*n"], beta: float
) -> Float[Array, "*n"]:
    """-[a log sigmoid(beta margin) + (1 - a) log sigmoid(-beta margin)] for the label a in [0, 1]:
    pDPO, sec. 3.2 of https://arxiv.org/abs/2502.11775."""
    return label * sigmoid(margin, beta) + (1 - label) * sigmoid(-margin, beta)


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
        rewards = self.beta * chosen, self.beta * rejected
        metrics = _metrics(rewards, (mate(logp), logp), real)
        metrics["entropy"] = _entropy(scores, batch)
        for i, name in enumerate(AXES, 1):
            of = jnp.where(branches.axis == i, real, 0.0)
            margins, right = _margins(rewards)
            metrics[f"rewards/accuracies/{name}"] = _mean(right, of)
            metrics[f"rewards/margins/{name}"] = _mean(margins, of)
        return Loss(jnp.where(pair > 0, pair * loss, 0.0).sum(), pair.sum(), metrics)


@dataclass(frozen=True)
class PDPO:
    """Mean over pairs of `labelled`, plus `ce_weight` x mean NLL per token of the preferred side.

    A pair is two branches behind one prefix (the prompt, or the branch that is their `parent`), of
    which one or both name the other as `mate`; it counts once either way. p of each is
    `Branches.value`, the share of rollouts from it that end in the right answer. The label of the
    branch s against its mate s' is

        "hard"  a = 1[p > p'], and pairs with p = p' are dropped
        "soft"  a = sigmoid((p - p') / mu); a tie is kept at 1/2, and has no preferred side

    a is a label and never a weight. An update of ties alone has no loss, and is skipped as one that
    is not finite. Pairs of whole replies (p of 1 and 0) train beside pairs of steps with the same
    loss; with hard labels a batch of them is DPO's, to the letter.
    """

    beta: float = 0.1
    labels: Literal["hard", "soft"] = "hard"
    mu: float = MU
    ce_weight: float = 0.0

    def __post_init__(self):
        if self.beta <= 0 or self.mu <= 0:
            raise ValueError(
                f"PDPO beta is {self.beta} and mu {self.mu}; both are scales and must be above 0"
            )
        if self.labels == "hard" and self.mu != MU:
            raise ValueError(f"mu {self.mu} means nothing to labels='hard'; set labels to 'soft'")

    def __call__(self, scores: Scores, batch: Batch) -> Loss:
        slot, branches = batch.tokens.slot, batch.branches
        columns = branches.weight.shape[1]
        logp, n = by_slot(scores.logp, slot, columns), lengths(slot, columns)
        ratio = logp - by_slot(batch.ref, slot, columns)
        mate = lambda x: jnp.take_along_axis(x, jnp.maximum(branches.mate - 1, 0), axis=1)
        both_name = mate(branches.mate) == jnp.arange(1, columns + 1)[None]
        pair = jnp.where((branches.mate > 0) & (n > 0) & (mate(n) > 0), branches.weight, 0.0)
        pair = jnp.where(both_name, pair / 2, pair)  # the loss is the same from either side

        better = branches.value - mate(branches.value)  # p - p'
        tied = better == 0
        if self.labels == "hard":
            label = jnp.where(better > 0, 1.0, 0.0)
            kept = jnp.where(tied, 0.0, pair)
        else:
            label, kept = jax.nn.sigmoid(better / self.mu), pair
        sides = lambda x: (jnp.where(better > 0, x, mate(x)), jnp.where(better > 0, mate(x), x))
        loss = labelled(ratio - mate(ratio), label, self.beta)
        preferred, _ = sides(logp / jnp.maximum(n, 1))
        loss = loss - self.ce_weight * jnp.where(tied, 0.0, preferred)

        real = jnp.where(pair > 0, jnp.where(both_name, 0.5, 1.0), 0.0)
        metrics = _metrics(sides(self.beta * ratio), sides(logp), jnp.where(tied, 0.0, real))
        metrics["pairs/tied"] = _mean(jnp.where(tied, 1.0, 0.0), real)
        metrics["entropy"] = _entropy(scores, batch)
        return Loss(jnp.where(kept > 0, kept * loss, 0.0).sum(), kept.sum(), metrics)


def _mean(values, of):
    """(sum, count) of `values`, each as often as `of` says."""
    return jnp.where(of > 0, of * values, 0.0).sum(), of.sum()


def _margins(rewards):
    """(chosen - rejected, 1 where above 0): strict, so 0 where nothing was learned yet."""
    chosen, rejected = rewards
    return chosen - rejected, jnp.where(chosen > rejected, 1.0, 0.0)


def _metrics(rewards, logps, of):
    """Names as TRL's, of (chosen, rejected) pairs."""
    margins, right = _margins(rewards)
    names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
    named = dict(zip(names, (*rewards, margins, right)))
    named |= dict(zip(("logps/chosen", "logps/rejected"), logps))
    return {name: _mean(x, of) for name, x in named.items()}


def _entropy(scores, batch):
    scored = at_slot(batch.branches.weight, batch.tokens.slot)
    return _mean(scores.entropy, jnp.where(scored > 0, 1.0, 0.0))
