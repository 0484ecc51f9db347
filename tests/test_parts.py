"""Tree attention as parts, with a stand-in for the library that has cuDNN's contract, and what can
be checked of cuDNN itself without a GPU: what it is called with, and that it lowers."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import close, normal, value_and_gradient
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.sharding import AxisType

from jaxvid.ops import _parts
from jaxvid.ops import attention as attention_module
from jaxvid.ops._choice import choose
from jaxvid.ops.attention import attention, attention_ref

# ---- a stand-in: every segment by itself, and NaN wherever cuDNN writes nothing


def segments(q, *places):
    """(place in memory [R, T], whether a query, whether a key) of each token of each segment, from
    the numbers that jax itself hands to cuDNN."""
    B, T, N, H = q.shape
    of_q, of_k, at_q, at_k = cudnn._fix_seqlen_offsets(*places, q, q)
    R, step = of_q.size, jnp.arange(T)[None]
    np.testing.assert_array_equal(np.shape(at_q), (B, R // B + 1))
    place = lambda at: at.reshape(-1)[:R, None] // (N * H) + step
    inside = lambda length: step < length.reshape(-1)[:, None]
    return place(at_q), place(at_k), inside(of_q), inside(of_k)


def flat(x):
    return x.reshape(-1, *x.shape[2:]).astype(jnp.float32)


def logits(q, k, places):
    at_q, at_k, is_q, is_k = segments(q, *places)
    take = lambda x, at: jnp.take(flat(x), at, axis=0, mode="clip")
    seen = (is_q[:, :, None] & is_k[:, None]) & jnp.tri(q.shape[1], dtype=bool)[None]
    x = jnp.einsum("rtnh,rsnh->rnts", take(q, at_q), take(k, at_k)) * q.shape[-1] ** -0.5
    return jnp.where(seen[:, None], x, -jnp.inf), take


def scatter(x, like, at, inside):
    """Tokens of segments to their places; NaN where none is."""
    at = jnp.where(inside, at, flat(like).shape[0])
    placed = jnp.full_like(flat(like), jnp.nan).at[at].set(x, mode="drop")
    return placed.reshape(like.shape).astype(like.dtype)


def forward(q, k, v, *places):
    x, take = logits(q, k, places)
    at_q, at_k, is_q, _ = segments(q, *places)
    sums = jax.nn.logsumexp(x, axis=-1)
    sums = jnp.where(is_q[:, None], sums, jnp.nan)
    p = jnp.where(x > -jnp.inf, jnp.exp(x - sums[..., None]), 0)
    y = jnp.einsum("rnts,rsnh->rtnh", p, take(v, at_k))
    return scatter(y, q, at_q, is_q), sums


def backward(q, k, v, *rest):
    places, (sums, y, dy) = rest[:4], rest[4:]
    x, take = logits(q, k, places)
    at_q, at_k, is_q, is_k = segments(q, *places)
    p = jnp.exp(x - sums[..., None])
    y, dy = (take(x, at_q) for x in (y, dy))
    drop = jnp.einsum("rtnh,rtnh->rnt", y, dy)[..., None]
    d = p * (jnp.einsum("rtnh,rsnh->rnts", dy, take(v, at_k)) - drop) * q.shape[-1] ** -0.5
    dq = jnp.einsum("rnts,rsnh->rtnh", d, take(k, at_k))
    dk = jnp.einsum("rnts,rtnh->rsnh", d, take(q, at_q))
    dv = jnp.einsum("rnts,rtnh->rsnh", p, dy)
    return scatter(dq, q, at_q, is_q), scatter(dk, k, at_k, is_k), scatter(dv, v, at_k, is_k)


STAND_IN = _parts.Library(forward, backward)


# ---- rows


def row(T, *trees):
    """`end` [T] of trees, each nested as (tokens, *branches) or a number of tokens."""
    end = []

    def add(node):
        tokens, *branches = node if isinstance(node, tuple) else (node,)
        start = len(end)
        end.extend([0] * tokens)
        for branch in branches:
            add(branch)
        end[start : start + tokens] = [len(end)] * tokens

    for node in trees:
        add(node)
    return np.array(end + [0] * (T - len(end)))


T = 24
PACKED = row(T, (4, 2, 3), (2, 1, 5, 1), 3)  # unequal branches, a prompt alone, padding
CHAIN, PAIR = row(T, 20), row(T, (4, 7, 7))
STEPS = row(T, (3, (2, 2, 3), (1, 1)), (4, (2, 1, 1)))  # alternatives under a branch
DEEP = row(T, (3, (2, (2, (3, 1, 2), 1), 2)))
EMPTY = row(T)
ROWS = {
    "two levels": (PACKED, PAIR),
    "one level": (CHAIN, row(T, 5, 7, 1)),
    "three levels": (STEPS, PACKED),
    "nothing": (EMPTY, EMPTY),
    "one of each": (EMPTY, CHAIN),
    "full": (row(T, (20, 4)), row(T, (1, 22, 1))),
    "a branch as long as its tree": (row(T, (4, (5,)), (2, 3, (4, 1, (2,)))), STEPS),
    "beyond the row": (np.full(T, 99), np.where(CHAIN, 99, 0)),
    "too deep": (DEEP, PACKED),
    "too many": (row(T, (2, *[1] * 7)), PACKED),
    "no tree": (np.array([9, 5, 7, 3, 12, 8, 0, 20] * 3), PACKED),
}


def heads(N, K, B=2, T=T, H=8):
    return normal(0, B, T, N, H), normal(1, B, T, K, H), normal(2, B, T, K, H)


@pytest.fixture(scope="module")
def runs():
    """`end` -> value and gradients (by parts, of the reference), each compiled once. The other way
    through counts double, so that it shows which way was taken."""
    q, k, v = heads(4, 2)

    def tree(q, k, v, end):
        twice = lambda *x: 2 * attention_module._deep(*x)
        return _parts.tree(q, k, v, end, twice, library=STAND_IN, levels=3, segments=6)

    def run(f):
        return jax.jit(lambda end: value_and_gradient(lambda *x: f(*x, end), np.cos(q))(q, k, v))

    return run(tree), run(attention_ref)


@pytest.mark.parametrize("name", ROWS)
def test_parts_are_the_reference(runs, name):
    """In value and gradient; and rows that do not fit go the other way, in both passes."""
    got, want = (f(jnp.asarray(np.stack(ROWS[name]))) for f in runs)
    times = 2 if name in ("too deep", "too many", "no tree") else 1
    close(got, jax.tree.map(lambda x: times * x, want), 1e-5)


def test_parts_of_a_row_by_hand():
    """A node that reaches as far as its parent and follows on it is one with it: the second tree of
    STEPS has two levels."""
    end = jnp.asarray(np.stack([PACKED, STEPS]))
    assert int(_parts.parts_of(end, 3, 4)[1]) == 4  # five branches, and room for four
    assert int(_parts.parts_of(end, 2, 5)[1]) == 3
    (top, low, last), depth = _parts.parts_of(end, 3, 5)
    same = np.testing.assert_array_equal
    same(depth, 3)
    same(top.start, [[0, 9, 18, T, T], [0, 12, T, T, T]])
    same(top.queries, [[9, 9, 3, 0, 0], [12, 8, 0, 0, 0]])
    same(top.keys, [[4, 2, 3, 0, 0], [3, 6, 0, 0, 0]])
    same(top.slot[0], [0] * 9 + [1] * 9 + [2] * 3 + [-1] * 3)
    same(np.flatnonzero(top.owned[0]), [0, 1, 2, 3, 9, 10, 18, 19, 20])
    same(low.start, [[4, 6, 11, 12, 17], [3, 10, 18, 19, T]])
    same(low.queries, [[2, 3, 1, 5, 1], [7, 2, 1, 1, 0]])
    same(low.keys, [[2, 3, 1, 5, 1], [2, 2, 1, 1, 0]])
    same(last.start, [[T] * 5, [5, 7, T, T, T]])
    assert not last.owned[0].any()
    (top, *_), depth = _parts.parts_of(jnp.full((2, T), 99), 3, 5)  # no segment leaves its row
    same(depth, 1)
    same(top.queries, [[T, 0, 0, 0, 0]] * 2)
    same(top.keys, top.queries)


def unused(q, k, v, end):
    return q


def test_parts_never_hold_every_logit():
    q = normal(0, 1, 640, 2, 8)
    sums = jnp.zeros((8, 2, 640))
    idle = _parts.Library(lambda *x: (x[0], sums), lambda *x: x[:3])
    end = jnp.full((1, 640), 640)
    loss = lambda q: _parts.tree(q, q, q, end, unused, library=idle, segments=8).sum()
    assert "640,640]" not in str(jax.make_jaxpr(jax.grad(loss))(q))


def test_segments_are_as_many_as_cudnn_has_room_for():
    def room(T, N):
        q = jax.ShapeDtypeStruct((1, T, N, 128), jnp.bfloat16)
        end = jax.ShapeDtypeStruct((1, T), jnp.int32)
        seen = []
        take = lambda q, k, v, *x: (seen.append(x[0].shape[1]), forward(q, k, v, *x))[1]
        library = _parts.Library(take, backward)
        f = lambda q, end: _parts.tree(q, q, q, end, unused, library=library)
        jax.eval_shape(f, q, end)
        return seen[0]

    assert [room(2048, 16), room(8192, 28), room(65536, 64)] == [64, 36, 2]


# ---- which implementation


@pytest.fixture
def gpu(monkeypatch):
    """A machine with one Hopper GPU, whose cuDNN is the stand-in and takes float32."""
    monkeypatch.setattr(_parts, "CUDNN", STAND_IN)
    monkeypatch.setattr(_parts, "device", lambda: (9, _parts.VERSION))
    monkeypatch.setattr(_parts, "DTYPES", ("float32",))
    monkeypatch.setattr(_parts, "LEVELS", 2)  # quick to compile


def used(**kwargs):
    """Whether attention is by parts."""
    q, k, v = heads(2, 2, T=128)
    f = lambda *x: attention(*x, **kwargs)
    return "custom_vjp_call" in str(jax.make_jaxpr(f)(q, k, v))


def test_parts_are_used_where_they_are_asked_for(gpu, monkeypatch):
    end = jnp.full((2, 128), 128)
    assert used(end=end, impl="cudnn")
    assert not used(end=end) and not used(end=end, impl="xla")
    for kwargs in (dict(segment=end), dict(end=end, depth=end, window=4), dict(end=end, index=end)):
        with pytest.raises(ValueError, match="by cuDNN takes `end` alone"):
            used(**kwargs, impl="cudnn")
    monkeypatch.setattr(_parts, "device", lambda: (8, 92000))
    with pytest.raises(ValueError, match="needs compute capability 9 or 10.x .* got 8.x and 92000"):
        used(end=end, impl="cudnn")


def test_what_cudnn_cannot_take():
    half = np.dtype(jnp.bfloat16)
    assert "got float32" in _parts.refusal(np.dtype(np.float32), 64, 1)
    assert "got 100" in _parts.refusal(np.dtype(np.float16), 100, 1)
    assert "got 256" in _parts.refusal(half, 256, 1)
    assert "32 bits" in _parts.refusal(half, 128, 2**31)
    assert "needs a GPU" in _parts.refusal(half, 128, 2**31 - 1)
    with pytest.raises(ValueError, match="no impl='cudnn' here"):
        choose("cudnn")
    with pytest.raises(ValueError, match="by cuDNN takes bfloat16"):
        attention(*heads(2, 2), end=jnp.asarray(np.stack([PAIR] * 2)), impl="cudnn")


def rows_and_heads():
    return jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def test_parts_on_a_mesh_are_those_on_one_device(gpu):
    """Rows of one depth on one device, of another depth on another; fewer kv heads than devices."""
    q, k, v = heads(4, 2)
    end = jnp.asarray(np.stack([PACKED, DEEP]))
    run = lambda f: value_and_gradient(lambda *x: f(*x, end=end), np.cos(q))(q, k, v)
    with jax.set_mesh(rows_and_heads()):
        got = run(lambda *x, end: attention(*x, end=end, impl="cudnn"))
    close(got, run(attention_ref), 1e-5)


# ---- cuDNN itself


def test_the_private_function_takes_what_we_pass():
    """Arrays by the names in Library's order, and nothing that we do not know."""
    names = list(inspect.signature(cudnn._dot_product_attention_bwd_impl).parameters)
    arrays = (
        "query key value bias q_seqlen kv_seqlen q_offsets kv_offsets page_table_k page_table_v"
    )
    assert names[:13] == [*arrays.split(), "activation", "fwd_output", "grad_output"]
    static = "scale seed dropout_rate variadic_args mask_type layout sliding_window_length".split()
    assert set(static) <= set(names[13:])
    assert set(names[13:]) <= {*static, "score_mod_args", "score_mod"}
    asked = inspect.signature(cudnn.dot_product_attention).parameters
    ours = "q_seqlen kv_seqlen q_offsets kv_offsets scale mask_type return_residual".split()
    assert set(ours) <= set(asked) and list(asked)[:3] == ["query", "key", "value"]
    assert not inspect.signature(cudnn.check_cudnn_version).parameters


@pytest.mark.parametrize("mesh", [None, rows_and_heads])
def test_parts_lower_for_cuda(monkeypatch, mesh):
    """One call forward and one backward for each level, of 1, 2 and 3 levels."""
    monkeypatch.setattr(_parts, "device", lambda: (9, _parts.VERSION))
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: _parts.VERSION)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda at_least: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda exactly: False)
    q, k, v = (x.astype(jnp.bfloat16) for x in heads(8, 4, T=128, H=64))
    end = jnp.full((2, 128), 128)
    loss = lambda *x: attention(*x, end=end, impl="cudnn").astype(jnp.float32).sum()
    with jax.set_mesh(mesh() if mesh else jax.make_mesh((1,), ("fsdp",), (AxisType.Auto,))):
        traced = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(q, k, v)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "custom_call @__cudnn" in line]
    count = lambda *of: sum(all(x in line for x in of) for line in calls)
    B, N = (1, 2) if mesh else (2, 8)  # of one device
    wide, sums = f"tensor<{B}x128x{N}x64xbf16>", f"tensor<{B * 64}x{N}x128xf32>"
    for name in ("Softmax(", "SoftmaxBackward("):
        assert count("fmha" + name, "PADDING_CAUSAL", wide, sums) == 6
