"""Window Q-Former: a few learned queries gather what stands in each window of a sequence.

The Q-Former of BLIP-2 (https://arxiv.org/abs/2301.12597, section 3.1) without text, cross-attention
in every layer, applied to each window alone (SALMONN, https://arxiv.org/abs/2310.13289, eq. 2). A
layer is BERT's, the norm after the sum:

    x = LN(x + attention(x, x)); x = LN(x + attention(x, window)); x = LN(x + mlp(x))

Left out: dropout, windows that overlap, positions (the sequence brings its own).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxvid.models.family import Path, Place, Places
from jaxvid.models.layers import ACTIVATIONS, MLP, Compute, LayerNorm, Linear, scan, stack
from jaxvid.ops.attention import attention
from jaxvid.sharding import fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    layers: int
    width: int
    ffn: int
    heads: int
    source: int  # width of the sequence that is asked
    window: int  # of its frames, how many one set of queries sees
    queries: int = 1  # features of a window
    activation: str = "gelu"  # of the MLP, one of ACTIVATIONS
    norm_eps: float = 1e-12

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation={self.activation!r} is not known; choose one of {sorted(ACTIVATIONS)}"
            )
        if min(self.layers, self.window, self.queries) < 1:
            raise ValueError(
                f"layers={self.layers}, window={self.window}, queries={self.queries}: each must be "
                "at least 1"
            )


class Attention(nnx.Module):
    """LN(x + out(attention of x over y)), where y has the width `source`."""

    def __init__(self, cfg: Config, source: int, *, rngs: nnx.Rngs):
        D, N, H = cfg.width, cfg.heads, cfg.width // cfg.heads
        self.q = Linear((D,), (N, H), "embed heads head", bias=True, rngs=rngs)
        self.k = Linear((source,), (N, H), "embed heads head", bias=True, rngs=rngs)
        self.v = Linear((source,), (N, H), "embed heads head", bias=True, rngs=rngs)
        self.out = Linear((N, H), (D,), "heads head embed", bias=True, rngs=rngs)
        self.norm = LayerNorm(D, eps=cfg.norm_eps)

    def __call__(self, x, y):
        return self.norm(x + self.out(attention(self.q(x), self.k(y), self.v(y))))


class Block(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.itself = Attention(cfg, cfg.width, rngs=rngs)
        self.source = Attention(cfg, cfg.source, rngs=rngs)
        self.mlp = MLP((cfg.width, cfg.ffn, cfg.width), cfg.activation, rngs=rngs)
        self.norm = LayerNorm(cfg.width, eps=cfg.norm_eps)

    def __call__(self, x, window):
        x = self.source(self.itself(x, x), window)
        return self.norm(x + self.mlp(x))


class QFormer(nnx.Module):
    def __init__(self, cfg: Config, compute: Compute, *, rngs: nnx.Rngs):
        self.cfg, self.compute = cfg, compute
        shape = (1, cfg.queries, cfg.width)
        queries = 0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.queries = nnx.Param(queries, axes=("merged", "patch", "embed"))
        self.norm = LayerNorm(cfg.width, eps=cfg.norm_eps)
        self.blocks = stack(lambda rngs: Block(cfg, rngs=rngs), cfg.layers, rngs)

    def __call__(self, x: Float[Array, "C O I"]) -> Float[Array, "C P D"]:
        """The features of each window of each sequence, window by window. Raises ValueError for
        sequences that do not divide into windows."""
        C, O, I = x.shape
        size = self.cfg.window
        if O % size or I != self.cfg.source:
            raise ValueError(
                f"sequences of {O} frames of width {I}; this Q-Former wants a multiple of {size} "
                f"frames of width {self.cfg.source}"
            )
        windows = x.reshape(-1, size, I)
        queries = self.norm(self.queries[...]).astype(x.dtype)
        queries = jnp.broadcast_to(queries, (len(windows), *queries.shape[1:]))

        def layer(y, block, _):
            return block(fit(y, "rows", "tokens", None), windows), None

        y = scan(layer, queries, self.blocks, None, self.compute)[0]
        return y.reshape(C, -1, self.cfg.width)


def places(out: Places, at: Path, name: str) -> None:
    """Those of the Q-Former at `at`, whose files call it `name`; its queries are `query_tokens`."""
    out[*at, "queries"] = Place("query_tokens")
    out.norm((*at, "norm"), f"{name}.layernorm", bias=True)
    at, block = (*at, "blocks"), f"{name}.encoder.layer.{{}}"
    for ours, theirs in (("itself", "attention"), ("source", "crossattention")):
        for which, word in (("q", "query"), ("k", "key"), ("v", "value")):
            out.linear((*at, ours, which), f"{block}.{theirs}.attention.{word}", bias=True)
        out.linear((*at, ours, "out"), f"{block}.{theirs}.output.dense", bias=True, inputs=2)
        out.norm((*at, ours, "norm"), f"{block}.{theirs}.output.LayerNorm", bias=True)
    out.linear((*at, "mlp", "hidden"), f"{block}.intermediate_query.dense", bias=True)
    out.linear((*at, "mlp", "out"), f"{block}.output_query.dense", bias=True)
    out.norm((*at, "norm"), f"{block}.output_query.LayerNorm", bias=True)
