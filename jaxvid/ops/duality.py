"""Group advantages, balanced between the real and the counterfactual video of a pair.

    A_i = (R_i - mean R) / (std R + eps)             over the valid branches of one group
    S = sum_i |A_i|                                  the group's learning signal
    alpha_* = (S_real + S_cf) / 2 / S_*              A'_i = alpha A_i, so both sides weigh the same

DNA-Train (https://arxiv.org/abs/2512.24271); GRPO (https://arxiv.org/abs/2402.03300); no division
by std: Dr.GRPO (https://arxiv.org/abs/2503.20783). S is summed from the actual advantages: the
closed form in the group's accuracy fails once a format reward varies inside a group.
In order: the computation, reference, kernel, public function.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from jaxvid.ops._choice import Impl, choose

VMEM = 2**21  # bytes of one padded operand; the kernel holds about six in fast memory


class Advantages(NamedTuple):
    """Side 0 is real, 1 counterfactual. alpha is 0 where a group takes no part in the loss."""

    advantage: Float[Array, "pairs 2 G"]
    signal: Float[Array, "pairs 2"]  # before the norm
    alpha: Float[Array, "pairs 2"]
    dead: Bool[Array, "pairs 2"]  # fewer than two valid branches, or all rewards equal


def _compute(rewards, valid, normalise, std, eps, lonely, scope):
    """On float [2, pairs, G], sides first; keeps all three axes, as the kernel needs."""
    n = valid.sum(-1, keepdims=True)
    mean = (rewards * valid).sum(-1, keepdims=True) / jnp.maximum(n, 1)
    centred = (rewards - mean) * valid
    # by range, not by std: rounding of the mean would give equal rewards a tiny std and A of 1
    low = jnp.where(valid > 0, rewards, jnp.inf).min(-1, keepdims=True)
    high = jnp.where(valid > 0, rewards, -jnp.inf).max(-1, keepdims=True)
    alive = jnp.where((n >= 2) & (high > low), 1.0, 0.0)
    if std != "none":
        freedom = jnp.maximum(n - 1 if std == "sample" else n, 1)
        scale = jnp.sqrt((centred**2).sum(-1, keepdims=True) / freedom) + eps
        centred /= jnp.where(alive > 0, scale, 1.0)
    advantage = centred * alive
    signal = jnp.abs(advantage).sum(-1, keepdims=True)
    if normalise == "none":
        return advantage, signal, alive
    norm = signal if scope == "pair" else signal.sum(1, keepdims=True)  # [2, pairs or 1, 1]
    both = norm.sum(0, keepdims=True)
    lone = norm.min(0, keepdims=True) <= 0
    alpha = both / 2 / jnp.where(norm > 0, norm, 1.0)
    alpha = jnp.where(lone, {"keep": 1.0, "halve": 0.5, "drop": 0.0}[lonely], alpha)
    alpha = alpha * alive
    return advantage * alpha, signal, alpha


def duality_ref(
    rewards: Float[Array | np.ndarray, "pairs 2 G"],
    valid: Bool[Array | np.ndarray, "pairs 2 G"],
    normalise: str,
    std: str,
    eps: float,
    lonely: str,
    scope: str,
) -> Advantages:
    """The definition, in XLA. float32, or float64 where the rewards are."""
    dtype = jnp.promote_types(jnp.result_type(rewards), jnp.float32)
    first = lambda x: jnp.swapaxes(x, 0, 1).astype(dtype)
    return _unpack(_compute(first(rewards), first(valid), normalise, std, eps, lonely, scope))


def _unpack(sides_first):
    advantage, signal, alpha = (jnp.swapaxes(x, 0, 1) for x in sides_first)
    signal, alpha = signal[..., 0], alpha[..., 0]
    return Advantages(advantage, signal, alpha, signal == 0)


# called from the host, with as many pairs as survived a filter: one program a count, not twenty
_xla = jax.jit(duality_ref, static_argnums=(2, 3, 4, 5, 6))


def _kernel(rewards_ref, valid_ref, advantage_ref, signal_ref, alpha_ref, *, settings):
    out = _compute(rewards_ref[...], valid_ref[...], *settings)
    advantage_ref[...], signal_ref[...], alpha_ref[...] = out


def _pallas(rewards, valid, settings, interpret):
    """The whole batch in one step: the norm over a batch needs every group at once."""
    pairs, _, G = rewards.shape
    first = lambda x: jnp.swapaxes(x, 0, 1).astype(jnp.float32)
    shape = lambda last: jax.ShapeDtypeStruct((2, pairs, last), jnp.float32)
    return _unpack(
        pl.pallas_call(
            functools.partial(_kernel, settings=settings),
            out_shape=[shape(G), shape(1), shape(1)],
            interpret=interpret,
        )(first(rewards), first(valid))
    )


def duality(
    rewards: Float[Array | np.ndarray, "pairs 2 G"],
    valid: Bool[Array | np.ndarray, "pairs 2 G"],
    *,
    normalise: Literal["duality", "none"] = "duality",
    std: Literal["sample", "population", "none"] = "sample",
    eps: float = 1e-6,
    lonely: Literal["keep", "halve", "drop"] = "keep",
    scope: Literal["pair", "batch"] = "pair",
    impl: Impl | None = None,
) -> Advantages:
    """Advantages of both groups of every pair. Data: no gradient flows.

    `lonely` is for a pair (or, with `scope="batch"`, a batch) in which one side has no signal:
    "keep" leaves the other side as it is (alpha 1), "halve" is the formula to the letter (alpha
    1/2), "drop" zeroes it. A group with fewer than two valid branches gets A = 0. `impl=None` is
    Pallas on one TPU where the batch fits its fast memory, else XLA.
    """
    rewards = jax.lax.stop_gradient(rewards)
    settings = (normalise, std, eps, lonely, scope)
    pairs, _, G = rewards.shape
    size = 2 * (-(-pairs // 8) * 8) * (-(-G // 128) * 128) * 4
    impl = choose(impl, size <= VMEM)
    if impl == "xla":
        return _xla(rewards, valid, *settings)
    if size > VMEM:
        raise ValueError(
            f"the duality kernel holds the batch in fast memory: {rewards.shape} takes {size} "
            f"bytes padded, the limit is {VMEM}. Use impl='xla', or fewer pairs per update."
        )
    return _pallas(rewards, valid, settings, impl == "interpret")
