"""Frozen weights: what a step does not compute, hold or save; and what a resumed run insists on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import net, with_lora
from toy import assert_same, batch

from jaxvid import paths
from jaxvid.models import lora
from jaxvid.objectives.preference import DPO
from jaxvid.objectives.sft import SFT
from jaxvid.train import checkpoint, loop, optimizers, step
from jaxvid.train import state as states

ADAM = optimizers.AdamW(lr=1e-2, schedule="constant")
SOME = lora.LoRA(rank=2, targets=("blocks",))


def parts(freeze=(), cfg=None):
    """(graph, trained, frozen)."""
    graph, params = net() if cfg is None else with_lora(cfg)
    train = () if cfg is None else lora.TRAINED
    return graph, *states.split(params, freeze=freeze, train=train)


def begun(*args, **options):
    """(state, step)."""
    graph, trained, frozen = parts(*args)
    tx = ADAM.build(6, trained)
    state = states.create(trained, tx, frozen=frozen)
    return state, step.make_step(graph, SFT(), tx, **options)


def test_patterns_divide_the_weights():
    _, trained, frozen = parts(freeze=("tower", "blocks.(gate|up)", "norm"))
    assert paths.names(trained) == ["blocks.down.w", "table"]
    assert set(paths.names(frozen)) == {
        "blocks.gate.w",
        "blocks.up.w",
        "norm.scale",
        "tower.b",
        "tower.w",
    }
    with pytest.raises(ValueError, match=r"freeze: 'visual' fits nothing.*There are: blocks.down"):
        parts(freeze=("visual",))
    with pytest.raises(ValueError, match="fits nothing"):
        parts(freeze=("low",))  # whole parts of a path alone
    with pytest.raises(ValueError, match="leaves no weight to train"):
        parts(freeze=(".*",))


def products(*args):
    """Matrix products in the compiled step (a scan's body counts once), and its temporaries."""
    state, train_step = begun(*args)
    compiled = train_step.lower(state, batch([1, 2], rows=2)).compile()
    return compiled.as_text().count(" dot("), compiled.memory_analysis().temp_size_in_bytes


def test_gradients_of_frozen_weights_are_not_computed():
    """Of the seven products with weights (tower, three of the MLP, three of the vocabulary's walk),
    those of the backward pass that give a weight's gradient go, and no others."""
    whole, room = products()
    without = lambda *freeze: whole - products(freeze)[0]
    assert without("blocks") == 3
    assert without("tower") == 1
    assert without("table") == 1
    assert without("norm") == 0
    # With all before the MLPs frozen, their inputs need no gradient beyond the first layer's, which
    # the scan shares. LoRA has 3 products for each of 2 matrices of 3 layers, in place of 3.
    adapters, less = products((), SOME)
    assert adapters == whole - 3 - 1 - 1 + 3 * 6
    blocks = 2 * 3 * 64 * 128 * 4  # bytes of their gradients
    assert room - products(("blocks",))[1] > blocks and room - less > blocks


def test_nothing_is_held_for_frozen_weights():
    state, train_step = begun(("blocks", "table"))
    assert {p.split(".")[0] for p in paths.names(state.params)} == {"tower", "norm"}
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in jax.tree.leaves(state.params))
    before = jax.tree.map(np.array, state)
    after, values = train_step(state, batch([1, 2], rows=2))
    assert_same(before.frozen, after.frozen)
    _, everything = begun()
    whole, all_of_it = everything(begun()[0], batch([1, 2], rows=2))
    np.testing.assert_allclose(values["loss"], all_of_it["loss"], rtol=1e-6)
    assert values["grad_norm"] < 0.9 * all_of_it["grad_norm"]
    # Adam's first step goes by the sign alone: what is trained moves as it does in the whole.
    want = whole.params["tower"]["b"][...]
    np.testing.assert_allclose(after.params["tower"]["b"][...], want, atol=1e-6)


def test_frozen_weights_may_be_bfloat16():
    """Of weights that bfloat16 holds, as published ones, it changes nothing at all."""
    data, results = batch([1, 2], rows=2), []
    for dtype in (jnp.float32, jnp.bfloat16):
        graph, trained, frozen = parts(("blocks", "table"))
        half = jax.tree.map(lambda x, to=dtype: x.astype(jnp.bfloat16).astype(to), frozen)
        tx = ADAM.build(6, trained)
        train_step = step.make_step(graph, SFT(), tx)
        state, values = train_step(states.create(trained, tx, frozen=half), data)
        assert {x.dtype for x in jax.tree.leaves(state.frozen)} == {jnp.dtype(dtype)}
        assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
        results.append((state.params, values))
    assert_same(results[0], results[1])


def test_masters_keep_what_bfloat16_would_lose():
    """Steps of 1e-4 on weights near 1, of which bfloat16 holds 256 between 1 and 2: computed in
    bfloat16, they add up in the float32 masters."""
    graph, params = net(dtype="bfloat16")
    tx = optimizers.AdamW(lr=1e-4, schedule="constant").build(6, params)
    state, train_step = states.create(params, tx), step.make_step(graph, SFT(), tx)
    for _ in range(5):
        before = np.array(state.params["norm"]["scale"][...])
        state, values = train_step(state, batch([1, 2], rows=2))
        moved = np.abs(state.params["norm"]["scale"][...] - before)
        assert 0 < moved.max() < 2**-9 and np.isfinite(values["loss"])
    scale = state.params["norm"]["scale"][...]
    assert scale.dtype == jnp.float32 and np.abs(scale - 1).max() > 3e-4
    assert (scale.astype(jnp.bfloat16) == 1).all()
    kinds = {x.dtype for x in jax.tree.leaves((state.params, state.opt_state)) if x.ndim}
    assert kinds == {jnp.dtype("float32")}


# Checkpoints --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [((), SOME), (("tower",), None)], ids=["lora", "freeze"])
def test_a_checkpoint_holds_what_is_trained(how, tmp_path):
    state, train_step = begun(*how)
    data, saver = batch([1, 2], rows=2), checkpoint.Checkpoints(tmp_path)
    state, _ = train_step(state, data)
    saver.save(1, state, checkpoint.Meta(0, None, {"model": "runs/sft/model"}))
    saver.wait()
    saved = jax.tree.map(np.array, state)
    stored = saver.manager.item_metadata(1)["state"].tree
    assert not any(name.startswith("frozen") for name in stored)
    assert sum(name.startswith("params.") for name in stored) == len(jax.tree.leaves(state.params))
    _, back, _ = saver.restore(begun(*how)[0])
    assert_same(saved, back)
    straight, resumed = train_step(state, data)[0], train_step(back, data)[0]
    assert_same(straight, resumed)
    other = begun(*how)[0]
    other.frozen["tower"]["b"][...] += 1e-3
    with pytest.raises(ValueError, match=r"1 frozen weights.*tower.b.*model \(runs/sft/model\)"):
        saver.restore(other)
    with pytest.raises(ValueError, match="froze other weights than this run.*`freeze` and `lora`"):
        saver.restore(begun()[0])
    saver.close()


# References ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [((), SOME), (("tower",), None)], ids=["lora", "freeze"])
def test_the_reference_is_where_the_run_began(how):
    """Its margins are 0 at first; under LoRA it is the state's own frozen weights and no copy."""
    graph, trained, frozen = parts(*how)
    tx, data = ADAM.build(6, trained), batch([1, 2], rows=2, mates=True)
    base = net()[0]
    if how[1]:
        reference = loop.base(step.make_score(base))
    else:
        reference = loop.start(step.make_score(graph), trained)
    want = step.make_score(base)(net()[1], data).logp
    state = states.create(trained, tx, frozen=frozen)
    train_step = step.make_step(graph, DPO(beta=0.5), tx)
    margins = []
    for _ in range(3):
        refs = reference(state, data)
        np.testing.assert_array_equal(refs, want)
        state, values = train_step(state, data._replace(ref=refs))
        margins.append(float(values["rewards/margins"]))
    assert margins[0] == 0 and margins[-1] > 0.001
