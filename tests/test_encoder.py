"""The encoder and its towers (CLIP, SigLIP) against transformers' own, and what must not matter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from flax import nnx
from towers import drawn, filled, pixels

from jaxvid.batch import VisionBatch
from jaxvid.models import encoder, layers, vit
from jaxvid.models.family import Places
from jaxvid.models.layers import Compute

CFG = encoder.Config(layers=3, width=32, ffn=48, heads=4)
SEGMENT = np.array([[1] * 7 + [0] * 2, [1] * 4 + [2] * 5])


def noisy(cfg):
    """An encoder of small numbers everywhere, so that a lost one shows; compiles nothing."""
    r = np.random.default_rng(7)
    build = lambda: encoder.Encoder(cfg, Compute(remat="none"), rngs=nnx.Rngs(0))
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


# --- the towers


def shown(cfg, frames):
    patches = np.random.default_rng(5).integers(0, 256, (1, frames, cfg.side**2, cfg.patch_values))
    window = np.ones((1, frames, cfg.side**2), np.int32)
    coords = np.zeros((*window.shape, 2), np.int32)  # positions are learned
    return VisionBatch(patches.astype(np.uint8), coords, window)


def towers(cfg, activation, frames):
    """Our tower, what it is shown, and the hidden states of theirs."""
    torch = pytest.importorskip("torch", reason="the oracle: pip install jaxvid[oracle]")
    from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig
    from transformers import SiglipVisionModel as Siglip

    made = CLIPVisionConfig if cfg.kind == "clip" else SiglipVisionConfig
    config = made(
        hidden_size=cfg.width,
        intermediate_size=cfg.ffn,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        image_size=cfg.image,
        patch_size=cfg.patch,
        hidden_act=activation,
        layer_norm_eps=cfg.norm_eps,
    )
    if cfg.kind == "siglip":
        config.vision_use_head = False
    theirs = (CLIPVisionModel if cfg.kind == "clip" else Siglip)(config)
    state = drawn(theirs.state_dict())
    theirs.load_state_dict({k: torch.from_numpy(x) for k, x in state.items()})
    where = Places()
    vit.places(where, cfg, (), "tower")
    build = lambda: vit.Tower(cfg, Compute(remat="none"), rngs=nnx.Rngs(0))
    ours = filled(build, where, lambda name: state[name.removeprefix("tower.")])
    seen = shown(cfg, frames)
    images = torch.tensor(pixels(cfg, seen.patches[0]))
    with torch.no_grad():
        states = theirs.eval()(images, output_hidden_states=True).hidden_states
    return ours, seen, [x.numpy()[:, -(cfg.side**2) :] for x in states]


CLIP = vit.Config(layers=3, width=24, ffn=40, heads=2, image=12, patch=4)
SIGLIP = dataclasses.replace(
    CLIP,
    kind="siglip",
    activation="gelu_tanh",
    norm_eps=1e-6,
    image_mean=vit.SIGLIP_MEAN,
    image_std=vit.SIGLIP_STD,
)
NAMES = {"clip": "quick_gelu", "siglip": "gelu_pytorch_tanh"}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("unused", [0, 1])
def test_hidden_states_of_towers_equal_transformers(kind, unused):
    cfg = dataclasses.replace({"clip": CLIP, "siglip": SIGLIP}[kind], unused=unused)
    ours, seen, states = towers(cfg, NAMES[kind], frames=2)
    got = run(ours, seen)
    print(f"{kind}, {unused} unused: {np.abs(got[0] - states[-1 - unused]).max():.1e}")
    np.testing.assert_allclose(got[0], states[-1 - unused], atol=1e-4)
    hidden = seen._replace(window=seen.window * np.array([1, 0], np.int32)[None, :, None])
    padded = run(ours, hidden)
    np.testing.assert_array_equal(padded[0, 0], got[0, 0])
    assert np.isfinite(padded).all()


TRUE = {
    "clip": vit.Config(layers=1, width=1024, ffn=4096, heads=16, image=336, patch=14),
    "siglip": dataclasses.replace(
        SIGLIP, layers=1, width=1152, ffn=4304, heads=16, image=384, patch=14
    ),
}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_block_of_true_width_equals_transformers(kind):
    """CLIP-L at 336 pixels, SigLIP-so400m (heads of 72) at 384, of which 6 are left over."""
    ours, seen, states = towers(TRUE[kind], NAMES[kind], frames=1)
    got = run(ours, seen)
    print(f"{kind} at true width: {np.abs(got[0] - states[-1]).max():.1e}")
    np.testing.assert_allclose(got[0], states[-1], atol=1e-4)


def test_towers_refuse_what_does_not_fit():
    tower = nnx.eval_shape(lambda: vit.Tower(CLIP, Compute(), rngs=nnx.Rngs(0)))
    seen = shown(CLIP, 1)
    with pytest.raises(ValueError, match="this tower wants 9 of 48 .* frames of 12 pixels a side"):
        tower(VisionBatch(*(x[:, :, :8] for x in seen)))
    for change, said in (
        ({"kind": "dino"}, "kind='dino' of tower"),
        ({"image": 3}, "image=3 pixels holds no patch of 4"),
        ({"image_std": (0.5,)}, "one value for each of 3 channels"),
    ):
        with pytest.raises(ValueError, match=said):
            dataclasses.replace(CLIP, **change)
