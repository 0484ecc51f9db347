"""Decoder of the Llama kind: RMSNorm, grouped-query attention with (M-)RoPE, gated MLP.

Parameters live in the module; positions, tree ends and caches come in and go out. One block is
traced once and scanned over the stacked layers. A prompt's cache is one copy, whatever the number
of branches that grow from it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxvid.models.layers import Compute, GatedMLP, Linear, RMSNorm, lookup, scan, stack
from jaxvid.ops.attention import attention, decode_attention
from jaxvid.ops.rope import rope
from jaxvid.sharding import collect, deal, fit, pieces


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    rope_sections: tuple[int, int, int]  # frequency pairs that follow time, height, width
    interleaved: bool = False  # the sections lie t h w t h w ..., not one after the other
    head_dim: int = 0  # 0 is width / heads
    qkv_bias: bool = True
    qk_norm: bool = False  # RMSNorm of each head of queries and keys, before they turn
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    max_positions: int = 32_768  # what the export states; nothing here depends on it
    window: int = 0  # tokens of its own path that a token sees, itself included; 0 is all

    def __post_init__(self):
        if self.window < 0:
            raise ValueError(f"window={self.window}: give a number of tokens, or 0 for no window")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        if not self.head_dim and self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}")
        if 2 * sum(self.rope_sections) != self.head:
            raise ValueError(
                f"rope_sections={self.rope_sections} sum to {sum(self.rope_sections)}; they must "
                f"sum to half of the head dimension, {self.head} / 2"
            )

    @property
    def head(self) -> int:
        return self.head_dim or self.width // self.heads


class KV(NamedTuple):
    """Keys (turned by their positions) and values: of a prompt [L, B, T, K, H], or of its
    branches [L, B, G, R, K, H]."""

    k: Float[Array, "L B *rest K H"]
    v: Float[Array, "L B *rest K H"]


def empty_branches(prompt: KV, groups: int, tokens: int) -> KV:
    """An unwritten cache for `groups` branches of up to `tokens` tokens on each row's prompt."""
    L, B, _, K, H = prompt.k.shape
    zeros = jnp.zeros((L, B, groups, tokens, K, H), prompt.k.dtype)
    return KV(zeros, zeros)


class Attention(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.sections, self.interleaved = cfg.rope_sections, cfg.interleaved
        self.theta = cfg.rope_theta
        D, N, K, H, bias = cfg.width, cfg.heads, cfg.kv_heads, cfg.head, cfg.qkv_bias
        self.q = Linear((D,), (N, H), "embed heads head", bias=bias, rngs=rngs)
        self.k = Linear((D,), (K, H), "embed kv_heads head", bias=bias, rngs=rngs)
        self.v = Linear((D,), (K, H), "embed kv_heads head", bias=bias, rngs=rngs)
        self.q_norm = RMSNorm(H, eps=cfg.norm_eps, axis="head") if cfg.qk_norm else None
        self.k_norm = RMSNorm(H, eps=cfg.norm_eps, axis="head") if cfg.qk_norm else None
        out_scale = 1 / math.sqrt(2 * cfg.layers)
        self.out = Linear((N, H), (D,), "heads head embed", scale=out_scale, rngs=rngs)

    def qkv(self, x: Float[Array, "B T D"], positions: Int[Array, "B 3 T"]):
        q, k = self.q(x), self.k(x)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        how = {"sections": self.sections, "interleaved": self.interleaved, "theta": self.theta}
        q, k = rope((q, k), positions, **how)
        return q, k, self.v(x)


class Block(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(cfg.width, eps=cfg.norm_eps)
        self.attention = Attention(cfg, rngs=rngs)
        self.mlp_norm = RMSNorm(cfg.width, eps=cfg.norm_eps)
        out_scale = 1 / math.sqrt(2 * cfg.layers)
        self.mlp = GatedMLP(cfg.width, cfg.ffn, out_scale=out_scale, rngs=rngs)

    def __call__(self, x, positions, attend, ffn_parts=1):
        """`attend(q, k, v) -> y` decides what is seen. Returns x and this layer's new k and v."""
        q, k, v = self.attention.qkv(self.attention_norm(x), positions)
        x = x + self.attention.out(attend(q, k, v))
        return x + self.mlp(self.mlp_norm(x), ffn_parts), (k, v)


class Decoder(nnx.Module):
    def __init__(self, cfg: Config, compute: Compute, *, rngs: nnx.Rngs):
        self.compute, self.window, self.layers = compute, cfg.window, cfg.layers
        table = 0.02 * jax.random.normal(rngs.params(), (cfg.vocab, cfg.width), jnp.float32)
        self.table = nnx.Param(table, axes=("vocab", "embed"))
        self.blocks = stack(lambda rngs: Block(cfg, rngs=rngs), cfg.layers, rngs)
        self.norm = RMSNorm(cfg.width, eps=cfg.norm_eps)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return lookup(self.table[...], tokens, self.compute.dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],  # token embeddings with vision features already in place
        positions: Int[Array, "B 3 T"],
        end: Int[Array, "B T"],
        depth: Int[Array, "B T"],  # read where there is a window
        *,
        keep: bool = False,
        deep: Callable[[Int[Array, ""]], Float[Array, "B T D"]] | None = None,
    ) -> tuple[Float[Array, "B T D"], KV | None]:
        """Hidden states after the final norm, never logits; with `keep`, every layer's k and v.

        `deep(i)` is added to what leaves layer i: Qwen3-VL's features of deeper vision blocks. Over
        an axis `context` of the mesh every device runs its own part of each row."""
        index, split = None, pieces(x.shape[1]) > 0 and not keep  # a cache is in order
        if split:
            index = jnp.broadcast_to(jnp.arange(x.shape[1])[None], end.shape)
            x, positions = deal(x), deal(positions, 2)
            end, depth, index = map(deal, (end, depth, index))
        path = depth if self.window else None
        sees = {"end": end, "depth": path, "index": index, "window": self.window}
        attend = lambda q, k, v: attention(q, k, v, **sees)

        def layer(x, block, i):
            x = fit(x, "rows", "tokens", None)
            x, kv = block(x, positions, attend, self.compute.ffn_parts)
            if deep is not None:
                x = x + (deal(deep(i)) if split else deep(i))
            return x, KV(*kv) if keep else None

        layers = None if deep is None else jnp.arange(self.layers)
        x, kv = scan(layer, x, self.blocks, layers, self.compute)
        x = self.norm(x)
        return collect(x) if split else x, kv

    def step(
        self,
        x: Float[Array, "B G D"],
        positions: Int[Array, "B G"],
        prompt: KV,
        length: Int[Array, "B"],  # tokens of the prompt; what follows in its cache is padding
        branch: KV,
        step: int | Int[Array, ""] | Int[Array, "B"],  # index of the new token in its branch
        at: int | Int[Array, ""] | None = None,  # its column of the cache; None is `step`
    ) -> tuple[Float[Array, "B G D"], KV]:
        """One new token on each of G branches of each prompt. Rows may be at different steps; all
        write into one column, which is what a cache can take in place (`decode_attention`)."""
        B, G, _ = x.shape
        x = fit(x, "rows", None, None)
        positions = jnp.broadcast_to(positions[:, None], (B, 3, G))
        column = step if at is None else at

        def layer(carry, block, extra):
            x, branch = carry
            i, prompt_k, prompt_v = extra
            write = lambda cache, new: jax.lax.dynamic_update_slice(
                cache, new[None, :, :, None], (i, 0, 0, column, 0, 0)
            )
            written = []  # the caches with this layer's new k and v in them

            def attend(q, k, v):
                written.extend((write(branch.k, k), write(branch.v, v)))
                here = written[0][i], written[1][i]
                return decode_attention(q, prompt_k, prompt_v, length, *here, step, self.window, at)

            x, _ = block(x, positions, attend)
            return (x, KV(*written)), None

        layers = jnp.arange(prompt.k.shape[0])
        compute = dataclasses.replace(self.compute, remat="none")
        extras = (layers, prompt.k, prompt.v)
        (x, branch), _ = scan(layer, (x, branch), self.blocks, extras, compute)
        return self.norm(x), branch
