"""What `inspect` says is what is measured, decoded and counted elsewhere."""

import dataclasses

import jax
import numpy as np
import pytest

from benchmarks import step
from jaxvid import inspection, main, runs
from jaxvid.data import media
from jaxvid.models import hf
from jaxvid.models.layers import Compute


@pytest.mark.parametrize(
    ("chips", "tokens", "measured"), [(16, 5120, 8.64), (8, 16_384, 18.70)], ids=["v5e", "v5p"]
)
def test_memory_is_about_what_the_tpu_compiler_finds(chips, tokens, measured):
    """The 7B step of benchmarks/RESULTS.md: the most that is live at one time."""
    found = sum(inspection.memory(step.config(parts=4), chips=chips, tokens=tokens).values())
    assert abs(found / measured - 1) < 0.05


def test_less_is_trained_in_less():
    cfg = dataclasses.replace(step.config(parts=4), compute=Compute(dtype="bfloat16"))
    whole, lora = (
        inspection.memory(cfg, chips=8, tokens=1024, trained=n) for n in (None, 10_000_000)
    )
    assert lora["gradient"] < 0.01 * whole["gradient"] and lora["moments"] < 0.01 * whole["moments"]
    assert lora["weights"] == whole["weights"]
    assert not inspection.memory(cfg, chips=8, tokens=1024, moments=0)["moments"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("twin") / "model"
    runs.tiny("qwen2_5_omni_thinker", out)
    return out


def test_an_imagined_clip_costs_what_a_real_one_does(folder):
    cfg = hf.read_config(folder)
    sampling = runs.sampling_of(folder, cfg, {"fps": 3.0})
    silence = np.zeros(24_000, np.float32)
    data = media.encode(np.zeros((45, 64, 96, 3), np.uint8), 30.0, silence)
    real = media.plan(data, sampling, cfg.prompting.vision)
    thought = inspection.imagined(1.5, 64, 96, sampling, cfg)
    assert inspection.cost(folder, cfg, real, heard=True) == inspection.cost(
        folder, cfg, thought, heard=True
    )
    np.testing.assert_allclose(thought.times, real.times)
    mute = inspection.cost(folder, cfg, real, heard=False)
    assert mute.sound == 0 and mute.tokens < inspection.cost(folder, cfg, real, heard=True).tokens


def test_the_verb_prints_parts_tokens_and_memory(folder, capsys):
    ask = ["inspect", str(folder), "--seconds", "3", "--frames", "4", "--chips", "4", "--sound"]
    assert main.main(ask) == 0
    text, cfg = capsys.readouterr().out, hf.read_config(folder)
    total = sum(x.size for x in jax.tree.leaves(hf.abstract(cfg)[1]))
    assert f"{total:,} parameters" in text
    for said in ("ears", "tower", "decoder", "4 frames of", "300 log-mel", "on 4 chips", "a chip"):
        assert said in text


def test_what_cannot_be_counted_is_said(folder, tmp_path, capsys):
    ask = ["inspect", str(folder)]
    for flags, said in (
        (["--pixels", "720p"], "--pixels '720p'; give HEIGHTxWIDTH"),
        (["--pixels", "0x9"], "--pixels '0x9'; give HEIGHTxWIDTH"),
        (["--chips", "0"], "0 chips and 8192 tokens on each; give at least one"),
    ):
        assert main.main([*ask, *flags]) == 1
        assert said in capsys.readouterr().err
    runs.tiny("qwen2_5_vl", tmp_path / "deaf")
    assert main.main(["inspect", str(tmp_path / "deaf"), "--sound"]) == 1
    assert "this model does not hear; leave it out" in capsys.readouterr().err


def test_trained_weights_are_a_flag(folder, capsys):
    assert main.main(["inspect", str(folder), "--trained", "0", "--chips", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (moments,) = [line for line in lines if line.endswith("moments")]
    assert float(moments.split()[0]) == 0
