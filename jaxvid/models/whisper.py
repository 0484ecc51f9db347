"""Whisper's encoder (https://arxiv.org/abs/2212.04356, section 2.2) with its last norm: log-mel
frames of a chunk of 30 seconds to a state every 20 ms.

Positions are a table of the files: Whisper's own are sinusoids, which a fresh one begins with.
A chunk is heard to its end, with the silence that fills it.
Left out: dropout and layers skipped at random (the published models have none), the decoder.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxvid.batch import AudioBatch
from jaxvid.models import encoder
from jaxvid.models.audio import KERNEL, Convolutions, sinusoids
from jaxvid.models.family import Path, Place, Places
from jaxvid.models.layers import Compute, LayerNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    encoder: encoder.Config
    mels: int = 128
    positions: int = 1500  # states of a chunk

    def __post_init__(self):
        if self.encoder.key_bias:
            raise ValueError("key_bias=True; Whisper's keys have no bias, set encoder.key_bias")
        if self.positions < 1:
            raise ValueError(f"positions={self.positions} must be at least 1")

    @property
    def chunk(self) -> int:
        """Mel frames of a chunk: two become one state."""
        return 2 * self.positions


class Tower(nnx.Module):
    def __init__(self, cfg: Config, compute: Compute, *, rngs: nnx.Rngs):
        self.cfg, self.compute = cfg, compute
        width = cfg.encoder.width
        self.convolutions = Convolutions(cfg.mels, width, rngs=rngs)
        table = jnp.asarray(sinusoids(cfg.positions, width))
        self.positions = nnx.Param(table, axes=("patch", "embed"))
        self.encoder = encoder.Encoder(cfg.encoder, compute, rngs=rngs)
        self.norm = LayerNorm(width, eps=cfg.encoder.norm_eps)

    def __call__(self, sound: AudioBatch) -> Float[Array, "C O W"]:
        """The states of all chunks of all rows. Chunks of padding give finite states nobody reads.
        Raises ValueError for chunks of another size."""
        sound = AudioBatch(*map(jnp.asarray, sound))
        B, A, F, Z = sound.features.shape
        if (F, Z) != (self.cfg.chunk, self.cfg.mels):
            raise ValueError(
                f"chunks of {F} frames of {Z} mel bins; this tower wants {self.cfg.chunk} of "
                f"{self.cfg.mels}. Make the features with this model's settings."
            )
        there = sound.length.reshape(B * A) > 0
        x = sound.features.reshape(B * A, F, Z).astype(self.compute.dtype)
        x = self.convolutions(x, F * there.astype(jnp.int32))
        x = x + self.positions[...].astype(x.dtype)[None]
        segment = jnp.broadcast_to(there[:, None], x.shape[:2]).astype(jnp.int32)
        return self.norm(self.encoder(x, segment))


def places(out: Places, cfg: Config, at: Path, name: str) -> None:
    """Those of the tower at `at`, whose files call it `name`."""
    for ours, theirs, wide in (
        ("first", "conv1", cfg.mels),
        ("second", "conv2", cfg.encoder.width),
    ):
        path = (*at, "convolutions", ours, "linear")
        out[*path, "w"] = Place(f"{name}.{theirs}.weight", 2, stored=(wide, KERNEL))
        out[*path, "b"] = Place(f"{name}.{theirs}.bias")
    out[*at, "positions"] = Place(f"{name}.embed_positions.weight")
    out.norm((*at, "norm"), f"{name}.layer_norm", bias=True)
    at, block = (*at, "encoder", "blocks"), f"{name}.layers.{{}}"
    out.norm((*at, "attention_norm"), f"{block}.self_attn_layer_norm", bias=True)
    out.norm((*at, "mlp_norm"), f"{block}.final_layer_norm", bias=True)
    out.linear((*at, "mlp", "hidden"), f"{block}.fc1", bias=True)
    out.linear((*at, "mlp", "out"), f"{block}.fc2", bias=True)
    for which in "qkv":
        out.linear((*at, "attention", which), f"{block}.self_attn.{which}_proj", bias=which != "k")
    out.linear((*at, "attention", "out"), f"{block}.self_attn.out_proj", bias=True, inputs=2)
