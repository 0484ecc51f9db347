"""Rotary positions: three axes for text and video (M-RoPE, https://arxiv.org/abs/2409.12191), two
for the patches of a frame.

Frequency i of a head turns with time, height or width, by `sections`:

    contiguous   t t t t h h h h h h w w w w w w     Qwen2.5-VL, sections (4, 6, 6)
    interleaved  t h w t h w t h w t h w t t t t     Qwen3-VL, sections (8, 4, 4)

Where the three positions are equal, as on text, this is plain RoPE. The kernel makes its cosines
from the positions of a block: no table of angles is in memory. In order: reference, kernel,
derivative, public function, frames.
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
VMEM = 12 * 2**20  # most bytes of two steps' arrays, in and out, in a fast memory of 16 MiB

Sections = tuple[int, int, int]
Heads = Float[Array, "B T _ H"]


def _axes(sections, interleaved):
    """Which of time, height and width (0, 1, 2) each frequency turns with."""
    if not interleaved:
        return np.repeat(np.arange(3), sections)
    axis = np.zeros(sum(sections), int)
    for a in (1, 2):
        axis[a : 3 * sections[a] : 3] = a
    if tuple(np.bincount(axis, minlength=3)) != tuple(sections):
        raise ValueError(
            f"sections {sections} do not interleave: height and width take every third frequency "
            f"of {sum(sections)}. Give each of them at most a third, or set interleaved=False."
        )
    return axis


def _turns(head, sections, theta, interleaved):
    """[3, H / 2]: each frequency at its own axis, 0 at the others. An angle is the sum over axes of
    position x turn, of which one term counts: exact, and no gather."""
    freq = 1 / theta ** (np.arange(0, head, 2, dtype=np.float32) / head)
    mine = np.arange(3)[:, None] == _axes(sections, interleaved)[None]
    return np.where(mine, freq[None], 0).astype(np.float32)


def _tables(positions, turns):
    """cos and signed sin, [B, T, H]: rope(x) = x * cos + roll(x, H / 2) * sin."""
    # bf16 would round position 257 to 256, and sin(257 f) is not near sin(256 f).
    at = positions.astype(jnp.float32)[..., None]
    return _double(sum(at[:, a] * turns[None, None, a] for a in range(3)))


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
    sections: Sections,
    theta: float,
    interleaved: bool = False,
) -> Float[Array, "B T N H"]:
    """The definition, in XLA."""
    return _rotate_ref(x, *_tables(positions, _turns(x.shape[-1], sections, theta, interleaved)))


def _kernel(positions_ref, turns_ref, *refs, sign):
    """One block of tokens of every array. Angles stand as [H / 2, BLOCK_T], with tokens on the
    lanes as the positions have them, and are turned round as cosines."""
    at, turns = positions_ref[0].astype(jnp.float32), turns_ref[...]
    angle = sum(turns[:, a : a + 1] * at[a : a + 1] for a in range(3))
    cos, sin = jnp.cos(angle), sign * jnp.sin(angle)
    cos, sin = (jnp.concatenate(x, 0).T[None] for x in ([cos, cos], [-sin, sin]))
    for x_ref, out_ref in zip(refs[: len(refs) // 2], refs[len(refs) // 2 :]):
        x = x_ref[0].astype(jnp.float32)  # [N, BLOCK_T, H]
        y = x * cos + pltpu.roll(x, x.shape[-1] // 2, 2) * sin
        out_ref[0] = y.astype(out_ref.dtype)


def _rotate(xs, positions, settings, sign, interpret):
    B, T, _, H = xs[0].shape
    turns = _turns(H, *settings).T
    # Tokens beside the head's numbers: 28 heads in that place would be padded to 32 and copied.
    xs = [jnp.swapaxes(x, 1, 2) for x in xs]
    heads = [pl.BlockSpec((1, x.shape[1], BLOCK_T, H), lambda b, t: (b, 0, t, 0)) for x in xs]
    rotated = pl.pallas_call(
        functools.partial(_kernel, sign=sign),
        grid=(B, T // BLOCK_T),
        in_specs=[
            pl.BlockSpec((1, 3, BLOCK_T), lambda b, t: (b, 0, t)),
            pl.BlockSpec(turns.shape, lambda b, t: (0, 0)),
            *heads,
        ],
        out_specs=heads,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in xs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 2),
        interpret=interpret,
    )(positions, jnp.asarray(turns), *xs)
    return tuple(jnp.swapaxes(x, 1, 2) for x in rotated)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _pallas(xs, positions, settings, interpret):
    return _rotate(xs, positions, settings, 1.0, interpret)


def _pallas_fwd(xs, positions, settings, interpret):
    return _rotate(xs, positions, settings, 1.0, interpret), positions


def _pallas_bwd(settings, interpret, positions, dys):
    """A rotation's transpose undoes it."""
    return _rotate(dys, positions, settings, -1.0, interpret), None


_pallas.defvjp(_pallas_fwd, _pallas_bwd)


def _spread(xs, positions, settings, interpret):
    """Each device turns its own rows, tokens and heads."""
    names = ["heads" if x.shape[2] == xs[0].shape[2] else "kv_heads" for x in xs]
    sizes = {name: x.shape[2] for name, x in zip(names, xs)}
    on = sharding.splits({"rows": xs[0].shape[0], "tokens": xs[0].shape[1], **sizes})
    if xs[0].shape[1] // sharding.ways(on["tokens"]) % BLOCK_T:
        on["tokens"] = ()
    arrays = tuple(("rows", "tokens", name, None) for name in names)
    return sharding.spread(
        lambda at, *xs: _pallas(xs, at, settings, interpret),
        (("rows", None, "tokens"), *arrays),
        arrays,
        on,
    )(positions, *xs)


def rope(
    x: Heads | tuple[Heads, ...],
    positions: Int[Array, "B 3 T"],
    *,
    sections: Sections,
    theta: float,
    interleaved: bool = False,
    impl: Impl | None = None,
) -> Heads | tuple[Heads, ...]:
    """Rotate queries and keys by (time, height, width): one array [B, T, N, H], or a tuple of them
    that share their angles and a kernel. float32 within, the arrays' dtype out.

    `interleaved` deals the frequencies out in turn, as Qwen3-VL does, in place of one range an
    axis. `impl=None` is Pallas on TPUs where shapes fit, else XLA. Raises ValueError for
    sections that do not fill half a head, and for a named kernel whose block does not divide T.
    """
    xs = x if isinstance(x, tuple) else (x,)
    T, H = xs[0].shape[1], xs[0].shape[3]
    if sum(sections) != H // 2:
        raise ValueError(f"sections {sections} add to {sum(sections)}; head {H} has {H // 2} pairs")
    step = 4 * BLOCK_T * H * sum(x.shape[2] * x.dtype.itemsize for x in xs)
    impl = choose(impl, T % BLOCK_T == 0 and H % 128 == 0 and step <= VMEM)
    if impl == "xla":
        tables = _tables(positions, _turns(H, sections, theta, interleaved))
        rotated = tuple(_rotate_ref(x, *tables) for x in xs)
    elif T % BLOCK_T:
        raise ValueError(f"rope kernel needs T divisible by {BLOCK_T}, got {xs[0].shape}")
    else:
        rotated = _spread(xs, positions, (sections, theta, interleaved), impl == "interpret")
    return rotated if isinstance(x, tuple) else rotated[0]


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
