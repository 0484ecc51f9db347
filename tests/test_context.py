"""Rows whose tokens are split over the mesh's axis `context` are the rows of one device."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from prompts import QUICK
from qwen import CFG, fresh
from test_trees import BUDGET, CLIP, DEEP, SMALL, assert_equal, branches, grow

from jaxvid import score, sharding
from jaxvid.data import layout

ROWS, T = 4, 64
MESHES = {"all": dict(fsdp=2, tensor=2, context=2), "long": dict(fsdp=2, context=4)}


@functools.cache
def data():
    """Rows of the trees that `test_trees` takes apart, and one of padding."""
    budget = dataclasses.replace(BUDGET, tokens=T)
    groups = [
        [grow(4, ((6, 0), (2, 0), (3, 0)), grid=CLIP), grow(5, ((1, 0), (8, 0)), grid=SMALL)],
        [grow(6, DEEP, grid=CLIP), grow(7, ((2, 0), (3, 1)), grid=SMALL, policy="hf5")],
        [grow(1, ((4, 0), (7, 0), (1, 0)))],
    ]
    micro = [layout.pack([group], budget)[0] for group in groups]
    return jax.tree.map(lambda x: x[:, 0], layout.stack(micro, ROWS))


def scored(window, mesh=None):
    """(log-probs by branch, gradients of their weighted sum), and the program."""
    loaded, batch = fresh(window=window), data()

    def weighted(params, batch):
        scores = score.score(nnx.merge(loaded.graph, params), batch.tokens, batch.vision)
        return jnp.where(batch.tokens.slot > 0, batch.old * scores.logp, 0.0).sum(), scores

    params, run = loaded.params, jax.jit(jax.value_and_grad(weighted, has_aux=True))
    if mesh is not None:
        batch = jax.device_put(batch, sharding.row_sharding(mesh, ROWS))
        params = jax.device_put(params, sharding.parameter_shardings(params, mesh))
    lowered = run.lower(params, batch)
    (_, scores), grads = lowered.compile(compiler_options=QUICK)(params, batch)
    return (branches(scores.logp, data()), grads), lowered.as_text()


@pytest.mark.parametrize("mesh, window", [("all", 5), ("long", 0)])
def test_split_rows_are_whole_rows(mesh, window):
    want, _ = scored(window)
    placed = sharding.make_mesh(**MESHES[mesh])
    with jax.set_mesh(placed):
        got, program = scored(window, placed)
    assert_equal(got, want)
    pinned = rf'\[{{"fsdp"}}, {{"context"}}, {{}}\]>.*: tensor<{ROWS}x{T}x{CFG.text.width}xf32>'
    assert len(re.findall(pinned, program)) >= 2  # the decoder's, in both passes


def test_dealt_rows_are_even_and_come_back():
    x = np.arange(2 * 16 * 3).reshape(2, 16, 3)
    with jax.set_mesh(sharding.make_mesh(fsdp=2, context=4)):
        dealt = jax.jit(sharding.deal)(x)
        assert dealt.sharding.spec == jax.P("fsdp", "context")
        pieces = np.arange(16).reshape(8, 2)[[0, 7, 1, 6, 2, 5, 3, 4]].ravel()
        np.testing.assert_array_equal(dealt, x[:, pieces])
        whole = jax.jit(sharding.collect)(dealt)
        assert whole.sharding.spec == jax.P("fsdp")
        np.testing.assert_array_equal(whole, x)
        last = jax.jit(lambda x: sharding.deal(x, 2))(np.moveaxis(x, 1, 2))
        np.testing.assert_array_equal(last, np.moveaxis(x[:, pieces], 1, 2))
        odd = jnp.arange(2 * 12).reshape(2, 12)  # does not divide into eight pieces
        np.testing.assert_array_equal(jax.jit(sharding.deal)(odd), odd)


def test_rows_that_cannot_be_dealt_are_refused():
    mesh = sharding.make_mesh(fsdp=2, context=4)
    sharding.check_tokens(mesh, 64)
    with pytest.raises(ValueError, match="61 tokens .* 8 pieces .* context 4.* multiple of 8"):
        sharding.check_tokens(mesh, 61)
    sharding.check_tokens(sharding.make_mesh(), 61)
