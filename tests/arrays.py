"""Arrays and comparisons the op tests share."""

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu


def normal(seed, *shape):
    """numpy's, which compiles nothing."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def value_and_gradient(f, weight):
    """(f, gradient of the sum of weight x f) at every argument, compiled once."""

    def run(*x):
        weigh = lambda *x: sum(
            (w * y).sum() for w, y in zip(*map(jax.tree.leaves, (weight, f(*x))))
        )
        return f(*x), jax.grad(weigh, tuple(range(len(x))))(*x)

    return jax.jit(run)


def close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-4), a, b)


def raceless(f, *args):
    """The value of `f`, whose one kernel (impl="pallas") runs on a simulated TPU of two cores that
    watches for two steps of the grid writing, or writing and reading, the same place."""
    two = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    with pltpu.force_tpu_interpret_mode(two):
        out = jax.block_until_ready(jax.jit(f)(*args))
    assert interpret_pallas_call.races.races_found is False
    return out
