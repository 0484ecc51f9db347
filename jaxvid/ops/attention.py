"""Attention under a tree mask, inside segments, and from new tokens to a shared prompt.

    row    | prompt: video + question | branch 1 | branch 2 | next tree ... | pad |
    end    | e e e e ...          e   | b1 .. b1 | b2 .. b2 | ...           | 0 0 |

    token i sees token j   iff   j <= i < end[j]

Grouped queries: N query heads share K kv heads, query head n reads kv head n // (N / K). A query
that sees nothing (padding) gives zeros and no gradient.
In order: reference, the tree's lower triangle, long rows, public function, decoding.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxvid.ops._choice import Impl

LONG = 2048  # longer rows never hold [N, T, T]
BLOCK = 256  # queries of one step of a long row
PARTS, SHORT = 4, 128  # runs of queries of a tree row; shorter rows are not cut
HIDDEN = -1e30  # finite, so that a row of nothing but HIDDEN has no NaN


def _mask(queries, end, segment_q, segment_k):
    """[B, T, S] of what queries at array index `queries` [T] see; None where all see all."""
    if end is not None:
        keys = jnp.arange(end.shape[1])
        causal = keys[None, :] <= queries[:, None]
        return causal[None] & (queries[None, :, None] < end[:, None, :])
    if segment_q is not None:
        same = segment_q[:, :, None] == segment_k[:, None, :]
        return same & (segment_q > 0)[:, :, None]
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
) -> Float[Array, "B T N H"]:
    """The definition, in XLA, with all of [B, N, T, S] in memory."""
    return _attend(q, k, v, _mask(jnp.arange(q.shape[1]), end, segment, segment))


def _triangle(q, k, v, end):
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
                _mask(jnp.arange(r.start, r.stop), end[:, : r.stop], None, None),
            )
            for r in runs
        ],
        axis=1,
    )


def _blocks(q, k, v, end, segment):
    """The reference, BLOCK queries at a time; the backward pass recomputes each block."""
    B, T, N, H = q.shape
    steps = -(-T // BLOCK)
    split = lambda x: jnp.pad(x, [(0, 0), (0, steps * BLOCK - T)] + [(0, 0)] * (x.ndim - 2))
    split_q = split(q).reshape(B, steps, BLOCK, N, H).swapaxes(0, 1)
    split_s = None
    if segment is not None:
        split_s = split(segment).reshape(B, steps, BLOCK).swapaxes(0, 1)

    @jax.checkpoint
    def step(_, block):
        i, q_i, s_i = block
        return None, _attend(q_i, k, v, _mask(i * BLOCK + jnp.arange(BLOCK), end, s_i, segment))

    _, y = jax.lax.scan(step, None, (jnp.arange(steps), split_q, split_s))
    return y.swapaxes(0, 1).reshape(B, steps * BLOCK, N, H)[:, :T]


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    end: Int[Array, "B S"] | None = None,
    segment: Int[Array, "B T"] | None = None,
    impl: Impl | None = None,
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention, softmax in float32.

    With `end` tokens see along their tree (the picture above). With `segment` they see, in both
    directions, the tokens of equal positive segment. With neither every query sees every key.
    `impl=None` is XLA everywhere; there is no Pallas kernel.
    """
    (T, N), (S, K) = q.shape[1:3], k.shape[1:3]
    if N % K:
        raise ValueError(f"{N} query heads do not divide over {K} kv heads; N must be a multiple")
    if end is not None and segment is not None:
        raise ValueError("attention takes `end` (a tree) or `segment` (both directions), not both")
    if (end is not None or segment is not None) and T != S:
        raise ValueError(f"a tree or segment mask needs queries = keys, got {T} and {S}")
    if impl not in (None, "xla"):
        raise ValueError(f"attention has no {impl!r} implementation; use impl='xla' or None")
    if max(T, S) > LONG:
        return _blocks(q, k, v, end, segment)
    if end is not None and T >= SHORT:
        return _triangle(q, k, v, end)
    return attention_ref(q, k, v, end, segment)


def decode_attention(
    q: Float[Array, "B G N H"],
    prompt_k: Float[Array, "B P K H"],
    prompt_v: Float[Array, "B P K H"],
    length: Int[Array, "B"],
    branch_k: Float[Array, "B G R K H"],
    branch_v: Float[Array, "B G R K H"],
    step: Int[Array, ""] | int,
) -> Float[Array, "B G N H"]:
    """One new token of each of G branches: sees its prompt's first `length` tokens, and entries
    0..`step` of its own branch. One softmax over both parts; the prompt is never copied per branch.
    """
    B, G, N, H = q.shape
    P, K, R = prompt_k.shape[1], prompt_k.shape[2], branch_k.shape[2]
    q = q.reshape(B, G, K, N // K, H)
    f32 = jnp.float32
    prompt = jnp.einsum("BGKNH,BPKH->BKGNP", q, prompt_k, preferred_element_type=f32) * H**-0.5
    branch = jnp.einsum("BGKNH,BGRKH->BKGNR", q, branch_k, preferred_element_type=f32) * H**-0.5
    seen = jnp.arange(P)[None] < length[:, None]
    prompt = jnp.where(seen[:, None, None, None], prompt, HIDDEN)
    branch = jnp.where((jnp.arange(R) <= step)[None, None, None, None], branch, HIDDEN)
    top = jnp.maximum(prompt.max(-1, keepdims=True), branch.max(-1, keepdims=True))
    # entry 0 of the branch is always seen, so `top` is a true logit and HIDDEN gives exp(..) = 0
    prompt, branch = jnp.exp(prompt - top), jnp.exp(branch - top)
    total = (prompt.sum(-1) + branch.sum(-1)).transpose(0, 2, 1, 3)[..., None]
    cast = lambda x: x.astype(q.dtype)
    y = jnp.einsum("BKGNP,BPKH->BGKNH", cast(prompt), prompt_v, preferred_element_type=f32)
    y += jnp.einsum("BKGNR,BGRKH->BGKNH", cast(branch), branch_v, preferred_element_type=f32)
    return (y / total).reshape(B, G, N, H).astype(q.dtype)
