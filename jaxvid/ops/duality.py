"""Group advantages, balanced between the real and the counterfactual video of a pair.

    A_i = (R_i - mean R) / (std R + eps)             over the valid branches of one group
    S = sum_i |A_i|                                  the group's learning signal
    alpha_* = (S_real + S_cf) / 2 / S_*              A'_i = alpha A_i, so both sides weigh the same
    R_i += weight [real i and counterfactual i are right]                the pair reward, optional

DNA-Train (https://arxiv.org/abs/2512.24271); GRPO (https://arxiv.org/abs/2402.03300); no division
by std: Dr.GRPO (https://arxiv.org/abs/2503.20783); pair reward: FADE
(https://arxiv.org/abs/2608.10764). S is summed from the actual advantages: the closed form in the
group's accuracy fails once a format reward varies inside a group.
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
from jaxvid.sharding import RULES

VMEM = 2**21  # bytes of one padded operand; the kernel holds about seven in fast memory


class Advantages(NamedTuple):
    """Side 0 is real, 1 counterfactual. alpha is 0 where a group takes no part in the loss.

    S_target of a pair is `signal.mean(1)`; `dead.mean()` is the fraction of dead groups.
    """

    advantage: Float[Array, "pairs 2 G"]
    signal: Float[Array, "pairs 2"]  # before the norm
    alpha: Float[Array, "pairs 2"]
    dead: Bool[Array, "pairs 2"]  # fewer than two valid branches, or all rewards equal


class _Settings(NamedTuple):
    """What a compiled program is made for."""

    normalise: str
    std: str
    eps: float
    lonely: str
    scope: str
    weight: float


def pair_reward(correct, valid, weight, axis=1):
    """R_pair of FADE (https://arxiv.org/abs/2608.10764): `weight` to branch i of both sides where
    both are valid and right. It takes the profit out of "always answer counterfactual".

    On numpy or jax arrays with the sides at `axis`, booleans or 0 and 1; that axis is left with
    size 1. What is paid outside the op (a filter, a metric) comes from here too.
    """
    return weight * (correct * valid).min(axis, keepdims=True)


def _groups(rewards, valid, correct, s):
    """Plain advantages, their signal and which groups have one."""
    valid = jnp.where(jnp.abs(rewards) < jnp.inf, valid, 0.0)  # false of NaN too
    rewards = jnp.where(valid > 0, rewards, 0.0)
    if correct is not None:
        rewards = rewards + pair_reward(correct, valid, s.weight, axis=0)
    n = valid.sum(-1, keepdims=True)
    mean = (rewards * valid).sum(-1, keepdims=True) / jnp.maximum(n, 1)
    centred = (rewards - mean) * valid
    # by range, not by std: rounding of the mean would give equal rewards a tiny std and A of 1
    low = jnp.where(valid > 0, rewards, jnp.inf).min(-1, keepdims=True)
    high = jnp.where(valid > 0, rewards, -jnp.inf).max(-1, keepdims=True)
    alive = jnp.where((n >= 2) & (high > low), 1.0, 0.0).astype(rewards.dtype)
    if s.std != "none":
        freedom = jnp.maximum(n - 1 if s.std == "sample" else n, 1)
        scale = jnp.sqrt((centred**2).sum(-1, keepdims=True) / freedom) + s.eps
        centred /= jnp.where(alive > 0, scale, 1.0)
    advantage = centred * alive
    return advantage, jnp.abs(advantage).sum(-1, keepdims=True), alive


def _balance(advantage, signal, alive, s, axes=()):
    """The duality norm. `axes` are the mesh axes over which a batch is split, in shard_map."""
    norm = signal if s.scope == "pair" else signal.sum(1, keepdims=True)  # [2, pairs or 1, 1]
    if axes:
        norm = jax.lax.psum(norm, axes)
    both = norm.sum(0, keepdims=True)
    lone = norm.min(0, keepdims=True) <= 0
    alpha = both / 2 / jnp.where(norm > 0, norm, 1.0)
    alpha = jnp.where(lone, {"keep": 1.0, "halve": 0.5, "drop": 0.0}[s.lonely], alpha)
    alpha = alpha * alive
    return advantage * alpha, signal, alpha


def _compute(rewards, valid, correct, s, axes=()):
    """On float [2, pairs, G], sides first; keeps all three axes, as the kernel needs."""
    found = _groups(rewards, valid, correct, s)
    return found if s.normalise == "none" else _balance(*found, s, axes)


def _split(s: _Settings) -> tuple[str, ...]:
    """Mesh axes to sum the norm over: in shard_map a batch is split over the data axes.

    Over an axis on which the pairs are repeated both sides' sums grow alike, and alpha stays.
    """
    if s.normalise == "none" or s.scope == "pair":
        return ()
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(a for a in RULES["rows"] if a in mesh.manual_axes)


def duality_ref(
    rewards: Float[Array | np.ndarray, "pairs 2 G"],
    valid: Bool[Array | np.ndarray, "pairs 2 G"],
    normalise: str,
    std: str,
    eps: float,
    lonely: str,
    scope: str,
    correct: Bool[Array | np.ndarray, "pairs 2 G"] | None = None,
    pair_reward: float = 0.0,
) -> Advantages:
    """The definition, in XLA. float32, or float64 where the rewards are."""
    dtype = jnp.promote_types(jnp.result_type(rewards), jnp.float32)
    settings = _Settings(normalise, std, eps, lonely, scope, pair_reward)
    operands = [_sides_first(x, dtype) for x in (rewards, valid, correct)]
    return _unpack(_compute(*operands, settings, _split(settings)))


def _sides_first(x, dtype=jnp.float32):
    return None if x is None else jnp.swapaxes(x, 0, 1).astype(dtype)


def _unpack(sides_first):
    advantage, signal, alpha = (jnp.swapaxes(x, 0, 1) for x in sides_first)
    signal, alpha = signal[..., 0], alpha[..., 0]
    return Advantages(advantage, signal, alpha, signal == 0)


# called from the host, with as many pairs as survived a filter: one program a count, not twenty
_xla = jax.jit(duality_ref, static_argnums=(2, 3, 4, 5, 6, 8))


def _kernel(*refs, settings):
    *operands, advantage_ref, signal_ref, alpha_ref = refs
    operands = [ref[...] for ref in operands] + [None] * (3 - len(operands))
    out = _compute(*operands, settings)
    advantage_ref[...], signal_ref[...], alpha_ref[...] = out


def _pallas(rewards, valid, correct, settings, interpret):
    """The whole batch in one step: the norm over a batch needs every group at once. A batch split
    over devices is balanced behind the kernel, by the sum of the two numbers of each device."""
    pairs, _, G = rewards.shape
    axes = _split(settings)
    inside = settings._replace(normalise="none") if axes else settings
    shape = lambda last: jax.ShapeDtypeStruct((2, pairs, last), jnp.float32)
    found = pl.pallas_call(
        functools.partial(_kernel, settings=inside),
        out_shape=[shape(G), shape(1), shape(1)],
        interpret=interpret,
    )(*(_sides_first(x) for x in (rewards, valid, correct) if x is not None))
    return _unpack(_balance(*found, settings, axes) if axes else found)


def duality(
    rewards: Float[Array | np.ndarray, "pairs 2 G"],
    valid: Bool[Array | np.ndarray, "pairs 2 G"],
    correct: Bool[Array | np.ndarray, "pairs 2 G"] | None = None,
    *,
    normalise: Literal["duality", "none"] = "duality",
    std: Literal["sample", "population", "none"] = "sample",
    eps: float = 1e-6,
    lonely: Literal["keep", "halve", "drop"] = "keep",
    scope: Literal["pair", "batch"] = "pair",
    pair_reward: float = 0.0,
    impl: Impl | None = None,
) -> Advantages:
    """Advantages of both groups of every pair. Data: no gradient flows.

    A branch that is not valid, or whose reward is NaN or infinite, leaves its group: A = 0 there,
    and neither its reward nor `correct` counts. A group with fewer than two branches left gets
    A = 0. `pair_reward` is paid to both where reply i is right (`correct`) on both sides.
    `lonely` is for a pair (or, with `scope="batch"`, a batch) in which one side has no signal:
    "keep" leaves the other side as it is (alpha 1), "halve" is the formula to the letter (alpha
    1/2), "drop" zeroes it. `scope="batch"` is the whole batch however it is split: under jit by
    its sharding, in shard_map over the mesh's data axes. `impl=None` is Pallas on one TPU (in
    shard_map on each) where the batch fits its fast memory, else XLA. float64 rewards are computed
    as such, in XLA alone.
    Raises ValueError for a pair reward without `correct`, and where a named kernel does not fit.
    """
    if pair_reward and correct is None:
        raise ValueError(
            f"pair_reward {pair_reward} is paid where both replies are right: give `correct` "
            f"{rewards.shape}, or set it to 0"
        )
    rewards, correct = jax.lax.stop_gradient(rewards), correct if pair_reward else None
    pairs, _, G = rewards.shape
    size = 2 * (-(-pairs // 8) * 8) * (-(-G // 128) * 128) * 4
    wide = jnp.result_type(rewards) == jnp.float64
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.size == 1 or bool(mesh.manual_axes)  # the kernel is not spread
    impl = choose(impl, size <= VMEM and not wide and alone)
    if impl == "xla":
        settings = (normalise, std, eps, lonely, scope)
        return _xla(rewards, valid, *settings, correct, pair_reward)
    if wide:
        raise ValueError(
            "the duality kernel is float32 and the rewards are float64: use impl='xla'"
        )
    if size > VMEM:
        raise ValueError(
            f"the duality kernel holds the batch in fast memory: {rewards.shape} takes {size} "
            f"bytes padded, the limit is {VMEM}. Use impl='xla', or fewer pairs per update."
        )
    settings = _Settings(normalise, std, eps, lonely, scope, pair_reward)
    return _pallas(rewards, valid, correct, settings, impl == "interpret")
