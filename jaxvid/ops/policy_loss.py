"""Clipped policy-gradient loss per token, and its gradient, in one pass.

    loss = -min(r A, clip(r, 1 - lo, 1 + hi) A),    r = exp(logp - old)
    dual clip, where A < 0:  loss = min(loss, -c A)
    importance weight:  loss = min(exp(old - sampled), cap) loss

PPO (https://arxiv.org/abs/1707.06347); asymmetric bounds from DAPO (https://arxiv.org/abs/2503.14476);
dual clip (https://arxiv.org/abs/1912.09729): without it a token that the policy now likes much more
than the old one did pushes without bound when A < 0. Truncated importance weight, for a sampler
that is not quite the policy (https://fengyao.notion.site/off-policy-rl).
In order: reference, kernel, derivative, public function.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from jaxvid import sharding
from jaxvid.ops._choice import Impl, choose

BLOCK = (64, 1024)  # rows and tokens of one kernel step; 256 KiB an operand
LIMIT = 20.0  # log-ratios are held within +-LIMIT: exp overflows at 88, and inf * 0 is NaN


def importance(
    old: Float[Array, "*n"], sampled: Float[Array, "*n"], cap: float
) -> Float[Array, "*n"]:
    """min(old / sampled, cap), from log-probs. 1 where the sampler's is NaN (not known)."""
    diff = jnp.where(jnp.isnan(sampled), 0.0, old - sampled)
    return jnp.minimum(jnp.exp(jnp.clip(diff, -LIMIT, LIMIT)), cap)


def policy_loss_ref(
    logp: Float[Array, "B S"],
    old: Float[Array, "B S"],
    adv: Float[Array, "B S"],
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    sampled: Float[Array, "B S"] | None = None,
    importance_cap: float | None = None,
) -> Float[Array, "B S"]:
    """The definition, in XLA, float32 or float64. The kernel is tested against this and against
    its gradient."""
    ratio = jnp.exp(jnp.clip(logp - old, -LIMIT, LIMIT))
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    loss = -jnp.minimum(ratio * adv, clipped * adv)
    if dual_clip is not None:
        loss = jnp.where(adv < 0, jnp.minimum(loss, -dual_clip * adv), loss)
    return loss if sampled is None else loss * importance(old, sampled, importance_cap)


def _kernel(*refs, clip_low, clip_high, dual_clip, cap):
    *operands, loss_ref, grad_ref = refs
    logp, old, adv, *sampled = (ref[...] for ref in operands)
    diff = logp - old
    ratio = jnp.exp(jnp.clip(diff, -LIMIT, LIMIT))
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    keep = ratio * adv <= clipped * adv  # the unclipped branch is the minimum: gradient flows
    loss = -jnp.where(keep, ratio, clipped) * adv
    if dual_clip is not None:
        over = (adv < 0) & (loss > -dual_clip * adv)
        loss, keep = jnp.where(over, -dual_clip * adv, loss), keep & ~over
    grad = jnp.where(keep & (jnp.abs(diff) < LIMIT), -ratio * adv, 0.0)  # d loss / d logp
    if sampled:
        weight = importance(old, sampled[0], cap)
        loss, grad = loss * weight, grad * weight
    loss_ref[...], grad_ref[...] = loss, grad


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _pallas(logp, old, adv, sampled, settings, interpret):
    return _pallas_fwd(logp, old, adv, sampled, settings, interpret)[0]


def _pallas_fwd(logp, old, adv, sampled, settings, interpret):
    operands = [x.astype(jnp.float32) for x in (logp, old, adv, sampled) if x is not None]
    on, row = sharding.splits({"rows": len(logp)}), ("rows", None)
    launch = lambda *x: _launch(x, settings, interpret)
    return sharding.spread(launch, (row,) * len(operands), (row,) * 2, on)(*operands)


def _launch(operands, settings, interpret):
    """(loss, gradient). Every token is alone, so what a block at the edge reads beyond the array
    does no harm."""
    shape = operands[0].shape
    tile = tuple(min(n, b) for n, b in zip(shape, BLOCK))
    block = pl.BlockSpec(tile, lambda i, j: (i, j))
    names = ("clip_low", "clip_high", "dual_clip", "cap")
    return tuple(
        pl.pallas_call(
            functools.partial(_kernel, **dict(zip(names, settings))),
            grid=tuple(-(-n // t) for n, t in zip(shape, tile)),
            in_specs=[block] * len(operands),
            out_specs=[block] * 2,
            out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32)] * 2,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 2),
            interpret=interpret,
        )(*operands)
    )


def _pallas_bwd(settings, interpret, grad, dloss):
    return grad * dloss, None, None, None  # old, adv and sampled are data


_pallas.defvjp(_pallas_fwd, _pallas_bwd)


def policy_loss(
    logp: Float[Array, "B S"],
    old: Float[Array, "B S"],
    adv: Float[Array, "B S"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    sampled: Float[Array, "B S"] | None = None,
    importance_cap: float | None = None,
    impl: Impl | None = None,
) -> Float[Array, "B S"]:
    """Loss per token, unreduced and unmasked; gradient to `logp` alone.

    `sampled` and `importance_cap` go together: the sampler's log-probs, NaN where not known (weight
    1). On a mesh rows are split as `sharding.RULES` says. `impl=None` is Pallas on TPUs, else XLA;
    float64 is computed as such, in XLA alone.
    Raises ValueError for log-probs below float32, and for settings that do not fit each other.
    """
    if jnp.finfo(logp.dtype).bits < 32:
        raise ValueError(
            f"policy_loss exponentiates: give log-probs of at least float32, got {logp.dtype}"
        )
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip bounds the loss at ratio {dual_clip}; set it above 1, or None")
    cap = importance_cap
    if (sampled is None) != (cap is None) or (cap is not None and cap <= 0):
        raise ValueError(
            f"importance_cap={cap} with {'no' if sampled is None else 'the'} sampler's "
            "log-probs: give `sampled` and a cap above 0, or neither"
        )
    old, adv, sampled = jax.lax.stop_gradient((old, adv, sampled))
    impl = choose(impl, logp.dtype == jnp.float32)
    if impl == "xla":
        settings = (clip_low, clip_high, dual_clip)
        return policy_loss_ref(logp, old, adv, *settings, sampled, cap)
    if logp.dtype != jnp.float32:
        raise ValueError(f"the policy_loss kernel is float32, got {logp.dtype}: use impl='xla'")
    settings = (clip_low, clip_high, dual_clip, cap)
    return _pallas(logp, old, adv, sampled, settings, impl == "interpret")
