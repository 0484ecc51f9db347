"""Attention under a tree mask on NVIDIA GPUs: one call of cuDNN's flash attention per level of the
trees, merged by log-sum-exp.

cuDNN takes no arbitrary mask, but it takes rows of segments, each with queries and keys of its own.

    row      | prompt: video + question | branch 1 | branch 2 | next tree ... | pad |
    level 0  | keys K, queries Q        | Q        | Q        | K, Q          |     |
    level 1  |                          | K, Q     | K, Q     |    K, Q       |     |

A node is a run of tokens of equal `end`; level l holds the nodes inside l others. At one level the
subtrees of the nodes are apart, so they are segments: the queries are the tokens of a subtree, the
keys those of its node alone, and the mask is causal from the top left, query i of the segment
seeing its keys 0..i. So a token sees its own node causally and its ancestors whole. With s_l the
log of the sum of exponentials of a query's logits in part l,

    s = log sum_l exp(s_l)        y = sum_l exp(s_l - s) y_l

The backward pass of a part is the library's, given the merged y and s: it computes p as
exp(logit - s) and the row sum of dy y from those (https://arxiv.org/abs/2307.08691, section 3.1),
so parts of the gradient add up exactly, as in ring attention (https://arxiv.org/abs/2310.01889).

Rows deeper than `levels` or with more than `segments` nodes at one level take another way through,
`otherwise`. The device chooses, by what is in `end`.

Not yet run on a GPU. The calls of cuDNN have been lowered for CUDA and no more; all the rest is
tested on CPU, with a stand-in that has cuDNN's contract.

In order: the parts of a row, sums as cuDNN lays them out, merging, derivative, entry, the library.
"""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxvid.ops._flash import HIDDEN

LEVELS = 3  # prompt, branch, and the alternatives of a step under it (pDPO)
SEGMENTS = 64  # of one level of a row
WORKSPACE = 4 << 30  # bytes that cuDNN may take for its float32 sums of dq
DTYPES = ("bfloat16", "float16")
CAPABILITIES = (9, 10)  # Hopper, Blackwell of data centres: older GPUs have no segments in cuDNN
VERSION = 90600  # of cuDNN, the first whose segments jax tests


class Part(NamedTuple):
    """One level of the trees of some rows. A segment that is not there has length 0."""

    start: Int[Array, "B M"]  # first token of the node, and so of its subtree
    queries: Int[Array, "B M"]  # tokens of the subtree
    keys: Int[Array, "B M"]  # tokens of the node itself
    slot: Int[Array, "B T"]  # segment in which a token is a query; -1 is none
    owned: Bool[Array, "B T"]  # whether a token is a key


class Library(NamedTuple):
    """Flash attention over segments. Both functions take q, k, v [B, T, N, H] of equally many
    heads, then of every segment the queries [B, M], the keys [B, M] and twice [B, M + 1] where it
    starts, -1 beyond the last.

    `forward` gives (y [B, T, N, H], log of the sum of exponentials [B * M, N, T], a row per segment
    and a column per query counted from its start). `backward` takes also those sums, y and dy, and
    gives (dq, dk, dv). What lies outside every segment is undefined in all of them."""

    forward: Callable
    backward: Callable


class _Static(NamedTuple):
    """What `_tree` is compiled for."""

    library: Library
    otherwise: Callable  # (q, k, v, end) -> y for rows that do not fit
    levels: int
    segments: int


# ---- the parts of a row


def _before(x):
    """At each token the value of the token before it."""
    return jnp.pad(x, ((0, 0), (1, 0)))[:, :-1]


def _part(taken, end, stop, at, segments):
    """(the nodes that begin at the tokens `taken`, whether there are more than `segments`)."""
    T = end.shape[1]
    count = jnp.cumsum(taken, axis=1, dtype=jnp.int32)
    place = jnp.arange(segments, dtype=jnp.int32)[None, :, None]
    start = (count[:, None, :] <= place).sum(-1, dtype=jnp.int32)  # T where there is none
    of = lambda x: jnp.take_along_axis(jnp.pad(x, ((0, 0), (0, 1))), start, 1)
    length = lambda x: jnp.where(start < T, of(x) - start, 0)
    covers = lambda x: at < jax.lax.cummax(jnp.where(taken, x, 0), axis=1)
    slot = jnp.where(covers(end), count - 1, -1)
    part = Part(start, length(end), length(stop), slot, covers(stop))
    return part, count[:, -1].max() > segments


def parts_of(
    end: Int[Array, "B T"], levels: int, segments: int
) -> tuple[list[Part], Int[Array, ""]]:
    """(the parts, how many of them hold anything). The count is `levels` + 1 where that many levels
    of that many segments do not hold every node."""
    T = end.shape[1]
    at = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), end.shape)
    end = jnp.where(end > at, jnp.minimum(end, T), 0).astype(jnp.int32)  # 0: no token sees it
    change = end != _before(end)
    following = jnp.pad(jnp.where(change, at, T)[:, 1:], ((0, 0), (0, 1)), constant_values=T)
    stop = jax.lax.cummin(following, axis=1, reverse=True)  # first token after the run of each
    left, parts, depth = change & (end > 0), [], 0
    crowded = jnp.zeros((), bool)
    for _ in range(levels):
        # under no earlier node that is left; whatever `end` holds, subtrees of a level are apart
        reach = jax.lax.cummax(jnp.where(left, end, 0), axis=1)
        taken = left & (at >= _before(reach))
        left &= ~taken
        part, more = _part(taken, end, stop, at, segments)
        parts.append(part)
        crowded |= more
        depth += taken.any().astype(jnp.int32)
    return parts, jnp.where(left.any() | crowded, levels + 1, depth)


# ---- sums as cuDNN lays them out


def _layout(part: Part):
    """Lengths and places of the segments as the library takes them."""
    offsets = jnp.pad(part.start, ((0, 0), (0, 1)), constant_values=-1)
    return part.queries, part.keys, offsets, offsets


def _to_tokens(sums, part: Part):
    """Sums [B * M, N, T] by segment -> [B, T, N] by token; HIDDEN where there is no segment."""
    B, T = part.slot.shape
    sums, slot = sums.reshape(B, -1, *sums.shape[1:]), jnp.maximum(part.slot, 0)
    place = jnp.arange(T)[None] - jnp.take_along_axis(part.start, slot, 1)
    by_token = sums[jnp.arange(B)[:, None], slot, :, jnp.clip(place, 0, T - 1)]
    return jnp.where(part.slot[..., None] >= 0, by_token, HIDDEN)


def _to_segments(sums, part: Part):
    """The inverse. Beyond a segment they are such that exp(logit - sum) is 0."""
    B, T, N = sums.shape
    place = jnp.arange(T)[None, None]
    at = jnp.minimum(part.start[..., None] + place, T - 1)
    by_segment = sums[jnp.arange(B)[:, None, None], at]  # [B, M, T, N]
    inside = place < part.queries[..., None]
    by_segment = jnp.where(inside[..., None], by_segment, -HIDDEN)
    return by_segment.swapaxes(2, 3).reshape(-1, N, T)


# ---- merging


def _copies(x, N):
    """Every query head with a kv head of its own: jax before 0.12 counts places of keys in query
    heads, which are the right ones only where there are as many."""
    return jnp.repeat(x, N // x.shape[2], axis=2)


def _where(mask, x):
    return jnp.where(mask[..., None, None], x, 0).astype(jnp.float32)


def _merge(q, k, v, parts, library):
    """(y [B, T, N, H], log of the sum of exponentials [B, T, N]) over all parts."""
    N = q.shape[2]
    k, v = _copies(k, N), _copies(v, N)
    ys, sums = [], []
    for part in parts:
        y, by_segment = library.forward(q, k, v, *_layout(part))
        ys.append(_where(part.slot >= 0, y))
        sums.append(_to_tokens(by_segment, part))
    total = jax.nn.logsumexp(jnp.stack(sums), axis=0)
    y = sum(jnp.exp(s - total)[..., None] * y for s, y in zip(sums, ys))
    return y.astype(q.dtype), total


def _unmerge(q, k, v, y, total, dy, parts, library):
    """Gradients at q, k, v, as sums over the parts."""
    N, K = q.shape[2], k.shape[2]
    wide = q, _copies(k, N), _copies(v, N)
    sums = (jnp.zeros(x.shape, jnp.float32) for x in wide)
    for part in parts:
        args = *wide, *_layout(part), _to_segments(total, part), y, dy
        masks = part.slot >= 0, part.owned, part.owned
        sums = [s + _where(m, g) for s, m, g in zip(sums, masks, library.backward(*args))]
    dq, dk, dv = sums
    of_kv = lambda x: x.reshape(*x.shape[:2], K, N // K, -1).sum(3).astype(k.dtype)
    return dq.astype(q.dtype), of_kv(dk), of_kv(dv)


# ---- derivative


def _by_depth(end, static, of_parts, otherwise, *args):
    """`of_parts(*args, parts, library)` with as many levels as the rows have, or `otherwise`."""
    parts, depth = parts_of(end, static.levels, static.segments)
    ways = [
        functools.partial(of_parts, parts=parts[:n], library=static.library)
        for n in range(1, static.levels + 1)
    ]
    return jax.lax.switch(jnp.maximum(depth - 1, 0), [*ways, otherwise], *args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _tree(q, k, v, end, static):
    return _tree_forward(q, k, v, end, static)[0]


def _tree_forward(q, k, v, end, static):
    def otherwise(q, k, v):
        return static.otherwise(q, k, v, end), jnp.zeros(q.shape[:3], jnp.float32)

    y, total = _by_depth(end, static, _merge, otherwise, q, k, v)
    y, total = checkpoint_name((y, total), "attention")
    return y, (q, k, v, end, y, total)


def _tree_backward(static, saved, dy):
    q, k, v, end, y, total = saved

    def otherwise(q, k, v, y, total, dy):
        return jax.vjp(lambda *x: static.otherwise(*x, end), q, k, v)[1](dy)

    grads = _by_depth(end, static, _unmerge, otherwise, q, k, v, y, total, dy)
    return *grads, None


_tree.defvjp(_tree_forward, _tree_backward)


# ---- entry


def tree(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    end: Int[Array, "B T"],
    otherwise: Callable,
    *,
    library: Library | None = None,
    levels: int | None = None,
    segments: int | None = None,
) -> Float[Array, "B T N H"]:
    """Attention where token i sees token j iff j <= i < end[j].

    `otherwise(q, k, v, end)` computes rows of more than `levels` levels or `segments` nodes at one.
    Left out, `levels` are LEVELS and `segments` as many as WORKSPACE holds, at most SEGMENTS: in
    the backward pass cuDNN sets aside room for a whole row per segment. The library is cuDNN if
    none is given.
    """
    if levels is None:
        levels = LEVELS
    if segments is None:
        segments = min(SEGMENTS, WORKSPACE // (4 * q.size))
    segments = max(2, segments)  # with one jax passes no places, and the segment starts at 0
    return _tree(q, k, v, end, _Static(library or CUDNN, otherwise, levels, segments))


# ---- the library


def refusal(dtype: np.dtype, head: int, numbers: int) -> str | None:
    """Why cuDNN cannot compute parts with queries of this type, head size and count of numbers on
    this machine's GPU; None if it can."""
    if dtype.name not in DTYPES:
        return f"takes {' or '.join(DTYPES)}, got {dtype.name}"
    if head % 8 or head > 128:
        return f"takes a head size that 8 divides, up to 128, got {head}"
    if numbers >= 2**31:
        return f"counts places in 32 bits, and the queries of one device are {numbers} numbers"
    try:
        capability, version = device()
    except RuntimeError as missing:
        return f"needs a GPU: {missing}"
    if capability not in CAPABILITIES or version < VERSION:
        return (
            f"needs compute capability {' or '.join(map(str, CAPABILITIES))}.x and cuDNN {VERSION},"
            f" got {capability}.x and {version}"
        )
    return None


def device() -> tuple[int, int]:
    """(major compute capability of this machine's GPU, version of its cuDNN). RuntimeError where
    there is none."""
    from jax._src.cudnn.fused_attention_stablehlo import check_cudnn_version

    gpu = jax.local_devices(backend="cuda")[0]
    return int(gpu.compute_capability.split(".")[0]), check_cudnn_version()


# jax.nn.dot_product_attention gives no log-sum-exp of segments and takes none in its backward pass,
# so these two reach below it. They import late: elsewhere jax may move or lose what they name.


def _cudnn_forward(q, k, v, q_lengths, k_lengths, q_offsets, k_offsets):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    return cudnn.dot_product_attention(
        q,
        k,
        v,
        q_seqlen=q_lengths,
        kv_seqlen=k_lengths,
        q_offsets=q_offsets,
        kv_offsets=k_offsets,
        scale=q.shape[-1] ** -0.5,
        mask_type=cudnn.MaskType.PADDING_CAUSAL,
        return_residual=True,
    )


def _cudnn_backward(q, k, v, q_lengths, k_lengths, q_offsets, k_offsets, sums, y, dy):
    """By name, because releases add names (score_mod in 0.12); a name unknown here is a KeyError.
    The function differs from the one jax differentiates with in that it cannot be split over
    devices, which shard_map around the op has done."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    none = jnp.zeros(0, q.dtype)  # what jax passes for an array that is not there
    known = dict(
        query=q,
        key=k,
        value=v,
        bias=none,
        q_seqlen=q_lengths,
        kv_seqlen=k_lengths,
        q_offsets=q_offsets,
        kv_offsets=k_offsets,
        page_table_k=none,
        page_table_v=none,
        activation=sums,
        fwd_output=y,
        grad_output=dy,
        scale=q.shape[-1] ** -0.5,
        seed=42,
        dropout_rate=0.0,
        variadic_args=(False, False),  # bias, gradient of bias
        mask_type=cudnn.MaskType.PADDING_CAUSAL,
        layout=cudnn.AttentionLayout.BTNH.value,
        sliding_window_length=None,
        score_mod_args=(),
        score_mod=None,
    )
    backward = cudnn._dot_product_attention_bwd_impl
    return backward(**{name: known[name] for name in inspect.signature(backward).parameters})[:3]


CUDNN = Library(_cudnn_forward, _cudnn_backward)
