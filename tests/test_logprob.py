"""Log-probs and entropy without the vocabulary in memory, against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import close, normal, value_and_gradient

from jaxvid.ops.logprob import logprob, logprob_ref


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
