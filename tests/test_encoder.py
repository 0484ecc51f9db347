"""The encoder: what must not matter, and activations against transformers' own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from flax import nnx

from jaxvid.models import encoder, layers
from jaxvid.models.layers import Compute

CFG = encoder.Config(layers=3, width=32, ffn=48, heads=4)
SEGMENT = np.array([[1] * 7 + [0] * 2, [1] * 4 + [2] * 5])


def noisy(cfg):
    """An encoder of small numbers everywhere, so that a lost one shows; compiles nothing."""
    r = np.random.default_rng(7)
    build = lambda: encoder.Encoder(cfg, Compute(remat=False), rngs=nnx.Rngs(0))
    graph, params = nnx.split(nnx.eval_shape(build))
    draw = lambda x: jnp.asarray(0.2 * r.standard_normal(x.shape).astype(np.float32))
    return nnx.merge(graph, jax.tree.map(draw, params))


run = nnx.jit(lambda module, *inputs: module(*inputs))


@pytest.fixture(scope="module")
def ours():
    return noisy(CFG)


def test_segments_do_not_see_each_other_and_padding_is_unseen(ours):
    x = normal(1, 2, 9, 32)
    want = run(ours, x, SEGMENT)
    got = run(ours, x.at[0, 7:].add(3.0).at[1, 4:].add(3.0), SEGMENT)
    np.testing.assert_allclose(got[0, :7], want[0, :7], atol=1e-6)
    np.testing.assert_allclose(got[1, :4], want[1, :4], atol=1e-6)
    assert np.abs(got[1, 4:] - want[1, 4:]).max() > 0.1 and np.isfinite(got).all()


def test_unused_layers_are_the_same_layers_left_out(ours):
    short = noisy(dataclasses.replace(CFG, unused=1))
    blocks = nnx.state(ours.blocks)
    nnx.update(short.blocks, jax.tree.map(lambda w: w[:2], blocks))
    nnx.update(short.unused[0], jax.tree.map(lambda w: w[2], blocks))
    x = normal(1, 2, 9, 32)
    last = run(short.unused[0], run(short, x, SEGMENT), jnp.asarray(SEGMENT))
    np.testing.assert_allclose(last, run(ours, x, SEGMENT), atol=1e-5)


def test_only_the_keys_lose_their_bias():
    attention = noisy(dataclasses.replace(CFG, key_bias=False)).blocks.attention
    assert attention.k.b is None
    assert None not in (attention.q.b, attention.v.b, attention.out.b)


def test_bfloat16_keeps_its_type_and_little_is_lost(ours):
    x = normal(1, 2, 9, 32)
    rough = run(ours, x.astype(jnp.bfloat16), SEGMENT)
    assert rough.dtype == jnp.bfloat16
    want = run(ours, x, SEGMENT)
    assert np.abs(rough.astype(jnp.float32) - want).max() < 0.05 * np.abs(want).max()


@pytest.mark.parametrize(
    "name, theirs",
    [("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh"), ("quick_gelu", "quick_gelu")],
)
def test_activations_equal_transformers(name, theirs):
    torch = pytest.importorskip("torch", reason="the oracle: pip install jaxvid[oracle]")
    from transformers.activations import ACT2FN

    x = np.linspace(-6, 6, 201, dtype=np.float32)
    want = ACT2FN[theirs](torch.tensor(x)).numpy()
    np.testing.assert_allclose(layers.ACTIVATIONS[name](x), want, atol=1e-6)


def test_encoder_configs_refuse_what_does_not_fit():
    for change, said in (
        ({"heads": 5}, "not a multiple of heads=5"),
        ({"activation": "tanh"}, "activation='tanh' is not known"),
        ({"unused": 3}, "unused=3 of 3 layers"),
    ):
        with pytest.raises(ValueError, match=said):
            dataclasses.replace(CFG, **change)
