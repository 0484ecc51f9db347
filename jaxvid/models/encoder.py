"""Pre-LN transformer encoder: the blocks of CLIP, SigLIP and Whisper, without what comes before and
after them. Every token sees, in both directions, the tokens of its own segment.

Equation of a block: x + attention(LN(x)), then x + mlp(LN(x))
(https://arxiv.org/abs/2010.11929, eq. 2 and 3; https://arxiv.org/abs/2212.04356, section 2.2).
Left out: dropout (the published models have none) and rotary positions (models/vision.py has them).
"""

import dataclasses
import math

from flax import nnx
from jaxtyping import Array, Float, Int

from jaxvid.models.layers import ACTIVATIONS, MLP, Compute, LayerNorm, Linear, scan, stack
from jaxvid.ops.attention import attention
from jaxvid.sharding import fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    layers: int
    width: int
    ffn: int
    heads: int
    activation: str = "gelu"  # of the MLP, one of ACTIVATIONS
    norm_eps: float = 1e-5
    key_bias: bool = True  # Whisper's keys have none; queries, values and the output always do
    unused: int = 0  # of the layers, how many of the last are kept but not run

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation={self.activation!r} is not known; choose one of {sorted(ACTIVATIONS)}"
            )
        if not 0 <= self.unused < self.layers:
            raise ValueError(
                f"unused={self.unused} of {self.layers} layers: give a number that leaves one"
            )


class Attention(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        D, N, H = cfg.width, cfg.heads, cfg.width // cfg.heads
        self.q = Linear((D,), (N, H), "embed heads head", bias=True, rngs=rngs)
        self.k = Linear((D,), (N, H), "embed heads head", bias=cfg.key_bias, rngs=rngs)
        self.v = Linear((D,), (N, H), "embed heads head", bias=True, rngs=rngs)
        out_scale = 1 / math.sqrt(2 * cfg.layers)
        self.out = Linear((N, H), (D,), "heads head embed", bias=True, scale=out_scale, rngs=rngs)

    def __call__(self, x, segment):
        return self.out(attention(self.q(x), self.k(x), self.v(x), segment=segment))


class Block(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.attention_norm = LayerNorm(cfg.width, eps=cfg.norm_eps)
        self.attention = Attention(cfg, rngs=rngs)
        self.mlp_norm = LayerNorm(cfg.width, eps=cfg.norm_eps)
        out_scale = 1 / math.sqrt(2 * cfg.layers)
        widths = cfg.width, cfg.ffn, cfg.width
        self.mlp = MLP(widths, cfg.activation, out_scale=out_scale, rngs=rngs)

    def __call__(self, x, segment):
        x = x + self.attention(self.attention_norm(x), segment)
        return x + self.mlp(self.mlp_norm(x))


class Encoder(nnx.Module):
    """Blocks alone. The last `unused` are parameters of their own that nothing reads: a model that
    takes an earlier hidden state has them in its files, and an export must have them too. They are
    not part of the stack, so that leaving them out costs no copy of the weights that run."""

    def __init__(self, cfg: Config, compute: Compute, *, rngs: nnx.Rngs):
        self.compute = compute
        build = lambda rngs: Block(cfg, rngs=rngs)
        self.blocks = stack(build, cfg.layers - cfg.unused, rngs)
        self.unused = nnx.List([build(rngs) for _ in range(cfg.unused)])

    def __call__(
        self,
        x: Float[Array, "F Q W"],
        segment: Int[Array, "F Q"],  # tokens of equal positive segment see each other; 0 is padding
    ) -> Float[Array, "F Q W"]:
        """The hidden state after the last layer that runs, without a norm. Padding gives finite
        values that nobody reads."""

        def layer(x, block, _):
            return block(fit(x, "rows", "tokens", None), segment), None

        return scan(layer, x, self.blocks, None, self.compute)[0]
