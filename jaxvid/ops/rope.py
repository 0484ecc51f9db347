"""Rotary positions: three axes for text and video (M-RoPE, https://arxiv.org/abs/2409.12191), two
for the patches of a frame.

Frequency i of a head turns with time, height or width, by `sections`. Where the three positions
are equal, as on text, this is plain RoPE. In order: reference, kernel, derivative, public function,
frames.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from jaxvid import sharding
from jaxvid.ops._choice import Impl, choose

BLOCK_T = 128  # tokens per kernel step


def _tables(positions, head, sections, theta):
    """cos and signed sin, [B, T, H]: rope(x) = x * cos + roll(x, H / 2) * sin."""
    freq = 1 / theta ** (np.arange(0, head, 2, dtype=np.float32) / head)
    parts = np.split(freq, np.cumsum(sections)[:-1])  # frequencies of time, height, width
    # bf16 would round position 257 to 256, and sin(257 f) is not near sin(256 f).
    at = positions.astype(jnp.float32)
    angle = jnp.concatenate([at[:, i, :, None] * f[None, None] for i, f in enumerate(parts)], -1)
    return _double(angle)


def _double(angle):
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)


def _rotate_ref(x, cos, sin):
    y = x.astype(jnp.float32)
    y = y * cos[..., None, :] + jnp.roll(y, x.shape[-1] // 2, axis=-1) * sin[..., None, :]
    return y.astype(x.dtype)


def rope_ref(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "B 3 T"],
    sections: tuple[int, int, int],
    theta: float,
) -> Float[Array, "B T N H"]:
    """The definition, in XLA."""
    return _rotate_ref(x, *_tables(positions, x.shape[-1], sections, theta))


def _kernel(x_ref, cos_ref, sin_ref, out_ref):
    x = x_ref[0].astype(jnp.float32)  # [BLOCK_T, N, H]
    y = x * cos_ref[0][:, None] + pltpu.roll(x, x.shape[-1] // 2, 2) * sin_ref[0][:, None]
    out_ref[0] = y.astype(out_ref.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rotate_pallas(x, cos, sin, interpret):
    B, T, N, H = x.shape
    heads = pl.BlockSpec((1, BLOCK_T, N, H), lambda b, t: (b, t, 0, 0))
    table = pl.BlockSpec((1, BLOCK_T, H), lambda b, t: (b, t, 0))
    return pl.pallas_call(
        _kernel,
        grid=(B, T // BLOCK_T),
        in_specs=[heads, table, table],
        out_specs=heads,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        interpret=interpret,
    )(x, cos, sin)


def _rotate_fwd(x, cos, sin, interpret):
    return _rotate_pallas(x, cos, sin, interpret), (cos, sin)


def _rotate_bwd(interpret, tables, dy):
    cos, sin = tables
    return _rotate_pallas(dy, cos, -sin, interpret), None, None  # a rotation's transpose undoes it


_rotate_pallas.defvjp(_rotate_fwd, _rotate_bwd)


def rope(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "B 3 T"],
    *,
    sections: tuple[int, int, int],
    theta: float,
    impl: Impl | None = None,
) -> Float[Array, "B T N H"]:
    """Rotate queries or keys. `impl=None` is Pallas on one TPU where shapes fit, else XLA."""
    T, H = x.shape[1], x.shape[3]
    if sum(sections) != H // 2:
        raise ValueError(f"sections {sections} add to {sum(sections)}; head {H} has {H // 2} pairs")
    impl = choose(impl, T % BLOCK_T == 0 and H % 128 == 0)
    if impl == "xla":
        return rope_ref(x, positions, sections, theta)
    if T % BLOCK_T:
        raise ValueError(f"rope kernel needs T divisible by {BLOCK_T}, got {x.shape}")
    on = sharding.splits({"rows": x.shape[0], "heads": x.shape[2]})
    heads, row = ("rows", None, "heads", None), ("rows", None, None)
    turn = lambda x, at: _rotate_pallas(x, *_tables(at, H, sections, theta), impl == "interpret")
    return sharding.spread(turn, (heads, row), heads, on)(x, positions)


def rope2d(
    x: Float[Array, "*R Q N H"], coords: Int[Array, "*R Q 2"], theta: float = 1e4
) -> Float[Array, "*R Q N H"]:
    """Rotate by (row, column): the first quarter of a head's frequencies turns with the row, the
    second with the column, as in Qwen2.5-VL's vision tower."""
    H = x.shape[-1]
    if H % 4:
        raise ValueError(f"two axes of pairs need a head divisible by 4, got {H}")
    freq = jnp.asarray(1 / theta ** (np.arange(0, H // 2, 2, dtype=np.float32) / (H // 2)))
    angle = jnp.einsum(
        "...A,F->...AF", coords.astype(jnp.float32), freq, precision=jax.lax.Precision.HIGHEST
    )
    return _rotate_ref(x, *_double(angle.reshape(*coords.shape[:-1], H // 2)))
