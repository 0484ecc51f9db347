"""Clipped policy-gradient loss per token, and its gradient, in one pass.

    loss = -min(r A, clip(r, 1 - lo, 1 + hi) A),    r = exp(logp - old)
    dual clip, where A < 0:  loss = min(loss, -c A)

PPO (https://arxiv.org/abs/1707.06347); asymmetric bounds from DAPO (https://arxiv.org/abs/2503.14476);
dual clip (https://arxiv.org/abs/1912.09729): without it a token that the policy now likes much more
than the old one did pushes without bound when A < 0.
In order: reference, kernel, derivative, public function.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jaxvid.ops._choice import Impl, choose

BLOCK = (64, 128)  # float32 (sublanes, lanes) of one kernel step
LIMIT = 20.0  # log-ratios are held within +-LIMIT: exp overflows at 88, and inf * 0 is NaN


def policy_loss_ref(
    logp: Float[Array, "B S"],
    old: Float[Array, "B S"],
    adv: Float[Array, "B S"],
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Float[Array, "B S"]:
    """The definition, in XLA. The kernel is tested against this and against its gradient."""
    ratio = jnp.exp(jnp.clip(logp - old, -LIMIT, LIMIT))
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    loss = -jnp.minimum(ratio * adv, clipped * adv)
    if dual_clip is None:
        return loss
    return jnp.where(adv < 0, jnp.minimum(loss, -dual_clip * adv), loss)


def _kernel(logp_ref, old_ref, adv_ref, loss_ref, grad_ref, *, clip_low, clip_high, dual_clip):
    adv, diff = adv_ref[...], logp_ref[...] - old_ref[...]
    ratio = jnp.exp(jnp.clip(diff, -LIMIT, LIMIT))
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    keep = ratio * adv <= clipped * adv  # the unclipped branch is the minimum: gradient flows
    loss = -jnp.where(keep, ratio, clipped) * adv
    if dual_clip is not None:
        over = (adv < 0) & (loss > -dual_clip * adv)
        loss, keep = jnp.where(over, -dual_clip * adv, loss), keep & ~over
    loss_ref[...] = loss
    grad_ref[...] = jnp.where(keep & (jnp.abs(diff) < LIMIT), -ratio * adv, 0.0)  # d loss / d logp


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _pallas(logp, old, adv, settings, interpret):
    return _pallas_fwd(logp, old, adv, settings, interpret)[0]


def _pallas_fwd(logp, old, adv, settings, interpret):
    """Every token is alone, so any [B, S] is laid out as full tiles and back."""
    size, tile = logp.size, BLOCK[0] * BLOCK[1]
    flat = lambda x: jnp.pad(x.reshape(-1), (0, -size % tile)).reshape(-1, BLOCK[1])
    back = lambda x: x.reshape(-1)[:size].reshape(logp.shape)
    block = pl.BlockSpec(BLOCK, lambda i: (i, 0))
    rows = -(-size // tile) * BLOCK[0]
    loss, grad = pl.pallas_call(
        functools.partial(_kernel, **dict(zip(("clip_low", "clip_high", "dual_clip"), settings))),
        grid=(rows // BLOCK[0],),
        in_specs=[block] * 3,
        out_specs=[block] * 2,
        out_shape=[jax.ShapeDtypeStruct((rows, BLOCK[1]), jnp.float32)] * 2,
        interpret=interpret,
    )(flat(logp), flat(old), flat(adv))
    return back(loss), back(grad)


def _pallas_bwd(settings, interpret, grad, dloss):
    return grad * dloss, None, None  # old and adv are data


_pallas.defvjp(_pallas_fwd, _pallas_bwd)


def policy_loss(
    logp: Float[Array, "B S"],
    old: Float[Array, "B S"],
    adv: Float[Array, "B S"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    impl: Impl | None = None,
) -> Float[Array, "B S"]:
    """Loss per token, unreduced and unmasked; gradient to `logp` alone.

    `impl=None` is Pallas on one TPU, else XLA.
    """
    if jnp.finfo(logp.dtype).bits < 32:
        raise ValueError(
            f"policy_loss exponentiates: give log-probs of at least float32, got {logp.dtype}"
        )
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip bounds the loss at ratio {dual_clip}; set it above 1, or None")
    old, adv = jax.lax.stop_gradient((old, adv))
    impl = choose(impl)
    if impl == "xla":
        return policy_loss_ref(logp, old, adv, clip_low, clip_high, dual_clip)
    return _pallas(logp, old, adv, (clip_low, clip_high, dual_clip), impl == "interpret")
