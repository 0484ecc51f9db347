"""Reads the fixtures of other libraries and puts their inputs into our rows. No torch here."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.batch import Batch, Branches, Scores, TokenBatch, VisionBatch

FOLDER = pathlib.Path(__file__).parent / "oracles"
DTYPES = ("float64", "float32")


@functools.cache
def load(name):
    """(arrays by name, meta) of a fixture; tests/oracles/README.md says what is in it."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = dict(file)
    return arrays, json.loads(str(arrays.pop("meta")))


def inputs(name):
    """The draws of a fixture, by name."""
    return {k.removeprefix("inputs/"): v for k, v in load(name)[0].items() if "inputs/" in k}


def rows(drawn, branches, dtype, **table):
    """(Scores, Batch) of arrays [draw, row, S]; `branches` [draw, row, S] are slots, 0 padding.

    `table` are the leaves of Branches, [draw, row, M]; those not given are 0.
    """
    leaf = lambda name: np.asarray(table.get(name, np.zeros_like(table["weight"])))
    floats = ("weight", "advantage", "value")
    kind = lambda name: dtype if name in floats else np.int32
    columns = Branches(*(leaf(n).astype(kind(n)) for n in Branches._fields))
    none = np.zeros(branches.shape, np.int32)
    fill = lambda name: np.asarray(drawn.get(name, np.zeros(branches.shape)), dtype)
    tokens = TokenBatch(none, none[:, :, None], *[none] * 5, branches.astype(np.int32))
    batch = Batch(
        tokens, VisionBatch(none, none, none), None, columns, *map(fill, ("old", "ref")), None
    )
    return Scores(fill("logp"), fill("entropy")), batch._replace(sampled=fill("sampled"))


def answers(objective, scores, batch):
    """(value [draw], gradients of it to Scores [draw, row, S]) of an objective."""

    def one(scores, batch):
        loss = objective(scores, batch)
        return loss.numerator / loss.denominator

    with jax.enable_x64(scores.logp.dtype == np.float64):
        run = jax.jit(jax.vmap(jax.value_and_grad(one)))
        value, grads = jax.tree.map(np.asarray, run(*jax.tree.map(jnp.asarray, (scores, batch))))
    assert value.dtype == grads.logp.dtype == scores.logp.dtype
    return value, grads


def agree(got, want, dtype):
    """1e-6 in float64, 1e-5 in float32, relative to each number and to the largest of its draw."""
    tolerance = {"float64": 1e-6, "float32": 1e-5}[str(dtype)]
    got, want = (np.asarray(x, np.float64).reshape(len(want), -1) for x in (got, want))
    scale = np.maximum(np.abs(want), np.abs(want).max(1, keepdims=True) * 0.1)
    np.testing.assert_array_less(np.abs(got - want), tolerance * scale + 1e-12)
