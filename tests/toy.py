"""A model of one matrix, rows of small trees for it, and runs of the loop over them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxvid import sharding
from jaxvid.data import layout, media
from jaxvid.models import decoder, qwen25vl, vision
from jaxvid.models.layers import Compute
from jaxvid.objectives.sft import SFT
from jaxvid.train import loop, optimizers, step
from jaxvid.train import state as states

VISION = media.Vision(patch=4, temporal=2, merge=2, window=16)
BUDGET = layout.Budget(rows=1, tokens=16, scored=8, branches=2, frames=2, patches=4)
SETTINGS = loop.Settings(steps=6, log_every=1, checkpoint_every=2)
ADAM = optimizers.AdamW(lr=1e-2)


class Toy(nnx.Module):
    """What the step asks of a model, small enough to compile at once: no token sees another."""

    def __init__(self, *, rngs: nnx.Rngs, width: int = 8):
        draw = lambda *shape: 0.5 * jax.random.normal(rngs.params(), shape)
        self.table = nnx.Param(draw(64, width), axes=("vocab", "embed"))
        self.up = nnx.Param(draw(2, width, 16), axes=("embed", "ffn"))  # two stacked layers
        self.down = nnx.Param(draw(2, 16, width), axes=("ffn", "embed"))
        self.scale = nnx.Param(jnp.ones((width,)), axes=("embed",))

    def hidden(self, tokens, vision, audio=None):
        light = vision.patches.astype(jnp.float32).mean((1, 2, 3)) / 255
        x = self.table[...][tokens.tokens] + light[:, None, None]
        for up, down in zip(self.up[...], self.down[...]):
            x = x + jnp.tanh(x @ up) @ down
        return x * self.scale[...].reshape(1, 1, -1)

    def unembedding(self):
        return self.table[...]


def toy(width=8):
    return nnx.split(Toy(rngs=nnx.Rngs(0), width=width))


@functools.cache
def small():
    """The smallest real model."""
    return qwen25vl.Config(
        text=decoder.Config(
            layers=2, width=32, ffn=64, heads=4, kv_heads=2, vocab=64, rope_sections=(1, 1, 2)
        ),
        vision=vision.Config(
            layers=2, width=32, ffn=64, heads=2, out=32, full=(1,), patch=4, window=16
        ),
        tied=True,
        image_token_id=1,
        video_token_id=2,
        compute=Compute(remat="none"),
    )


def tree(seed, mates=False):
    """A prompt of a clip of two temporal patches, then two branches of three scored tokens."""
    rng = np.random.default_rng(seed)
    tokens = np.array([5, 2, 2, 6, 7])
    branches = tuple(
        layout.Branch(
            rng.integers(8, 64, 4),
            np.array([False, True, True, True]),
            record=seed,
            branch=m,
            mate=int(m and mates),
        )
        for m in range(2)
    )
    return layout.tree(
        f"record {seed}",
        tokens,
        qwen25vl.positions(tokens, [(2, 2, 2)], [1.0], small()),
        VISION,
        clips=[layout.Clip(rng.integers(0, 256, (2, 4, 96), np.uint8), (2, 2, 2))],
        seen=layout.in_order(tokens == 2),
        branches=branches,
    )


def batch(seeds, rows, mates=False):
    """One tree to a row, `rows` rows to a micro-batch."""
    micro = [layout.pack([[tree(s, mates)]], BUDGET)[0] for s in seeds]
    together = lambda *x: np.concatenate(x).reshape(len(seeds) // rows, rows, *x[0].shape[1:])
    return jax.tree.map(together, *micro)


def row(data, i):
    """Micro-batch i, on the device."""
    return jax.tree.map(lambda x: jnp.asarray(x[i]), data)


class Stream:
    """Batches by number. Those in `bad` have no finite loss."""

    def __init__(self, bad=(), mates=False, before=lambda n: None):
        self.n, self.bad, self.mates, self.before = 0, bad, mates, before

    def __next__(self):
        self.n += 1
        self.before(self.n)
        out = batch([self.n, self.n + 100], rows=2, mates=self.mates)
        if self.n in self.bad:
            out.branches.weight[:] = np.nan
        return out

    def get_state(self):
        return {"n": self.n}

    def set_state(self, state):
        self.n = state["n"]


def mesh_of(ways=1, tensor=1, context=1):
    """A mesh (1, ways, tensor, context) over the first devices."""
    shape = 1, ways, tensor, context
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    auto = (jax.sharding.AxisType.Auto,) * 4
    return jax.sharding.Mesh(devices, sharding.AXES, axis_types=auto)


@functools.cache
def compiled(optimizer=ADAM, objective=None):
    """(graph, transformation, step) of the toy: compiled once for all tests that share them."""
    graph, params = toy()
    tx = optimizer.build(6, params)
    return graph, tx, step.make_step(graph, objective or SFT(), tx)


def train(folder, stream, settings=SETTINGS, **options):
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        _, tx, train_step = compiled()
        state = states.create(toy()[1], tx, mesh)
        update = loop.supervised(train_step, mesh)
        rate = ADAM.rate(6)
        return loop.train(state, update, stream, settings, folder, rate=rate, **options)


def assert_same(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)):
        name = jax.tree_util.keystr(path)
        if tolerance:
            np.testing.assert_allclose(x, y, err_msg=name, **tolerance)
        else:
            np.testing.assert_array_equal(x, y, err_msg=name)
