"""Optimizers: which weights they treat as matrices, decay and rates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nets import net
from toy import Stream, assert_same, mesh_of, toy

from jaxvid.objectives.sft import SFT
from jaxvid.train import loop, metrics, optimizers, step
from jaxvid.train import state as states


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((8, 16), ("embed", "ffn"), ((0,), (1,))),
        ((3, 8, 16), ("embed", "ffn"), ((1,), (2,))),  # stacked
        ((3, 8, 4, 2), ("embed", "heads", "head"), ((1,), (2, 3))),
        ((3, 4, 2, 8), ("heads", "head", "embed"), ((1, 2), (3,))),
        ((3, 8, 4, 2), ("embed", "kv_heads", "head"), ((1,), (2, 3))),
        ((3, 4, 2), ("heads", "head"), None),  # a bias
        ((3, 8), ("embed",), None),
        ((64, 8), ("vocab", "embed"), None),
    ],
)
def test_matrices_of_muon(shape, axes, expected):
    found = optimizers.matrix_axes(nnx.Param(jnp.zeros(shape), axes=axes))
    assert (found and (found.reduction_axis, found.output_axis)) == expected


def test_muon_orthogonalises_each_layer_and_leaves_the_rest_to_adam():
    _, params = toy()
    optimizer = optimizers.Muon(lr=0.1, schedule="constant", adam_lr=0.01, clip=0.0)
    tx = optimizer.build(6, params)
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), params)
    moved, _ = tx.update(grads, tx.init(params), params)
    for layer in np.asarray(moved["up"][...]):  # [8, 16]: 8 orthogonal rows, scaled by sqrt(2)
        sizes = np.linalg.svd(layer / (0.1 * np.sqrt(2)), compute_uv=False)
        assert (sizes > 0.6).all() and (sizes < 1.3).all()
    for name in ("table", "scale"):
        # Nesterov: the first step looks ahead by 0.9 / (1 + 0.9) of itself.
        ahead = -0.01 * (1 + 0.9 / 1.9) * np.sign(grads[name][...])
        np.testing.assert_allclose(moved[name][...], ahead, rtol=1e-3)


@pytest.mark.parametrize("optimizer", [optimizers.Muon, optimizers.AdamW, optimizers.Adafactor])
def test_weight_decay_is_on_matrices_alone(optimizer):
    _, params = toy()
    still = jax.tree.map(jnp.zeros_like, params)
    tx = optimizer(lr=0.1, schedule="constant", weight_decay=0.5).build(6, params)
    moved, _ = tx.update(still, tx.init(params), params)
    assert np.abs(moved["up"][...]).max() > 1e-3 and np.abs(moved["down"][...]).max() > 1e-3
    assert not np.abs(moved["table"][...]).max() and not np.abs(moved["scale"][...]).max()


def test_learning_rates():
    rate = optimizers.AdamW(lr=1.0, warmup=4, schedule="linear", final=0.5).rate(12)
    found = [float(rate(n)) for n in (0, 1, 3, 4, 8, 12)]
    np.testing.assert_allclose(found, [0.25, 0.5, 1.0, 1.0, 0.75, 0.5])
    with pytest.raises(ValueError, match="warmup of 12 steps.*--optimizer.warmup"):
        optimizers.Muon(warmup=12).rate(12)


@pytest.mark.parametrize("optimizer", [optimizers.Muon, optimizers.AdamW, optimizers.Adafactor])
def test_parts_of_the_model_have_rates_of_their_own(optimizer):
    """A part steps as it would plainly, times its factor; the last pattern that fits counts."""
    _, params = toy()
    plain = optimizer(lr=0.1, warmup=2, weight_decay=0.01, clip=1.0).build(6, params)
    tx = optimizers.scaled(plain, (("up|down|table", 0.5), ("down", 0.1)), params)
    want, found = plain.init(params), tx.init(params)
    for n in range(2):
        grads = jax.tree.map(lambda x, n=n: jax.random.normal(jax.random.key(n), x.shape), params)
        moved, want = plain.update(grads, want, params)
        scaled, found = tx.update(grads, found, params)
        for name, factor in dict(up=0.5, table=0.5, down=0.1, scale=1.0).items():
            np.testing.assert_allclose(scaled[name][...], factor * moved[name][...], rtol=1e-6)
            assert np.abs(moved[name][...]).max() > 0


def test_rates_are_checked():
    _, params = toy()
    tx = optimizers.AdamW().build(6, params)
    assert optimizers.scaled(tx, (), params) is tx
    with pytest.raises(ValueError, match="rates: 'tower' fits nothing.*There are: down, scale"):
        optimizers.scaled(tx, (("tower", 0.1),), params)
    with pytest.raises(ValueError, match="a factor must be above 0; to keep a part still, freeze"):
        optimizers.scaled(tx, (("up", 0.0),), params)


def test_rates_are_logged_and_part_of_a_resumed_run(tmp_path):
    """Of weights frozen there is no rate; a run cut in two ends as one that was not."""
    rates, optimizer = (("norm", 0.1), ("table", 2.0)), optimizers.AdamW(lr=1e-2)
    graph, params = net()
    with pytest.raises(ValueError, match="'blocks' fits nothing"):
        optimizers.scaled(optimizer.build(4, params), (("blocks", 0.1),), net_parts()[0])
    tx = optimizers.scaled(optimizer.build(4, net_parts()[0]), rates, net_parts()[0])
    train_step, mesh, found = step.make_step(graph, SFT(), tx), mesh_of(), []
    with jax.set_mesh(mesh):
        for folder, cuts in ((tmp_path / "whole", (4,)), (tmp_path / "cut", (2, 4))):
            for steps in cuts:
                trained, frozen = net_parts()
                result = loop.train(
                    states.create(trained, tx, mesh, frozen=frozen),
                    loop.supervised(train_step, mesh),
                    Stream(),
                    loop.Settings(steps=steps, log_every=1, rates=rates),
                    folder,
                    rate=optimizer.rate(4),
                )
            found.append(jax.tree.map(np.array, result.state))
    assert_same(*found)
    for line in metrics.read(tmp_path / "cut"):
        for pattern, factor in rates:
            want = factor * line["learning_rate"]
            assert line[f"learning_rate/{pattern}"] == pytest.approx(want)


def net_parts():
    """(trained, frozen) of the small net with its MLPs frozen."""
    return states.split(net()[1], freeze=("blocks",))
