"""Rotary positions: value and gradient against the reference, and numbers by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from arrays import close, normal, value_and_gradient

from jaxvid.ops.rope import rope, rope2d, rope_ref


def test_rope_kernel_matches_reference():
    x = normal(0, 2, 128, 4, 128)
    positions = np.random.default_rng(1).integers(0, 5_000, (2, 3, 128)).astype(np.int32)
    args = dict(sections=(16, 24, 24), theta=1e6)
    ref = lambda x: rope_ref(x, jnp.asarray(positions), **args)
    ker = lambda x: rope(x, jnp.asarray(positions), impl="interpret", **args)
    close(*(value_and_gradient(f, np.cos(x))(x) for f in (ker, ref)), 1e-5)


def test_rope_by_hand():
    """Sections (1, 0, 1) of a head of 4: pair (0, 2) turns with time, pair (1, 3) with width."""
    x = jnp.array([1.0, 2.0, 3.0, 4.0])[None, None, None]
    y = rope(x, jnp.array([[[5], [6], [7]]]), sections=(1, 0, 1), theta=100.0)[0, 0, 0]
    a, b = 5.0, 7.0 / 10
    want = [
        np.cos(a) - 3 * np.sin(a),
        2 * np.cos(b) - 4 * np.sin(b),
        3 * np.cos(a) + np.sin(a),
        4 * np.cos(b) + 2 * np.sin(b),
    ]
    close(y, np.array(want), 1e-5)


def test_rope_depends_only_on_distance():
    q, k = normal(0, 2, 1, 1, 1, 128)
    at = lambda n: jnp.full((1, 3, 1), n)
    turn = lambda x, n: rope(x, at(n), sections=(16, 24, 24), theta=1e4)
    near, far = ((turn(q, n + 5) * turn(k, n)).sum() for n in (4, 100))
    np.testing.assert_allclose(near, far, rtol=1e-4)


def test_rope_refuses():
    x, positions = jnp.zeros((1, 5, 2, 8)), jnp.zeros((1, 3, 5), jnp.int32)
    with pytest.raises(ValueError, match="add to 3"):
        rope(x, positions, sections=(1, 1, 1), theta=1e4)
    with pytest.raises(ValueError, match="divisible by 128"):
        rope(x, positions, sections=(1, 1, 2), theta=1e4, impl="interpret")
    with pytest.raises(ValueError, match="divisible by 4"):
        rope2d(x[..., :6], jnp.zeros((1, 5, 2), jnp.int32))


def test_rope2d_is_the_vision_rotary_of_transformers():
    torch = pytest.importorskip("torch", reason="the oracle is transformers' torch code")
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    x, coords = normal(0, 7, 3, 16), np.random.default_rng(0).integers(0, 20, (7, 2))
    freq = 1 / 10_000 ** (torch.arange(0, 8, 2).float() / 8)
    angle = (torch.tensor(coords)[..., None] * freq).flatten(1)
    angle = torch.cat([angle, angle], -1)
    want, _ = apply_rotary_pos_emb_vision(
        *[torch.tensor(np.asarray(x))] * 2, angle.cos(), angle.sin()
    )
    close(rope2d(x, jnp.asarray(coords, jnp.int32)), want.numpy(), 1e-5)
