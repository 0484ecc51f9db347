"""Qwen2.5-VL against transformers' own, and model folders and configs in and out."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from qwen import (
    CFG,
    GRID,
    TEXT,
    TOWER,
    VIDEO,
    B,
    G,
    R,
    decode,
    frames,
    fresh,
    hidden,
    model,
    plain,
    prefill,
    rows,
    sequence,
    tower,
)

from jaxvid.models import decoder, hf, qwen25vl, weights
from jaxvid.models.layers import Compute

# --- transformers is the oracle


@pytest.fixture(scope="module", params=[0, 7], ids=["whole", "window"])
def oracle(request, tmp_path_factory):
    torch = pytest.importorskip("torch", reason="the oracle: pip install jaxvid[oracle]")
    from transformers import Qwen2_5_VLForConditionalGeneration

    folder = tmp_path_factory.mktemp("ours") / "model"
    loaded = fresh(window=request.param)
    hf.save(folder, loaded.cfg, loaded.params, dtype="float32")
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return torch, theirs, loaded


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
    torch, theirs, loaded = oracle
    ids, seen = sequence(8), frames()
    ours = model(loaded)
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
    torch, theirs, loaded = oracle
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
    torch, theirs, loaded = oracle
    theirs.save_pretrained(tmp_path)
    read = hf.load(tmp_path)
    assert dataclasses.replace(read.cfg, compute=Compute(remat=False)) == loaded.cfg
    jax.tree.map(np.testing.assert_array_equal, read.params, loaded.params)


def test_greedy_generation_equals_transformers(oracle):
    """Under the position policy of transformers 5, which its generate() uses."""
    torch, theirs, loaded = oracle
    cfg = dataclasses.replace(CFG, text_after_video="hf5", fractional_seconds=True)
    ids, seen = sequence(4), frames()
    inputs = their_inputs(torch, ids, seen)
    want = theirs.generate(**inputs, max_new_tokens=R, do_sample=False, eos_token_id=None)
    ours = model(loaded)
    tokens = rows(plain(ids, cfg))
    state, prompt = prefill(ours, tokens, seen)
    state, branch = jnp.stack([state] * G, 1), decoder.empty_branches(prompt, G, R)
    after, length, out = int(tokens.positions.max()) + 1, jnp.full(B, len(ids)), []
    for i in range(R):
        token = (state @ ours.unembedding().T).argmax(-1).astype(jnp.int32)
        out.append(int(token[0, 0]))
        at = jnp.full((B, G), after + i)
        state, branch = decode(ours, token, at, prompt, length, branch, jnp.int32(i))
    assert out == want[0, len(ids) :].tolist()


# --- model folders


@pytest.mark.parametrize("tied", [False, True])
def test_folder_round_trip(tied, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)  # several files and an index
    loaded = fresh(tied)
    hf.save(tmp_path / "m", loaded.cfg, loaded.params, dtype="float32")
    hf.save(tmp_path / "m", loaded.cfg, loaded.params, dtype="float32")  # replaces the folder
    assert (tmp_path / "m/model.safetensors.index.json").is_file()
    assert len({p.stat().st_mode for p in (tmp_path / "m").iterdir()}) == 1  # all can be read alike
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    read = hf.load(tmp_path / "m")
    assert dataclasses.replace(read.cfg, compute=Compute(remat=False)) == loaded.cfg
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
    assert parameters(hf.tiny_config("qwen2_5_vl")) < 3.8e6


@pytest.mark.parametrize(
    "cfg", [CFG, hf.tiny_config("qwen2_5_vl"), fresh(window=7).cfg], ids=["test", "tiny", "window"]
)
def test_config_round_trip(cfg):
    read = qwen25vl.Config.from_hf(json.loads(json.dumps(cfg.to_hf())))
    assert dataclasses.replace(read, compute=cfg.compute) == cfg


WINDOW = {"use_sliding_window": True, "sliding_window": 4096}


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"layer_types": ["full_attention"] * 28, "sliding_window": None}, 0),
        (WINDOW, 0),  # from layer 28 of 28 on
        (WINDOW | {"max_window_layers": 0}, 4096),
        (WINDOW | {"layer_types": ["full_attention"] * 28, "max_window_layers": 0}, 0),
        (WINDOW | {"layer_types": ["sliding_attention"] * 28}, 4096),
        (WINDOW | {"max_window_layers": 0, "sliding_window": None}, 0),
    ],
)
def test_sliding_window_is_read_by_transformers_rule(changes, window):
    assert qwen25vl.Config.from_hf(published(**changes)).text.window == window


def test_sliding_window_that_cannot_be_had_is_refused():
    for changes, said in (
        (WINDOW | {"max_window_layers": 14}, "on all layers or 'sliding_attention' on all"),
        ({"layer_types": ["sliding_attention"] * 28}, "with use_sliding_window=False"),
        (WINDOW | {"max_window_layers": 0, "sliding_window": 0}, "a window of at least 1"),
        ({"layer_types": ["chunked_attention"] * 28}, "layer_types has .'chunked_attention'"),
    ):
        with pytest.raises(ValueError, match=said):
            qwen25vl.Config.from_hf(published(**changes))
    with pytest.raises(ValueError, match="window=-1: give a number of tokens"):
        dataclasses.replace(TEXT, window=-1)


def test_config_names_every_problem():
    config = published(hidden_act="gelu", mystery=1, **WINDOW, max_window_layers=1)
    del config["vocab_size"]
    config["vision_config"]["deepstack"] = [1]
    with pytest.raises(ValueError) as e:
        qwen25vl.Config.from_hf(config)
    for part in (
        "hidden_act is 'gelu'",
        "mystery=1",
        "use_sliding_window=True, max_window_layers=1 of 28",
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
        Compute(dtype="float16")
    with pytest.raises(ValueError, match="Patchify with this model's settings"):
        seen = frames()
        model(fresh()).tower(seen._replace(patches=seen.patches[..., :48]))


def test_tiny_config_reads_the_tokenizer(tmp_path):
    special = sorted(set(qwen25vl.FAMILY.special.values()))
    added = [{"id": 700 + i, "content": c} for i, c in enumerate(special)]
    read = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": added}
    (tmp_path / "tokenizer.json").write_text(json.dumps(read))
    cfg = hf.tiny_config("qwen2_5_vl", tmp_path)
    ids = {t["content"]: t["id"] for t in added}
    assert cfg.text.vocab == 768 and cfg.video_token_id == ids["<|video_pad|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(read | {"added_tokens": added[1:]}))
    with pytest.raises(ValueError, match="has no <|endoftext|>".replace("|", r"\|")):
        hf.tiny_config("qwen2_5_vl", tmp_path)
