"""Attention under a tree mask, inside segments, and from new tokens to a shared prompt.

    row    | prompt: video + question | branch 1 | branch 2 | next tree ... | pad |
    end    | e e e e ...          e   | b1 .. b1 | b2 .. b2 | ...           | 0 0 |

    token i sees token j   iff   j <= i < end[j]
                                 and, with a sliding window, depth[i] - depth[j] < window

Grouped queries: N query heads share K kv heads, query head n reads kv head n // (N / K). A query
that sees nothing (padding) gives zeros and no gradient. What its derivative keeps is named
"attention", for policies of rematerialisation. The Pallas kernel is in _flash.py, the
calls of cuDNN are in _parts.py.
In order: reference, the tree's lower triangle, long rows, one device, public function, decoding.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxvid import sharding
from jaxvid.ops import _parts
from jaxvid.ops._choice import Impl, choose
from jaxvid.ops._flash import HIDDEN, LANES, Facts, flash

LONG = 2048  # longer rows never hold [N, T, T]
BLOCK = 256  # queries of one step of a long row
PARTS, SHORT = 4, 128  # runs of queries of a tree row; shorter rows are not cut


def _mask(queries: Facts, keys: Facts, window: int) -> Bool[Array, "B t S"] | None:
    """Which keys the queries see; None where all see all."""
    if keys.end is not None:
        at = queries.index[:, :, None]
        mask = (keys.index[:, None, :] <= at) & (at < keys.end[:, None, :])
        if window:
            mask &= queries.depth[:, :, None] - keys.depth[:, None, :] < window
        return mask
    if keys.segment is not None:
        same = queries.segment[:, :, None] == keys.segment[:, None, :]
        return same & (queries.segment > 0)[:, :, None]
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
    facts = _facts(end, segment, depth, None)
    return _attend(q, k, v, _mask(facts, facts, window))


def _facts(end, segment, depth, index):
    if end is None:
        return Facts(segment=segment)
    if index is None:
        index = jnp.broadcast_to(jnp.arange(end.shape[1], dtype=jnp.int32), end.shape)
    return Facts(index, end, depth)


def _triangle(q, k, v, facts, window):
    """The reference on PARTS runs of queries, each over the keys up to its own end: no token sees a
    later one, so 3/8 of the products need not be made."""
    T = q.shape[1]
    size = -(-T // PARTS)
    if T > LONG:
        size += -size % BLOCK

    def run(i):
        stop = min(i + size, T)
        some, keys = facts.cut(i, stop), facts.cut(0, stop)
        part = q[:, i:stop], k[:, :stop], v[:, :stop]
        if T > LONG:
            return _blocks(*part, some, keys, window)
        return _attend(*part, _mask(some, keys, window))

    return jnp.concatenate([run(i) for i in range(0, T, size)], axis=1)


def _blocks(q, k, v, queries, keys, window):
    """The reference, BLOCK queries at a time; the backward pass recomputes each block."""
    B, T, N, H = q.shape
    steps = -(-T // BLOCK)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, steps * BLOCK - T)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(B, steps, BLOCK, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def step(_, block):
        q_i, of = block
        return None, _attend(q_i, k, v, _mask(of, keys, window))

    _, y = jax.lax.scan(step, None, (split(q), jax.tree.map(split, queries)))
    return y.swapaxes(0, 1).reshape(B, steps * BLOCK, N, H)[:, :T]


# ---- one device's part


def _deep(q, k, v, end):
    """Rows of more levels or branches than cuDNN's parts hold."""
    facts = _facts(end, None, None, None)
    return _blocks(q, k, v, facts, facts, 0)


def _here(q, k, v, facts, window, impl, context, ordered):
    """`context` names the mesh axes over which the tokens of a row are split: every device has the
    queries of its own tokens and gathers the keys of all of them."""
    keys = facts
    if context:
        gather = lambda x: jax.lax.all_gather(x, context, axis=1, tiled=True)
        k, v, keys = jax.tree.map(gather, (k, v, keys))
    if impl == "cudnn":
        return _parts.tree(q, k, v, facts.end, _deep)
    if impl != "xla":
        return flash(q, k, v, facts, keys, window, impl == "interpret")
    T, S = q.shape[1], k.shape[1]
    if facts.end is not None and T >= SHORT and ordered and not context:
        y = _triangle(q, k, v, facts, window)
    elif max(T, S) > LONG:
        y = _blocks(q, k, v, facts, keys, window)
    else:
        y = _attend(q, k, v, _mask(facts, keys, window))
    return checkpoint_name(y, "attention")


def _copy_heads(k, v, on):
    """Where more devices share the queries than there are kv heads, each gets its own copy of the
    head that its queries read; where they do not divide, no head is split."""
    devices, K = sharding.ways(on["heads"]), k.shape[2]
    if devices % K:
        return k, v, on | {"heads": ()}
    copy = lambda x: jnp.repeat(x, devices // K, axis=2)
    return copy(k), copy(v), on


def _choose(impl, q, on, masked, plain):
    """`plain`: a tree mask without a window, over tokens in order."""
    if impl != "cudnn":
        return choose(impl, masked and q.shape[1] >= LANES)
    why = "takes `end` alone, on rows that are not split"
    if plain and not on["tokens"]:
        why = _parts.refusal(q.dtype, q.shape[-1], q.size // sharding.ways(on["rows"]))
    if why:
        raise ValueError(f"attention by cuDNN {why}; use impl=None or 'xla'")
    return impl


def _check(q, k, end, segment, depth, window):
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


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    end: Int[Array, "B S"] | None = None,
    segment: Int[Array, "B T"] | None = None,
    depth: Int[Array, "B T"] | None = None,
    index: Int[Array, "B T"] | None = None,
    window: int = 0,
    impl: Impl | Literal["cudnn"] | None = None,
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention, softmax in float32.

    With `end` tokens see along their tree (the picture above), with `window` > 0 no further back
    than that many tokens of their own path, by `depth`. With `segment` they see, in both
    directions, the tokens of equal positive segment. With neither every query sees every key.

    On a mesh rows, heads and, over an axis `context`, tokens are split as `sharding.RULES` says.
    There the tokens of a row may stand in any order that suits the devices: `index` carries their
    places in the row as `end` counts them. Left out, they stand in order.
    `impl=None` is Pallas on TPUs for rows of LANES and more under a mask, else XLA. "cudnn" is for
    NVIDIA GPUs, under a tree mask without a window, in bfloat16 or float16; it has not been run on
    one yet, so nobody gets it unasked.
    Raises ValueError for head counts and masks that do not fit together, and for a named `impl`
    that cannot run.
    """
    _check(q, k, end, segment, depth, window)
    if index is not None and end is None:
        raise ValueError("`index` says where tokens stand in a tree; it needs `end`")
    masked = end is not None or segment is not None
    (B, T, N, _), K = q.shape, k.shape[2]
    on = sharding.splits({"rows": B, "tokens": T, "heads": N, "kv_heads": K})
    plain = end is not None and index is None and not window
    impl = _choose(impl, q, on, masked, plain)
    if not masked:
        if impl != "xla":
            raise ValueError(
                "the attention kernel needs `end` or `segment`; use impl='xla' or None"
            )
        return checkpoint_name(_attend(q, k, v, None), "attention")
    if on["heads"] != on["kv_heads"]:
        k, v, on = _copy_heads(k, v, on)
    heads = ("rows", "tokens", "heads", None)
    run = sharding.spread(
        lambda *x: _here(*x, window, impl, on["tokens"], index is None),
        (heads, heads, heads, ("rows", "tokens")),
        heads,
        on,
    )
    return run(q, k, v, _facts(end, segment, depth, index))


def decode_attention(
    q: Float[Array, "B G N H"],
    prompt_k: Float[Array, "B P K H"],
    prompt_v: Float[Array, "B P K H"],
    length: Int[Array, "B"],
    branch_k: Float[Array, "B G R K H"],
    branch_v: Float[Array, "B G R K H"],
    step: Int[Array, "B"] | Int[Array, ""] | int,
    window: int = 0,
    at: Int[Array, ""] | int | None = None,
) -> Float[Array, "B G N H"]:
    """One new token of each of G branches, the `step`-th of its own: sees its prompt's first
    `length` tokens and its branch up to itself; with a window, the last `window` of these.

    The branch cache is a ring of R columns, and the new token stands in column `at` for all rows;
    left out, that is `step`, one number then. A column holds what was written so many steps ago
    as it lies before `at`, so rows may have begun at different times; what a row's last owner left
    is older than the row's branch and is not seen.

    Prompt and branches are attended to apart and their sums put together by their maxima (log-sum-
    exp): the prompt is never copied per branch, nor are the two caches put into one. On a mesh
    every device has its own rows and heads.
    """
    B, K, R = q.shape[0], prompt_k.shape[2], branch_k.shape[2]
    at = jnp.asarray(step if at is None else at, jnp.int32)
    step = jnp.broadcast_to(jnp.asarray(step, jnp.int32), (B,))
    on = sharding.splits({"rows": B, "heads": q.shape[2], "kv_heads": K})
    if on["heads"] != on["kv_heads"]:
        on |= {"heads": (), "kv_heads": ()}
    prompt, branch = ("rows", None, "kv_heads", None), ("rows", None, None, "kv_heads", None)
    heads = ("rows", None, "heads", None)

    def here(q, prompt_k, prompt_v, length, branch_k, branch_v, step, at):
        age = (at - jnp.arange(R)) % R
        return _decode(q, prompt_k, prompt_v, length, branch_k, branch_v, step, age, window)

    ins = (heads, prompt, prompt, ("rows",), branch, branch, ("rows",), ())
    run = sharding.spread(here, ins, heads, on)
    return run(q, prompt_k, prompt_v, length, branch_k, branch_v, step, at)


def _decode(q, prompt_k, prompt_v, length, branch_k, branch_v, step, age, window):
    """`age` [R]: how many steps ago a column was written."""
    B, G, N, H = q.shape
    P, K = prompt_k.shape[1], prompt_k.shape[2]
    q = q.reshape(B, G, K, N // K, H)
    f32 = jnp.float32
    prompt = jnp.einsum("BGKNH,BPKH->BKGNP", q, prompt_k, preferred_element_type=f32) * H**-0.5
    branch = jnp.einsum("BGKNH,BGRKH->BKGNR", q, branch_k, preferred_element_type=f32) * H**-0.5
    step, length, age = step[:, None], length[:, None], age[None]
    seen, own = jnp.arange(P)[None] < length, age <= step
    if window:  # the new token's depth is length + step
        seen &= length + step - jnp.arange(P)[None] < window
        own &= age < window
    prompt = jnp.where(seen[:, None, None, None], prompt, HIDDEN)
    branch = jnp.where(own[:, None, None, None], branch, HIDDEN)
    top = jnp.maximum(prompt.max(-1, keepdims=True), branch.max(-1, keepdims=True))
    # the new token is always seen, so `top` is a true logit and HIDDEN gives exp(..) = 0
    prompt, branch = jnp.exp(prompt - top), jnp.exp(branch - top)
    total = (prompt.sum(-1) + branch.sum(-1)).transpose(0, 2, 1, 3)[..., None]
    cast = lambda x: x.astype(q.dtype)
    y = jnp.einsum("BKGNP,BPKH->BGKNH", cast(prompt), prompt_v, preferred_element_type=f32)
    y += jnp.einsum("BKGNR,BGRKH->BGKNH", cast(branch), branch_v, preferred_element_type=f32)
    return (y / total).reshape(B, G, N, H).astype(q.dtype)
