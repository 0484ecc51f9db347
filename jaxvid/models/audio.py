"""The audio tower of Qwen2.5-Omni (https://arxiv.org/abs/2503.20215, section 2.2): log-mel frames
to features of the decoder's width, 40 ms each.

Two convolutions and the blocks of Whisper's encoder (https://arxiv.org/abs/2212.04356), over chunks
of two seconds: nothing in a chunk sees another, so chunks are rows. `Convolutions`, `sinusoids` and
encoder.Encoder are what another family's Whisper is made of.
Left out: dropout (the published models have none).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxvid.batch import AudioBatch
from jaxvid.models import encoder
from jaxvid.models.layers import Compute, LayerNorm, Linear

KERNEL = 3  # frames that an output of a convolution sees


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    encoder: encoder.Config
    out: int  # width of the decoder
    mels: int = 128
    chunk: int = 200  # mel frames that see each other
    max_positions: int = 1500  # what the export states: after the convolutions, two frames are one

    def __post_init__(self):
        if self.chunk < 4 or self.chunk % 4:
            raise ValueError(
                f"chunk={self.chunk} mel frames must be a multiple of 4: two become one in the "
                "convolutions and two of these one feature"
            )
        if self.chunk > 2 * self.max_positions:
            raise ValueError(
                f"a chunk of {self.chunk} mel frames has {self.chunk // 2} positions; there are "
                f"max_positions={self.max_positions}"
            )

    @property
    def slots(self) -> int:
        """Features of a chunk."""
        return self.chunk // 4


def features(frames: int) -> int:
    """Features of a sound of so many mel frames: the convolutions halve them, rounding up, and the
    pooling halves these, rounding down."""
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


def sinusoids(length: int, width: int) -> Float[np.ndarray, "T D"]:
    """Whisper's positions: sines of all wavelengths, then cosines. The wavelengths are rounded to
    float32 before they are multiplied, as in the published models."""
    scale = np.log(1e4) / (width // 2 - 1)
    each = np.exp(np.float32(-scale) * np.arange(width // 2, dtype=np.float32))
    turned = np.arange(length, dtype=np.float32)[:, None] * each[None]
    return np.concatenate([np.sin(turned), np.cos(turned)], axis=1)


class Convolution(nnx.Module):
    """y[t] = b + sum over k of x[stride t + k - 1] w[k], zeros beyond the ends."""

    def __init__(self, width: int, out: int, axes: str, *, stride: int, rngs: nnx.Rngs):
        self.stride = stride
        self.linear = Linear((width, KERNEL), (out,), axes, bias=True, rngs=rngs)

    def __call__(self, x: Float[Array, "C F I"]) -> Float[Array, "C O D"]:
        count = -(-x.shape[1] // self.stride)
        x = jnp.pad(x, [(0, 0), (1, self.stride), (0, 0)])
        last = self.stride * (count - 1) + 1
        seen = [x[:, k : k + last : self.stride] for k in range(KERNEL)]
        return self.linear(jnp.stack(seen, axis=-1))


class Convolutions(nnx.Module):
    """What Whisper's encoder begins with: mel frames to half as many of the encoder's width."""

    def __init__(self, mels: int, width: int, *, rngs: nnx.Rngs):
        self.first = Convolution(mels, width, "patch patch embed", stride=1, rngs=rngs)
        self.second = Convolution(width, width, "embed patch ffn", stride=2, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "C F Z"],
        length: Int[Array, "C"],  # frames after these are as if there were none
    ) -> Float[Array, "C O D"]:
        sound = (jnp.arange(x.shape[1])[None] < length[:, None])[..., None]
        x = jax.nn.gelu(self.first(x * sound), approximate=False)
        return jax.nn.gelu(self.second(x * sound), approximate=False)


class Tower(nnx.Module):
    def __init__(self, cfg: Config, compute: Compute, *, rngs: nnx.Rngs):
        self.cfg, self.compute = cfg, compute
        width = cfg.encoder.width
        self.convolutions = Convolutions(cfg.mels, width, rngs=rngs)
        self.encoder = encoder.Encoder(cfg.encoder, compute, rngs=rngs)
        self.norm = LayerNorm(width, eps=cfg.encoder.norm_eps)
        self.out = Linear((width,), (cfg.out,), "ffn embed", bias=True, rngs=rngs)
        # Two embeddings that published files have and nothing reads: an export has them too.
        self.marks = nnx.Param(jnp.zeros((2, cfg.out), jnp.float32), axes=("patch", "embed"))

    def __call__(self, sound: AudioBatch) -> Float[Array, "B P D"]:
        """Features of each row, chunk by chunk, slots a chunk. A chunk of `length` frames has
        `features(length)` of them; the rest are finite and nobody reads them."""
        sound = AudioBatch(*map(jnp.asarray, sound))
        B, A, F, Z = sound.features.shape
        if (F, Z) != (self.cfg.chunk, self.cfg.mels):
            raise ValueError(
                f"chunks of {F} frames of {Z} mel bins; this tower wants {self.cfg.chunk} of "
                f"{self.cfg.mels}. Make the features with this model's settings."
            )
        length = sound.length.reshape(B * A)
        x = sound.features.reshape(B * A, F, Z).astype(self.compute.dtype)
        x = self.convolutions(x, length)
        x = x + jnp.asarray(sinusoids(x.shape[1], x.shape[2]), x.dtype)[None]
        segment = (jnp.arange(x.shape[1])[None] < (length[:, None] + 1) // 2).astype(jnp.int32)
        x = self.encoder(x, segment)
        x = (x[:, ::2] + x[:, 1::2]) / 2
        return self.out(self.norm(x)).reshape(B, -1, self.cfg.out)
