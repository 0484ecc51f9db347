"""Configs of Qwen3-VL in and out, and their sizes."""

import dataclasses
import json

import jax
import pytest
from qwen3 import CFG, TEXT, TOWER, published

from jaxvid.models import hf, qwen3vl


@pytest.mark.parametrize("size", ["2B", "4B", "8B", "32B"])
def test_published_configs_have_the_size_of_transformers(size):
    torch = pytest.importorskip("torch", reason="the oracle: pip install jaxvid[oracle]")
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    cfg = qwen3vl.Config.from_hf(published(size))
    with torch.device("meta"):
        theirs = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**published(size)))
    want = sum(p.numel() for p in theirs.parameters())
    assert parameters(cfg) == want
    assert (cfg.text.head, cfg.text.rope_theta, cfg.vision.side) == (128, 5e6, 48)


def parameters(cfg):
    return sum(x.size for x in jax.tree.leaves(hf.abstract(cfg)[1]))


@pytest.mark.parametrize("cfg", [CFG, hf.tiny_config("qwen3_vl")], ids=["test", "tiny"])
def test_config_round_trip(cfg):
    written = json.loads(json.dumps(cfg.to_hf()))
    read = qwen3vl.Config.from_hf(written)
    assert dataclasses.replace(read, compute=cfg.compute) == cfg
    # transformers 5 writes the rope in one place, 4 in two
    text = written["text_config"]
    text["rope_parameters"] = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}
    assert qwen3vl.Config.from_hf(written) == read
    assert parameters(hf.tiny_config("qwen3_vl")) < 3.8e6


def test_config_names_every_problem():
    config = published("2B") | {"mystery": 1, "eos_token_id": [1, 2]}
    config["text_config"] |= {
        "attention_bias": True,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4},
        "sliding_window": 7,
    }
    del config["text_config"]["vocab_size"]
    config["vision_config"] |= {"hidden_act": "gelu", "patch_size": [16, 16], "window_size": 3}
    with pytest.raises(ValueError) as e:
        qwen3vl.Config.from_hf(config)
    for part in (
        "mystery=1",
        "eos_token_id is [1, 2]; give one id",
        "text_config.vocab_size is missing",
        "text_config.attention_bias is True",
        "rope_theta is 5000000 and 1000000.0",
        "rope_type is 'default', and 'yarn' too",
        "rope rope_type is 'yarn'",
        "text_config.sliding_window=7",
        "vision_config.hidden_act is 'gelu'",
        "vision_config.patch_size is [16, 16]",
        "vision_config.window_size=3",
    ):
        assert part in str(e.value), part
    for change, said in (
        ({"text_config": {"model_type": "qwen3_vl_moe_text"}}, "only 'qwen3_vl_text' is"),
        ({"model_type": "qwen3_vl_moe"}, "model_type is 'qwen3_vl_moe'; wanted is 'qwen3_vl'"),
        ({"text_config": published("2B")["text_config"] | {"rope_theta": None}}, "give it once"),
    ):
        with pytest.raises(ValueError, match=said):
            qwen3vl.Config.from_hf(published("2B") | change)


def test_configs_refuse_what_does_not_fit():
    change = dataclasses.replace
    for cfg, field, said in (
        (TOWER, {"positions": 24}, "positions=24 is not the number of a square's places"),
        (TOWER, {"deep": (1, 0)}, "each once, in order"),
        (TOWER, {"deep": (3,)}, "name blocks of 0 to 2"),
        (TOWER, {"heads": 3}, "times a multiple of 4"),
        (CFG, {"text": change(TEXT, qkv_bias=True)}, "the decoder has qkv_bias=True"),
        (CFG, {"text": change(TEXT, layers=1)}, "for 2 layers of the decoder, which has 1"),
        (CFG, {"vision": change(TOWER, out=64)}, "the vision tower gives width 64"),
    ):
        with pytest.raises(ValueError, match=said):
            change(cfg, **field)


def test_hub_names_from_every_spelling():
    for name in ("model.visual.merger.norm.bias", "visual.merger.norm.bias"):
        assert qwen3vl.hub_name(name) == "model.visual.merger.norm.bias"
    for name in ("model.language_model.norm.weight", "language_model.norm.weight"):
        assert qwen3vl.hub_name(name) == "model.language_model.norm.weight"
    assert qwen3vl.hub_name("model.norm.weight") == "model.language_model.norm.weight"
    assert qwen3vl.hub_name("lm_head.weight") == "lm_head.weight"
