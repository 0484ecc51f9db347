"""The audio tower against transformers' own, and what a chunk must not see."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from jaxvid.batch import AudioBatch
from jaxvid.models import audio, encoder
from jaxvid.models.layers import Compute

CFG = audio.Config(
    encoder=encoder.Config(layers=2, width=24, ffn=40, heads=3, key_bias=False),
    out=20,
    mels=16,
    chunk=12,
    max_positions=64,
)
LENGTHS = ((12, 12, 7), (12, 3, 0))  # two sounds, of 31 and 15 mel frames


def _key(k):
    return k.key if isinstance(k, jax.tree_util.DictKey) else ""


def fresh(cfg=CFG):
    graph, params = nnx.split(audio.Tower(cfg, Compute(remat="none"), rngs=nnx.Rngs(0)))
    r = np.random.default_rng(1)  # biases and norms are not 0 and 1, so that a lost one shows
    noisy = lambda path, x: (
        x if "w" in map(_key, path) else x + 0.1 * r.standard_normal(x.shape).astype(np.float32)
    )
    return graph, jax.tree.map_with_path(noisy, params)


def sounds(lengths=LENGTHS, cfg=CFG):
    length = np.array(lengths, np.int32)
    shape = (*length.shape, cfg.chunk, cfg.mels)
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    return AudioBatch(
        x * (np.arange(cfg.chunk) < length[..., None])[..., None], length, np.zeros_like(length)
    )


run = jax.jit(lambda graph, params, sound: nnx.merge(graph, params)(sound), static_argnums=0)


def their_weights(torch, params):
    """Our parameters by the names of their state_dict."""
    flat = {
        ".".join(filter(None, map(_key, path))): np.asarray(x)
        for path, x in jax.tree.leaves_with_path(params)
    }
    out = {"audio_bos_eos_token.weight": flat["marks"]}
    for ours, name in (("first", "conv1"), ("second", "conv2")):
        out[f"{name}.weight"] = flat[f"convolutions.{ours}.linear.w"].transpose(2, 0, 1)
        out[f"{name}.bias"] = flat[f"convolutions.{ours}.linear.b"]
    out |= {"ln_post.weight": flat["norm.scale"], "ln_post.bias": flat["norm.bias"]}
    out |= {"proj.weight": flat["out.w"].T, "proj.bias": flat["out.b"]}
    names = {"mlp.hidden": "fc1", "mlp.out": "fc2", "attention.out": "self_attn.out_proj"}
    names |= {f"attention.{x}": f"self_attn.{x}_proj" for x in "qkv"}
    norms = {"attention_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm"}
    for i in range(len(flat["encoder.blocks.mlp.out.b"])):
        at = lambda name, i=i: flat[f"encoder.blocks.{name}"][i]
        for ours, name in names.items():
            w = at(f"{ours}.w")
            inputs = 2 if ours == "attention.out" else 1
            out[f"layers.{i}.{name}.weight"] = w.reshape(int(np.prod(w.shape[:inputs])), -1).T
            if ours != "attention.k":
                out[f"layers.{i}.{name}.bias"] = at(f"{ours}.b").reshape(-1)
        for ours, name in norms.items():
            out[f"layers.{i}.{name}.weight"] = at(f"{ours}.scale")
            out[f"layers.{i}.{name}.bias"] = at(f"{ours}.bias")
    return {k: torch.tensor(np.array(v)) for k, v in out.items()}


def oracle(cfg, params):
    torch = pytest.importorskip("torch", reason="the oracle: pip install jaxvid[oracle]")
    from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as theirs

    at = cfg.encoder
    config = theirs.Qwen2_5OmniAudioEncoderConfig(
        num_mel_bins=cfg.mels,
        encoder_layers=at.layers,
        encoder_attention_heads=at.heads,
        encoder_ffn_dim=at.ffn,
        d_model=at.width,
        max_source_positions=cfg.max_positions,
        n_window=cfg.chunk // 2,
        output_dim=cfg.out,
    )
    tower = theirs.Qwen2_5OmniAudioEncoder(config).eval()
    tower.load_state_dict(their_weights(torch, params))
    return torch, tower


def compare(cfg, params, graph, sound):
    torch, tower = oracle(cfg, params)
    got, worst = run(graph, params, sound), 0.0
    frames = [x[: n.sum()] for x, n in zip(sound.features.reshape(2, -1, cfg.mels), sound.length)]
    with torch.no_grad():
        want = tower(
            torch.tensor(np.concatenate(frames).T), torch.tensor(sound.length.sum(1))
        ).last_hidden_state.numpy()
    counts = [audio.features(int(n)) for n in sound.length.sum(1)]
    assert len(want) == sum(counts) and got.shape[1] == sound.length.shape[1] * cfg.slots
    for row, theirs in zip(got, np.split(want, np.cumsum(counts)[:-1])):
        worst = max(worst, float(np.abs(row[: len(theirs)] - theirs).max()))
    return worst, got


def test_features_equal_transformers():
    """At most 1e-6 apart."""
    graph, params = fresh()
    worst, got = compare(CFG, params, graph, sounds())
    assert worst < 1e-5 and np.isfinite(got).all()


def test_chunks_and_what_follows_a_sound_do_not_matter():
    graph, params = fresh()
    sound = sounds()
    want = run(graph, params, sound)
    changed = sound._replace(features=sound.features.copy())
    changed.features[0, 1] += 1  # another chunk
    changed.features[1, 1, 3:] += 1  # frames after the end
    changed.features[1, 2] += 1  # padding
    got = run(graph, params, changed)
    slots = CFG.slots
    np.testing.assert_array_equal(got[0, :slots], want[0, :slots])
    np.testing.assert_array_equal(got[0, 2 * slots :], want[0, 2 * slots :])
    assert np.abs(got[0, slots : 2 * slots] - want[0, slots : 2 * slots]).max() > 1e-3
    np.testing.assert_array_equal(got[1, : slots + 1], want[1, : slots + 1])


def test_the_number_of_features_is_known_beforehand():
    """The sum over chunks is the formula over the whole."""
    counts = [audio.features(n) for n in range(1, 50)]
    assert counts[:8] == [0, 0, 1, 1, 1, 1, 2, 2] and audio.features(3000) == 750
    for n in range(1, 50):
        chunks = [CFG.chunk] * (n // CFG.chunk) + [n % CFG.chunk] * (n % CFG.chunk > 0)
        assert sum(map(audio.features, chunks)) == counts[n - 1]


def test_gradients_are_finite_beside_chunks_of_padding():
    graph, params = fresh()
    loss = lambda p: (nnx.merge(graph, p)(sounds()) ** 2).mean()
    gradient = jax.jit(jax.grad(loss), compiler_options={"xla_backend_optimization_level": 0})
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient(params)))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="chunk=50 mel frames must be a multiple of 4"):
        dataclasses.replace(CFG, chunk=50)
    with pytest.raises(ValueError, match="has 80 positions; there are max_positions=64"):
        dataclasses.replace(CFG, chunk=160)
    graph, params = fresh()
    wide = sounds()._replace(features=np.zeros((2, 3, 12, 80), np.float32))
    with pytest.raises(ValueError, match="12 frames of 80 mel bins; this tower wants 12 of 16"):
        nnx.merge(graph, params)(wide)
