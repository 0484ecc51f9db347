"""From scored tokens to branches and back.

    slot     [B, S]   0 0 1 1 1 2 2 ...     1 + column of the branch; 0 is padding
    columns  [B, M]   one number per branch

Comparison and sum, not scatter: exact in float32 on every backend, and rows stay apart.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def by_slot(
    values: Float[Array, "B S"], slot: Int[Array, "B S"], columns: int
) -> Float[Array, "B M"]:
    """Sum over the tokens of each of `columns` branches. Padding is left out, even NaN."""
    mine = slot[:, :, None] == jnp.arange(1, columns + 1)[None, None]
    return jnp.where(mine, values[:, :, None], 0.0).sum(1)


def at_slot(values: Float[Array, "B M"], slot: Int[Array, "B S"]) -> Float[Array, "B S"]:
    """Each branch's number at each of its tokens; 0 on padding."""
    at = jnp.take_along_axis(values, jnp.maximum(slot - 1, 0), axis=1)
    return jnp.where(slot > 0, at, 0.0)


def lengths(slot: Int[Array, "B S"], columns: int) -> Float[Array, "B M"]:
    """Scored tokens of each branch."""
    return by_slot(jnp.ones(slot.shape, jnp.float32), slot, columns)
