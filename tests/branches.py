"""Rows of branches laid out by hand, for tests of objectives."""

import functools

import jax
import numpy as np

from jaxvid.batch import Batch, Branches, Scores, TokenBatch, VisionBatch

# Two rows: branches of 2, 3 and 1 tokens, then of 2 and 1; the rest is padding.
SLOT = np.array([[1, 1, 2, 2, 2, 3, 0, 0], [1, 1, 2, 0, 0, 0, 0, 0]], np.int32)
LOGP = -np.arange(1.0, 17.0, dtype=np.float32).reshape(2, 8) / 10
COLUMNS = 3


def make(logp=LOGP, old=0.0, ref=0.0, sampled=0.0, entropy=0.5, **branches):
    """Scores and a batch of SLOT's shape; `branches` are leaves by name, zeros where not given."""
    full = lambda x: np.array(np.broadcast_to(x, SLOT.shape), np.float32)
    leaf = lambda name: np.asarray(branches.get(name, np.zeros((2, COLUMNS))), np.int32)
    table = Branches(*(leaf(n) for n in Branches._fields))
    table = table._replace(
        weight=np.asarray(branches.get("weight", [[1, 1, 1], [1, 1, 0]]), np.float32),
        advantage=np.asarray(branches.get("advantage", np.zeros((2, COLUMNS))), np.float32),
        value=np.asarray(branches.get("value", np.zeros((2, COLUMNS))), np.float32),
    )
    none = np.zeros(SLOT.shape, np.int32)
    tokens = TokenBatch(none, none[:, None], none, none, none, none, none, SLOT)
    vision = VisionBatch(*(np.zeros((2, 1), np.int32) for _ in VisionBatch._fields))
    batch = Batch(tokens, vision, None, table, full(old), full(ref), full(sampled))
    return Scores(full(logp), full(entropy)), batch


@functools.partial(jax.jit, static_argnums=0)
def call(objective, scores, batch):
    return objective(scores, batch)


@functools.partial(jax.jit, static_argnums=0)
def with_gradient(objective, scores, batch):
    """(loss, gradient of its numerator to the log-probs)."""

    def f(logp):
        loss = objective(scores._replace(logp=logp), batch)
        return loss.numerator, loss

    grad, loss = jax.grad(f, has_aux=True)(scores.logp)
    return loss, grad


def value(objective, scores, batch):
    loss = call(objective, scores, batch)
    metrics = {k: float(s) / max(float(n), 1e-9) for k, (s, n) in loss.metrics.items()}
    return float(loss.numerator / loss.denominator), metrics


def near(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
