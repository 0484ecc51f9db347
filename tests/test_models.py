"""Qwen2.5-VL's positions, the cache against the full pass, what must not matter, and sharding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from prompts import QUICK, decode, hidden, model, prefill
from qwen import CFG, PADS, VIDEO, B, G, R, frames, fresh, plain, rows, sequence, tower

from jaxvid import sharding
from jaxvid.batch import VisionBatch
from jaxvid.models import decoder, hf, layers, qwen25vl
from jaxvid.models.layers import Compute
from jaxvid.ops import attention

# --- positions


def test_positions_by_hand():
    ids = np.array([9, 2, *[VIDEO] * 8, 3, 7])
    grid = (2, 4, 4)  # merged: 2 x 2 x 2
    cfg = dataclasses.replace(CFG, fractional_seconds=True)
    got = qwen25vl.positions(ids, [grid], [0.5], cfg)  # 4 per second: 2 per temporal patch
    assert got[0].tolist() == [0, 1, 2, 2, 2, 2, 4, 4, 4, 4, 5, 6]
    assert got[1].tolist() == [0, 1, 2, 2, 3, 3, 2, 2, 3, 3, 5, 6]
    assert got[2].tolist() == [0, 1, 2, 3, 2, 3, 2, 3, 2, 3, 5, 6]
    truncated = qwen25vl.positions(ids, [grid], [0.5], CFG)  # half a second is 0 seconds
    assert truncated[0].tolist() == [0, 1, *[2] * 8, 4, 5]
    early = qwen25vl.positions(ids, [grid], [2.0], CFG, text_after_video="hf5")
    assert early[0].tolist() == [0, 1, *[2] * 4, *[10] * 4, 4, 5]


def test_positions_of_images_and_of_no_media():
    ids = np.array([9, *[4] * 4, *[4] * 4, 8])  # two images side by side
    got = qwen25vl.positions(ids, [(1, 4, 4)] * 2, [0.0, 0.0], CFG)
    assert got[1].tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    none = qwen25vl.positions(np.arange(6, 10), [], [], CFG)
    assert (none == np.arange(4)).all()


def test_positions_refuse_the_wrong_number_of_placeholders():
    with pytest.raises(ValueError, match="wants 8 equal placeholder tokens"):
        qwen25vl.positions(np.array([9, *[VIDEO] * 7, 3]), [(2, 4, 4)], [1.0], CFG)
    with pytest.raises(ValueError, match="give a grid for every medium"):
        qwen25vl.positions(np.array([9, VIDEO, 3]), [], [], CFG)


# --- the cache, and what must not matter


@pytest.mark.parametrize("window", [0, 9])
def test_decoding_with_one_prompt_cache_equals_the_full_pass(window):
    """A window of 9 leaves the clip behind at the third token of a branch."""
    prompt, branches = sequence(4), [np.arange(10, 15), np.arange(30, 33)]
    p, (ids, at, _), after = len(prompt), plain(prompt), sequence(1)
    start = at.max() + 1
    ours = model(fresh(window=window))
    first = rows(plain(prompt), plain(after))  # a shorter row beside it
    state, kv = prefill(ours, first, frames())
    full = []
    for b in branches:
        turned = np.tile(start + np.arange(len(b)), (3, 1))
        whole = np.concatenate([ids, b]), np.concatenate([at, turned], 1), np.full(p + len(b), 99)
        full.append(hidden(ours, rows(whole), frames())[0])
    np.testing.assert_allclose(state[0], full[0][p - 1], atol=1e-5)
    cache = decoder.empty_branches(kv, G, R)
    length = jnp.asarray((first.end > 0).sum(1), jnp.int32)
    for i in range(3):
        token = jnp.array([[b[i] for b in branches]] * B, jnp.int32)
        state, cache = decode(
            ours, token, jnp.full((B, G), start + i), kv, length, cache, jnp.int32(i)
        )
        for g in range(G):
            np.testing.assert_allclose(state[0, g], full[g][p + i], atol=1e-5)


def test_future_padding_and_other_rows_do_not_matter():
    ids = sequence(6)
    ours, seen = model(fresh()), frames()
    changed = ids.copy()
    changed[-2] = 6 + (changed[-2] - 5) % 58
    tokens = rows(plain(ids), plain(sequence(2, seed=3)))
    a, b = hidden(ours, tokens, seen), hidden(ours, rows(plain(changed), plain(ids)), seen)
    n = len(ids)
    np.testing.assert_allclose(a[0, : n - 2], b[0, : n - 2], atol=1e-6)
    assert np.abs(a[0, n - 2 : n] - b[0, n - 2 : n]).max() > 1e-3 and np.isfinite(a).all()


def test_a_frame_does_not_see_another_and_padding_is_unseen():
    ours, seen = model(fresh()), frames()
    want = tower(ours, seen)
    changed = seen._replace(patches=seen.patches.copy())
    changed.patches[0, 1] = 255 - changed.patches[0, 1]
    got = tower(ours, changed)
    np.testing.assert_array_equal(got[0, :9], want[0, :9])
    assert np.abs(got[0, 9:] - want[0, 9:]).max() > 1e-3
    padded = VisionBatch(*(np.pad(x, [(0, 0), (0, 1)] + [(0, 0)] * (x.ndim - 2)) for x in seen))
    got = tower(ours, padded)
    np.testing.assert_allclose(got[0, :PADS], want[0], atol=1e-5)
    assert np.isfinite(got).all()


def test_no_media_needs_no_frames():
    ids = np.arange(6, 12, dtype=np.int32)
    tokens = rows((ids, np.tile(np.arange(6), (3, 1)), np.full(6, 6)))
    empty = VisionBatch(*(np.zeros((B, 0, *x.shape[2:]), x.dtype) for x in frames()))
    got = hidden(model(fresh()), tokens, empty)
    np.testing.assert_allclose(got, hidden(model(fresh()), tokens, frames()), atol=1e-6)


def test_remat_unroll_and_parts_change_nothing_and_bfloat16_little():
    loaded, tokens, seen = fresh(), rows(plain(sequence(4))), frames()

    def gradient(params, **settings):
        graph, _ = hf.abstract(
            dataclasses.replace(loaded.cfg, compute=Compute(**{"remat": "none", **settings}))
        )
        state = lambda p: nnx.merge(graph, p).hidden(tokens, seen).astype(jnp.float32)
        loss = lambda p: (jnp.abs(state(p)) ** 3).mean()
        return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(params)

    want = gradient(loaded.params)
    got = gradient(loaded.params, remat="full", unroll=2, ffn_parts=2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), got, want)
    rough, gradients = gradient(loaded.params, dtype="bfloat16", remat="full")
    np.testing.assert_allclose(rough, want[0], rtol=0.05)
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


def test_kinds_of_remat_give_the_same_gradient_and_keep_what_they_say(monkeypatch):
    """On two layers of attention, as of a long row, and MLP: the gradient, and how many products
    the backward pass makes again."""
    monkeypatch.setattr(attention, "LONG", 8)
    monkeypatch.setattr(attention, "BLOCK", 8)
    cfg = decoder.Config(
        layers=2, width=16, ffn=24, heads=2, kv_heads=1, vocab=8, rope_sections=(1, 1, 2)
    )
    T = 16
    x = jax.random.normal(jax.random.key(0), (1, T, 16))
    at = jnp.arange(T)[None]
    inputs = (x, jnp.tile(at[:, None], (1, 3, 1)), jnp.full((1, T), T), at)
    _, params = nnx.split(decoder.Decoder(cfg, Compute(), rngs=nnx.Rngs(0)))
    found, products = {}, {}
    for name in layers.REMAT:
        make = lambda name=name: decoder.Decoder(cfg, Compute(remat=name), rngs=nnx.Rngs(0))
        graph, _ = nnx.split(nnx.eval_shape(make))
        loss = lambda p, graph=graph: (nnx.merge(graph, p)(*inputs)[0] ** 3).mean()
        compiled = jax.jit(jax.grad(loss)).lower(params).compile(compiler_options=QUICK)
        found[name], products[name] = compiled(params), compiled.as_text().count(" dot(")
    for got in found.values():
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
        jax.tree.map(close, got, found["none"])
    again = {name: n - products["none"] for name, n in products.items()}
    assert again["offload"] == again["full"] and min(again["dots"], again["attention"]) > 0
    # Kept are the six products with weights whose results something needs (mlp.down's is a sum's),
    # or attention's, which `full` makes twice: for its result, and for each block's derivative.
    assert again["full"] - again["dots"] == 6
    assert again["full"] - again["attention"] >= 2
    with pytest.raises(ValueError, match="remat='all' is not known; choose one of .*'attention'"):
        Compute(remat="all")


@pytest.mark.parametrize("inputs, outputs", [((6,), (2, 3)), ((2, 3), (5,))])
def test_the_written_derivative_of_linear_is_the_automatic_one(inputs, outputs):
    linear = layers.Linear(inputs, outputs, "a b c", bias=True, rngs=nnx.Rngs(0))
    graph, params = nnx.split(linear)
    x = jax.random.normal(jax.random.key(1), (4, 7, *inputs))

    def automatic(p, x):
        y = jnp.tensordot(x, p["w"][...], len(inputs))
        return y + p["b"][...].reshape((1, 1, *outputs))

    gradient = lambda f: jax.grad(lambda *a: (f(*a) ** 3).sum(), argnums=(0, 1))(params, x)
    got, want = gradient(lambda p, x: nnx.merge(graph, p)(x)), gradient(automatic)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


# --- sharding


def mesh():
    return sharding.make_mesh(fsdp=2, tensor=4)  # two kv heads do not divide: replicated


def test_a_folder_is_loaded_onto_a_mesh(tmp_path):
    loaded = fresh()
    hf.save(tmp_path / "m", loaded.cfg, loaded.params, dtype="float32")
    parts = hf.load(tmp_path / "m", mesh=mesh())
    q = parts.params["decoder"]["blocks"]["attention"]["q"]["w"][...]
    assert q.sharding.spec == jax.P(None, "fsdp", "tensor")
    k = parts.params["decoder"]["blocks"]["attention"]["k"]["w"][...]
    assert k.sharding.spec == jax.P(None, "fsdp")
    jax.tree.map(np.testing.assert_array_equal, parts.params, loaded.params)


def test_initialise_is_the_same_on_a_mesh_and_well_scaled():
    one, parts = hf.initialise(CFG, 0), hf.initialise(CFG, 0, mesh=mesh())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one.params, parts.params)
    spread = jax.tree.leaves(parts.params["decoder"]["blocks"]["mlp"]["up"]["w"])[0].sharding
    assert spread.spec == jax.P(None, "fsdp", "tensor")
    flat = {path: np.std(v[...]) for path, v in hf._leaves(one.params)}
    assert abs(flat[("decoder", "table")] - 0.02) < 2e-3
    assert abs(flat[("decoder", "blocks", "mlp", "up", "w")] - 32**-0.5) < 0.02
    assert abs(flat[("decoder", "blocks", "mlp", "down", "w")] - 48**-0.5 / 2) < 0.01
    assert not np.array_equal(one.params["head"][...], hf.initialise(CFG, 1).params["head"][...])


@pytest.mark.parametrize("rows", [4, 6, 64])  # fewer than w is wide; that do not divide; more
@pytest.mark.parametrize(
    "axes",
    ["embed ffn", "ffn embed", "embed heads head", "heads head embed", "embed rank", "rank embed"],
)
def test_products_on_a_mesh_are_products(rows, axes):
    """Whether rows are sent to the weight or the weight to the rows; and their gradients."""
    sizes = {"embed": 32, "ffn": 24, "heads": 4, "head": 8, "rank": 3}
    names = tuple(axes.split())
    shape = tuple(sizes[n] for n in names)
    width = 32 if "heads" in names else shape[0]
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
    x, w = draw(0, rows, width), draw(1, *shape)
    y, pull = jax.vjp(lambda x, w: x @ w.reshape(width, -1), x, w)
    dy = draw(2, *y.shape)
    mesh = sharding.make_mesh(replica=2, fsdp=2, tensor=2)
    spec = sharding.spec(names)

    @jax.jit
    def ours(x, w, dy):
        y, pull = jax.vjp(lambda x, w: layers.matmul(x, w, names), x, w)
        return y, *pull(dy)

    with jax.set_mesh(mesh):
        found = ours(x, jax.device_put(w, jax.NamedSharding(mesh, spec)), dy)
    for a, b in zip(found, (y, *pull(dy)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
