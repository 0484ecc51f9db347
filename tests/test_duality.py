"""Advantages balanced over pairs: the kernel against the reference, both against float64 numpy, the
properties that make them what they are, and one device against eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import close, raceless
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxvid.ops.duality import duality, duality_ref
from jaxvid.sharding import make_mesh, row_sharding, spec

STATIC = ("normalise", "std", "eps", "lonely", "scope", "pair_reward", "impl")
balance = jax.jit(duality, static_argnames=STATIC)


def cases(pairs, G, seed=0):
    """Rewards, validity and correctness; the first three pairs are the odd ones."""
    r = np.random.default_rng(seed)
    values = r.integers(0, 3, (pairs, 2, G)).astype(np.float32)
    valid = r.random((pairs, 2, G)) < 0.9
    values[0, 0] = 1.0  # dead, unless the pair is paid
    valid[1, 1, 1:] = False  # one branch
    values[2] = 0.3  # dead on both sides
    return values, valid, r.random((pairs, 2, G)) < 0.6


def by_hand(rewards, valid, correct, *, normalise, std, eps, lonely, scope, pair_reward):
    """Advantage, signal and alpha in float64, one group at a time."""
    valid = valid & np.isfinite(rewards)
    paid = rewards.astype(np.float64)
    advantage, alpha = np.zeros(paid.shape), np.zeros(paid.shape[:2])
    for p, i in np.ndindex(paid.shape[0], paid.shape[2]):
        if valid[p, :, i].all() and correct[p, :, i].all():
            paid[p, :, i] += pair_reward
    for p, side in np.ndindex(alpha.shape):
        x = paid[p, side][valid[p, side]]
        if len(x) < 2 or x.min() == x.max():
            continue
        scale = {"sample": x.std(ddof=1), "population": x.std(), "none": 1 - eps}[std]
        advantage[p, side][valid[p, side]] = (x - x.mean()) / (scale + eps)
    signal = np.abs(advantage).sum(-1)
    for p, side in np.ndindex(alpha.shape):
        if signal[p, side] == 0:
            continue
        mine, both = (signal[p], signal.sum(0))[scope == "batch"], 1.0
        if normalise == "duality" and mine.min() > 0:
            both = mine.mean() / mine[side]
        elif normalise == "duality":
            both = {"keep": 1.0, "halve": 0.5, "drop": 0.0}[lonely]
        alpha[p, side] = both
    return advantage * alpha[..., None], signal, alpha


OPTIONS = [
    dict(normalise=n, std=std, eps=1e-3, lonely=lonely, scope=scope, pair_reward=paid)
    for n, std, lonely, scope, paid in [
        ("duality", "sample", "keep", "pair", 0.0),
        ("duality", "population", "halve", "pair", 0.5),
        ("duality", "none", "drop", "pair", 0.0),
        ("duality", "sample", "keep", "batch", 0.5),
        ("duality", "none", "keep", "batch", 0.0),
        ("none", "sample", "keep", "pair", 0.5),
        ("none", "none", "keep", "pair", 0.0),
    ]
]
EACH = pytest.mark.parametrize("option", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))


@EACH
def test_duality_kernel_and_reference_by_hand(option):
    r, valid, correct = cases(9, 5)
    ref = jax.jit(lambda: duality_ref(r, valid, correct=correct, **option))()
    close(balance(r, valid, correct, impl="interpret", **option), ref, 1e-6)
    close(tuple(ref[:3]), by_hand(r, valid, correct, **option), 1e-5)
    assert ref.dead.tolist() == (np.asarray(ref.signal) == 0).tolist()


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("lonely", ["keep", "halve", "drop"])
def test_duality_of_a_batch_with_a_side_without_signal(lonely, side):
    r, valid, correct = cases(5, 5)
    r[:, side] = 1.0
    option = OPTIONS[0] | dict(scope="batch", lonely=lonely)
    close(tuple(balance(r, valid, **option)[:3]), by_hand(r, valid, correct, **option), 1e-5)


def test_duality_in_float64():
    r, valid, correct = cases(9, 5)
    r = r.astype(np.float64) / 3
    with jax.enable_x64(True):
        got = duality(r, valid, correct, **OPTIONS[3])
        assert got.advantage.dtype == jnp.float64
        with pytest.raises(ValueError, match="rewards are float64"):
            duality(r, valid, impl="interpret")
    for x, y in zip(got, by_hand(r, valid, correct, **OPTIONS[3])):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-14)


# Properties -------------------------------------------------------------------------------------

SHAPE = (3, 2, 4)
each = lambda dtype, of: hnp.arrays(dtype, SHAPE, elements=st.sampled_from(of), fill=st.nothing())
REWARDS = each(np.float32, [-1.0, 0.0, 0.25, 1.0, 1.5, 2.0])
FLAGS = each(np.bool_, [True, False, True, True])
SCOPES = pytest.mark.parametrize("scope", ["pair", "batch"])


def found(rewards, valid, correct=None, **option):
    """As numpy, of one of four compiled programs."""
    option = dict(pair_reward=0.0 if correct is None else 0.5) | option
    return jax.tree.map(np.asarray, balance(rewards, valid, correct, **option))


def tried(test):
    return settings(max_examples=25, deadline=None, database=None, derandomize=True)(test)


@SCOPES
@tried
@given(REWARDS, FLAGS, FLAGS)
def test_duality_of_any_rewards_by_hand(scope, rewards, valid, correct):
    rewards[0, 0, 0] = np.nan
    option = dict(OPTIONS[0], scope=scope, pair_reward=0.5, eps=1e-6)
    want = by_hand(rewards, valid, correct, **option)
    close(tuple(found(rewards, valid, correct, scope=scope)[:3]), want, 1e-4)


@SCOPES
@tried
@given(REWARDS, FLAGS, st.sampled_from([-2.0, 0.5, 3.0]), st.sampled_from([0.25, 2.0, 8.0]))
def test_duality_knows_neither_the_zero_nor_the_unit_of_a_reward(scope, rewards, valid, by, times):
    """A group's own shift changes nothing; nor does a scale of all, but by eps."""
    of = found(rewards, valid, scope=scope)
    shifted = rewards.copy()
    shifted[1, 0] += by
    close(found(shifted, valid, scope=scope), of, 1e-5)
    close(found(times * rewards, valid, scope=scope), of, 1e-4)


@SCOPES
@tried
@given(REWARDS, FLAGS, FLAGS, st.permutations(range(4)), st.permutations(range(3)))
def test_duality_follows_its_branches_sides_and_pairs(scope, rewards, valid, right, order, pairs):
    """Permuted branches have permuted advantages; swapped sides swapped ones; pairs likewise."""
    of = found(rewards, valid, right, scope=scope)
    operands = rewards, valid, right
    moved = found(*(x[..., order] for x in operands), scope=scope)
    close(moved, of._replace(advantage=of.advantage[..., order]), 1e-5)
    swap = lambda x: x[pairs][:, [1, 0]]
    close(found(*map(swap, operands), scope=scope), jax.tree.map(swap, of), 1e-5)


@tried
@given(REWARDS, FLAGS, FLAGS, REWARDS, FLAGS)
def test_duality_never_reads_a_branch_that_is_not_valid(rewards, valid, right, other, guess):
    """Neither its reward nor whether it was right, for itself or for its mate."""
    of = found(rewards, valid, right)
    changed = np.where(valid, rewards, other), valid, np.where(valid, right, guess)
    close(found(*changed), of, 0)
    assert not of.advantage[~valid].any()


@SCOPES
@tried
@given(REWARDS, FLAGS)
def test_duality_makes_both_sides_weigh_the_same(scope, rewards, valid):
    """sum |A'_R| = sum |A'_C| = S_target where both have signal, and advantages sum to 0."""
    of = found(rewards, valid, scope=scope)
    assert np.abs(of.advantage.sum(-1)).max() < 1e-5
    sums, signal = np.abs(of.advantage).sum(-1), of.signal
    if scope == "batch":
        sums, signal = (x.sum(0, keepdims=True) for x in (sums, signal))
    alive = (signal > 0).all(1)
    target = np.broadcast_to(signal.mean(1, keepdims=True), sums.shape)
    close(sums[alive], target[alive], 1e-4)
    assert (of.dead == (of.signal == 0)).all() and ((of.alpha > 0) == ~of.dead).all()


# Numbers of the paper ---------------------------------------------------------------------------


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


def test_duality_pays_a_pair_where_both_are_right():
    """Right: real 0 and 1, counterfactual 0 and 2. Only the two replies 0 are paid, and where one
    of them is not valid, nobody is."""
    right = np.array([[[1, 1, 0, 0], [1, 0, 1, 0]]], bool)
    option = dict(normalise="none", std="none", pair_reward=2.0)
    for impl in ("xla", "interpret"):
        out = balance(np.zeros((1, 2, 4)), np.ones((1, 2, 4), bool), right, impl=impl, **option)
        close(out.advantage, np.array([[[1.5, -0.5, -0.5, -0.5]] * 2]), 1e-6)
        missing = np.array([[[1, 1, 1, 1], [0, 1, 1, 1]]], bool)
        assert balance(np.zeros((1, 2, 4)), missing, right, impl=impl, **option).dead.all()


@pytest.mark.parametrize("impl", ["xla", "interpret"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_duality_drops_a_branch_whose_reward_is_not_finite(impl, bad):
    r, valid, correct = cases(9, 5)
    r[3, 0, 2], valid[3, 0, 2] = bad, True
    without = valid.copy()
    without[3, 0, 2] = False
    option = OPTIONS[3] | dict(impl=impl)
    close(
        balance(r, valid, correct, **option), balance(cases(9, 5)[0], without, correct, **option), 0
    )


def test_duality_equal_rewards_that_round_are_dead():
    out = balance(np.full((1, 2, 7), 0.1, np.float32), np.ones((1, 2, 7), bool))
    assert out.dead.all() and not out.advantage.any()


# Where it runs ----------------------------------------------------------------------------------


@SCOPES
@pytest.mark.parametrize("mesh", [(2, 4, 1), (2, 2, 2)], ids=str)
def test_duality_on_eight_devices_is_that_on_one(mesh, scope):
    """Pairs over the data axes: under jit by their sharding, and in shard_map by both impls. A norm
    of each device's own pairs would give other alphas."""
    operands = cases(16, 5)
    option = OPTIONS[3] | dict(scope=scope)
    one = balance(*operands, **option)
    mesh = make_mesh(*mesh)
    placed = jax.device_put(operands, row_sharding(mesh, 16))
    close(balance(*placed, **option), one, 1e-6)
    with jax.set_mesh(mesh):  # as the policy loop calls it: the kernel stands on every device
        close(balance(*operands, **option, impl="interpret"), one, 1e-6)
    rows, whole = spec(("rows",)), NamedSharding(mesh, P())
    for impl in ("xla", "interpret"):
        local = functools.partial(duality, impl=impl, **option)
        split = jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
        close(jax.jit(split, out_shardings=whole)(*placed), one, 1e-6)
    if scope == "batch":
        alone = [balance(*(x[i : i + 2] for x in operands), **option).alpha for i in (0, 2)]
        assert np.abs(np.concatenate(alone) - one.alpha[:4]).max() > 0.01


def test_duality_kernel_has_no_race():
    option = {**OPTIONS[3], "impl": "pallas"}
    operands = cases(9, 5)
    close(
        raceless(lambda *x: duality(*x, **option), *operands),
        balance(*operands, **OPTIONS[3]),
        1e-6,
    )


def test_duality_passes_no_gradient_and_refuses_what_does_not_fit():
    r, valid, _ = cases(4, 8)
    loss = lambda x: (duality(x, valid, impl="interpret").advantage ** 2).sum()
    assert not jax.jit(jax.grad(loss))(r).any()
    big = jnp.zeros((4096, 2, 8))
    with pytest.raises(ValueError, match="fast memory"):
        duality(big, big > 0, impl="pallas")
    with pytest.raises(ValueError, match="give `correct`"):
        duality(r, valid, pair_reward=0.5)
