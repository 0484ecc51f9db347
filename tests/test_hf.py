"""Model folders and configs of Qwen2.5-VL, in and out."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from prompts import model
from qwen import CFG, TEXT, TOWER, frames, fresh, published

from jaxvid.models import hf, qwen25vl, weights
from jaxvid.models.layers import Compute

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
    assert dataclasses.replace(read.cfg, compute=Compute(remat="none")) == loaded.cfg
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
