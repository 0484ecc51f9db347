"""Flash attention under a tree or segment mask as a Pallas TPU kernel, forward and backward.

It visits only the blocks that are seen (https://arxiv.org/abs/2205.14135 over a table of blocks).
Logits are held transposed, [keys, queries], so that what belongs to a query (its largest logit,
its sum) is a row of lanes and meets them without a change of layout. What the mask is made from
comes as rows of queries [B, 8, T] (index or segment, depth) and columns of keys [B, S, 128]
(index or segment, end, depth). A table, computed before and prefetched, names the key blocks that
a query block can see, packed to the front; the steps beyond them fetch and compute nothing. So a
row of a prompt and G branches costs its own tree and not the whole triangle.

`ops.attention` is the public function; here is its kernel alone. In order: what masks are made
from, kernels, their launch, derivative, entry.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

HIDDEN = -1e30  # finite, so that a row of nothing but HIDDEN has no NaN
LANES, SUBLANES = 128, 8  # of a TPU register of 32 bits
TILE = 512  # queries and keys of one step


class Facts(NamedTuple):
    """What the mask needs of some tokens. `index` is the place in the row, before any permutation
    over devices; with it stand `end` and, for a window, `depth`; or `segment` stands alone."""

    index: Int[Array, "B T"] | None = None
    end: Int[Array, "B T"] | None = None
    depth: Int[Array, "B T"] | None = None
    segment: Int[Array, "B T"] | None = None

    def cut(self, start: int, stop: int) -> "Facts":
        """Those of the tokens start..stop."""
        return Facts(*(None if x is None else x[:, start:stop] for x in self))


class _Shape(NamedTuple):
    """The static part of the kernel."""

    tree: bool
    window: int
    scale: float
    tile: int
    interpret: bool


def _facts(queries, keys, T, S):
    """(query rows, key columns) for the padded lengths T and S."""

    def fill(facts, length, n, beyond):
        pad = lambda x, value: jnp.pad(
            x.astype(jnp.int32), ((0, 0), (0, length - x.shape[1])), constant_values=value
        )
        stand = [pad(x, value) for x, value in zip(facts, beyond) if x is not None]
        return jnp.pad(jnp.stack(stand, 1), ((0, 0), (0, n - len(stand)), (0, 0)))

    rows = queries._replace(end=None)  # a query is inside its own subtree
    far = 2**30  # what is filled in sees nothing, is not seen, and widens no block's range
    return (
        fill(rows, T, SUBLANES, Facts(far, 0, far, 0)),
        fill(keys, S, LANES, Facts(far, 0, 0, 0)).swapaxes(1, 2),
    )


def _seen(rows, columns, shape):
    """Mask [keys, queries] of one block."""
    query = rows[:1]
    if not shape.tree:
        return (columns[:, :1] == query) & (query > 0)
    mask = (columns[:, :1] <= query) & (query < columns[:, 1:2])
    if shape.window:
        mask &= rows[1:2] - columns[:, 2:3] < shape.window
    return mask


def _visible(rows, columns, shape):
    """[B, query blocks, key blocks]: whether a query of the one may see a key of the other."""
    B, size = rows.shape[0], shape.tile
    q = rows.reshape(B, SUBLANES, -1, size).swapaxes(1, 2)  # [B, blocks, fact, tile]
    k = columns.reshape(B, -1, size, LANES).swapaxes(2, 3)
    least = lambda x, i: x[:, :, i].min(-1)
    most = lambda x, i: x[:, :, i].max(-1)
    across = lambda test, a, b: test(a[:, :, None], b[:, None, :])
    if not shape.tree:  # padding is segment 0: it must not widen the range of a block
        real = lambda x: jnp.where(x[:, :, 0] > 0, x[:, :, 0], 2**30).min(-1)
        return across(jnp.less_equal, real(q), most(k, 0)) & across(
            jnp.greater_equal, most(q, 0), real(k)
        )
    seen = across(jnp.less, least(q, 0), most(k, 1))
    seen &= across(jnp.greater_equal, most(q, 0), least(k, 0))
    if shape.window:
        seen &= across(lambda a, b: a - b < shape.window, least(q, 1), most(k, 2))
    return seen


def _table(visible):
    """(blocks to visit, packed to the front and flat; how many of each row)."""
    count = visible.sum(-1).astype(jnp.int32)
    order = jnp.argsort(~visible, axis=-1, stable=True).astype(jnp.int32)
    # beyond the count stands the last block again, which is then not fetched anew
    at = jnp.minimum(
        jnp.arange(visible.shape[-1])[None, None], jnp.maximum(count - 1, 0)[..., None]
    )
    return jnp.take_along_axis(order, at, -1).reshape(-1), count.reshape(-1)


def _dot(a, b, over):
    """Contract axis over[0] of `a` with over[1] of `b`; float32 sums."""
    dims = ((over[:1], over[1:]), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _forward_kernel(*refs, shape):
    table, count, q, k, v, rows, columns, y, log_sum, top, total, acc = refs
    row, j = pl.program_id(0) * pl.num_programs(2) + pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        top[...] = jnp.full(top.shape, HIDDEN, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        acc[...] = jnp.zeros(acc.shape, jnp.float32)

    @pl.when(j < count[row])
    def _():
        mask = _seen(rows[0], columns[0], shape)
        logits = jnp.where(mask, _dot(k[0, 0], q[0, 0], (1, 1)) * shape.scale, HIDDEN)
        new = jnp.maximum(top[:1], logits.max(0, keepdims=True))
        p = jnp.where(mask, jnp.exp(logits - new), 0.0)
        shrink = jnp.exp(top[:1] - new)
        total[:1] = total[:1] * shrink + p.sum(0, keepdims=True)
        acc[...] = acc[...] * shrink + _dot(v[0, 0], p.astype(v.dtype), (0, 0))  # [H, queries]
        top[:1] = new

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        whole = jnp.maximum(total[:1], 1e-30)  # 0 where nothing is seen
        y[0, 0] = (acc[...] / whole).T.astype(y.dtype)
        log_sum[0, 0] = top[:1] + jnp.log(whole)


def _weights(q, k, v, rows, columns, dy, log_sum, drop, shape):
    """Of one block: probabilities and the gradient of the logits, both [keys, queries]."""
    mask = _seen(rows[0], columns[0], shape)
    logits = _dot(k[0, 0], q[0, 0], (1, 1)) * shape.scale
    p = jnp.where(mask, jnp.exp(logits - log_sum[0, 0]), 0.0)
    return p, p * (_dot(v[0, 0], dy[0, 0], (1, 1)) - drop[0, 0]) * shape.scale


def _query_kernel(*refs, shape):
    table, count, *block, dq, acc = refs
    k = block[1]
    row, j = pl.program_id(0) * pl.num_programs(2) + pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        acc[...] = jnp.zeros(acc.shape, jnp.float32)

    @pl.when(j < count[row])
    def _():
        _, ds = _weights(*block, shape)
        acc[...] += _dot(k[0, 0], ds.astype(k.dtype), (0, 0))  # [H, queries]

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        dq[0, 0] = acc[...].T.astype(dq.dtype)


def _key_kernel(*refs, shape):
    table, count, *block, dk, dv, acc_k, acc_v = refs
    q, dy = block[0], block[5]
    row = pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)
    head, i = pl.program_id(3), pl.program_id(4)

    @pl.when((head == 0) & (i == 0))
    def _():
        acc_k[...] = jnp.zeros(acc_k.shape, jnp.float32)
        acc_v[...] = jnp.zeros(acc_v.shape, jnp.float32)

    @pl.when(i < count[row])
    def _():
        p, ds = _weights(*block, shape)
        acc_v[...] += _dot(p.astype(dy.dtype), dy[0, 0], (1, 0))
        acc_k[...] += _dot(ds.astype(q.dtype), q[0, 0], (1, 0))

    @pl.when((head == pl.num_programs(3) - 1) & (i == pl.num_programs(4) - 1))
    def _():
        dk[0, 0] = acc_k[...].astype(dk.dtype)
        dv[0, 0] = acc_v[...].astype(dv.dtype)


def _launch(kernel, shape, grid, tables, args, ins, outs, like, scratch):
    """One kernel over `grid`; the last axes (one, or two of five) add up in `scratch`."""
    order = ("parallel",) * 3 + ("arbitrary",) * (len(grid) - 3)
    return pl.pallas_call(
        functools.partial(kernel, shape=shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=ins,
            out_specs=outs,
            scratch_shapes=[pltpu.VMEM(s, jnp.float32) for s in scratch],
        ),
        out_shape=[jax.ShapeDtypeStruct(*x) for x in like],
        compiler_params=pltpu.CompilerParams(dimension_semantics=order),
        interpret=shape.interpret,
    )(*tables, *args)


def _specs(tile, H, query, key):
    """Blocks of q-like, k-like, query rows, key columns and per-query rows, from the maps of
    program indices to (batch, head, block)."""

    def at(of, place):
        return lambda *grid: place(*of(*grid))

    return (
        pl.BlockSpec((1, 1, tile, H), at(query, lambda b, n, i: (b, n, i, 0))),
        pl.BlockSpec((1, 1, tile, H), at(key, lambda b, n, j: (b, n, j, 0))),
        pl.BlockSpec((1, SUBLANES, tile), at(query, lambda b, n, i: (b, 0, i))),
        pl.BlockSpec((1, tile, LANES), at(key, lambda b, n, j: (b, j, 0))),
        pl.BlockSpec((1, 1, 1, tile), at(query, lambda b, n, i: (b, n, 0, i))),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _flash(q, k, v, rows, columns, shape):
    return _flash_forward(q, k, v, rows, columns, shape)[0]


def _by_query(q, k, shape):
    """Grid of the kernels that walk the key blocks of a query block, and its specs."""
    (B, N, T, H), K, blocks = q.shape, k.shape[1], k.shape[2] // shape.tile
    grid = (B, N, T // shape.tile, blocks)
    query = lambda b, n, i, j, table, count: (b, n, i)
    key = lambda b, n, i, j, t, count: (b, n * K // N, t[(b * grid[2] + i) * blocks + j])
    return grid, _specs(shape.tile, H, query, key)


def _flash_forward(q, k, v, rows, columns, shape):
    grid, (of_q, of_k, of_row, of_column, of_sum) = _by_query(q, k, shape)
    B, N, T, H = q.shape
    y, log_sum = _launch(
        _forward_kernel,
        shape,
        grid,
        _table(_visible(rows, columns, shape)),
        (q, k, v, rows, columns),
        [of_q, of_k, of_k, of_row, of_column],
        [of_q, of_sum],
        [(q.shape, q.dtype), ((B, N, 1, T), jnp.float32)],
        [(SUBLANES, shape.tile), (SUBLANES, shape.tile), (H, shape.tile)],
    )
    y, log_sum = checkpoint_name((y, log_sum), "attention")
    return y, (q, k, v, rows, columns, y, log_sum)


def _flash_backward(shape, saved, dy):
    q, k, v, rows, columns, y, log_sum = saved
    (B, N, T, H), K = q.shape, k.shape[1]
    f32 = lambda x: x.astype(jnp.float32)
    drop = (f32(y) * f32(dy)).sum(-1)[:, :, None]  # [B, N, 1, T]
    args = (q, k, v, rows, columns, dy, log_sum, drop)
    visible = _visible(rows, columns, shape)
    grid, (of_q, of_k, of_row, of_column, of_sum) = _by_query(q, k, shape)
    ins = [of_q, of_k, of_k, of_row, of_column, of_q, of_sum, of_sum]
    outs, sums = [(q.shape, q.dtype)], [(H, shape.tile)]
    (dq,) = _launch(_query_kernel, shape, grid, _table(visible), args, ins, [of_q], outs, sums)
    blocks, G = T // shape.tile, N // K
    grid = (B, K, k.shape[2] // shape.tile, G, blocks)
    query = lambda b, n, j, g, i, t, count: (b, n * G + g, t[(b * grid[2] + j) * blocks + i])
    key = lambda b, n, j, g, i, table, count: (b, n, j)
    of_q, of_k, of_row, of_column, of_sum = _specs(shape.tile, H, query, key)
    dk, dv = _launch(
        _key_kernel,
        shape,
        grid,
        _table(visible.swapaxes(1, 2)),
        args,
        [of_q, of_k, of_k, of_row, of_column, of_q, of_sum, of_sum],
        [of_k] * 2,
        [(k.shape, k.dtype), (v.shape, v.dtype)],
        [(shape.tile, H)] * 2,
    )
    return dq, dk, dv, None, None


_flash.defvjp(_flash_forward, _flash_backward)


def flash(q, k, v, queries: Facts, keys: Facts, window: int, interpret: bool):
    """q [B, T, N, H] over k, v [B, S, K, H]. Pads rows to whole tiles and puts heads before tokens,
    as the kernel wants them."""
    (T, H), S = q.shape[1::2], k.shape[1]
    tile = min(TILE, -(-max(T, S) // LANES) * LANES)
    whole = lambda n: -(-n // tile) * tile

    def turn(x):
        x = x.swapaxes(1, 2)
        return jnp.pad(x, ((0, 0), (0, 0), (0, whole(x.shape[2]) - x.shape[2]), (0, 0)))

    shape = _Shape(keys.end is not None, window, H**-0.5, tile, interpret)
    y = _flash(turn(q), turn(k), turn(v), *_facts(queries, keys, whole(T), whole(S)), shape)
    return y.swapaxes(1, 2)[:, :T]
