"""The clipped loss: value and gradient against the reference, and numbers by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import close, normal, value_and_gradient

from jaxvid.ops.policy_loss import policy_loss, policy_loss_ref

CLIP = dict(clip_low=0.2, clip_high=0.28)


def ratios(rows, tokens):
    logp, noise, adv = normal(0, 3, rows, tokens)
    return logp, logp + 0.6 * noise, adv


@pytest.mark.parametrize("rows,tokens,dual_clip", [(64, 128, None), (3, 50, 1.5), (70, 130, 1.5)])
def test_policy_loss_kernel_matches_reference(rows, tokens, dual_clip):
    logp, old, adv = ratios(rows, tokens)
    weight = normal(5, rows, tokens)
    ref = lambda x: policy_loss_ref(x, old, adv, **CLIP, dual_clip=dual_clip)
    ker = lambda x: policy_loss(x, old, adv, **CLIP, dual_clip=dual_clip, impl="interpret")
    close(*(value_and_gradient(f, weight)(logp) for f in (ker, ref)), 1e-5)


@pytest.mark.parametrize("impl", ["xla", "interpret"])
def test_policy_loss_on_policy_is_reinforce(impl):
    logp, _, adv = ratios(2, 9)
    loss = lambda x: policy_loss(x, logp, adv, **CLIP, impl=impl).sum()
    close(jax.grad(loss)(logp), -adv, 1e-6)


@pytest.mark.parametrize("impl", ["xla", "interpret"])
def test_policy_loss_clips_exactly_where_it_should(impl):
    logp = jnp.log(jnp.array([[1.5, 1.5, 0.5, 0.5, 1.25, 9.0]]))
    adv = jnp.array([[1.0, -1.0, 1.0, -1.0, 1.0, -1.0]])
    loss = lambda x: policy_loss(x, jnp.zeros_like(x), adv, **CLIP, dual_clip=3.0, impl=impl)
    close(loss(logp), jnp.array([[-1.28, 1.5, -0.5, 0.8, -1.25, 3.0]]), 1e-6)
    grad = jax.grad(lambda x: loss(x).sum())(logp)
    close(grad, jnp.array([[0.0, 1.5, -0.5, 0.0, -1.25, 0.0]]), 1e-6)


@pytest.mark.parametrize("impl", ["xla", "interpret"])
def test_policy_loss_survives_a_ratio_past_float32(impl):
    logp, adv = jnp.array([[200.0, -200.0]]), jnp.array([[0.0, -1.0]])
    loss = lambda x: policy_loss(x, jnp.zeros_like(x), adv, **CLIP, impl=impl).sum()
    assert np.isfinite(loss(logp)) and np.isfinite(jax.grad(loss)(logp)).all()


def test_policy_loss_refuses():
    x = jnp.zeros((8, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match="float32"):
        policy_loss(x, x, x, **CLIP)
    x = jnp.zeros((8, 128))
    with pytest.raises(ValueError, match="above 1"):
        policy_loss(x, x, x, **CLIP, dual_clip=0.5)
