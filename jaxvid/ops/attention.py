"""Attention under a tree mask, inside segments, and from new tokens to a shared prompt.

    row    | prompt: video + question | branch 1 | branch 2 | next tree ... | pad |
    end    | e e e e ...          e   | b1 .. b1 | b2 .. b2 | ...           | 0 0 |

    token i sees token j   iff   j <= i < end[j]
                                 and, with a sliding window, depth[i] - depth[j] < window

Grouped queries: N query heads share K kv heads, query head n reads kv head n // (N / K). A query
that sees nothing (padding) gives zeros and no gradient.
In order: reference, the tree's lower triangle, long rows, kernel, public function, decoding.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from jaxvid.ops._choice import Impl, choose

LONG = 2048  # longer rows never hold [N, T, T]
BLOCK = 256  # queries of one step of a long row
PARTS, SHORT = 4, 128  # runs of queries of a tree row; shorter rows are not cut
HIDDEN = -1e30  # finite, so that a row of nothing but HIDDEN has no NaN
LANES, SUBLANES = 128, 8  # of a TPU register of 32 bits
TILE = 512  # queries and keys of one step of the kernel


class _Sight(NamedTuple):
    """What the mask is made from. Of [B, T]: `end`, and `depth` with a window; or `segment`."""

    end: Int[Array, "B T"] | None
    depth: Int[Array, "B T"] | None
    segment: Int[Array, "B T"] | None
    window: int  # 0 is none

    def cut(self, start: int, stop: int) -> "_Sight":
        """That of the tokens start..stop."""
        parts = [None if x is None else x[:, start:stop] for x in self[:3]]
        return _Sight(*parts, self.window)


def _mask(queries: Int[Array, "t"], sight: _Sight, of: _Sight) -> Bool[Array, "B t S"] | None:
    """What the queries at array index `queries` see; None where all see all. `of` has the
    queries' own depth and segment, `sight` the keys'."""
    if sight.end is not None:
        index = jnp.arange(sight.end.shape[1])
        mask = (index[None, :] <= queries[:, None])[None]
        mask = mask & (queries[None, :, None] < sight.end[:, None, :])
        if sight.window:
            mask &= of.depth[:, :, None] - sight.depth[:, None, :] < sight.window
        return mask
    if sight.segment is not None:
        same = of.segment[:, :, None] == sight.segment[:, None, :]
        return same & (of.segment > 0)[:, :, None]
    return None


def _attend(q, k, v, mask):
    """Softmax attention of q [B,T,N,H] over k, v [B,S,K,H] under mask [B,T,S]."""
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    G = N // K
    # heads first, the queries of a kv head as rows of one matrix: plain batched products, which CPU
    # runs 1.5 times as fast as the contraction in place
    q = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    # float32 logits and sums: exp of a rounded logit is off by its rounding error times the logit
    logits = jnp.einsum("BKTH,BSKH->BKTS", q, k, preferred_element_type=jnp.float32)
    logits = logits.reshape(B, K, G, T, S) * H**-0.5
    if mask is not None:
        mask = mask[:, None, None]
        logits = jnp.where(mask, logits, HIDDEN)
    p = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    if mask is not None:
        p = jnp.where(mask, p, 0.0)
    total = jnp.maximum(p.sum(-1, keepdims=True), 1e-30)  # 0 where nothing is seen
    p = p.reshape(B, K, G * T, S).astype(v.dtype)
    y = jnp.einsum("BKTS,BSKH->BKTH", p, v, preferred_element_type=jnp.float32)
    y = y.reshape(B, K, G, T, H) / total  # after the product: it touches [T, H] and not [T, S]
    return y.astype(v.dtype).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def attention_ref(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    end: Int[Array, "B S"] | None = None,
    segment: Int[Array, "B T"] | None = None,
    depth: Int[Array, "B T"] | None = None,
    window: int = 0,
) -> Float[Array, "B T N H"]:
    """The definition, in XLA, with all of [B, N, T, S] in memory."""
    sight = _Sight(end, depth, segment, window)
    return _attend(q, k, v, _mask(jnp.arange(q.shape[1]), sight, sight))


def _triangle(q, k, v, sight):
    """The reference on PARTS runs of queries, each over the keys up to its own end: no token sees a
    later one, so 3/8 of the products need not be made."""
    T = q.shape[1]
    size = -(-T // PARTS)
    runs = [slice(i, min(i + size, T)) for i in range(0, T, size)]
    return jnp.concatenate(
        [
            _attend(
                q[:, r],
                k[:, : r.stop],
                v[:, : r.stop],
                _mask(
                    jnp.arange(r.start, r.stop), sight.cut(0, r.stop), sight.cut(r.start, r.stop)
                ),
            )
            for r in runs
        ],
        axis=1,
    )


def _blocks(q, k, v, sight):
    """The reference, BLOCK queries at a time; the backward pass recomputes each block."""
    B, T, N, H = q.shape
    steps = -(-T // BLOCK)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, steps * BLOCK - T)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(B, steps, BLOCK, *x.shape[2:]).swapaxes(0, 1)

    own = [None if x is None else split(x) for x in sight[:3]]

    @jax.checkpoint
    def step(_, block):
        i, q_i, own_i = block
        of = _Sight(*own_i, sight.window)
        return None, _attend(q_i, k, v, _mask(i * BLOCK + jnp.arange(BLOCK), sight, of))

    _, y = jax.lax.scan(step, None, (jnp.arange(steps), split(q), own))
    return y.swapaxes(0, 1).reshape(B, steps * BLOCK, N, H)[:, :T]


# ---- kernel
#
# Flash attention (https://arxiv.org/abs/2205.14135) that visits only the blocks that are seen.
# Logits are held transposed, [keys, queries], so that what belongs to a query (its largest logit,
# its sum) is a row of lanes and meets them without a change of layout. What the mask is made from
# comes as rows of queries [B, 8, T] (index or segment, depth) and columns of keys [B, S, 128]
# (index or segment, end, depth). A table, computed before and prefetched, names the key blocks
# that a query block can see, packed to the front; the steps beyond them fetch and compute nothing.
# So a row of a prompt and G branches costs its own tree and not the whole triangle.


class _Shape(NamedTuple):
    """The static part of the kernel."""

    tree: bool
    window: int
    scale: float
    tile: int
    interpret: bool


def _facts(sight, T):
    """(query rows, key columns) for padded length T."""
    pad = lambda x: jnp.pad(x, ((0, 0), (0, T - x.shape[1])))
    if sight.segment is not None:
        first = pad(sight.segment)
        rows, columns = [first], [first]
    else:
        index = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (sight.end.shape[0], T))
        rows, columns = [index], [index, pad(sight.end)]
        if sight.window:
            rows, columns = [*rows, pad(sight.depth)], [*columns, pad(sight.depth)]
    fill = lambda xs, n: jnp.pad(
        jnp.stack(xs, 1).astype(jnp.int32), ((0, 0), (0, n - len(xs)), (0, 0))
    )
    return fill(rows, SUBLANES), fill(columns, LANES).swapaxes(1, 2)


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


def _kernel(q, k, v, sight, interpret):
    """Pads the row to whole tiles and puts heads before tokens, as the kernel wants them."""
    T, H = q.shape[1], q.shape[3]
    tile = min(TILE, -(-T // LANES) * LANES)
    whole = -(-T // tile) * tile
    turn = lambda x: jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, whole - T), (0, 0)))
    shape = _Shape(sight.end is not None, sight.window, H**-0.5, tile, interpret)
    y = _flash(turn(q), turn(k), turn(v), *_facts(sight, whole), shape)
    return y.swapaxes(1, 2)[:, :T]


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    end: Int[Array, "B S"] | None = None,
    segment: Int[Array, "B T"] | None = None,
    depth: Int[Array, "B T"] | None = None,
    window: int = 0,
    impl: Impl | None = None,
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention, softmax in float32.

    With `end` tokens see along their tree (the picture above), with `window` > 0 no further back
    than that many tokens of their own path, by `depth`. With `segment` they see, in both
    directions, the tokens of equal positive segment. With neither every query sees every key.
    `impl=None` is Pallas on one TPU (or inside shard_map there) for rows of LANES and more under a
    mask, else XLA.
    """
    (T, N), (S, K) = q.shape[1:3], k.shape[1:3]
    if N % K:
        raise ValueError(f"{N} query heads do not divide over {K} kv heads; N must be a multiple")
    if end is not None and segment is not None:
        raise ValueError("attention takes `end` (a tree) or `segment` (both directions), not both")
    if (end is not None or segment is not None) and T != S:
        raise ValueError(f"a tree or segment mask needs queries = keys, got {T} and {S}")
    if (window > 0) != (depth is not None) or (window and end is None) or window < 0:
        raise ValueError(
            f"a sliding window is counted in depth along a tree: got window={window}, "
            f"{'no ' * (depth is None)}depth and {'no ' * (end is None)}end. Give all three or "
            f"neither window nor depth."
        )
    masked = end is not None or segment is not None
    impl = choose(impl, masked and T >= LANES)
    sight = _Sight(end, depth, segment, window)
    if impl != "xla":
        if not masked:
            raise ValueError(
                "the attention kernel needs `end` or `segment`; use impl='xla' or None"
            )
        return _kernel(q, k, v, sight, impl == "interpret")
    if max(T, S) > LONG:
        return _blocks(q, k, v, sight)
    if end is not None and T >= SHORT:
        return _triangle(q, k, v, sight)
    return attention_ref(q, k, v, end, segment, depth, window)


def decode_attention(
    q: Float[Array, "B G N H"],
    prompt_k: Float[Array, "B P K H"],
    prompt_v: Float[Array, "B P K H"],
    length: Int[Array, "B"],
    branch_k: Float[Array, "B G R K H"],
    branch_v: Float[Array, "B G R K H"],
    step: Int[Array, ""] | int,
    window: int = 0,
) -> Float[Array, "B G N H"]:
    """One new token of each of G branches: sees its prompt's first `length` tokens, and entries
    0..`step` of its own branch; with a window, the last `window` of these. One softmax over both;
    the prompt is never copied per branch.
    """
    B, G, N, H = q.shape
    P, K, R = prompt_k.shape[1], prompt_k.shape[2], branch_k.shape[2]
    q = q.reshape(B, G, K, N // K, H)
    f32 = jnp.float32
    prompt = jnp.einsum("BGKNH,BPKH->BKGNP", q, prompt_k, preferred_element_type=f32) * H**-0.5
    branch = jnp.einsum("BGKNH,BGRKH->BKGNR", q, branch_k, preferred_element_type=f32) * H**-0.5
    seen, own = jnp.arange(P)[None] < length[:, None], jnp.arange(R) <= step
    if window:  # the new token's depth is length + step; an entry's is its index, or length + index
        seen &= length[:, None] + step - jnp.arange(P)[None] < window
        own &= step - jnp.arange(R) < window
    prompt = jnp.where(seen[:, None, None, None], prompt, HIDDEN)
    branch = jnp.where(own[None, None, None, None], branch, HIDDEN)
    top = jnp.maximum(prompt.max(-1, keepdims=True), branch.max(-1, keepdims=True))
    # entry `step` is always seen, so `top` is a true logit and HIDDEN gives exp(..) = 0
    prompt, branch = jnp.exp(prompt - top), jnp.exp(branch - top)
    total = (prompt.sum(-1) + branch.sum(-1)).transpose(0, 2, 1, 3)[..., None]
    cast = lambda x: x.astype(q.dtype)
    y = jnp.einsum("BKGNP,BPKH->BGKNH", cast(prompt), prompt_v, preferred_element_type=f32)
    y += jnp.einsum("BKGNR,BGRKH->BGKNH", cast(branch), branch_v, preferred_element_type=f32)
    return (y / total).reshape(B, G, N, H).astype(q.dtype)
