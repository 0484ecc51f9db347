"""Advantages balanced over pairs: value and gradient against the reference, and numbers by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import close

from jaxvid.ops.duality import duality, duality_ref

DUALITY = ("normalise", "std", "eps", "lonely", "scope", "impl")
balance = jax.jit(duality, static_argnames=DUALITY)


def rewards(pairs, G, seed=0):
    r = np.random.default_rng(seed)
    values = r.integers(0, 3, (pairs, 2, G)).astype(np.float32)
    valid = r.random((pairs, 2, G)) < 0.9
    values[0, 0] = 1.0  # dead
    valid[1, 1, 1:] = False  # one branch
    values[2] = 0.3  # dead on both sides
    return values, valid


SETTINGS = [
    dict(normalise=n, std=s, eps=1e-6, lonely=lonely, scope=scope)
    for n, s, lonely, scope in [
        ("duality", "sample", "keep", "pair"),
        ("duality", "population", "halve", "pair"),
        ("duality", "none", "drop", "pair"),
        ("duality", "sample", "keep", "batch"),
        ("none", "sample", "keep", "pair"),
    ]
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_duality_kernel_matches_reference(settings):
    r, valid = rewards(9, 5)
    got = balance(r, valid, impl="interpret", **settings)
    close(got, jax.jit(lambda: duality_ref(r, valid, **settings))(), 1e-6)


@pytest.mark.parametrize("std", ["sample", "population", "none"])
def test_duality_advantages_by_hand(std):
    r, valid = rewards(6, 5)
    got = jax.tree.map(np.asarray, balance(r, valid, normalise="none", std=std))
    for p, side in np.ndindex(6, 2):
        of = valid[p, side]
        x, want = r[p, side].astype(np.float64)[of], np.zeros(5)
        if len(x) > 1 and x.std() > 0:
            scale = {"sample": x.std(ddof=1), "population": x.std(), "none": 1.0}[std]
            want[of] = (x - x.mean()) / scale
        close(got.advantage[p, side], want, 1e-5)
        close(got.signal[p, side], np.abs(want).sum(), 1e-4)
        assert got.dead[p, side] == (not want.any())
        assert got.alpha[p, side] == want.any()


def binary(real, cf, G):
    """One pair with `real` and `cf` right answers of G."""
    return np.array([[[1] * n + [0] * (G - n) for n in (real, cf)]], np.float32)


def test_duality_signal_has_its_closed_form():
    """Binary rewards, population std: mean |A| = 2 sqrt(p (1 - p))."""
    for n in range(9):
        out = balance(binary(n, n, 8), np.ones((1, 2, 8), bool), std="population", eps=0.0)
        close(out.signal[0, 0] / 8, 2 * np.sqrt(n / 8 * (1 - n / 8)), 1e-6)


@pytest.mark.parametrize("G,low,high", [(16, 0.742, 1.533), (8, 0.831, 1.256), (4, 0.933, 1.077)])
def test_duality_alpha_has_its_bounds(G, low, high):
    counts = range(1, G)
    r = np.concatenate([binary(a, b, G) for a in counts for b in counts])
    out = balance(r, np.ones(r.shape, bool))
    np.testing.assert_allclose((out.alpha.min(), out.alpha.max()), (low, high), atol=6e-4)
    sums = np.abs(out.advantage).sum(-1)
    close(sums[:, 0], sums[:, 1], 1e-3)  # both sides weigh the same
    close(sums.sum(-1), out.signal.sum(-1), 1e-3)  # and together what they weighed
    other = balance(r, np.ones(r.shape, bool), std="population")
    close(out.alpha, other.alpha, 1e-4)  # the kind of std cancels


def test_duality_of_a_lonely_group():
    """(3 of 4 right, all right): the formula halves the real side, the default leaves it alone."""
    r, valid = binary(3, 4, 4), np.ones((1, 2, 4), bool)
    plain = balance(r, valid, normalise="none").advantage
    for lonely, alpha in [("keep", 1.0), ("halve", 0.5), ("drop", 0.0)]:
        out = balance(r, valid, lonely=lonely)
        close(out.alpha, np.array([[alpha, 0.0]]), 0)
        close(out.advantage, alpha * plain, 1e-6)
        assert out.dead.tolist() == [[False, True]]


def test_duality_over_the_batch_counts_dead_groups_as_nothing():
    r = np.concatenate([binary(2, 4, 4), binary(2, 2, 4)])  # S: real twice s, counterfactual s
    out = balance(r, np.ones((2, 2, 4), bool), scope="batch")
    close(out.alpha, np.array([[0.75, 0.0], [0.75, 1.5]]), 1e-5)


def test_duality_equal_rewards_that_round_are_dead():
    out = balance(np.full((1, 2, 7), 0.1, np.float32), np.ones((1, 2, 7), bool))
    assert out.dead.all() and not out.advantage.any()


def test_duality_passes_no_gradient_and_refuses_what_does_not_fit():
    r, valid = rewards(4, 8)
    grad = jax.jit(jax.grad(lambda x: (duality(x, valid, impl="interpret").advantage ** 2).sum()))(
        r
    )
    assert not grad.any()
    big = jnp.zeros((4096, 2, 8))
    with pytest.raises(ValueError, match="fast memory"):
        duality(big, big > 0, impl="pallas")
