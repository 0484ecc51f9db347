"""Rotary positions: value and gradient against the reference, and numbers by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import close, normal, raceless, value_and_gradient

from jaxvid.ops.rope import rope, rope2d, rope_ref

CONTIGUOUS = dict(sections=(16, 24, 24), theta=1e6)
INTERLEAVED = dict(sections=(24, 20, 20), theta=5e6, interleaved=True)
KINDS = pytest.mark.parametrize(
    "kind", [CONTIGUOUS, INTERLEAVED], ids=["contiguous", "interleaved"]
)


def places(*shape):
    return jnp.asarray(np.random.default_rng(1).integers(0, 5_000, shape), jnp.int32)


@KINDS
def test_rope_kernel_matches_reference(kind):
    """Queries and keys in one call, as the reference does them one by one."""
    q, k, positions = normal(0, 2, 256, 3, 128), normal(1, 2, 256, 1, 128), places(2, 3, 256)
    ref = lambda q, k: tuple(rope_ref(x, positions, **kind) for x in (q, k))
    ker = lambda q, k: rope((q, k), positions, impl="interpret", **kind)
    weight = (np.cos(q), np.cos(k))
    close(*(value_and_gradient(f, weight)(q, k) for f in (ker, ref)), 1e-5)
    close(jax.jit(lambda q: rope(q, positions, **kind))(q), ref(q, k)[0], 1e-6)


@pytest.mark.parametrize("impl", ["xla", "interpret"])
def test_rope_rounds_bfloat16_once(impl):
    x, positions = normal(0, 1, 128, 2, 128).astype(jnp.bfloat16), places(1, 3, 128)
    turn = jax.jit(lambda x: rope(x, positions, impl=impl, **CONTIGUOUS))
    want, got = rope_ref(x.astype(jnp.float32), positions, **CONTIGUOUS), turn(x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=2**-8, atol=1e-6)


def test_rope_kernel_makes_its_own_cosines():
    """Forward and backward read the array, its positions and one number a frequency."""
    x, positions = normal(0, 1, 128, 2, 128), places(1, 3, 128)
    loss = lambda x: (rope(x, positions, impl="interpret", **INTERLEAVED) ** 2).sum()
    found = [e for e in jax.make_jaxpr(jax.grad(loss))(x).eqns]
    kernels = [e for e in found if e.primitive.name == "pallas_call"]
    assert not {"sin", "cos"} & {e.primitive.name for e in found}
    read = [[v.aval.shape for v in e.invars] for e in kernels]
    assert read == [[(1, 3, 128), (64, 3), (1, 2, 128, 128)]] * 2


def test_rope_kernel_has_no_race():
    x, positions = normal(0, 1, 256, 1, 128), places(1, 3, 256)
    turn = lambda x: rope(x, positions, impl="pallas", **CONTIGUOUS)
    close(raceless(turn, x), rope_ref(x, positions, **CONTIGUOUS), 1e-5)
    raceless(lambda dy: jax.vjp(turn, x)[1](dy), x, kernels=2)  # forward too


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


def test_rope_interleaved_by_hand():
    """Sections (2, 1, 1): the four frequencies turn with time, height, width, time."""
    x = jnp.ones((1, 1, 1, 8))
    at = jnp.array([[[5], [6], [7]]])
    y = rope(x, at, sections=(2, 1, 1), theta=1e4, interleaved=True)[0, 0, 0]
    angle = np.array([5, 0.6, 0.07, 0.005])
    close(y, np.concatenate([np.cos(angle) - np.sin(angle), np.cos(angle) + np.sin(angle)]), 1e-6)


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
    with pytest.raises(ValueError, match="do not interleave"):
        rope(x, positions, sections=(1, 1, 2), theta=1e4, interleaved=True)
    with pytest.raises(ValueError, match="divisible by 4"):
        rope2d(x[..., :6], jnp.zeros((1, 5, 2), jnp.int32))


@KINDS
@pytest.mark.parametrize("impl", ["xla", "interpret"])
def test_rope_is_the_rotary_of_transformers(kind, impl):
    torch = pytest.importorskip("torch", reason="the oracle is transformers' torch code")
    if "interleaved" in kind:
        from transformers.models.qwen3_vl import modeling_qwen3_vl as theirs
        from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig as Config

        rotary = theirs.Qwen3VLTextRotaryEmbedding
    else:
        from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as theirs
        from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
            Qwen2_5_VLTextConfig as Config,
        )

        rotary = theirs.Qwen2_5_VLRotaryEmbedding
    parameters = dict(
        rope_type="default", rope_theta=kind["theta"], mrope_section=list(kind["sections"])
    )
    shape = dict(hidden_size=384, num_attention_heads=3, num_key_value_heads=1)
    cfg = Config(**shape, head_dim=128, rope_parameters=parameters)
    q, k, positions = normal(0, 2, 128, 3, 128), normal(1, 2, 128, 1, 128), places(2, 3, 128)
    into = lambda x: torch.tensor(np.asarray(x))
    cos, sin = rotary(cfg)(into(q), into(positions).transpose(0, 1))
    want = theirs.apply_rotary_pos_emb(into(q), into(k), cos, sin, unsqueeze_dim=2)
    got = jax.jit(lambda *qk: rope(qk, positions, impl=impl, **kind))(q, k)
    close(got, tuple(x.numpy() for x in want), 1e-5)


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
