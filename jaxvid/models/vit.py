"""The image towers of the LLaVA families: CLIP (https://arxiv.org/abs/2103.00020) and SigLIP
(https://arxiv.org/abs/2303.15343), a frame or a tile at a time. All frames have one size, which
the learned positions give.

Left out: interpolated positions, SigLIP's attention pooling head. The norm after the last layer and
the layers after the one taken are parameters that nothing reads: the files have them.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxvid.batch import VisionBatch
from jaxvid.models import encoder
from jaxvid.models.encoder import Encoder
from jaxvid.models.family import Path, Place, Places
from jaxvid.models.layers import Compute, LayerNorm, Linear
from jaxvid.models.vision import CLIP_MEAN, CLIP_STD, normalise

SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    layers: int
    width: int
    ffn: int
    heads: int
    image: int  # side of a frame in pixels
    patch: int
    kind: str = "clip"  # a class token, a norm before the layers, patches without bias; or "siglip"
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    unused: int = 0  # of the layers, how many of the last are not run
    channels: int = 3
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD

    def __post_init__(self):
        _ = self.encoder  # refuses what it must
        if self.kind not in ("clip", "siglip"):
            raise ValueError(f"kind={self.kind!r} of tower is not known; choose 'clip' or 'siglip'")
        if self.image < self.patch:
            raise ValueError(f"image={self.image} pixels holds no patch of {self.patch}")
        if not len(self.image_mean) == len(self.image_std) == self.channels:
            raise ValueError(
                f"image_mean={self.image_mean} and image_std={self.image_std} must have one value "
                f"for each of {self.channels} channels"
            )

    @property
    def encoder(self) -> encoder.Config:
        return encoder.Config(
            layers=self.layers,
            width=self.width,
            ffn=self.ffn,
            heads=self.heads,
            activation=self.activation,
            norm_eps=self.norm_eps,
            unused=self.unused,
        )

    @property
    def side(self) -> int:
        """Patches along a side of a frame; what is left of the pixels is not seen."""
        return self.image // self.patch

    @property
    def patch_values(self) -> int:
        return self.channels * self.patch**2


class Tower(nnx.Module):
    def __init__(self, cfg: Config, compute: Compute, *, rngs: nnx.Rngs):
        self.cfg, self.compute = cfg, compute
        clip, W = cfg.kind == "clip", cfg.width
        draw = lambda *dims: W**-0.5 * jax.random.normal(rngs.params(), dims, jnp.float32)
        self.embed = Linear((cfg.patch_values,), (W,), "patch embed", bias=not clip, rngs=rngs)
        self.start = nnx.Param(draw(W), axes=("embed",)) if clip else None  # the class token
        self.positions = nnx.Param(draw(cfg.side**2 + clip, W), axes=("patch", "embed"))
        self.before = LayerNorm(W, eps=cfg.norm_eps) if clip else None
        self.encoder = Encoder(cfg.encoder, compute, rngs=rngs)
        self.after = LayerNorm(W, eps=cfg.norm_eps)

    def __call__(self, vision: VisionBatch) -> Float[Array, "B E Q W"]:
        """The patches' features of each frame, in raster order, after the last layer that runs.
        Padding gives finite features nobody reads. Raises ValueError for frames of another size."""
        vision = VisionBatch(*map(jnp.asarray, vision))
        B, E, Q, C = vision.patches.shape
        wanted = self.cfg.side**2, self.cfg.patch_values
        if (Q, C) != wanted:
            raise ValueError(
                f"frames of {Q} patches of {C} values; this tower wants {wanted[0]} of {wanted[1]} "
                f"({self.cfg.channels} channels x {self.cfg.patch} x {self.cfg.patch}, frames of "
                f"{self.cfg.image} pixels a side). Patchify with this model's settings."
            )
        pixels = vision.patches.reshape(B * E, Q, C)
        x = normalise(pixels, self.cfg.image_mean, self.cfg.image_std, self.compute.dtype)
        x = self.embed(x)
        segment = jnp.minimum(vision.window.reshape(B * E, Q), 1)
        if self.start is not None:
            start = self.start[...].astype(x.dtype)[None, None]
            x = jnp.concatenate([jnp.broadcast_to(start, (B * E, 1, x.shape[-1])), x], axis=1)
            segment = jnp.concatenate([segment.max(axis=1, keepdims=True), segment], axis=1)
        x = x + self.positions[...].astype(x.dtype)[None]
        if self.before is not None:
            x = self.before(x)
        x = self.encoder(x, segment)[:, -Q:]
        return x.reshape(B, E, Q, -1)


def places(out: Places, cfg: Config, at: Path, name: str) -> None:
    """Those of the tower at `at`, whose files call it `name`."""
    clip = cfg.kind == "clip"
    pixels = (cfg.channels, cfg.patch, cfg.patch)  # a convolution in the files
    out[*at, "embed", "w"] = Place(f"{name}.embeddings.patch_embedding.weight", 1, stored=pixels)
    out[*at, "positions"] = Place(f"{name}.embeddings.position_embedding.weight")
    if clip:
        out[*at, "start"] = Place(f"{name}.embeddings.class_embedding")
        out.norm((*at, "before"), f"{name}.pre_layrnorm", bias=True)
    else:
        out[*at, "embed", "b"] = Place(f"{name}.embeddings.patch_embedding.bias")
    out.norm((*at, "after"), f"{name}.post_layernorm", bias=True)
    _block_places(out, (*at, "encoder", "blocks"), f"{name}.encoder.layers.{{}}")
    for i in range(cfg.unused):
        layer = cfg.layers - cfg.unused + i
        _block_places(out, (*at, "encoder", "unused", str(i)), f"{name}.encoder.layers.{layer}")


def _block_places(out, at, block):
    out.norm((*at, "attention_norm"), f"{block}.layer_norm1", bias=True)
    out.norm((*at, "mlp_norm"), f"{block}.layer_norm2", bias=True)
    for which in "qkv":
        out.linear((*at, "attention", which), f"{block}.self_attn.{which}_proj", bias=True)
    out.linear((*at, "attention", "out"), f"{block}.self_attn.out_proj", bias=True, inputs=2)
    out.linear((*at, "mlp", "hidden"), f"{block}.mlp.fc1", bias=True)
    out.linear((*at, "mlp", "out"), f"{block}.mlp.fc2", bias=True)
