"""Arrays and comparisons the op tests share."""

from unittest import mock

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


def raceless(f, *args, kernels=1):
    """The value of `f`, in which a kernel (impl="pallas") runs `kernels` times, on a simulated TPU
    of two cores that watches for two steps of the grid writing, or writing and reading, the same
    place."""
    watched, watch = [], interpret_pallas_call.RaceDetectionState  # one for each run of a kernel

    def keep(num_cores):
        watched.append(watch(num_cores=num_cores))
        return watched[-1]

    two = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    kept = mock.patch.object(interpret_pallas_call, "RaceDetectionState", keep)
    with pltpu.force_tpu_interpret_mode(two), kept:
        out = jax.block_until_ready(jax.jit(f)(*args))
    assert len(watched) == kernels and not any(x.races_found for x in watched)
    return out
