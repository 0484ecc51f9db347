"""The vision tower of Qwen3-VL (https://arxiv.org/abs/2511.21631): patches to merged features,
frame by frame, and with them what leaves a few blocks on the way, for the decoder's first layers
(DeepStack, https://arxiv.org/abs/2406.04334).

A patch knows its place twice: from a learned square table, stretched over the frame whatever its
shape, and from two-dimensional rope. Attention is over the whole of a temporal patch. The patches
stay in merge order throughout.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxvid.batch import VisionBatch
from jaxvid.models import encoder
from jaxvid.models.family import Place, Places
from jaxvid.models.layers import MLP, Compute, LayerNorm, Linear, scan, stack
from jaxvid.models.vision import normalise
from jaxvid.ops.attention import attention
from jaxvid.ops.rope import rope2d
from jaxvid.sharding import fit

NORM_EPS = 1e-6  # the published family has no setting for it
HALF = (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    layers: int
    width: int
    ffn: int
    heads: int
    out: int  # width of the decoder
    deep: tuple[int, ...]  # blocks whose output goes to the decoder's first layers too
    positions: int = 2304  # rows of the position table, a square
    patch: int = 16
    temporal: int = 2
    merge: int = 2
    channels: int = 3
    rope_theta: float = 1e4
    image_mean: tuple[float, ...] = HALF
    image_std: tuple[float, ...] = HALF

    def __post_init__(self):
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise ValueError(
                f"width={self.width} must be heads={self.heads} times a multiple of 4 "
                "(two coordinates, two halves)"
            )
        if self.side**2 != self.positions:
            raise ValueError(f"positions={self.positions} is not the number of a square's places")
        rising = all(a < b for a, b in zip(self.deep, self.deep[1:]))
        if not rising or any(not 0 <= i < self.layers for i in self.deep):
            raise ValueError(
                f"deep={self.deep}: name blocks of 0 to {self.layers - 1}, each once, in order"
            )

    @property
    def side(self) -> int:
        """Places along a side of the position table."""
        return math.isqrt(self.positions)

    @property
    def patch_values(self) -> int:
        return self.channels * self.temporal * self.patch**2


class Block(encoder.Block):
    """The encoder's, whose queries and keys turn with their patch's row and column."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.theta = cfg.rope_theta
        plain = encoder.Config(
            layers=cfg.layers,
            width=cfg.width,
            ffn=cfg.ffn,
            heads=cfg.heads,
            activation="gelu_tanh",
            norm_eps=NORM_EPS,
        )
        super().__init__(plain, rngs=rngs)

    def __call__(self, x, coords, segment):
        a, y = self.attention, self.attention_norm(x)
        turn = lambda z: rope2d(z, coords, theta=self.theta)
        x = x + a.out(attention(turn(a.q(y)), turn(a.k(y)), a.v(y), segment=segment))
        return x + self.mlp(self.mlp_norm(x))


class Merger(nnx.Module):
    """merge x merge neighbouring patches to one feature of the decoder's width. `together`: the
    norm is over all the neighbours at once, not over each patch."""

    def __init__(self, cfg: Config, *, together: bool, rngs: nnx.Rngs):
        inner = cfg.width * cfg.merge**2
        self.norm = LayerNorm(inner if together else cfg.width, eps=NORM_EPS)
        self.mlp = MLP((inner, inner, cfg.out), "gelu", rngs=rngs)
        self.together, self.inner = together, inner

    def __call__(self, x: Float[Array, "F Q W"]) -> Float[Array, "F P D"]:
        group = lambda x: x.reshape(x.shape[0], -1, self.inner)
        return self.mlp(self.norm(group(x)) if self.together else group(self.norm(x)))


def stretched(
    coords: Int[Array, "F Q 2"], extent: Int[Array, "F 2"], side: int
) -> Float[Array, "F Q _"]:
    """How much of each of a square table's side x side places a patch takes: bilinear, with the
    corners of the frame on the corners of the table (`align_corners` of torch's `interpolate`).

    `extent` is (rows, columns) of patches of each frame. float32; each row sums to 1.
    """
    at = coords.astype(jnp.float32) * (side - 1)
    at = at / jnp.maximum(extent - 1, 1).astype(jnp.float32)[:, None]
    near = 1 - jnp.abs(at[..., None] - jnp.arange(side, dtype=jnp.float32)[None, None, None])
    row, column = jnp.moveaxis(jnp.maximum(near, 0), 2, 0)
    return (row[..., :, None] * column[..., None, :]).reshape(*coords.shape[:2], side**2)


class Tower(nnx.Module):
    def __init__(self, cfg: Config, compute: Compute, *, rngs: nnx.Rngs):
        self.cfg, self.compute = cfg, compute
        values, W = cfg.patch_values, cfg.width
        self.embed = Linear((values,), (W,), "patch embed", bias=True, rngs=rngs)
        # A product and not a look-up of four rows: its gradient is a product too, and on a mesh the
        # table is gathered as any weight is. It is under a hundredth of the blocks' work.
        self.positions = Linear((cfg.positions,), (W,), "patch embed", rngs=rngs)
        self.blocks = stack(lambda rngs: Block(cfg, rngs=rngs), cfg.layers, rngs)
        self.merger = Merger(cfg, together=False, rngs=rngs)
        build = lambda rngs: Merger(cfg, together=True, rngs=rngs)
        self.deep = stack(build, len(cfg.deep), rngs) if cfg.deep else None

    def __call__(
        self, vision: VisionBatch
    ) -> tuple[Float[Array, "B P D"], Float[Array, "I B P D"] | None]:
        """Merged features of each row, frame-major: of the last block, and of each of the `deep`
        ones (None without any). Padding gives finite features nobody reads."""
        vision = VisionBatch(*map(jnp.asarray, vision))
        cfg, (B, E, Q, C) = self.cfg, vision.patches.shape
        if C != cfg.patch_values:
            raise ValueError(
                f"patches of {C} values; this tower wants {cfg.patch_values} ({cfg.channels} "
                f"channels x {cfg.temporal} frames x {cfg.patch} x {cfg.patch}). Patchify with "
                f"this model's settings."
            )
        pixels = vision.patches.reshape(B * E, Q, C)
        coords = vision.coords.reshape(B * E, Q, 2)
        seen = jnp.minimum(vision.window.reshape(B * E, Q), 1)  # the whole frame is one segment
        x = normalise(pixels, cfg.image_mean, cfg.image_std, self.compute.dtype)
        x = self.embed(x) + self._places(coords, seen)
        x, taps = self._blocks(x, coords, seen)
        put = self.merger(x).reshape(B, -1, cfg.out)
        if self.deep is None:
            return put, None
        merge = lambda _, merger, x: (None, merger(x))
        _, deep = scan(merge, None, self.deep, taps, self.compute)
        return put, deep.reshape(len(cfg.deep), B, -1, cfg.out)

    def _places(self, coords, seen):
        """What the table says of each patch's place in its frame."""

        def places(coords, seen):
            extent = jnp.max((coords + 1) * seen[..., None], axis=1)
            some = stretched(coords, extent, self.cfg.side)
            return self.positions(some.astype(self.compute.dtype))

        # [F, Q, positions] is larger than all else outside of the blocks, and quickly made again.
        return (jax.checkpoint(places) if self.compute.remat != "none" else places)(coords, seen)

    def _blocks(self, x, coords, seen):
        """The last block's output, and that of each deep block. They are written into one array as
        they come, the others' into a last place of it that is left out."""
        cfg, count = self.cfg, len(self.cfg.deep)
        to = np.full(cfg.layers, count)
        to[list(cfg.deep)] = np.arange(count)
        taps = jnp.zeros((count + 1, *x.shape), x.dtype)

        def layer(carry, block, to):
            x, taps = carry
            x = block(fit(x, "rows", "tokens", None), coords, seen)
            taps = jax.lax.dynamic_update_slice(taps, x[None], (to, 0, 0, 0))
            return (x, fit(taps, None, "rows", "tokens", None)), None

        (x, taps), _ = scan(layer, (x, taps), self.blocks, jnp.asarray(to), self.compute)
        return x, taps[:count]


def places(out: Places, cfg: Config, name: str) -> None:
    """Those of the tower at ("tower",), whose files call it `name`."""
    values = (cfg.channels, cfg.temporal, cfg.patch, cfg.patch)  # a 3-D convolution in the files
    out["tower", "embed", "w"] = Place(f"{name}.patch_embed.proj.weight", 1, stored=values)
    out["tower", "embed", "b"] = Place(f"{name}.patch_embed.proj.bias")
    out["tower", "positions", "w"] = Place(f"{name}.pos_embed.weight")
    at, block = ("tower", "blocks"), f"{name}.blocks.{{}}"
    out.norm((*at, "attention_norm"), f"{block}.norm1", bias=True)
    out.norm((*at, "mlp_norm"), f"{block}.norm2", bias=True)
    for part, which in enumerate("qkv"):
        out.linear((*at, "attention", which), f"{block}.attn.qkv", bias=True, part=part, parts=3)
    out.linear((*at, "attention", "out"), f"{block}.attn.proj", bias=True, inputs=2)
    out.linear((*at, "mlp", "hidden"), f"{block}.mlp.linear_fc1", bias=True)
    out.linear((*at, "mlp", "out"), f"{block}.mlp.linear_fc2", bias=True)
    _merger_places(out, ("tower", "merger"), f"{name}.merger")
    if cfg.deep:
        _merger_places(out, ("tower", "deep"), f"{name}.deepstack_merger_list.{{}}")


def _merger_places(out, at, merger):
    out.norm((*at, "norm"), f"{merger}.norm", bias=True)
    out.linear((*at, "mlp", "hidden"), f"{merger}.linear_fc1", bias=True)
    out.linear((*at, "mlp", "out"), f"{merger}.linear_fc2", bias=True)
