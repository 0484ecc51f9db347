"""Attention in every implementation, against the reference and numbers by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import close, normal, raceless, value_and_gradient
from jax.sharding import AxisType

from jaxvid import sharding
from jaxvid.ops import _flash
from jaxvid.ops import attention as attention_module
from jaxvid.ops._choice import choose
from jaxvid.ops.attention import attention, attention_ref, decode_attention


def test_none_is_the_kernel_on_tpus(monkeypatch):
    assert choose(None) == "xla" and choose("pallas") == "pallas"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert choose(None) == "xla"  # eight devices and no mesh: the compiler cannot split a kernel
    with jax.set_mesh(sharding.make_mesh()):
        assert choose(None) == "xla"  # the mesh's devices are CPUs, whatever this machine has
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert choose(None) == "pallas" and choose(None, fits=False) == "xla"


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
    monkeypatch.setattr(_flash, "TILE", 128)
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
    index = jnp.arange(len(end))[None]
    facts = _flash.Facts(index, jnp.asarray(end)[None])
    shape = _flash._Shape(True, 0, 1.0, size, True)
    seen = _flash._visible(*_flash._facts(facts, facts, len(end), len(end)), shape)
    assert int(seen.sum()) == P * (P + 1) // 2 + G * (P + 1)
    order, count = _flash._table(seen)
    order = np.asarray(order).reshape(P + G, P + G)
    np.testing.assert_array_equal(count[P:], P + 1)
    np.testing.assert_array_equal(order[P + 2, : P + 1], [0, 1, 2, 3, P + 2])
    assert (order[P + 2, P + 1 :] == P + 2).all()  # nothing more is fetched


def test_attention_kernels_have_no_race(monkeypatch):
    """Forward, queries' and keys' gradient. Three heads and tiles: an axis of three that were
    wrongly parallel would be cut between the two cores."""
    monkeypatch.setattr(_flash, "TILE", 128)
    end, depth = tree_row(384)
    q, k, v = heads(384, N=3, K=1)
    mask = dict(end=end, depth=depth, window=50)

    def both(f, *x):
        y, pull = jax.vjp(lambda *x: f(*x, **mask), *x)
        return y, pull(jnp.cos(q))

    ours = functools.partial(both, functools.partial(attention, impl="pallas"))
    got = raceless(ours, q, k, v, kernels=3)
    close(got, jax.jit(functools.partial(both, attention_ref))(q, k, v), 1e-5)


MESHES = {
    "rows and heads": ((4, 2), ("fsdp", "tensor")),
    "more devices than kv heads": ((2, 4), ("fsdp", "tensor")),
    "context": ((2, 2, 2), ("fsdp", "context", "tensor")),
    "rows that do not divide": ((8,), ("fsdp",)),
}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("impl", ["xla", "interpret"])
@pytest.mark.parametrize("mask", ["window", "segment"])
def test_attention_on_a_mesh_is_that_on_one_device(mesh, impl, mask, monkeypatch):
    """Over `context` the tokens of a row lie on devices in another order, and carry their index."""
    monkeypatch.setattr(_flash, "TILE", 128)
    monkeypatch.setattr(attention_module, "LONG", 200)
    T, order = 256, np.arange(256)
    end, depth = (x.repeat(4, 0) for x in tree_row(T))
    q, k, v = heads(T, B=4)
    facts = dict(end=end, depth=depth, index=np.arange(T)[None].repeat(4, 0))
    if mask == "segment":
        facts = dict(segment=np.arange(T)[None].repeat(4, 0) // 40)
    elif mesh == "context":
        order = order.reshape(8, 32)[[0, 3, 4, 7, 1, 2, 5, 6]].ravel()
    static = dict(window=50) if mask == "window" else {}
    reference = {name: jnp.asarray(x) for name, x in facts.items() if name != "index"}
    want = value_and_gradient(lambda *x: attention_ref(*x, **reference, **static), np.cos(q))(
        q, k, v
    )
    facts = {name: jnp.asarray(x[:, order]) for name, x in facts.items()}
    shape, axes = MESHES[mesh]
    with jax.set_mesh(jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes))):
        got = value_and_gradient(
            lambda *x: attention(*x, **facts, **static, impl=impl), np.cos(q)[:, order]
        )(*(x[:, order] for x in (q, k, v)))
    close(got, jax.tree.map(lambda x: x[:, order], want), 1e-5)


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


@pytest.mark.parametrize("window", [0, 1, 3, 5])
def test_decode_attention_is_the_last_query_of_each_branch(window):
    B, G, N, K, H, P, R, step = 2, 3, 4, 2, 8, 5, 4, 2
    q, (pk, pv) = normal(0, B, G, N, H), normal(1, 2, B, P, K, H)
    bk, bv = normal(2, 2, B, G, R, K, H)
    length = jnp.array([3, 5])
    got = decode_attention(q, pk, pv, length, bk, bv, step, window)
    path = lambda p, x, b, g: jnp.concatenate([p[b, : length[b]], x[b, g, : step + 1]])
    join = lambda *of: path(*of)[None, -window:]  # all of it without a window
    for b, g in np.ndindex(B, G):
        want = attention(q[b : b + 1, g : g + 1], join(pk, bk, b, g), join(pv, bv, b, g))
        close(got[b, g], want[0, 0], 1e-5)


@pytest.mark.parametrize("window", [0, 2])
def test_rows_at_different_steps_share_a_ring(window):
    """Each row's entries end at column 1 of a ring of 5; what lies further back is another's."""
    B, G, N, K, H, P, R, at, steps = 3, 2, 4, 2, 8, 5, 5, 1, (0, 2, 4)
    q, (pk, pv) = normal(0, B, G, N, H), normal(1, 2, B, P, K, H)
    ring = normal(2, 2, B, G, R, K, H)
    length = jnp.array([3, 5, 1])
    got = decode_attention(q, pk, pv, length, *ring, jnp.array(steps), window, at)
    for b, step in enumerate(steps):
        straight = jnp.roll(ring[:, b : b + 1], step - at, axis=3)  # the new token in `step`
        alone = (x[b : b + 1] for x in (q, pk, pv, length))
        close(got[b], decode_attention(*alone, *straight, step, window)[0], 1e-5)
