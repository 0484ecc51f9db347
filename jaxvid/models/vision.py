"""The vision tower of Qwen2.5-VL: patches to merged features, frame by frame.

Attention stays inside a temporal patch: in most blocks inside a window of it, in the `full` blocks
over all of it. Both are one block with another segment id, so that the stack is scanned. The
patches stay in merge order throughout (a window needs no permutation: it is an id).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from jaxvid.batch import VisionBatch
from jaxvid.models.layers import Compute, GatedMLP, Linear, RMSNorm, scan, stack
from jaxvid.ops.attention import attention
from jaxvid.ops.rope import rope2d
from jaxvid.sharding import fit

NORM_EPS = 1e-6  # the published family has no setting for it
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    layers: int
    width: int
    ffn: int
    heads: int
    out: int  # width of the decoder
    full: tuple[int, ...]  # blocks that see the whole frame
    patch: int = 14
    temporal: int = 2
    merge: int = 2
    window: int = 112  # side of an attention window in pixels
    channels: int = 3
    rope_theta: float = 1e4
    tokens_per_second: int = 2  # of temporal position
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD

    def __post_init__(self):
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise ValueError(
                f"width={self.width} must be heads={self.heads} times a multiple of 4 "
                "(two coordinates, two halves)"
            )
        if self.window // self.merge // self.patch < 1:
            raise ValueError(
                f"window={self.window} pixels holds no merged token of {self.patch * self.merge}"
            )
        if bad := [i for i in self.full if not 0 <= i < self.layers]:
            raise ValueError(f"full={self.full} names blocks {bad}; there are {self.layers}")

    @property
    def patch_values(self) -> int:
        return self.channels * self.temporal * self.patch**2


class Attention(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.theta = cfg.rope_theta
        D, N, H = cfg.width, cfg.heads, cfg.width // cfg.heads
        self.q = Linear((D,), (N, H), "embed heads head", bias=True, rngs=rngs)
        self.k = Linear((D,), (N, H), "embed heads head", bias=True, rngs=rngs)
        self.v = Linear((D,), (N, H), "embed heads head", bias=True, rngs=rngs)
        out_scale = 1 / math.sqrt(2 * cfg.layers)
        self.out = Linear((N, H), (D,), "heads head embed", bias=True, scale=out_scale, rngs=rngs)

    def __call__(self, x, coords, segment):
        turn = lambda y: rope2d(y, coords, theta=self.theta)
        return self.out(attention(turn(self.q(x)), turn(self.k(x)), self.v(x), segment=segment))


class Block(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(cfg.width, eps=NORM_EPS)
        self.attention = Attention(cfg, rngs=rngs)
        self.mlp_norm = RMSNorm(cfg.width, eps=NORM_EPS)
        out_scale = 1 / math.sqrt(2 * cfg.layers)
        self.mlp = GatedMLP(cfg.width, cfg.ffn, bias=True, out_scale=out_scale, rngs=rngs)

    def __call__(self, x, coords, segment):
        x = x + self.attention(self.attention_norm(x), coords, segment)
        return x + self.mlp(self.mlp_norm(x))


class Merger(nnx.Module):
    """merge x merge neighbouring patches to one feature of the decoder's width."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        inner = cfg.width * cfg.merge**2
        self.norm = RMSNorm(cfg.width, eps=NORM_EPS)
        self.hidden = Linear((inner,), (inner,), "embed ffn", bias=True, rngs=rngs)
        self.out = Linear((inner,), (cfg.out,), "ffn embed", bias=True, rngs=rngs)

    def __call__(self, x: Float[Array, "F Q W"]) -> Float[Array, "F P D"]:
        x = self.norm(x).reshape(x.shape[0], -1, self.hidden.w.shape[0])
        return self.out(jax.nn.gelu(self.hidden(x), approximate=False))


def normalise(
    patches: UInt8[Array, "F Q C"], mean: tuple[float, ...], std: tuple[float, ...], dtype: str
) -> Float[Array, "F Q C"]:
    """Pixels 0..255 to the distribution a tower was trained on, in `dtype`. `mean` and `std` have a
    value for each channel; the values of a patch lie channel by channel."""
    each = patches.shape[-1] // len(mean)
    spread = lambda x: np.repeat(np.asarray(x, np.float32), each)
    mean, std = spread(mean), spread(std)
    x = patches.astype(jnp.float32) * (1 / (255 * std))[None, None] - (mean / std)[None, None]
    return x.astype(dtype)


class Tower(nnx.Module):
    def __init__(self, cfg: Config, compute: Compute, *, rngs: nnx.Rngs):
        self.cfg, self.compute = cfg, compute
        self.embed = Linear((cfg.patch_values,), (cfg.width,), "patch embed", rngs=rngs)
        self.blocks = stack(lambda rngs: Block(cfg, rngs=rngs), cfg.layers, rngs)
        self.merger = Merger(cfg, rngs=rngs)

    def __call__(self, vision: VisionBatch) -> Float[Array, "B P D"]:
        """Merged features of each row, frame-major. Padding gives finite features nobody reads."""
        vision = VisionBatch(*map(jnp.asarray, vision))
        B, E, Q, C = vision.patches.shape
        if C != self.cfg.patch_values:
            raise ValueError(
                f"patches of {C} values; this tower wants {self.cfg.patch_values} "
                f"({self.cfg.channels} channels x {self.cfg.temporal} frames x "
                f"{self.cfg.patch} x {self.cfg.patch}). Patchify with this model's settings."
            )
        pixels = vision.patches.reshape(B * E, Q, C)
        x = normalise(pixels, self.cfg.image_mean, self.cfg.image_std, self.compute.dtype)
        x = self.embed(x)
        coords = vision.coords.reshape(B * E, Q, 2)
        window = vision.window.reshape(B * E, Q)
        full = np.isin(np.arange(self.cfg.layers), self.cfg.full)

        def layer(x, block, is_full):
            segment = jnp.where(is_full, jnp.minimum(window, 1), window)
            return block(fit(x, "rows", "tokens", None), coords, segment), None

        x, _ = scan(layer, x, self.blocks, jnp.asarray(full), self.compute)
        return self.merger(x).reshape(B, -1, self.cfg.out)
