"""The clipped loss: value and gradient against the reference, and numbers by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import close, normal, raceless, value_and_gradient

from jaxvid import sharding
from jaxvid.ops.policy_loss import importance, policy_loss, policy_loss_ref

CLIP = dict(clip_low=0.2, clip_high=0.28)
EACH = pytest.mark.parametrize("impl", ["xla", "interpret"])


def ratios(rows, tokens):
    logp, noise, adv = normal(0, 3, rows, tokens)
    return logp, logp + 0.6 * noise, adv


def sampler(old):
    """Log-probs of a sampler that is not quite the old policy; every seventh is not known."""
    sampled = np.array(old + 0.5 * normal(7, *old.shape))
    sampled.flat[::7] = np.nan
    return jnp.asarray(sampled)


@pytest.mark.parametrize(
    "rows,tokens,dual_clip,cap",
    [(64, 128, None, None), (3, 50, 1.5, 1.2), (70, 1100, 1.5, None), (2, 1100, None, 2.0)],
)
def test_policy_loss_kernel_matches_reference(rows, tokens, dual_clip, cap):
    logp, old, adv = ratios(rows, tokens)
    weight, settings = normal(5, rows, tokens), dict(**CLIP, dual_clip=dual_clip)
    if cap is not None:
        settings |= dict(sampled=sampler(old), importance_cap=cap)
    ref = lambda x: policy_loss_ref(x, old, adv, **settings)
    ker = lambda x: policy_loss(x, old, adv, **settings, impl="interpret")
    close(*(value_and_gradient(f, weight)(logp) for f in (ker, ref)), 1e-5)


def test_policy_loss_kernel_on_a_mesh_takes_each_device_s_rows():
    logp, old, adv = ratios(8, 50)
    settings = dict(**CLIP, dual_clip=1.5, sampled=sampler(old), importance_cap=1.2)
    weight = normal(5, 8, 50)
    want = value_and_gradient(lambda x: policy_loss_ref(x, old, adv, **settings), weight)(logp)
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        run = lambda x: policy_loss(x, old, adv, **settings, impl="interpret")
        close(value_and_gradient(run, weight)(logp), want, 1e-5)


def by_hand(logp, old, adv, sampled, dual_clip, cap):
    """Loss and gradient per token in float64, one token at a time."""
    loss, grad = np.zeros(logp.shape), np.zeros(logp.shape)
    for i in np.ndindex(logp.shape):
        ratio = np.exp(logp[i] - old[i])
        clipped = np.clip(ratio, 0.8, 1.28)
        loss[i] = max(-ratio * adv[i], -clipped * adv[i])
        free = loss[i] == -ratio * adv[i]
        if adv[i] < 0 and loss[i] > -dual_clip * adv[i]:
            loss[i], free = -dual_clip * adv[i], False
        grad[i] = -ratio * adv[i] if free else 0
        weight = 1.0 if np.isnan(sampled[i]) else min(np.exp(old[i] - sampled[i]), cap)
        loss[i], grad[i] = loss[i] * weight, grad[i] * weight
    return loss, grad


def test_policy_loss_in_float64_is_exact():
    """The definition, to float64's rounding; the kernel is float32 and says so."""
    rng = np.random.default_rng(0)
    logp, old, adv = rng.normal(0, 1, (3, 4, 30))
    sampled = old + rng.normal(0, 1, old.shape)
    sampled[0, ::3] = np.nan
    with jax.enable_x64(True):
        settings = dict(**CLIP, dual_clip=1.5, sampled=jnp.asarray(sampled), importance_cap=1.3)
        loss = lambda x: policy_loss(x, jnp.asarray(old), jnp.asarray(adv), **settings)
        value, pull = jax.vjp(loss, jnp.asarray(logp))
        got = value, pull(jnp.ones_like(value))[0]
        assert value.dtype == jnp.float64
        with pytest.raises(ValueError, match="float64: use impl='xla'"):
            policy_loss(jnp.asarray(logp), value, value, **CLIP, impl="interpret")
    for x, y in zip(got, by_hand(logp, old, adv, sampled, 1.5, 1.3)):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-14)


@EACH
def test_policy_loss_on_policy_is_reinforce(impl):
    logp, _, adv = ratios(2, 9)
    loss = lambda x: policy_loss(x, logp, adv, **CLIP, impl=impl).sum()
    close(jax.grad(loss)(logp), -adv, 1e-6)


@EACH
def test_policy_loss_clips_exactly_where_it_should(impl):
    logp = jnp.log(jnp.array([[1.5, 1.5, 0.5, 0.5, 1.25, 9.0]]))
    adv = jnp.array([[1.0, -1.0, 1.0, -1.0, 1.0, -1.0]])
    loss = lambda x: policy_loss(x, jnp.zeros_like(x), adv, **CLIP, dual_clip=3.0, impl=impl)
    close(loss(logp), jnp.array([[-1.28, 1.5, -0.5, 0.8, -1.25, 3.0]]), 1e-6)
    grad = jax.grad(lambda x: loss(x).sum())(logp)
    close(grad, jnp.array([[0.0, 1.5, -0.5, 0.0, -1.25, 0.0]]), 1e-6)


@EACH
def test_policy_loss_weighs_what_the_sampler_did(impl):
    """Weights old / sampled: 2; 4, cut to 3; 1/2; not known, so 1. Value and gradient alike."""
    logp, adv = jnp.zeros((1, 4)), jnp.array([[1.0, 1.0, -1.0, 1.0]])
    sampled = jnp.log(jnp.array([[0.5, 0.25, 2.0, jnp.nan]]))
    loss = lambda x: policy_loss(
        x, logp, adv, **CLIP, sampled=sampled, importance_cap=3.0, impl=impl
    )
    want = jnp.array([[-2.0, -3.0, 0.5, -1.0]])
    close(loss(logp), want, 1e-6)
    close(jax.grad(lambda x: loss(x).sum())(logp), want, 1e-6)
    close(importance(logp, sampled, 3.0), jnp.array([[2.0, 3.0, 0.5, 1.0]]), 1e-6)


@EACH
def test_policy_loss_survives_a_ratio_past_float32(impl):
    logp, adv = jnp.array([[200.0, -200.0]]), jnp.array([[0.0, -1.0]])
    old, far = jnp.zeros_like(logp), jnp.array([[-500.0, 500.0]])
    loss = lambda x: policy_loss(
        x, old, adv, **CLIP, sampled=far, importance_cap=2.0, impl=impl
    ).sum()
    assert np.isfinite(loss(logp)) and np.isfinite(jax.grad(loss)(logp)).all()


@EACH
def test_policy_loss_gives_its_data_no_gradient(impl):
    logp, old, adv = ratios(2, 9)
    loss = lambda old, adv, sampled: policy_loss(
        logp, old, adv, **CLIP, sampled=sampled, importance_cap=2.0, impl=impl
    ).sum()
    assert not any(g.any() for g in jax.grad(loss, (0, 1, 2))(old, adv, old + 0.1))


@EACH
@pytest.mark.parametrize("rows", [8, 3])
def test_policy_loss_on_a_mesh_is_that_on_one_device(impl, rows):
    """Rows over replica and fsdp where they divide. The compiler splits no kernel by itself."""
    logp, old, adv = ratios(rows, 50)
    weight, settings = normal(5, rows, 50), dict(sampled=sampler(old), importance_cap=2.0, **CLIP)
    run = lambda **more: value_and_gradient(
        lambda *x: policy_loss(*x[:3], **settings, **more), weight
    )
    one = run()(logp, old, adv)
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        close(run(impl=impl)(logp, old, adv), one, 1e-6)
        text = str(jax.make_jaxpr(lambda x: policy_loss(x, old, adv, **CLIP, impl=impl))(logp))
    assert ("shard_map" in text) == (impl == "interpret")


def test_policy_loss_kernel_has_no_race():
    logp, old, adv = ratios(70, 1100)
    settings = dict(**CLIP, dual_clip=1.5, sampled=sampler(old), importance_cap=2.0)
    loss = lambda x: policy_loss(x, old, adv, **settings, impl="pallas")
    got = raceless(lambda x: jax.vjp(loss, x)[1](jnp.ones_like(x))[0], logp)
    close(got, jax.grad(lambda x: policy_loss_ref(x, old, adv, **settings).sum())(logp), 1e-5)


def test_policy_loss_refuses():
    x = jnp.zeros((8, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match="float32"):
        policy_loss(x, x, x, **CLIP)
    x = jnp.zeros((8, 128))
    with pytest.raises(ValueError, match="above 1"):
        policy_loss(x, x, x, **CLIP, dual_clip=0.5)
    wrong = dict(sampled=x), dict(importance_cap=2.0), dict(sampled=x, importance_cap=0.0)
    for settings in wrong:
        with pytest.raises(ValueError, match="a cap above 0"):
            policy_loss(x, x, x, **CLIP, **settings)
