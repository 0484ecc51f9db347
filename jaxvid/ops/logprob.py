"""Log-probability and entropy of scored tokens, straight from hidden states.

    z_v = hidden . unembed_v / temperature      logp = z_target - lse(z)
    entropy = lse(z) - sum_v p_v z_v

The vocabulary is walked in blocks, forward and backward, so that [B, S, V] is never in memory: the
backward pass recomputes each block from the kept lse. In order: reference, walk, derivative, public
function.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxvid.ops._choice import Impl


def logprob_ref(
    hidden: Float[Array, "B S D"],
    unembed: Float[Array, "V D"],
    targets: Int[Array, "B S"],
    temperature: float = 1.0,
) -> tuple[Float[Array, "B S"], Float[Array, "B S"]]:
    """The definition, in XLA, with all of [B, S, V] in memory."""
    every = jax.nn.log_softmax(_logits(hidden, unembed, temperature))
    logp = jnp.take_along_axis(every, targets[..., None], axis=-1)[..., 0]
    return logp, -(jnp.exp(every) * every).sum(-1)


def _logits(hidden, unembed, temperature):
    """float32: a bf16 logit of 20 is off by up to 1/16, and so would be its log-prob."""
    unembed = unembed.astype(hidden.dtype)
    z = jnp.einsum("BSD,VD->BSV", hidden, unembed, preferred_element_type=jnp.float32)
    return z / temperature


def _block(unembed, i, size):
    """Block i of the table, and which of its rows no earlier block had: the last block is moved
    back to end with the table, since padding would copy a table of gigabytes."""
    start = jnp.minimum(i * size, unembed.shape[0] - size)
    rows = start + jnp.arange(size)
    return jax.lax.dynamic_slice_in_dim(unembed, start, size), start, rows, rows >= i * size


def _walk(hidden, unembed, targets, temperature, size):
    """lse(z), sum_v p_v z_v and z_target, each [B, S]."""
    blocks = -(-unembed.shape[0] // size)

    def step(carry, i):
        top, total, weighted, target = carry
        w, _, rows, new = _block(unembed, i, size)
        z = _logits(hidden, w, temperature)
        z_new = jnp.where(new[None, None], z, -jnp.inf)
        higher = jnp.maximum(top, z_new.max(-1))
        p = jnp.exp(z_new - higher[..., None])
        shrink = jnp.exp(top - higher)
        hit = (rows[None, None] == targets[..., None]) & new[None, None]
        return (
            higher,
            total * shrink + p.sum(-1),
            weighted * shrink + (p * z).sum(-1),
            target + jnp.where(hit, z, 0.0).sum(-1),
        ), None

    zero = jnp.zeros(hidden.shape[:2], jnp.float32)
    start = (jnp.full_like(zero, -jnp.inf), zero, zero, zero)
    (top, total, weighted, target), _ = jax.lax.scan(step, start, jnp.arange(blocks))
    return top + jnp.log(total), weighted / total, target


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _xla(hidden, unembed, targets, temperature, size):
    return _xla_fwd(hidden, unembed, targets, temperature, size)[0]


def _xla_fwd(hidden, unembed, targets, temperature, size):
    lse, mean, target = _walk(hidden, unembed, targets, temperature, size)
    return (target - lse, lse - mean), (hidden, unembed, targets, lse, mean)


def _xla_bwd(temperature, size, kept, grads):
    hidden, unembed, targets, lse, mean = kept
    d_logp, d_entropy = (g[..., None] for g in grads)

    def step(carry, i):
        d_hidden, d_unembed = carry
        w, start, rows, new = _block(unembed, i, size)
        z = _logits(hidden, w, temperature)
        p = jnp.exp(z - lse[..., None])
        hit = rows[None, None] == targets[..., None]
        # d logp / dz = onehot - p;  d entropy / dz = -p (z - sum p z)
        dz = d_logp * (hit - p) - d_entropy * p * (z - mean[..., None])
        dz = (jnp.where(new[None, None], dz, 0.0) / temperature).astype(hidden.dtype)
        d_hidden += jnp.einsum(
            "BSV,VD->BSD", dz, w.astype(hidden.dtype), preferred_element_type=jnp.float32
        )
        d_w = jnp.einsum("BSV,BSD->VD", dz, hidden, preferred_element_type=jnp.float32)
        d_w = d_w.astype(unembed.dtype) + jax.lax.dynamic_slice_in_dim(d_unembed, start, size)
        return (d_hidden, jax.lax.dynamic_update_slice_in_dim(d_unembed, d_w, start, 0)), None

    blocks = -(-unembed.shape[0] // size)
    zeros = (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros_like(unembed))
    (d_hidden, d_unembed), _ = jax.lax.scan(step, zeros, jnp.arange(blocks))
    return d_hidden.astype(hidden.dtype), d_unembed, None


_xla.defvjp(_xla_fwd, _xla_bwd)


def logprob(
    hidden: Float[Array, "B S D"],
    unembed: Float[Array, "V D"],
    targets: Int[Array, "B S"],
    *,
    temperature: float = 1.0,
    block: int = 8192,
    impl: Impl | None = None,
) -> tuple[Float[Array, "B S"], Float[Array, "B S"]]:
    """Log-prob of `targets` and entropy, float32, under softmax(hidden . unembed / temperature).

    `block` is the number of vocabulary rows in memory at a time. `impl=None` is XLA everywhere;
    there is no Pallas kernel.
    """
    if temperature <= 0:
        raise ValueError(f"logprob needs a temperature above 0, got {temperature}")
    if impl not in (None, "xla"):
        raise ValueError(f"logprob has no {impl!r} implementation; use impl='xla' or None")
    return _xla(hidden, unembed, targets, temperature, min(block, unembed.shape[0]))
