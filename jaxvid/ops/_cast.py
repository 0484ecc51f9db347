"""A cast of weights that the compiler leaves where it is written."""

import jax
import jax.numpy as jnp


def cast(w, dtype):
    """`w` in `dtype`, to be used in a loop over layers or blocks. It is rounded first: the TPU
    compiler moves a mere cast out of the loop, and keeps a second copy of all weights."""
    if dtype == w.dtype:
        return w
    to = jnp.finfo(dtype)
    return jax.lax.reduce_precision(w, to.nexp, to.nmant).astype(dtype)
