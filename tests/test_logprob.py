"""Log-probs and entropy without the vocabulary in memory, against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import close, normal, raceless, value_and_gradient
from jax.sharding import NamedSharding

from jaxvid import sharding
from jaxvid.ops import logprob as module
from jaxvid.ops.logprob import kl, kl_ref, logprob, logprob_ref

TARGETS = jnp.array([[0, 36, 30, 29, 7], [35, 6, 14, 20, 21]])


@pytest.mark.parametrize("impl", ["xla", "interpret"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("block,temperature", [(7, 0.7), (10, 1.0), (37, 0.7), (64, 1.0)])
def test_logprob_in_blocks_is_the_reference(block, temperature, axis, impl):
    hidden, unembed = normal(0, 2, 5, 128), normal(1, 37, 128) / 8
    settings = dict(temperature=temperature, block=block, vocab_axis=axis, impl=impl)
    ours = lambda h, u: logprob(h, u if axis == 0 else u.T, TARGETS, **settings)
    ref = lambda h, u: logprob_ref(h, u, TARGETS, temperature)
    weight = tuple(normal(2, 2, 2, 5))
    close(*(value_and_gradient(f, weight)(hidden, unembed) for f in (ours, ref)), 1e-4)


def test_logprob_kernel_over_several_tiles(monkeypatch):
    """Three tiles of tokens, of words (the last one partial) and of width."""
    for name, size in (("TOKENS", 128), ("WORDS", 128), ("WIDTH", 512)):
        monkeypatch.setattr(module, name, size)
    hidden, unembed = normal(0, 1, 300, 384), normal(1, 700, 384) / 8
    targets = jnp.arange(300)[None] * 7 % 700
    ours = lambda h, u: logprob(h, u, targets, block=350, impl="interpret")
    ref = lambda h, u: logprob_ref(h, u, targets)
    weight = tuple(normal(2, 2, 1, 300))
    close(*(value_and_gradient(f, weight)(hidden, unembed) for f in (ours, ref)), 1e-4)


def test_logprob_kernels_have_no_race(monkeypatch):
    """Forward and backward, in each of two blocks that overlap. Three tiles of tokens and two of
    words and width: an axis that were wrongly parallel would be cut between the two cores."""
    for name in ("TOKENS", "WORDS", "WIDTH"):
        monkeypatch.setattr(module, name, 128)
    hidden, unembed = normal(0, 1, 384, 256), normal(1, 500, 256) / 8
    targets, weight = jnp.arange(384)[None], tuple(normal(2, 2, 1, 384))

    def both(f, *x):
        y, pull = jax.vjp(f, *x)
        return y, pull(weight)

    ours = lambda h, u: both(lambda *x: logprob(*x, targets, block=256, impl="pallas"), h, u)
    ref = lambda h, u: both(lambda *x: logprob_ref(*x, targets), h, u)
    close(raceless(ours, hidden, unembed, kernels=4), jax.jit(ref)(hidden, unembed), 1e-4)


MESHES = [(1, 8, 1), (2, 2, 2), (1, 2, 4), (1, 1, 8)]


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("impl", ["xla", "interpret"])
def test_logprob_on_a_mesh_is_that_on_one_device(shape, impl):
    """Rows over replica and fsdp, the table's width over fsdp, the vocabulary over tensor."""
    mesh = sharding.make_mesh(*shape)
    hidden, unembed = normal(0, 8, 3, 128), normal(1, 48, 128) / 8
    targets, weight = jnp.arange(24).reshape(8, 3) * 2, tuple(normal(2, 2, 8, 3))
    ours = lambda h, u: logprob(h, u, targets, block=5, impl=impl)
    want = value_and_gradient(lambda h, u: logprob_ref(h, u, targets), weight)(hidden, unembed)
    with jax.set_mesh(mesh):
        place = lambda x, *names: jax.device_put(x, NamedSharding(mesh, sharding.spec(names)))
        rows, table = place(hidden, "rows"), place(unembed, "vocab", "embed")
        run = value_and_gradient(ours, weight)
        close(run(rows, table), want, 1e-4)
        text = run.lower(rows, table).compile().as_text()
    assert "f32[48,128]" not in text or shape == (1, 1, 8)  # the table is never whole


@pytest.mark.parametrize("impl", ["xla", "interpret"])
def test_kl_is_the_reference(impl):
    hidden, other, unembed = normal(0, 8, 5, 128), normal(3, 8, 5, 128), normal(1, 40, 128) / 8
    want = kl_ref(hidden, other, unembed, 0.7)
    run = lambda *x, **more: kl(*x, temperature=0.7, impl=impl, **more)
    close(run(hidden, other, unembed, block=7), want, 1e-5)
    close(run(hidden, other, unembed.T, block=64, vocab_axis=1), want, 1e-5)
    close(run(hidden, hidden, unembed), jnp.zeros((8, 5)), 1e-6)
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        spread = jax.jit(lambda *x: run(*x, block=7))
        close(spread(hidden, other, unembed), want, 1e-5)
        assert not jax.grad(lambda h: spread(h, other, unembed).sum())(hidden).any()


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
    with pytest.raises(ValueError, match="divisible by 128"):
        logprob(*args, impl="interpret")
    with pytest.raises(ValueError, match="do not meet; set vocab_axis"):
        logprob(*args, vocab_axis=1)
