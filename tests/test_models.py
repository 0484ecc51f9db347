"""Qwen2.5-VL against transformers' own, the tree layout against separate rows, the cache against
the full pass, and model folders in and out."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from jaxvid import sharding
from jaxvid.batch import TokenBatch, VisionBatch
from jaxvid.models import decoder, hf, layers, qwen25vl, vision

VIDEO = 5
TEXT = decoder.Config(
    layers=2, width=32, ffn=48, heads=4, kv_heads=2, vocab=64, rope_sections=(1, 1, 2)
)
TOWER = vision.Config(
    layers=3, width=32, ffn=48, heads=2, out=32, full=(1,), patch=4, window=16, tokens_per_second=4
)
CFG = qwen25vl.Config(
    text=TEXT,
    vision=TOWER,
    image_token_id=4,
    video_token_id=VIDEO,
    vision_start_token_id=2,
    vision_end_token_id=3,
    bos_token_id=0,
    eos_token_id=1,
    remat=False,
)
QUICK = {"xla_backend_optimization_level": 0}  # for programs that run once
GRID = (2, 6, 6)  # windows of 2 x 2 merged tokens on 3 x 3: full, two kinds of partial, a corner
PADS = 2 * 3 * 3
B, T, G, R = 2, 36, 2, 6  # one shape for all tests: each compiles once


@functools.cache
def fresh(tied=False):
    cfg = dataclasses.replace(CFG, tied=tied)
    graph, _ = hf.abstract(cfg)
    r = np.random.default_rng(7)  # biases and norms too, so that a lost one shows
    noisy = lambda x: x + 0.2 * r.standard_normal(x.shape).astype(np.float32)
    return hf.Loaded(cfg, graph, jax.tree.map(noisy, hf.initialise(cfg, 0).params))


def model(loaded):
    return nnx.merge(loaded.graph, loaded.params)


hidden = nnx.jit(lambda model, *inputs: model.hidden(*inputs))
prefill = nnx.jit(lambda model, *inputs: model.prefill(*inputs))
decode = nnx.jit(lambda model, *inputs: model.decode(*inputs))
tower = nnx.jit(lambda model, seen: model.tower(seen))


def frames(seed=0):
    """The same geometry in every row; windows by HF's rule, written out for this grid."""
    patches = np.random.default_rng(seed).integers(0, 256, (B, 2, 36, 96)).astype(np.uint8)
    at = np.indices((3, 3, 2, 2)).reshape(4, -1)  # merge order: row, column, then inside
    at = np.stack([2 * at[0] + at[2], 2 * at[1] + at[3]], 1)
    window = 1 + 2 * (at[:, 0] // 4) + at[:, 1] // 4
    spread = lambda x: np.broadcast_to(np.asarray(x, np.int32), (B, 2, *np.shape(x)))
    return VisionBatch(patches, spread(at), spread(window))


def sequence(text, seed=0):
    ids = np.random.default_rng(seed).integers(6, 64, 3 + text)
    return np.concatenate([ids[:2], [2], [VIDEO] * PADS, [3], ids[2:]]).astype(np.int32)


def rows(*each):
    """TokenBatch of whole sequences (tokens, positions [3, n], end), padded; a row missing is a
    copy of the first."""
    pad = lambda x: np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, T - x.shape[-1])]).astype(np.int32)
    each = (*each, *each[:1] * (B - len(each)))
    tokens, positions, end = (np.stack([pad(np.asarray(x)) for x in xs]) for xs in zip(*each))
    at = tokens == VIDEO
    none = np.zeros((B, 1), np.int32)
    media = np.where(at, np.cumsum(at, 1), 0).astype(np.int32)
    return TokenBatch(tokens, positions, end, positions[:, 0], media, none, none, none)


def plain(ids, cfg=CFG):
    return ids, qwen25vl.positions(ids, [GRID], [0.5], cfg), np.full(len(ids), len(ids))


# --- transformers is the oracle


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    torch = pytest.importorskip("torch", reason="the oracle: pip install jaxvid[oracle]")
    from transformers import Qwen2_5_VLForConditionalGeneration

    folder = tmp_path_factory.mktemp("ours") / "model"
    loaded = fresh()
    hf.save(folder, loaded.cfg, loaded.params, dtype="float32")
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return torch, theirs


def their_inputs(torch, ids, seen, row=0):
    mean, std = (np.repeat(np.float32(x), 32) for x in (TOWER.image_mean, TOWER.image_std))
    pixels = (seen.patches[row].reshape(-1, 96).astype(np.float32) / 255 - mean) / std
    return {
        "input_ids": torch.tensor(ids[None].astype(np.int64)),
        "pixel_values_videos": torch.tensor(pixels),
        "video_grid_thw": torch.tensor([GRID]),
        "second_per_grid_ts": torch.tensor([0.5]),
        "mm_token_type_ids": torch.tensor(np.where(ids == VIDEO, 2, 0)[None]),
    }


def test_hidden_states_and_logits_equal_transformers(oracle):
    torch, theirs = oracle
    ids, seen = sequence(8), frames()
    ours = model(fresh())
    tokens = rows(plain(ids))
    with torch.no_grad():
        position_ids = torch.tensor(tokens.positions[0, :, None, : len(ids)].astype(np.int64))
        inputs = their_inputs(torch, ids, seen) | {"position_ids": position_ids}
        want = theirs(**inputs, output_hidden_states=True)
        merged = theirs.model.visual(
            inputs["pixel_values_videos"], inputs["video_grid_thw"]
        ).pooler_output
    got = hidden(ours, tokens, seen)
    np.testing.assert_allclose(tower(ours, seen)[0], merged.numpy(), atol=1e-4)
    got = got[0, : len(ids)]
    np.testing.assert_allclose(got, want.hidden_states[-1][0].numpy(), atol=1e-4)
    logits = got @ ours.unembedding().T
    np.testing.assert_allclose(logits, want.logits[0].numpy(), atol=1e-4)


def test_positions_equal_transformers(oracle):
    torch, theirs = oracle
    ids = sequence(8)
    inputs = their_inputs(torch, ids, frames())
    want, _ = theirs.model.get_rope_index(
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        video_grid_thw=inputs["video_grid_thw"],
        second_per_grid_ts=inputs["second_per_grid_ts"],
    )
    got = qwen25vl.positions(
        ids, [GRID], [0.5], CFG, text_after_video="hf5", fractional_seconds=True
    )
    np.testing.assert_array_equal(got, want[:, 0].numpy())


def test_folder_of_transformers_is_read(oracle, tmp_path):
    torch, theirs = oracle
    theirs.save_pretrained(tmp_path)
    read = hf.load(tmp_path)
    loaded = fresh()
    assert dataclasses.replace(read.cfg, remat=False) == loaded.cfg
    jax.tree.map(np.testing.assert_array_equal, read.params, loaded.params)


def test_greedy_generation_equals_transformers(oracle):
    """Under the position policy of transformers 5, which its generate() uses."""
    torch, theirs = oracle
    cfg = dataclasses.replace(CFG, text_after_video="hf5", fractional_seconds=True)
    ids, seen = sequence(4), frames()
    inputs = their_inputs(torch, ids, seen)
    want = theirs.generate(**inputs, max_new_tokens=R, do_sample=False, eos_token_id=None)
    ours = model(fresh())
    tokens = rows(plain(ids, cfg))
    state, prompt = prefill(ours, tokens, seen)
    state, branch = jnp.stack([state] * G, 1), qwen25vl.empty_branches(prompt, G, R)
    after, length, out = int(tokens.positions.max()) + 1, jnp.full(B, len(ids)), []
    for i in range(R):
        token = (state @ ours.unembedding().T).argmax(-1).astype(jnp.int32)
        out.append(int(token[0, 0]))
        at = jnp.full((B, G), after + i)
        state, branch = decode(ours, token, at, prompt, length, branch, jnp.int32(i))
    assert out == want[0, len(ids) :].tolist()


# --- positions


def test_positions_by_hand():
    ids = np.array([9, 2, *[VIDEO] * 8, 3, 7])
    grid = (2, 4, 4)  # merged: 2 x 2 x 2
    cfg = dataclasses.replace(CFG, fractional_seconds=True)
    got = qwen25vl.positions(ids, [grid], [0.5], cfg)  # 4 per second: 2 per temporal patch
    assert got[0].tolist() == [0, 1, 2, 2, 2, 2, 4, 4, 4, 4, 5, 6]
    assert got[1].tolist() == [0, 1, 2, 2, 3, 3, 2, 2, 3, 3, 5, 6]
    assert got[2].tolist() == [0, 1, 2, 3, 2, 3, 2, 3, 2, 3, 5, 6]
    truncated = qwen25vl.positions(ids, [grid], [0.5], CFG)  # half a second is 0 seconds
    assert truncated[0].tolist() == [0, 1, *[2] * 8, 4, 5]
    early = qwen25vl.positions(ids, [grid], [2.0], CFG, text_after_video="hf5")
    assert early[0].tolist() == [0, 1, *[2] * 4, *[10] * 4, 4, 5]


def test_positions_of_images_and_of_no_media():
    ids = np.array([9, *[4] * 4, *[4] * 4, 8])  # two images side by side
    got = qwen25vl.positions(ids, [(1, 4, 4)] * 2, [0.0, 0.0], CFG)
    assert got[1].tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    none = qwen25vl.positions(np.arange(6, 10), [], [], CFG)
    assert (none == np.arange(4)).all()


def test_positions_refuse_the_wrong_number_of_placeholders():
    with pytest.raises(ValueError, match="wants 8 equal placeholder tokens"):
        qwen25vl.positions(np.array([9, *[VIDEO] * 7, 3]), [(2, 4, 4)], [1.0], CFG)
    with pytest.raises(ValueError, match="give a grid for every medium"):
        qwen25vl.positions(np.array([9, VIDEO, 3]), [], [], CFG)


# --- trees and caches


def branched():
    """Two branches on one prompt: the tree, and each branch alone."""
    prompt = sequence(4)
    at = qwen25vl.positions(prompt, [GRID], [0.5], CFG)
    p = len(prompt)
    branches = [np.arange(10, 15), np.arange(30, 33)]
    turned = [np.tile(at.max() + 1 + np.arange(len(b)), (3, 1)) for b in branches]
    ends = np.cumsum([p, *map(len, branches)])
    end = np.concatenate(
        [np.full(p, ends[-1]), *(np.full(len(b), e) for b, e in zip(branches, ends[1:]))]
    )
    tree = (np.concatenate([prompt, *branches]), np.concatenate([at, *turned], 1), end)
    join = lambda b, t: (np.concatenate([prompt, b]), np.concatenate([at, t], 1))
    alone = [(*join(b, t), np.full(p + len(b), p + len(b))) for b, t in zip(branches, turned)]
    return p, branches, rows(tree), [rows(a) for a in alone]


def test_branches_of_a_tree_equal_the_separate_sequences():
    p, branches, tree, alone = branched()
    ours = model(fresh())
    got, start = hidden(ours, tree, frames())[0], p
    for branch, separate in zip(branches, alone):
        want = hidden(ours, separate, frames())[0]
        np.testing.assert_allclose(got[:p], want[:p], atol=1e-5)
        np.testing.assert_allclose(
            got[start : start + len(branch)], want[p : p + len(branch)], atol=1e-5
        )
        start += len(branch)


def test_decoding_with_one_prompt_cache_equals_the_full_pass():
    p, branches, tree, alone = branched()
    ours = model(fresh())
    prompt = rows(plain(tree.tokens[0, :p]), plain(sequence(1)))  # a shorter row beside it
    state, kv = prefill(ours, prompt, frames())
    full = [hidden(ours, separate, frames())[0] for separate in alone]
    np.testing.assert_allclose(state[0], full[0][p - 1], atol=1e-5)
    cache, first = qwen25vl.empty_branches(kv, G, R), int(prompt.positions[0].max()) + 1
    length = jnp.asarray((prompt.end > 0).sum(1), jnp.int32)
    for i in range(3):
        token = jnp.array([[b[i] for b in branches]] * B, jnp.int32)
        at = jnp.full((B, G), first + i)
        state, cache = decode(ours, token, at, kv, length, cache, jnp.int32(i))
        for g in range(G):
            np.testing.assert_allclose(state[0, g], full[g][p + i], atol=1e-5)


def test_future_padding_and_other_rows_do_not_matter():
    ids = sequence(6)
    ours, seen = model(fresh()), frames()
    changed = ids.copy()
    changed[-2] = 6 + (changed[-2] - 5) % 58
    tokens = rows(plain(ids), plain(sequence(2, seed=3)))
    a, b = hidden(ours, tokens, seen), hidden(ours, rows(plain(changed), plain(ids)), seen)
    n = len(ids)
    np.testing.assert_allclose(a[0, : n - 2], b[0, : n - 2], atol=1e-6)
    assert np.abs(a[0, n - 2 : n] - b[0, n - 2 : n]).max() > 1e-3 and np.isfinite(a).all()


def test_a_frame_does_not_see_another_and_padding_is_unseen():
    ours, seen = model(fresh()), frames()
    want = tower(ours, seen)
    changed = seen._replace(patches=seen.patches.copy())
    changed.patches[0, 1] = 255 - changed.patches[0, 1]
    got = tower(ours, changed)
    np.testing.assert_array_equal(got[0, :9], want[0, :9])
    assert np.abs(got[0, 9:] - want[0, 9:]).max() > 1e-3
    padded = VisionBatch(*(np.pad(x, [(0, 0), (0, 1)] + [(0, 0)] * (x.ndim - 2)) for x in seen))
    got = tower(ours, padded)
    np.testing.assert_allclose(got[0, :PADS], want[0], atol=1e-5)
    assert np.isfinite(got).all()


def test_no_media_needs_no_frames():
    ids = np.arange(6, 12, dtype=np.int32)
    tokens = rows((ids, np.tile(np.arange(6), (3, 1)), np.full(6, 6)))
    empty = VisionBatch(*(np.zeros((B, 0, *x.shape[2:]), x.dtype) for x in frames()))
    got = hidden(model(fresh()), tokens, empty)
    np.testing.assert_allclose(got, hidden(model(fresh()), tokens, frames()), atol=1e-6)


def test_remat_and_unroll_change_nothing_and_bfloat16_little():
    loaded, tokens, seen = fresh(), rows(plain(sequence(4))), frames()

    def gradient(params, **settings):
        graph, _ = hf.abstract(dataclasses.replace(loaded.cfg, **settings))
        loss = lambda p: (nnx.merge(graph, p).hidden(tokens, seen).astype(jnp.float32) ** 3).mean()
        return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(params)

    want = gradient(loaded.params)
    got = gradient(loaded.params, remat=True, unroll=2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), got, want)
    rough, gradients = gradient(loaded.params, dtype="bfloat16", remat=True)
    np.testing.assert_allclose(rough, want[0], rtol=0.05)
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("inputs, outputs", [((6,), (2, 3)), ((2, 3), (5,))])
def test_the_written_derivative_of_linear_is_the_automatic_one(inputs, outputs):
    linear = layers.Linear(inputs, outputs, "a b c", bias=True, rngs=nnx.Rngs(0))
    graph, params = nnx.split(linear)
    x = jax.random.normal(jax.random.key(1), (4, 7, *inputs))

    def automatic(p, x):
        y = jnp.tensordot(x, p["w"][...], len(inputs))
        return y + p["b"][...].reshape((1, 1, *outputs))

    gradient = lambda f: jax.grad(lambda *a: (f(*a) ** 3).sum(), argnums=(0, 1))(params, x)
    got, want = gradient(lambda p, x: nnx.merge(graph, p)(x)), gradient(automatic)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


# --- sharding


def mesh():
    return sharding.make_mesh(fsdp=2, tensor=4)  # two kv heads do not divide: replicated


def test_sharded_model_equals_one_device(tmp_path):
    loaded = fresh()
    hf.save(tmp_path / "m", loaded.cfg, loaded.params, dtype="float32")
    parts = hf.load(tmp_path / "m", mesh=mesh())
    q = parts.params["decoder"]["blocks"]["attention"]["q"]["w"][...]
    assert q.sharding.spec == jax.P(None, "fsdp", "tensor")
    k = parts.params["decoder"]["blocks"]["attention"]["k"]["w"][...]
    assert k.sharding.spec == jax.P(None, "fsdp")
    jax.tree.map(np.testing.assert_array_equal, parts.params, loaded.params)
    tokens, seen = rows(*[plain(sequence(4, seed=i)) for i in range(B)]), frames()
    want = hidden(model(loaded), tokens, seen)
    with jax.set_mesh(mesh()):
        spread = jax.device_put((tokens, seen), sharding.row_sharding(mesh(), B))
        call = jax.jit(lambda p, *a: nnx.merge(loaded.graph, p).hidden(*a))
        np.testing.assert_allclose(call(parts.params, *spread), want, atol=1e-4)


def test_initialise_is_the_same_on_a_mesh_and_well_scaled():
    one, parts = hf.initialise(CFG, 0), hf.initialise(CFG, 0, mesh=mesh())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one.params, parts.params)
    spread = jax.tree.leaves(parts.params["decoder"]["blocks"]["mlp"]["up"]["w"])[0].sharding
    assert spread.spec == jax.P(None, "fsdp", "tensor")
    flat = {path: np.std(v[...]) for path, v in hf._leaves(one.params)}
    assert abs(flat[("decoder", "table")] - 0.02) < 2e-3
    assert abs(flat[("decoder", "blocks", "mlp", "up", "w")] - 32**-0.5) < 0.02
    assert abs(flat[("decoder", "blocks", "mlp", "down", "w")] - 48**-0.5 / 2) < 0.01
    assert not np.array_equal(one.params["head"][...], hf.initialise(CFG, 1).params["head"][...])


# --- model folders


@pytest.mark.parametrize("tied", [False, True])
def test_folder_round_trip(tied, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "SHARD_BYTES", 20_000)  # several files and an index
    loaded = fresh(tied)
    hf.save(tmp_path / "m", loaded.cfg, loaded.params, dtype="float32")
    hf.save(tmp_path / "m", loaded.cfg, loaded.params, dtype="float32")  # replaces the folder
    assert (tmp_path / "m/model.safetensors.index.json").is_file()
    assert len({p.stat().st_mode for p in (tmp_path / "m").iterdir()}) == 1  # all can be read alike
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    read = hf.load(tmp_path / "m")
    assert dataclasses.replace(read.cfg, remat=False) == loaded.cfg
    jax.tree.map(np.testing.assert_array_equal, read.params, loaded.params)


def test_bfloat16_folder_and_companions(tmp_path):
    loaded, like = fresh(True), tmp_path / "like"
    like.mkdir()
    (like / "tokenizer.json").write_text("{}")
    mean = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (like / "preprocessor_config.json").write_text(json.dumps(mean))
    hf.save(tmp_path / "m", loaded.cfg, loaded.params, like=like)
    read = hf.load(tmp_path / "m", dtype="bfloat16")
    assert read.cfg.vision.image_mean == (0.5,) * 3 and (tmp_path / "m/tokenizer.json").is_file()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), loaded.params)
    jax.tree.map(np.testing.assert_array_equal, read.params, half)


def test_both_spellings_and_all_problems_in_one_error(tmp_path):
    loaded, folder = fresh(), tmp_path / "m"
    hf.save(folder, loaded.cfg, loaded.params, dtype="float32")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    other = {
        k.replace("model.", "model.language_model.") if k.startswith("model.") else k: v
        for k, v in tensors.items()
    }
    other = {k.replace("visual.", "model.visual.", 1): v for k, v in other.items()}
    safetensors.numpy.save_file(other, folder / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, hf.load(folder).params, loaded.params)

    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = np.zeros(7, np.float32)
    tensors["model.layers.9.surprise"] = np.zeros(7, np.float32)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError) as e:
        hf.load(folder)
    for part in (
        "layers.1.mlp.up_proj.weight is missing",
        "model.norm.weight has shape",
        "surprise",
    ):
        assert part in str(e.value)


def test_save_refuses_a_folder_of_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match="not a model folder"):
        hf.save(tmp_path, CFG, fresh().params)


# --- configs


def published(**changes):
    """config.json of Qwen2.5-VL-7B-Instruct as the hub has it."""
    tower = {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    }
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "initializer_range": 0.02,
        "intermediate_size": 18944,
        "max_position_embeddings": 128000,
        "max_window_layers": 28,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": tower,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vocab_size": 152064,
    } | changes


def parameters(cfg):
    return sum(x.size for x in jax.tree.leaves(hf.abstract(cfg)[1]))


def test_published_config_has_the_published_size():
    cfg = qwen25vl.Config.from_hf(published())
    assert (cfg.text.head, cfg.text.rope_sections, cfg.tied) == (128, (16, 24, 24), False)
    assert parameters(cfg) == 8_292_166_656
    assert parameters(hf.tiny_config()) < 3.8e6


@pytest.mark.parametrize("cfg", [CFG, hf.tiny_config()], ids=["test", "tiny"])
def test_config_round_trip(cfg):
    read = qwen25vl.Config.from_hf(json.loads(json.dumps(cfg.to_hf())))
    assert dataclasses.replace(read, remat=cfg.remat, unroll=cfg.unroll) == cfg


def test_config_names_every_problem():
    config = published(hidden_act="gelu", mystery=1, use_sliding_window=True)
    del config["vocab_size"]
    config["vision_config"]["deepstack"] = [1]
    with pytest.raises(ValueError) as e:
        qwen25vl.Config.from_hf(config)
    for part in (
        "hidden_act is 'gelu'",
        "mystery=1",
        "use_sliding_window",
        "vocab_size is missing",
    ):
        assert part in str(e.value)
    assert "vision_config.deepstack=[1]" in str(e.value)


def test_configs_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="heads=4 is not a multiple of kv_heads=3"):
        dataclasses.replace(TEXT, kv_heads=3)
    with pytest.raises(ValueError, match="sum to 5; they must sum to half"):
        dataclasses.replace(TEXT, rope_sections=(1, 2, 2))
    with pytest.raises(ValueError, match="Set vision.out"):
        dataclasses.replace(CFG, vision=dataclasses.replace(TOWER, out=64))
    with pytest.raises(ValueError, match="dtype='float16' is not known"):
        dataclasses.replace(CFG, dtype="float16")
    with pytest.raises(ValueError, match="Patchify with this model's settings"):
        seen = frames()
        model(fresh()).tower(seen._replace(patches=seen.patches[..., :48]))


def test_tiny_config_reads_the_tokenizer(tmp_path):
    added = [{"id": 700 + i, "content": c} for i, c in enumerate(sorted(set(hf.SPECIAL.values())))]
    read = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": added}
    (tmp_path / "tokenizer.json").write_text(json.dumps(read))
    cfg = hf.tiny_config(tmp_path)
    ids = {t["content"]: t["id"] for t in added}
    assert cfg.text.vocab == 768 and cfg.video_token_id == ids["<|video_pad|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(read | {"added_tokens": added[1:]}))
    with pytest.raises(ValueError, match="has no <|endoftext|>".replace("|", r"\|")):
        hf.tiny_config(tmp_path)
