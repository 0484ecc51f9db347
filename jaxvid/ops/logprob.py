"""Log-probability and entropy of scored tokens, straight from hidden states.

    z_v = hidden . unembed_v / temperature      logp = z_target - lse(z)
    entropy = lse(z) - sum_v p_v z_v

The vocabulary is walked in blocks, forward and backward, so that [B, S, V] is never in memory: the
backward pass recomputes each block from the kept lse. On a mesh each device walks the rows it has:
a block of the table is gathered over its width as it is needed, and the block's gradient is
scattered back at once, so that the whole table is never on one device; where the vocabulary is
split over devices, each walks its own part and one small collective joins them.
In order: reference, kernels, a block, the walk, derivative, public functions.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from jaxvid import sharding
from jaxvid.ops._cast import cast
from jaxvid.ops._choice import Impl, choose

TOKENS, WORDS = 1024, 512  # most scored tokens and words of one kernel step
WIDTH = 2048  # most bytes of a hidden state in one kernel step: fast memory is 16 MiB
LANES, SUBLANES = 128, 8  # of a TPU register of 32 bits
LOWEST = -1e30  # finite: exp(LOWEST - LOWEST) is no NaN


def logprob_ref(
    hidden: Float[Array, "B S D"],
    unembed: Float[Array, "V D"],
    targets: Int[Array, "B S"],
    temperature: float = 1.0,
) -> tuple[Float[Array, "B S"], Float[Array, "B S"]]:
    """The definition, in XLA, with all of [B, S, V] in memory."""
    every = jax.nn.log_softmax(_logits(hidden, unembed, temperature))
    logp = jnp.take_along_axis(every, targets[..., None], axis=-1)[..., 0]
    return logp, -(jnp.exp(every) * every).sum(-1)


def kl_ref(
    hidden: Float[Array, "B S D"],
    other: Float[Array, "B S D"],
    unembed: Float[Array, "V D"],
    temperature: float = 1.0,
) -> Float[Array, "B S"]:
    """The definition of `kl`, in XLA, with all of [B, S, V] in memory."""
    p, q = (jax.nn.log_softmax(_logits(x, unembed, temperature)) for x in (hidden, other))
    return (jnp.exp(p) * (p - q)).sum(-1)


def _logits(hidden, words, temperature):
    """[..., V]. At least float32: a bf16 logit of 20 is off by up to 1/16, and so its log-prob."""
    exact = jnp.promote_types(hidden.dtype, jnp.float32)
    words = words.astype(hidden.dtype)
    return jnp.einsum("...D,VD->...V", hidden, words, preferred_element_type=exact) / temperature


class _Plan(NamedTuple):
    """The static part: what to compute, and the mesh axes over which rows, vocabulary and width
    of the table are split."""

    temperature: float
    block: int
    axis: int  # of the table, that of the vocabulary
    impl: Impl
    rows: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    width: tuple[str, ...] = ()

    @property
    def placed(self):
        return {"rows": self.rows, "vocab": self.vocab, "embed": self.width}

    @property
    def table(self):
        return ("vocab", "embed") if self.axis == 0 else ("embed", "vocab")


class _Sums(NamedTuple):
    """Of the words walked so far, for each scored token; `words` is one block's stretch of them."""

    top: Array  # largest logit
    total: Array  # sum of exp(z - top)
    weighted: Array  # sum of exp(z - top) z, or times z - z' where two streams are compared
    target: Array  # logit of the target, 0 if not met yet

    def join(self, new: "_Sums") -> "_Sums":
        top = jnp.maximum(self.top, new.top)
        a, b = jnp.exp(self.top - top), jnp.exp(new.top - top)
        return _Sums(
            top,
            self.total * a + new.total * b,
            self.weighted * a + new.weighted * b,
            self.target + new.target,
        )


# ---- kernels
#
# Logits are held transposed, [words, tokens], so that what belongs to a token is a row of lanes.
# The width is walked in the innermost step and its products summed in fast memory; the logits of a
# tile never leave it. The gradient's kernel writes that of the logits of one block, in the hidden
# states' type: the two products that follow are plain ones, which the compiler does as well.


def _products(w, streams, sums):
    """Adds this part of the width to the logits of each stream; whether they are complete."""
    dims = (((1,), (1,)), ((), ()))
    for x, total in zip(streams, sums):

        @pl.when(pl.program_id(2) == 0)
        def _(total=total):
            total[...] = jnp.zeros(total.shape, jnp.float32)

        total[...] += jax.lax.dot_general(w[...], x[...], dims, preferred_element_type=jnp.float32)
    return pl.program_id(2) == pl.num_programs(2) - 1


def _words(at, tile, shape):
    """The word of each row of a tile, and which rows no earlier block had."""
    row = tile * shape[0] + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return row + at[0], (row >= at[1]) & (row < at[2])


def _sums_kernel(at, w, x, target, out, sums, *, scale):
    tile = pl.program_id(1)

    @pl.when((tile == 0) & (pl.program_id(2) == 0))
    def _():
        out[...] = jnp.zeros(out.shape, jnp.float32)
        out[:1] = jnp.full((1, out.shape[1]), LOWEST, jnp.float32)

    @pl.when(_products(w, [x], [sums]))
    def _():
        z = sums[...] * scale
        word, new = _words(at, tile, z.shape)
        seen = jnp.where(new, z, LOWEST)
        top = jnp.maximum(out[:1], seen.max(0, keepdims=True))
        p = jnp.where(new, jnp.exp(seen - top), 0.0)
        shrink = jnp.exp(out[:1] - top)
        out[1:2] = out[1:2] * shrink + p.sum(0, keepdims=True)
        out[2:3] = out[2:3] * shrink + (p * z).sum(0, keepdims=True)
        out[3:4] += jnp.where((word == target[:1]) & new, z, 0.0).sum(0, keepdims=True)
        out[:1] = top


def _kl_kernel(at, w, x, other, out, sums, sums_other, *, scale):
    """Rows 0 to 2 as above for the first stream, weighted by z - z'; 3 and 4 for the second."""
    tile = pl.program_id(1)

    @pl.when((tile == 0) & (pl.program_id(2) == 0))
    def _():
        out[...] = jnp.zeros(out.shape, jnp.float32)
        for i in (0, 3):
            out[i : i + 1] = jnp.full((1, out.shape[1]), LOWEST, jnp.float32)

    @pl.when(_products(w, [x, other], [sums, sums_other]))
    def _():
        z, y = sums[...] * scale, sums_other[...] * scale
        _, new = _words(at, tile, z.shape)
        for i, logits in ((0, z), (3, y)):
            seen = jnp.where(new, logits, LOWEST)
            top = jnp.maximum(out[i : i + 1], seen.max(0, keepdims=True))
            p = jnp.where(new, jnp.exp(seen - top), 0.0)
            shrink = jnp.exp(out[i : i + 1] - top)
            out[i + 1 : i + 2] = out[i + 1 : i + 2] * shrink + p.sum(0, keepdims=True)
            if i == 0:
                out[2:3] = out[2:3] * shrink + (p * (z - y)).sum(0, keepdims=True)
            out[i : i + 1] = top


def _gradient_kernel(at, w, x, target, rows, out, sums, *, scale):
    tile = pl.program_id(1)

    @pl.when(_products(w, [x], [sums]))
    def _():
        z = sums[...] * scale
        word, new = _words(at, tile, z.shape)
        lse, mean, d_logp, d_entropy = (rows[i : i + 1] for i in range(4))
        p = jnp.exp(z - lse)
        hit = jnp.where(word == target[:1], 1.0, 0.0)
        dz = d_logp * (hit - p) - d_entropy * p * (z - mean)
        out[...] = (jnp.where(new, dz, 0.0) * scale).astype(out.dtype)


def _tile(size, most, of):
    """The largest multiple of `of` up to `most` that divides `size`; `of` where none does."""
    return max((t for t in range(of, min(size, most) + 1, of) if size % t == 0), default=of)


def _launch(kernel, words, streams, rows, at, plan, out):
    """One kernel over tiles of (tokens, words, width). `streams` are hidden states [S, D], `rows`
    facts of tokens [n, S]; `out` is "rows" [8, S] or "logits" [words, S]."""
    (V, D), (S, _), dtype = words.shape, streams[0].shape, streams[0].dtype
    tokens = min(TOKENS // len(streams), -(-S // LANES) * LANES)
    count = min(WORDS, -(-V // LANES) * LANES)
    width = _tile(D, WIDTH // dtype.itemsize, LANES)
    pad = lambda x, n, axis: jnp.pad(x, [(0, n if i == axis else 0) for i in range(x.ndim)])
    words, streams = pad(words, -V % count, 0), [pad(x, -S % tokens, 0) for x in streams]
    rows = [pad(pad(x, SUBLANES - len(x), 0), -S % tokens, 1) for x in rows]
    padded = streams[0].shape[0]
    grid = (padded // tokens, words.shape[0] // count, D // width)
    fact = pl.BlockSpec((SUBLANES, tokens), lambda s, v, d, at: (0, s))
    logits = pl.BlockSpec((count, tokens), lambda s, v, d, at: (v, s))
    stream = pl.BlockSpec((tokens, width), lambda s, v, d, at: (s, d))
    whole = (SUBLANES if out == "rows" else words.shape[0], padded)
    result = pl.pallas_call(
        functools.partial(kernel, scale=1 / plan.temperature),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[
                pl.BlockSpec((count, width), lambda s, v, d, at: (v, d)),
                *[stream] * len(streams),
                *[fact] * len(rows),
            ],
            out_specs=fact if out == "rows" else logits,
            scratch_shapes=[pltpu.VMEM((count, tokens), jnp.float32)] * len(streams),
        ),
        out_shape=jax.ShapeDtypeStruct(whole, jnp.float32 if out == "rows" else dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        interpret=plan.impl == "interpret",
    )(jnp.stack([*at, jnp.int32(V)]).astype(jnp.int32), words, *streams, *rows)
    return result[:, :S] if out == "rows" else result[:V, :S]


# ---- a block of words: [words, D] against hidden states [S, D]; `at` is (id of its first word,
# first row that no earlier block had)


def _block_sums(words, hidden, targets, at, plan):
    if plan.impl != "xla":
        rows = _launch(_sums_kernel, words, [hidden], [targets[None]], at, plan, "rows")
        return _Sums(*rows[:4])
    z = _logits(hidden, words, plan.temperature)
    row = jnp.arange(words.shape[0])
    new = (row >= at[1])[None]
    seen = jnp.where(new, z, LOWEST)
    top = seen.max(-1)
    p = jnp.where(new, jnp.exp(seen - top[:, None]), 0.0)
    hit = ((row + at[0])[None] == targets[:, None]) & new
    return _Sums(top, p.sum(-1), (p * z).sum(-1), jnp.where(hit, z, 0.0).sum(-1))


def _block_gradient(words, hidden, targets, rows, at, plan):
    """(gradient of the hidden states [S, D], of the block [words, D]), both at least float32.
    `rows` [4, S]: lse, mean logit, and the gradients of log-prob and entropy."""
    exact = jnp.promote_types(hidden.dtype, jnp.float32)
    dot = functools.partial(jnp.einsum, preferred_element_type=exact)
    if plan.impl != "xla":
        args = (words, [hidden], [targets[None], rows], at, plan, "logits")
        dz = _launch(_gradient_kernel, *args)
        return dot("VS,VD->SD", dz, words), dot("VS,SD->VD", dz, hidden)
    z = _logits(hidden, words, plan.temperature)
    lse, mean, d_logp, d_entropy = (x[:, None] for x in rows)
    p = jnp.exp(z - lse)
    row = jnp.arange(words.shape[0])
    hit = (row + at[0])[None] == targets[:, None]
    dz = d_logp * (hit - p) - d_entropy * p * (z - mean)
    dz = (jnp.where((row >= at[1])[None], dz, 0.0) / plan.temperature).astype(hidden.dtype)
    return dot("SV,VD->SD", dz, words.astype(hidden.dtype)), dot("SV,SD->VD", dz, hidden)


# ---- the walk, on one device's part of the arrays


def _blocks(table, plan):
    """(number of blocks, block i as [words, D] with its place). The last block is moved back to end
    with the table, since padding would copy a table of gigabytes."""
    count = table.shape[plan.axis]
    size = min(plan.block, count)
    first = jax.lax.axis_index(plan.vocab) * count if plan.vocab else 0

    def block(i, dtype):
        start = jnp.minimum(i * size, count - size)
        words = jax.lax.dynamic_slice_in_dim(table, start, size, plan.axis)
        words = cast(words, dtype)
        if plan.width:
            words = jax.lax.all_gather(words, plan.width, axis=1 - plan.axis, tiled=True)
        words = words if plan.axis == 0 else words.T
        return words, (first + start, i * size - start), start

    return -(-count // size), block


def _over_vocab(sums, plan):
    """Joins what the devices found in their parts of the vocabulary: 4 numbers a token."""
    if not plan.vocab:
        return sums
    parts = jax.lax.all_gather(jnp.stack(sums), plan.vocab)
    return functools.reduce(_Sums.join, [_Sums(*part) for part in parts])


def _start(hidden):
    zero = jnp.zeros(hidden.shape[0], jnp.promote_types(hidden.dtype, jnp.float32))
    return _Sums(zero + LOWEST, zero, zero, zero)


def _forward(hidden, table, targets, plan):
    """lse(z), sum_v p_v z_v and z_target, each [B, S]."""
    shape, hidden, targets = targets.shape, hidden.reshape(-1, hidden.shape[-1]), targets.ravel()
    count, block = _blocks(table, plan)

    def step(sums, i):
        words, at, _ = block(i, hidden.dtype)
        return sums.join(_block_sums(words, hidden, targets, at, plan)), None

    sums = jax.lax.scan(step, _start(hidden), jnp.arange(count))[0]
    sums = _over_vocab(sums, plan)
    lse = sums.top + jnp.log(sums.total)
    return tuple(x.reshape(shape) for x in (lse, sums.weighted / sums.total, sums.target))


def _backward(hidden, table, targets, lse, mean, d_logp, d_entropy, plan, trained):
    """(gradient of the hidden states, of the table); the first alone if no table is `trained`."""
    shape, hidden = hidden.shape, hidden.reshape(-1, hidden.shape[-1])
    rows = jnp.stack([x.ravel() for x in (lse, mean, d_logp, d_entropy)])
    count, block = _blocks(table, plan)

    def step(carry, i):
        d_hidden, d_table = carry
        words, at, start = block(i, hidden.dtype)
        d_x, d_w = _block_gradient(words, hidden, targets.ravel(), rows, at, plan)
        if not trained:
            return (d_hidden + d_x, None), None
        d_w = d_w if plan.axis == 0 else d_w.T
        if plan.width:
            d_w = jax.lax.psum_scatter(d_w, plan.width, scatter_dimension=1 - plan.axis, tiled=True)
        old = jax.lax.dynamic_slice_in_dim(d_table, start, words.shape[0], plan.axis)
        d_w = old + d_w.astype(d_table.dtype)
        d_table = jax.lax.dynamic_update_slice_in_dim(d_table, d_w, start, plan.axis)
        return (d_hidden + d_x, d_table), None

    zeros = (jnp.zeros(hidden.shape, rows.dtype), jnp.zeros_like(table) if trained else None)
    (d_hidden, d_table), _ = jax.lax.scan(step, zeros, jnp.arange(count))
    if plan.vocab:
        d_hidden = jax.lax.psum(d_hidden, plan.vocab)
    d_hidden = d_hidden.reshape(shape).astype(hidden.dtype)
    if not trained:
        return (d_hidden,)
    if rest := tuple(a for a in plan.rows if a not in plan.width):
        d_table = jax.lax.psum(d_table, rest)
    return d_hidden, sharding.at_rest(d_table)


def _block_kl(words, p, q, at, plan):
    """Sums of both streams over a block; those of the first are weighted by z - z'."""
    if plan.impl != "xla":
        rows = _launch(_kl_kernel, words, [p, q], [], at, plan, "rows")
        none = jnp.zeros_like(rows[0])
        return _Sums(*rows[:3], none), _Sums(*rows[3:5], none, none)
    z, y = (_logits(x, words, plan.temperature) for x in (p, q))
    new = (jnp.arange(words.shape[0]) >= at[1])[None]

    def of(logits, weight):
        seen = jnp.where(new, logits, LOWEST)
        top = seen.max(-1)
        e = jnp.where(new, jnp.exp(seen - top[:, None]), 0.0)
        return _Sums(top, e.sum(-1), (e * weight).sum(-1), jnp.zeros_like(top))

    return of(z, z - y), of(y, 0.0)


def _kl(hidden, other, table, plan):
    """One walk for both streams, [B, S]; sum_v p_v (z_v - z'_v) - lse(z) + lse(z')."""
    shape = hidden.shape[:2]
    p, q = (x.reshape(-1, x.shape[-1]) for x in (hidden, other))
    count, block = _blocks(table, plan)

    def step(sums, i):
        words, at, _ = block(i, p.dtype)
        return tuple(a.join(b) for a, b in zip(sums, _block_kl(words, p, q, at, plan))), None

    sums = jax.lax.scan(step, (_start(p), _start(q)), jnp.arange(count))[0]
    a, b = (_over_vocab(s, plan) for s in sums)
    lse = lambda s: s.top + jnp.log(s.total)
    return jnp.maximum(a.weighted / a.total - lse(a) + lse(b), 0.0).reshape(shape)


# ---- derivative

_HIDDEN, _ROW = ("rows", None, None), ("rows", None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _logprob(hidden, table, targets, plan):
    lse, mean, target = _walk(hidden, table, targets, plan)
    return target - lse, lse - mean


def _walk(hidden, table, targets, plan):
    run = sharding.spread(
        lambda *x: _forward(*x, plan), (_HIDDEN, plan.table, _ROW), (_ROW,) * 3, plan.placed
    )
    return run(hidden, table, targets)


def _logprob_fwd(hidden, table, targets, plan):
    wanted = () if table.perturbed else None  # says by its structure alone: it holds no array
    hidden, table, targets = hidden.value, table.value, targets.value
    lse, mean, target = _walk(hidden, table, targets, plan)
    return (target - lse, lse - mean), (wanted, hidden, table, targets, lse, mean)


def _logprob_bwd(plan, kept, grads):
    wanted, *kept = kept
    zero = lambda g: isinstance(g, jax.custom_derivatives.SymbolicZero)
    grads = [jnp.zeros(g.shape, g.dtype) if zero(g) else g for g in grads]
    run = sharding.spread(
        lambda *x: _backward(*x, plan, wanted is not None),
        (_HIDDEN, plan.table, *(_ROW,) * 5),
        (_HIDDEN,) if wanted is None else (_HIDDEN, plan.table),
        plan.placed,
    )
    d_hidden, *d_table = run(*kept, *grads)
    return d_hidden, d_table[0] if d_table else None, None


_logprob.defvjp(_logprob_fwd, _logprob_bwd, symbolic_zeros=True)


# ---- public functions


def _plan(hidden, unembed, axis, temperature, block, impl):
    if temperature <= 0:
        raise ValueError(f"logprob needs a temperature above 0, got {temperature}")
    if axis not in (0, 1) or unembed.shape[1 - axis] != hidden.shape[-1]:
        raise ValueError(
            f"hidden states of width {hidden.shape[-1]} and a table {unembed.shape} whose axis "
            f"{axis} is the vocabulary do not meet; set vocab_axis to 0 for [V, D], 1 for [D, V]"
        )
    impl = choose(impl, hidden.shape[-1] % LANES == 0)
    if impl != "xla" and hidden.shape[-1] % LANES:
        raise ValueError(
            f"the logprob kernel needs a width divisible by {LANES}, got {hidden.shape[-1]}"
        )
    sizes = {
        "rows": hidden.shape[0],
        "vocab": unembed.shape[axis],
        "embed": unembed.shape[1 - axis],
    }
    on = sharding.splits(sizes)
    width = on["embed"] if set(on["embed"]) <= set(on["rows"]) else ()
    return _Plan(temperature, block, axis, impl, on["rows"], on["vocab"], width)


def logprob(
    hidden: Float[Array, "B S D"],
    unembed: Float[Array, "a b"],
    targets: Int[Array, "B S"],
    *,
    temperature: float = 1.0,
    block: int = 8192,
    vocab_axis: int = 0,
    impl: Impl | None = None,
) -> tuple[Float[Array, "B S"], Float[Array, "B S"]]:
    """Log-prob of `targets` and entropy, at least float32, under
    softmax(hidden . unembed / temperature).

    `unembed` is [V, D], or [D, V] with `vocab_axis=1`. `block` is the number of words in memory at
    a time. Gradients flow to `hidden` and `unembed`, in their own types. On a mesh, rows and table
    are split as `sharding.RULES` says. `impl=None` is Pallas on TPUs where the width fits, else
    XLA. Raises ValueError for a temperature of 0 and for a table that does not fit.
    """
    return _logprob(
        hidden, unembed, targets, _plan(hidden, unembed, vocab_axis, temperature, block, impl)
    )


def kl(
    hidden: Float[Array, "B S D"],
    other: Float[Array, "B S D"],
    unembed: Float[Array, "a b"],
    *,
    temperature: float = 1.0,
    block: int = 8192,
    vocab_axis: int = 0,
    impl: Impl | None = None,
) -> Float[Array, "B S"]:
    """KL(P || Q) at each token, over the whole vocabulary, of the distributions that two streams of
    hidden states give under one table: eq. of step selection in https://arxiv.org/abs/2502.11775.

    Both are walked together, in blocks of words. Data: no gradient flows. `impl`, errors and the
    mesh as for `logprob`.
    """
    hidden, other, unembed = jax.lax.stop_gradient((hidden, other, unembed))
    plan = _plan(hidden, unembed, vocab_axis, temperature, block, impl)
    run = sharding.spread(
        lambda *x: _kl(*x, plan), (_HIDDEN, _HIDDEN, plan.table), _ROW, plan.placed
    )
    return run(hidden, other, unembed)
