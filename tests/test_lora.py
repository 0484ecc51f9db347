"""LoRA: what it starts as, that it alone is trained and paid for, dropout, devices and merging."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nets import adapted, net, with_lora
from toy import assert_same, batch, mesh_of, row, small

from jaxvid import paths
from jaxvid.models import hf, lora
from jaxvid.objectives.sft import SFT
from jaxvid.train import checkpoint, loop, optimizers, step
from jaxvid.train import state as states

CFG = lora.LoRA(rank=2, alpha=8.0)
EVERYWHERE = lora.LoRA(rank=2, alpha=8.0, targets=("decoder", "tower"), dropout=0.3)
BLOCKS = lora.LoRA(rank=2, alpha=8.0, targets=("blocks",))  # of nets.Net
ADAM = optimizers.AdamW(lr=1e-2, schedule="constant", weight_decay=0.01)


@functools.cache
def base():
    return hf.initialise(small(), 0)


def attached(cfg=CFG, noisy=False, mesh=None):
    """(graph, weights) of the smallest real model."""
    params = hf.initialise(small(), 0, mesh=mesh).params
    return adapted(base().graph, params, cfg, noisy=noisy, mesh=mesh)


def run_of(graph, params, cfg, mesh=None, **options):
    """(state, step) of a LoRA run."""
    trained, frozen = states.split(params, train=lora.TRAINED)
    tx = ADAM.build(6, trained)
    drop = lora.drop if cfg.dropout else None
    train_step = step.make_step(graph, SFT(), tx, drop=drop, **options)
    return states.create(trained, tx, mesh, frozen=frozen), train_step


def test_it_starts_as_the_base_bit_for_bit():
    """With dropout in the config too: scoring never drops."""
    data, want = batch([1, 2], rows=2), None
    for graph, params in ((base().graph, base().params), attached(EVERYWHERE)):
        scores = step.make_score(graph)(params, data)
        want = want or scores
        assert_same(want, scores)


def test_targets_choose_the_layers():
    where = lambda *targets: {
        name
        for name in paths.names(attached(lora.LoRA(rank=1, targets=targets))[1])
        if name.endswith("lora.a")
    }
    assert len(where("decoder")) == 7 and len(where("attention.(q|v)")) == 4
    assert where("decoder.blocks.attention.q") == {"decoder.blocks.attention.q.lora.a"}
    with pytest.raises(ValueError, match=r"lora.targets: 'decodr' fits nothing.*tower.merger.out"):
        where("decodr")
    with pytest.raises(ValueError, match=r"'\(' is no regular expression"):
        where("(")


def test_settings_are_checked():
    assert lora.LoRA(rank=4, alpha=8.0).scale == 2.0
    assert lora.LoRA(rank=4, alpha=8.0, rank_stabilised=True).scale == 4.0
    with pytest.raises(ValueError, match="rank is 0, which is none; set lora.rank"):
        lora.LoRA(alpha=8.0)
    with pytest.raises(ValueError, match="dropout 1.0"):
        lora.LoRA(rank=2, dropout=1.0)


def test_merging_keeps_the_outputs():
    data = batch([1, 2], rows=2)
    cfg = dataclasses.replace(BLOCKS, rank_stabilised=True, targets=("blocks.(up|down)", "tower"))
    graph, params = with_lora(cfg, noisy=True)
    want = step.make_score(graph)(params, data).logp
    merged = lora.merge(params, cfg)
    assert paths.names(merged) == paths.names(net()[1])
    score = step.make_score(net()[0])
    np.testing.assert_allclose(score(merged, data).logp, want, atol=1e-4)
    assert np.abs(want - score(net()[1], data).logp).max() > 0.1
    assert_same(net()[1], lora.merge(with_lora(cfg)[1], cfg))


def test_kinds_of_remat_and_parts_of_the_mlp_give_the_same():
    data = row(batch([1, 2], rows=2), 0)
    _, params = with_lora(BLOCKS, noisy=True)
    trained, frozen = states.split(params, train=lora.TRAINED)

    def gradient(**settings):
        f = step.make_loss(with_lora(BLOCKS, **settings)[0], SFT(), 1.0)
        return jax.jit(jax.value_and_grad(f, has_aux=True))(trained, data, frozen)

    want = gradient()
    for settings in ({"remat": "full"}, {"remat": "dots", "ffn_parts": 2}):
        got = gradient(**settings)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), got, want)


def test_a_run_trains_the_adapters_alone():
    state, train_step = run_of(*with_lora(BLOCKS), BLOCKS)
    before = jax.tree.map(np.array, state)
    data, losses = batch([1, 2], rows=2), []
    for _ in range(6):
        state, values = train_step(state, data)
        losses.append(float(values["loss"]))
    assert losses[-1] < 0.98 * losses[0]
    assert_same(before.frozen, state.frozen)
    assert_same(before.frozen, net()[1])
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before.params, state.params)
    assert min(jax.tree.leaves(moved)) > 0
    held, trained, still = (
        sum(x.size for x in jax.tree.leaves(tree) if x.ndim)
        for tree in (state.opt_state, state.params, state.frozen)
    )
    assert held == 2 * trained and trained < 0.1 * still


def test_dropout_comes_from_seed_and_step():
    """The same state and seed draw the same; another step, seed or micro-batch other masks."""
    cfg, data = dataclasses.replace(BLOCKS, dropout=0.3), batch([1, 1], rows=1)
    graph, params = with_lora(cfg, noisy=True)
    losses = {}
    for seed in (0, 1):
        _, train_step = run_of(*with_lora(cfg, noisy=True), cfg, seed=seed)
        for n in (0, 1, 0):
            state, _ = run_of(*with_lora(cfg, noisy=True), cfg)
            state = state._replace(step=jnp.int32(n))
            losses.setdefault((seed, n), []).append(float(train_step(state, data)[1]["loss"]))
    for same in ((0, 0), (1, 0)):
        assert losses[same][0] == losses[same][1]
    assert len({x for found in losses.values() for x in found}) == 4
    trained, frozen = states.split(params, train=lora.TRAINED)
    loss = jax.jit(step.make_loss(graph, SFT(), 1.0, lora.drop))
    plain = float(loss(trained, row(data, 0), frozen)[0])
    keys = jax.random.split(jax.random.key(0), 64)
    drawn = [float(loss(trained, row(data, 0), frozen, k)[0]) for k in keys]
    assert np.std(drawn) > 0.01 and plain not in drawn
    parts, _ = with_lora(cfg, ffn_parts=2)
    with pytest.raises(ValueError, match="dropout before mlp.down"):
        step.make_loss(parts, SFT(), 1.0, lora.drop)(trained, row(data, 0), frozen, keys[0])


def test_dropout_keeps_the_expected_input():
    """An adapter's output under dropout is, in the mean, that without, and each layer's differs."""
    graph, params = attached(EVERYWHERE, noisy=True)
    adapter = dict(lora.adapters(nnx.merge(graph, params)))["decoder.blocks.mlp.up"]
    one = jax.tree.map(lambda x: x[0], nnx.split(adapter)[1])
    model = nnx.merge(nnx.split(adapter)[0], one)
    x = jax.random.normal(jax.random.key(0), (3, 32))
    want = model(x)

    def drawn(key):
        there = nnx.merge(*nnx.split(model))
        there.noise = lora.Noise(key)
        return there(x)

    found = jax.vmap(drawn)(jax.random.split(jax.random.key(1), 4000))
    error = np.abs(found.mean(0) - want) / (found.std(0) / np.sqrt(4000))
    assert error.max() < 5 and found.std(0).min() > 0.01
    model = nnx.merge(graph, params)
    lora.drop(model, jax.random.key(0))
    keys = jax.random.key_data(dict(lora.adapters(model))["decoder.blocks.mlp.up"].noise[...])
    assert len(keys) == 2 and (keys[0] != keys[1]).any()


def test_one_device_is_eight_with_dropout(tmp_path):
    """fsdp 4 x tensor 2, in three steps; b is split as its layer's outputs are."""
    data, results = batch(range(1, 9), 4), []
    saver = checkpoint.Checkpoints(tmp_path / "c")
    for mesh in mesh_of(4, 2), mesh_of():
        with jax.set_mesh(mesh):
            state, train_step = run_of(*attached(EVERYWHERE, mesh=mesh), EVERYWHERE, mesh)
            placed = jax.tree.map(lambda x: x.sharding, state)
            for _ in range(3):
                state, values = train_step(state, loop.place(data, mesh))
            assert jax.tree.map(lambda x: x.sharding, state) == placed
            assert train_step._cache_size() == 1
            if mesh.size == 8:
                up = state.params["decoder"]["blocks"]["mlp"]["up"]["lora"]
                assert up["a"][...].sharding.spec == jax.P(None, "fsdp")
                assert up["b"][...].sharding.spec == jax.P(None, None, "tensor")
                saver.save(3, state, checkpoint.Meta(0, None, {}))
            else:
                saver.wait()
                assert_same(saver.restore(state)[1], results[0][0])
            results.append(jax.tree.map(np.array, (state, values)))
    saver.close()
    assert_same(results[0][0].params, results[1][0].params, rtol=1e-3, atol=2e-3)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(results[0][1][name], results[1][1][name], rtol=1e-4)
