"""Optimizers: which weights they treat as matrices, decay and rates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy import toy

from jaxvid.train import optimizers


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
