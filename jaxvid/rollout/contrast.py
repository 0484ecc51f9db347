"""Which steps of a reply hang on what is seen: those that change with a slightly perturbed clip.

    d(s) = mean over the tokens y of step s of KL(P(y | before, clip) || P(y | before, clip~))

Contrastive step selection of video-SALMONN-o1 (https://arxiv.org/abs/2502.11775): the steps of
largest d are the ones worth comparing. The perturbation is a little diffusion noise; sound stays.
"""

import dataclasses
import functools
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from jaxvid import sharding
from jaxvid.data import layout
from jaxvid.data.layout import Tree
from jaxvid.ops.logprob import kl

DIFFUSION = 1000  # steps of the noise schedule


def select(divergence: Sequence[float], top: int) -> list[int]:
    """The indices of the `top` largest, in order; of equals the earlier ones."""
    return sorted(sorted(range(len(divergence)), key=lambda k: (-divergence[k], k))[:top])


def noise_scales(step: int) -> tuple[float, float]:
    """(factor of the clip, of the noise) after `step` steps of the diffusion's schedule,
    beta_t = sigmoid(-6 .. 6) (0.005 - 1e-5) + 1e-5: 0.9983 and 0.0584 at step 100."""
    beta = 1 / (1 + np.exp(-np.linspace(-6, 6, DIFFUSION))) * (0.005 - 1e-5) + 1e-5
    kept = np.cumprod(1 - beta)[step]
    return float(np.sqrt(kept)), float(np.sqrt(1 - kept))


@dataclasses.dataclass(frozen=True)
class Noised:
    """x~ = a x + b eps in the pixels that the tower sees, (p / 255 - mean) / std; eps is drawn from
    the seed and the record's id. A hook of `pipeline.Builder.frames`.

    Frames are whole grey levels, so what comes out is rounded, and cut at black and white.
    """

    step: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    seed: int = 0

    def __call__(
        self, frames: UInt8[np.ndarray, "F h w 3"], record: str
    ) -> UInt8[np.ndarray, "F h w 3"]:
        a, b = noise_scales(self.step)
        rng = np.random.default_rng((self.seed, zlib.crc32(record.encode())))
        mean, std = (
            np.broadcast_to(np.asarray(v, np.float32), frames.shape) for v in (self.mean, self.std)
        )
        x = (frames / np.float32(255) - mean) / std
        x = a * x + b * rng.standard_normal(frames.shape, np.float32)
        return np.clip(np.rint((x * std + mean) * 255), 0, 255).astype(np.uint8)


def divergences(
    model: nnx.Module,
    clean: Sequence[Tree],
    noised: Sequence[Tree],
    *,
    rows: int,
    mesh: Mesh | None = None,
) -> list[Float[np.ndarray, "s"]]:
    """KL(P(y | before, clip) || P(y | before, clip~)) at each scored token of each tree's branch.

    `clean` and `noised` are the same trees of one branch, but for their frames.
    """
    ways = 1 if mesh is None else sharding.data_shards(mesh)
    rows, (graph, params), found = -(-rows // ways) * ways, nnx.split(model), []
    for at in range(0, len(clean), rows):
        here = clean[at : at + rows]
        needs = [layout.size(t) for t in here]
        budget = layout.Budget(
            rows=rows,
            tokens=layout.bucket(max(n.tokens for n in needs)),
            scored=layout.bucket(max(n.scored for n in needs)),
            branches=1,
            frames=max(n.frames for n in needs),
            patches=max(layout.most_patches(t) for t in here),
            chunks=max(n.chunks for n in needs),
        )
        batch, other = (layout.rows(t[at : at + rows], budget) for t in (clean, noised))
        inputs = batch.tokens, batch.vision, other.vision, batch.audio
        if mesh is not None:
            inputs = jax.device_put(inputs, sharding.row_sharding(mesh, rows))
        values = jax.device_get(_divergence(graph, params, inputs))
        found += [values[i, : n.scored] for i, n in enumerate(needs)]
    return found


@functools.partial(jax.jit, static_argnums=0)
def _divergence(graph, params, inputs):
    tokens, clean, noised, audio = inputs
    model = nnx.merge(graph, params)
    at = tokens.sources[..., None]
    streams = [
        jnp.take_along_axis(model.hidden(tokens, seen, audio), at, axis=1)
        for seen in (clean, noised)
    ]
    return kl(*streams, model.unembedding())
