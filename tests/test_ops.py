"""Every op agrees with its reference in value and in gradient, and with numbers worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxvid.ops import attention as attention_module
from jaxvid.ops._choice import choose
from jaxvid.ops.attention import attention, attention_ref, decode_attention
from jaxvid.ops.duality import duality, duality_ref
from jaxvid.ops.logprob import logprob, logprob_ref
from jaxvid.ops.policy_loss import policy_loss, policy_loss_ref
from jaxvid.ops.rope import rope, rope2d, rope_ref

CLIP = dict(clip_low=0.2, clip_high=0.28)
DUALITY = ("normalise", "std", "eps", "lonely", "scope", "impl")
balance = jax.jit(duality, static_argnames=DUALITY)


def normal(seed, *shape):
    """numpy's, which compiles nothing."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def value_and_gradient(f, weight):
    """(f, gradient of the sum of weight x f) at every argument, compiled once."""

    def run(*x):
        weigh = lambda *x: sum(
            (w * y).sum() for w, y in zip(*map(jax.tree.leaves, (weight, f(*x))))
        )
        return f(*x), jax.grad(weigh, tuple(range(len(x))))(*x)

    return jax.jit(run)


def close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-4), a, b)


def test_none_is_the_kernel_where_one_tpu_holds_the_arrays(monkeypatch):
    assert choose(None) == "xla" and choose("pallas") == "pallas"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert choose(None) == "xla"  # eight devices: the compiler cannot split a kernel
    mesh, seen = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,)), []
    inside = jax.shard_map(
        lambda x: seen.append(choose(None)) or x, mesh=mesh, in_specs=P("x"), out_specs=P("x")
    )
    jax.eval_shape(inside, jnp.zeros(8))
    assert seen == ["pallas"]
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert choose(None) == "pallas" and choose(None, fits=False) == "xla"


# --- attention ---

# prompt 0..3, branches 4..5 and 6..8, a second tree 9..10 with branch 11, padding
END = np.array([[9] * 4 + [6] * 2 + [9] * 3 + [12] * 3 + [0] * 4])


def heads(T, N=4, K=2, H=8, B=1, seed=0):
    return normal(seed, B, T, N, H), normal(seed + 1, B, T, K, H), normal(seed + 2, B, T, K, H)


def by_hand(q, k, v, sees):
    """One query and one head at a time, in numpy."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    y = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        j = [s for s in range(k.shape[1]) if sees(b, t, s)]
        if j:
            kv = n // (q.shape[2] // k.shape[2])
            w = np.exp(k[b, j, kv] @ q[b, t, n] / np.sqrt(q.shape[-1]))
            y[b, t, n] = w / w.sum() @ v[b, j, kv]
    return y


def test_attention_tree_by_hand():
    q, k, v = heads(16)
    want = by_hand(q, k, v, lambda b, i, j: j <= i < END[b, j])
    close(attention(q, k, v, end=jnp.asarray(END)), want, 1e-5)
    assert not want[0, 12:].any()  # padding


def test_attention_segment_by_hand():
    q, k, v = heads(9, B=2)
    segment = np.array([[1, 1, 2, 2, 2, 1, 0, 0, 0], [3] * 9])
    same = lambda b, i, j: segment[b, i] == segment[b, j] > 0
    close(attention(q, k, v, segment=jnp.asarray(segment)), by_hand(q, k, v, same), 1e-5)


def tree_row(T):
    """A prompt, two branches and padding: (end, depth) [1, T]."""
    at, P = np.arange(T), T // 3
    end = np.where(at < P, T - 7, np.where(at < 2 * P, 2 * P, T - 7))
    depth = np.where(at < 2 * P, at, at - P)
    return tuple(jnp.asarray(np.where(at < T - 7, x, 0))[None] for x in (end, depth))


@pytest.mark.parametrize("mask", ["end", "segment", "window"])
@pytest.mark.parametrize(
    "impl,T,long", [("xla", 130, 200), ("xla", 300, 200), ("interpret", 300, 0)]
)
def test_attention_in_every_way_is_the_reference(monkeypatch, mask, impl, T, long):
    """In runs, in blocks, and by the kernel, with several tiles a row of which some are skipped."""
    monkeypatch.setattr(attention_module, "LONG", long)
    monkeypatch.setattr(attention_module, "TILE", 128)
    end, depth = tree_row(T)
    if mask == "segment":
        kwargs = dict(segment=jnp.asarray(np.arange(T) // 40 * (np.arange(T) < T - 7))[None])
    else:
        kwargs = dict(end=end) | (dict(depth=depth, window=50) if mask == "window" else {})
    q, k, v = heads(T)
    run = lambda f, **more: value_and_gradient(lambda *x: f(*x, **kwargs, **more), np.cos(q))
    close(run(attention, impl=impl)(q, k, v), run(attention_ref)(q, k, v), 1e-5)


def test_attention_window_by_hand():
    q, k, v = heads(24)
    end, depth = tree_row(24)
    sees = lambda b, i, j: j <= i < end[b, j] and depth[b, i] - depth[b, j] < 5
    close(attention(q, k, v, end=end, depth=depth, window=5), by_hand(q, k, v, sees), 1e-5)


def test_attention_kernel_visits_the_tiles_of_its_tree_alone():
    """A prompt of 4 tiles and 8 branches of one: every branch sees the prompt and itself."""
    size, P, G = 128, 4, 8
    end = np.repeat([(P + G) * size] * P + [(P + 1 + g) * size for g in range(G)], size)
    sight = attention_module._Sight(jnp.asarray(end)[None], None, None, 0)
    shape = attention_module._Shape(True, 0, 1.0, size, True)
    seen = attention_module._visible(*attention_module._facts(sight, len(end)), shape)
    assert int(seen.sum()) == P * (P + 1) // 2 + G * (P + 1)
    order, count = attention_module._table(seen)
    order = np.asarray(order).reshape(P + G, P + G)
    np.testing.assert_array_equal(count[P:], P + 1)
    np.testing.assert_array_equal(order[P + 2, : P + 1], [0, 1, 2, 3, P + 2])
    assert (order[P + 2, P + 1 :] == P + 2).all()  # nothing more is fetched


def test_attention_long_rows_never_hold_every_logit(monkeypatch):
    monkeypatch.setattr(attention_module, "LONG", 512)
    q, k, v = heads(1024)
    end = jnp.full((1, 1024), 1024)
    grad = jax.make_jaxpr(jax.grad(lambda q: attention(q, k, v, end=end).sum()))(q)
    assert "1024,1024]" not in str(grad)


def test_attention_branches_of_a_tree_are_the_separate_sequences():
    q, k, v = heads(16)
    y = attention(q, k, v, end=jnp.asarray(END))
    for branch in ([4, 5], [6, 7, 8]):
        path = jnp.array([0, 1, 2, 3] + branch)
        alone = attention(q[:, path], k[:, path], v[:, path], end=jnp.full((1, len(path)), 99))
        close(y[:, path], alone, 1e-5)


def test_attention_padding_has_no_gradient():
    q, k, v = heads(16)
    _, grads = value_and_gradient(lambda *x: attention(*x, end=jnp.asarray(END)), np.cos(q))(
        q, k, v
    )
    assert all(np.isfinite(g).all() and not np.asarray(g)[0, 12:].any() for g in grads)


def test_attention_without_mask_and_bfloat16():
    q, k, v = heads(6)
    close(attention(q, k, v), by_hand(q, k, v, lambda b, i, j: True), 1e-5)
    half = attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)), end=jnp.asarray(END[:, :6]))
    assert half.dtype == jnp.bfloat16
    whole = attention(q, k, v, end=jnp.asarray(END[:, :6]))
    np.testing.assert_allclose(half.astype(jnp.float32), whole, atol=0.05)


@pytest.mark.parametrize(
    "kwargs,message",
    [
        (dict(end=jnp.asarray(END), segment=jnp.asarray(END)), "not both"),
        (dict(impl="pallas"), "needs `end` or `segment`"),
        (dict(window=3), "counted in depth along a tree"),
        (dict(end=jnp.asarray(END), depth=jnp.asarray(END)), "window=0, depth and end"),
    ],
)
def test_attention_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        attention(*heads(16), **kwargs)
    with pytest.raises(ValueError, match="do not divide"):
        attention(*heads(4, N=3))


def test_decode_attention_is_the_last_query_of_each_branch():
    B, G, N, K, H, P, R, step = 2, 3, 4, 2, 8, 5, 4, 2
    q, (pk, pv) = normal(0, B, G, N, H), normal(1, 2, B, P, K, H)
    bk, bv = normal(2, 2, B, G, R, K, H)
    length = jnp.array([3, 5])
    got = decode_attention(q, pk, pv, length, bk, bv, step)
    join = lambda p, x, b, g: jnp.concatenate([p[b, : length[b]], x[b, g, : step + 1]])[None]
    for b, g in np.ndindex(B, G):
        want = attention(q[b : b + 1, g : g + 1], join(pk, bk, b, g), join(pv, bv, b, g))
        close(got[b, g], want[0, 0], 1e-5)


# --- rope ---


def test_rope_kernel_matches_reference():
    x = normal(0, 2, 128, 4, 128)
    positions = np.random.default_rng(1).integers(0, 5_000, (2, 3, 128)).astype(np.int32)
    args = dict(sections=(16, 24, 24), theta=1e6)
    ref = lambda x: rope_ref(x, jnp.asarray(positions), **args)
    ker = lambda x: rope(x, jnp.asarray(positions), impl="interpret", **args)
    close(*(value_and_gradient(f, np.cos(x))(x) for f in (ker, ref)), 1e-5)


def test_rope_by_hand():
    """Sections (1, 0, 1) of a head of 4: pair (0, 2) turns with time, pair (1, 3) with width."""
    x = jnp.array([1.0, 2.0, 3.0, 4.0])[None, None, None]
    y = rope(x, jnp.array([[[5], [6], [7]]]), sections=(1, 0, 1), theta=100.0)[0, 0, 0]
    a, b = 5.0, 7.0 / 10
    want = [
        np.cos(a) - 3 * np.sin(a),
        2 * np.cos(b) - 4 * np.sin(b),
        3 * np.cos(a) + np.sin(a),
        4 * np.cos(b) + 2 * np.sin(b),
    ]
    close(y, np.array(want), 1e-5)


def test_rope_depends_only_on_distance():
    q, k = normal(0, 2, 1, 1, 1, 128)
    at = lambda n: jnp.full((1, 3, 1), n)
    turn = lambda x, n: rope(x, at(n), sections=(16, 24, 24), theta=1e4)
    near, far = ((turn(q, n + 5) * turn(k, n)).sum() for n in (4, 100))
    np.testing.assert_allclose(near, far, rtol=1e-4)


def test_rope_refuses():
    x, positions = jnp.zeros((1, 5, 2, 8)), jnp.zeros((1, 3, 5), jnp.int32)
    with pytest.raises(ValueError, match="add to 3"):
        rope(x, positions, sections=(1, 1, 1), theta=1e4)
    with pytest.raises(ValueError, match="divisible by 128"):
        rope(x, positions, sections=(1, 1, 2), theta=1e4, impl="interpret")
    with pytest.raises(ValueError, match="divisible by 4"):
        rope2d(x[..., :6], jnp.zeros((1, 5, 2), jnp.int32))


def test_rope2d_is_the_vision_rotary_of_transformers():
    torch = pytest.importorskip("torch", reason="the oracle is transformers' torch code")
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    x, coords = normal(0, 7, 3, 16), np.random.default_rng(0).integers(0, 20, (7, 2))
    freq = 1 / 10_000 ** (torch.arange(0, 8, 2).float() / 8)
    angle = (torch.tensor(coords)[..., None] * freq).flatten(1)
    angle = torch.cat([angle, angle], -1)
    want, _ = apply_rotary_pos_emb_vision(
        *[torch.tensor(np.asarray(x))] * 2, angle.cos(), angle.sin()
    )
    close(rope2d(x, jnp.asarray(coords, jnp.int32)), want.numpy(), 1e-5)


# --- logprob ---


@pytest.mark.parametrize("block,temperature", [(7, 0.7), (10, 1.0), (37, 0.7), (64, 1.0)])
def test_logprob_in_blocks_is_the_reference(block, temperature):
    hidden, unembed = normal(0, 2, 5, 16), normal(1, 37, 16)
    targets = jnp.array([[0, 36, 30, 29, 7], [35, 6, 14, 20, 21]])
    ours = lambda h, u: logprob(h, u, targets, temperature=temperature, block=block)
    ref = lambda h, u: logprob_ref(h, u, targets, temperature)
    weight = tuple(normal(2, 2, 2, 5))
    close(*(value_and_gradient(f, weight)(hidden, unembed) for f in (ours, ref)), 1e-4)


def test_logprob_of_a_uniform_table():
    logp, entropy = logprob(jnp.ones((1, 1, 4)), jnp.ones((32, 4)), jnp.zeros((1, 1), jnp.int32))
    close((logp[0, 0], entropy[0, 0]), (-np.log(32), np.log(32)), 1e-6)


def test_logprob_never_holds_the_vocabulary():
    hidden, unembed = normal(0, 1, 6, 16), normal(1, 1000, 16)
    targets = jnp.zeros((1, 6), jnp.int32)
    run = lambda h, u: logprob(h, u, targets, block=128)[0].sum()
    assert "6,1000]" not in str(jax.make_jaxpr(jax.grad(run, (0, 1)))(hidden, unembed))


def test_logprob_bfloat16_gives_float32_and_gradients_of_the_inputs_type():
    hidden, unembed = normal(0, 1, 6, 16).astype(jnp.bfloat16), normal(1, 100, 16)
    targets = jnp.arange(6)[None]
    run = value_and_gradient(lambda h, u: logprob(h, u, targets, block=32), (1.0, 1.0))
    got, grads = run(hidden, unembed)
    assert [x.dtype for x in got] == [jnp.float32] * 2
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32]


def test_logprob_refuses():
    args = normal(0, 1, 2, 4), normal(1, 8, 4), jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="temperature above 0"):
        logprob(*args, temperature=0.0)
    with pytest.raises(ValueError, match="no 'interpret'"):
        logprob(*args, impl="interpret")


# --- duality ---


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


# --- policy loss ---


def ratios(rows, tokens):
    logp, noise, adv = normal(0, 3, rows, tokens)
    return logp, logp + 0.6 * noise, adv


@pytest.mark.parametrize("rows,tokens,dual_clip", [(64, 128, None), (3, 50, 1.5), (70, 130, 1.5)])
def test_policy_loss_kernel_matches_reference(rows, tokens, dual_clip):
    logp, old, adv = ratios(rows, tokens)
    weight = normal(5, rows, tokens)
    ref = lambda x: policy_loss_ref(x, old, adv, **CLIP, dual_clip=dual_clip)
    ker = lambda x: policy_loss(x, old, adv, **CLIP, dual_clip=dual_clip, impl="interpret")
    close(*(value_and_gradient(f, weight)(logp) for f in (ker, ref)), 1e-5)


@pytest.mark.parametrize("impl", ["xla", "interpret"])
def test_policy_loss_on_policy_is_reinforce(impl):
    logp, _, adv = ratios(2, 9)
    loss = lambda x: policy_loss(x, logp, adv, **CLIP, impl=impl).sum()
    close(jax.grad(loss)(logp), -adv, 1e-6)


@pytest.mark.parametrize("impl", ["xla", "interpret"])
def test_policy_loss_clips_exactly_where_it_should(impl):
    logp = jnp.log(jnp.array([[1.5, 1.5, 0.5, 0.5, 1.25, 9.0]]))
    adv = jnp.array([[1.0, -1.0, 1.0, -1.0, 1.0, -1.0]])
    loss = lambda x: policy_loss(x, jnp.zeros_like(x), adv, **CLIP, dual_clip=3.0, impl=impl)
    close(loss(logp), jnp.array([[-1.28, 1.5, -0.5, 0.8, -1.25, 3.0]]), 1e-6)
    grad = jax.grad(lambda x: loss(x).sum())(logp)
    close(grad, jnp.array([[0.0, 1.5, -0.5, 0.0, -1.25, 0.0]]), 1e-6)


@pytest.mark.parametrize("impl", ["xla", "interpret"])
def test_policy_loss_survives_a_ratio_past_float32(impl):
    logp, adv = jnp.array([[200.0, -200.0]]), jnp.array([[0.0, -1.0]])
    loss = lambda x: policy_loss(x, jnp.zeros_like(x), adv, **CLIP, impl=impl).sum()
    assert np.isfinite(loss(logp)) and np.isfinite(jax.grad(loss)(logp)).all()


def test_policy_loss_refuses():
    x = jnp.zeros((8, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match="float32"):
        policy_loss(x, x, x, **CLIP)
    x = jnp.zeros((8, 128))
    with pytest.raises(ValueError, match="above 1"):
        policy_loss(x, x, x, **CLIP, dual_clip=0.5)
