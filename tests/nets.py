"""A model of the real layers, small enough to compile at once: tower, two scanned MLPs, table."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxvid.models import layers, lora

WIDTH, FFN = 64, 128


class Net(nnx.Module):
    def __init__(self, compute: layers.Compute, *, rngs: nnx.Rngs):
        self.compute = compute
        draw = 0.5 * jax.random.normal(rngs.params(), (64, WIDTH))
        self.table = nnx.Param(draw, axes=("vocab", "embed"))
        self.tower = layers.Linear((96,), (WIDTH,), "patch embed", bias=True, rngs=rngs)
        self.blocks = layers.stack(lambda r: layers.GatedMLP(WIDTH, FFN, rngs=r), 2, rngs)
        self.norm = layers.RMSNorm(WIDTH, eps=1e-6)

    def hidden(self, tokens, vision, audio=None):
        seen = vision.patches.astype(jnp.float32).mean((1, 2)) / 255
        x = layers.lookup(self.table[...], tokens.tokens, self.compute.dtype)
        x = x + self.tower(seen.astype(x.dtype))[:, None]
        body = lambda x, block, _: (x + block(x, self.compute.ffn_parts), None)
        x, _ = layers.scan(body, x, self.blocks, None, self.compute)
        return self.norm(x)

    def unembedding(self):
        return self.table[...]


def net(**compute):
    compute = layers.Compute(**{"remat": "none"} | compute)
    return nnx.split(Net(compute, rngs=nnx.Rngs(0)))


def with_lora(cfg: lora.LoRA, *, noisy=False, mesh=None, **compute):
    """(graph, weights); `noisy`: b is not zero, as after some steps."""
    return adapted(*net(**compute), cfg, noisy=noisy, mesh=mesh)


def adapted(graph, params, cfg: lora.LoRA, *, noisy=False, mesh=None):
    graph, params = lora.attach(graph, params, cfg, 3, mesh=mesh)
    if noisy:
        draw = lambda x: 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)
        is_b = lambda path: path[-2:] == ("lora", "b")
        flat = nnx.to_flat_state(params)
        params = nnx.from_flat_state([(p, v.replace(draw(v)) if is_b(p) else v) for p, v in flat])
    return graph, params
