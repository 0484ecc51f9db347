"""Clipped policy-gradient objectives over sampled branches.

    token loss = importance x clipped loss (ops.policy_loss) + kl_coef KL - entropy_coef entropy

PPO (https://arxiv.org/abs/1707.06347), GRPO (https://arxiv.org/abs/2402.03300), DAPO
(https://arxiv.org/abs/2503.14476), Dr.GRPO (https://arxiv.org/abs/2503.20783), DNA-Train
(https://arxiv.org/abs/2512.24271): they differ in the advantages (objectives.advantages) and in how
token losses are averaged. GSPO (https://arxiv.org/abs/2507.18071) takes one ratio a branch; CISPO
(https://arxiv.org/abs/2506.13585) clips the ratio alone and keeps every token's gradient.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxvid.batch import Batch, Loss, Scores
from jaxvid.objectives.slots import at_slot, by_slot, lengths
from jaxvid.ops.policy_loss import importance, policy_loss

LIMIT = 20.0  # log-ratios are held within +-LIMIT before exp, as ops.policy_loss does


def kl(
    logp: Float[Array, "*n"], ref: Float[Array, "*n"], kind: Literal["k1", "k2", "k3"] = "k3"
) -> Float[Array, "*n"]:
    """Estimates of KL(pi || ref) per token (http://joschu.net/blog/kl-approx.html), d = ref - logp:
    k1 -d; k2 d^2 / 2; k3 e^d - d - 1, >= 0 (eq. 4 of https://arxiv.org/abs/2402.03300). k3 is held
    within 10, as verl does. The gradient is that of the estimate itself, as in TRL and verl: in
    expectation over pi that of k2 is KL's, k1's is 0, and k3's is that of KL(ref || pi)."""
    if kind == "k1":
        return logp - ref
    if kind == "k2":
        return (logp - ref) ** 2 / 2
    d = jnp.clip(ref - logp, -LIMIT, LIMIT)
    return jnp.clip(jnp.exp(d) - d - 1, -10.0, 10.0)


def group_sum(values: Float[Array, "B M"], same: Bool[Array, "B M M"]) -> Float[Array, "B M"]:
    """At each branch, the sum of `values` over the branches of its own group."""
    return jnp.where(same, values[:, None, :], 0.0).sum(-1)


@dataclass(frozen=True)
class Policy:
    """Clipped loss with one of four means (w is the branch's weight, 1 unless set):

    batch_token  sum of token losses / number of tokens, over the whole update (DAPO as in practice)
    group_token  the same within each group, then the mean over groups (DAPO's equation)
    sequence     mean within each branch, then over branches (GRPO)
    fixed        sum within each branch / `fixed_length`, then the mean over branches (Dr.GRPO)

    A group is the branches of one (pair, side); its tree stands in one row. `importance_cap` turns
    on the importance weight old / sampled. KL needs `Batch.ref`, and is computed where kl_coef > 0.

    ratio "sequence" is GSPO: the mean log-ratio of a branch at each of its tokens, with the
    gradient of the token's own log-prob (GSPO-token, eq. 13; the clip is about 3e-4 there).
    clip "weight" is CISPO: -sg(clip(ratio, 1 - clip_low, 1 + clip_high)) A logp; clip_low 1 leaves
    the upper bound alone, as in the paper.
    """

    clip: Literal["loss", "weight"] = "loss"
    ratio: Literal["token", "sequence"] = "token"

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = 3.0
    aggregation: Literal["batch_token", "group_token", "sequence", "fixed"] = "batch_token"
    fixed_length: int = 0
    kl_coef: float = 0.0
    kl_kind: Literal["k1", "k2", "k3"] = "k3"
    entropy_coef: float = 0.0
    importance_cap: float | None = None

    def __post_init__(self):
        if (self.aggregation == "fixed") != (self.fixed_length > 0):
            raise ValueError(
                f"aggregation={self.aggregation!r} with fixed_length={self.fixed_length}: "
                "fixed_length (the longest response) is for aggregation='fixed', which needs it"
            )

        if self.clip == "weight" and self.dual_clip is not None:
            raise ValueError(
                f"dual_clip={self.dual_clip} bounds the clipped loss, which clip='weight' (CISPO) "
                "does not have: set dual_clip to None"
            )

    def _log_ratio(self, logp, old, slot, columns):
        if self.ratio == "token":
            return logp - old
        mean = by_slot(logp - old, slot, columns) / jnp.maximum(lengths(slot, columns), 1)
        still = jax.lax.stop_gradient  # value: the branch's mean; gradient: the token's own
        return logp - still(logp) + at_slot(still(mean), slot)

    def _token_loss(self, logp, log_ratio, adv, sampled):
        """`sampled` is relative to the old log-prob, as `log_ratio` is: old stands at 0."""
        old, cap = jnp.zeros_like(log_ratio), self.importance_cap
        if self.clip == "weight":
            ratio = jnp.exp(jnp.clip(log_ratio, -LIMIT, LIMIT))
            weight = jnp.clip(ratio, 1 - self.clip_low, 1 + self.clip_high)
            weight = weight if cap is None else weight * importance(old, sampled, cap)
            return -jax.lax.stop_gradient(weight) * adv * logp
        return policy_loss(
            log_ratio,
            old,
            adv,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
            sampled=None if cap is None else sampled,
            importance_cap=cap,
        )

    def _aggregate(self, loss, batch):
        """Numerator and denominator of the mean. `loss` [B, S] is 0 on what does not count."""
        slot, branches = batch.tokens.slot, batch.branches
        columns = branches.weight.shape[1]
        n = lengths(slot, columns)
        w = jnp.where(n > 0, branches.weight, 0.0)  # a branch without tokens leaves the mean
        total = by_slot(loss, slot, columns)
        match self.aggregation:
            case "batch_token":
                return (w * total).sum(), (w * n).sum()
            case "sequence":
                return (w * total / jnp.maximum(n, 1)).sum(), w.sum()
            case "fixed":
                return (w * total).sum() / self.fixed_length, w.sum()
        same = jnp.ones((), bool)
        for key in (branches.pair, branches.side):
            same = same & (key[:, :, None] == key[:, None, :])
        tokens, members = group_sum(w * n, same), group_sum(w, same)
        safe = lambda x: jnp.where(x > 0, x, 1.0)
        return (w * total / safe(tokens)).sum(), (w / safe(members)).sum()

    def __call__(self, scores: Scores, batch: Batch) -> Loss:
        slot, logp, old = batch.tokens.slot, scores.logp, batch.old
        counted = at_slot(batch.branches.weight, slot) > 0
        # padding may hold anything: give it ratio 1 and advantage 0 before any exp
        logp, old, ref = (jnp.where(counted, x, 0.0) for x in (logp, old, batch.ref))
        old = jnp.where(jnp.isnan(old), jax.lax.stop_gradient(logp), old)
        adv = at_slot(batch.branches.advantage, slot)
        columns = batch.branches.weight.shape[1]
        log_ratio = self._log_ratio(logp, old, slot, columns)
        loss = self._token_loss(logp, log_ratio, adv, batch.sampled - old)
        metrics = self._metrics(scores, log_ratio, old, adv, counted, batch)
        if self.importance_cap is not None:
            weight = importance(old, batch.sampled, self.importance_cap)
            metrics["sampling/importance_sampling_ratio/mean"] = _mean(weight, counted)
        if self.kl_coef:
            divergence = kl(logp, ref, self.kl_kind)
            loss = loss + self.kl_coef * divergence
            metrics["kl"] = _mean(divergence, counted)
        if self.entropy_coef:
            loss = loss - self.entropy_coef * scores.entropy
        return Loss(*self._aggregate(jnp.where(counted, loss, 0.0), batch), metrics)

    def _metrics(self, scores, log_ratio, old, adv, counted, batch):
        """Names as TRL's. What ends in /max is the largest of the update (train.step)."""
        log_ratio, entropy = jax.lax.stop_gradient((log_ratio, scores.entropy))
        ratio = jnp.exp(jnp.clip(log_ratio, -LIMIT, LIMIT))
        low = (ratio < 1 - self.clip_low) & (adv < 0)
        high = (ratio > 1 + self.clip_high) & (adv > 0)
        gap = jnp.where(counted & ~jnp.isnan(batch.sampled), jnp.abs(old - batch.sampled), 0)
        metrics = {
            "entropy": _mean(entropy, counted),
            "ppo_kl": _mean(-log_ratio, counted),
            "clip_ratio/low_mean": _mean(low, counted),
            "clip_ratio/high_mean": _mean(high, counted),
            "clip_ratio/region_mean": _mean(low | high, counted),
            "sampling/sampling_logp_difference/mean": _mean(gap, counted),
            "sampling/sampling_logp_difference/max": (gap.max(), jnp.ones(())),
        }
        if self.dual_clip is not None:
            metrics["clip_ratio/dual_mean"] = _mean((ratio > self.dual_clip) & (adv < 0), counted)
        return metrics


def _mean(values, of):
    """(sum, count) of `values` where `of`."""
    return jnp.where(of, values, 0.0).sum(), of.astype(jnp.float32).sum()
