"""Adapter folders against the library `peft` on transformers' model, out and in."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from nets import adapted
from prompts import CLIP, model, run_theirs, states, tree, worst
from qwen import BUDGET, FIVE, fresh, their_inputs

from jaxvid import paths
from jaxvid.models import hf, lora, peft

SETTINGS = {
    "all": lora.LoRA(rank=3, alpha=6.0, targets=("decoder", "tower")),
    "some": lora.LoRA(
        rank=2,
        alpha=6.0,
        targets=("decoder.blocks.attention.(q|v)", "tower.*.v"),
        rank_stabilised=True,
    ),
}


def noisy(settings):
    loaded = fresh()
    return loaded, *adapted(loaded.graph, loaded.params, settings, noisy=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft") / "base"
    hf.save(folder, fresh().cfg, fresh().params, dtype="float32")
    return folder


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own
@pytest.mark.parametrize("name", SETTINGS)
def test_peft_loads_the_adapter_and_gives_our_logits(name, base, tmp_path):
    """Also merged: our folder of merged weights and peft's own merge agree."""
    torch = pytest.importorskip("torch", reason="the oracle: pip install jaxvid[oracle]")
    library = pytest.importorskip("peft", reason="the oracle: pip install jaxvid[oracle]")
    from transformers import Qwen2_5_VLForConditionalGeneration

    settings = SETTINGS[name]
    loaded, graph, params = noisy(settings)
    peft.save(tmp_path / "a", loaded.cfg, params, settings, base=str(base))
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32).eval()
    one = tree(FIVE, CLIP, text=8)
    inputs = their_inputs([one], [(CLIP,)])
    before = run_theirs(theirs, inputs, [one])[1]
    wrapped = library.PeftModel.from_pretrained(theirs, str(tmp_path / "a")).eval()
    want = run_theirs(wrapped, inputs, [one])[1]
    merged = wrapped.merge_and_unload().state_dict()
    ours = model(hf.Loaded(loaded.cfg, graph, params))
    got = [x @ np.asarray(ours.unembedding()).T for x in states(ours, BUDGET, [one])]
    assert worst(got, want) < 1e-4 and worst(before, want) > 0.1
    hf.save(tmp_path / "m", loaded.cfg, lora.merge(params, settings), dtype="float32")
    stored = safetensors.numpy.load_file(tmp_path / "m" / "model.safetensors")
    named = {hf.family_of(loaded.cfg).hub_name(k): x.numpy() for k, x in merged.items()}
    for key, x in stored.items():
        np.testing.assert_allclose(x, named[key], atol=1e-5, err_msg=key)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_folder_comes_back_as_it_was(name, tmp_path):
    settings = SETTINGS[name]
    loaded, graph, params = noisy(settings)
    peft.save(tmp_path / "a", loaded.cfg, params, settings, base="runs/sft/model")
    peft.save(tmp_path / "a", loaded.cfg, params, settings, base="runs/sft/model")  # replaces it
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    content = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == "runs/sft/model"
    back, other, read = peft.load(tmp_path / "a", loaded.cfg, loaded.graph, loaded.params)
    assert dataclasses.replace(back, targets=settings.targets) == settings
    assert paths.names(read) == paths.names(params)
    jax.tree.map(np.testing.assert_array_equal, read, params)
    (tmp_path / "file").mkdir()
    (tmp_path / "file/x").touch()
    with pytest.raises(FileExistsError, match="is no adapter"):
        peft.save(tmp_path / "file", loaded.cfg, params, settings)


def test_what_is_not_understood_is_told_at_once(tmp_path):
    settings = SETTINGS["all"]
    loaded, graph, params = noisy(settings)
    peft.save(tmp_path, loaded.cfg, params, settings)
    load = lambda: peft.load(tmp_path, loaded.cfg, loaded.graph, loaded.params)
    path = tmp_path / "adapter_config.json"
    content = json.loads(path.read_text())
    wrong = {"use_dora": True, "alpha_pattern": {".*gate_proj": 1.0}}
    path.write_text(json.dumps(content | wrong))
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    odd = next(k for k in tensors if "layers.1" in k and "up_proj.lora_A" in k)
    tensors["base_model.model.audio.x.lora_A.weight"] = tensors.pop(odd)
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError) as error:
        load()
    for said in ("use_dora is True", "scale 0.33", "audio.x.lora_A", "up_proj: not every layer"):
        assert said in str(error.value)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no adapter_config.json"):
        load()


def test_an_adapter_shared_by_fused_layers_is_theirs_each(tmp_path):
    """As peft trains it: one pair of matrices on the tower's fused q, k and v."""
    settings = lora.LoRA(rank=2, targets=("tower.blocks.attention.(q|k|v)",))
    loaded, _, params = noisy(settings)
    peft.save(tmp_path, loaded.cfg, params, settings)
    file, path = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"rank_pattern": {}, "alpha_pattern": {}}))
    r = np.random.default_rng(0)
    draw = lambda shape: r.standard_normal(shape).astype(np.float32)
    shapes = {"A": (2, 32), "B": (96, 2)}
    tensors = {k: draw(shapes[k[-8]]) for k in safetensors.numpy.load_file(file)}
    safetensors.numpy.save_file(tensors, file)
    _, _, read = peft.load(tmp_path, loaded.cfg, loaded.graph, loaded.params)
    merged = lora.merge(read, settings)
    name = "base_model.model.model.visual.blocks.1.attn.qkv.lora_{}.weight"
    delta = settings.scale * tensors[name.format("B")] @ tensors[name.format("A")]
    for n, which in enumerate("qkv"):
        of = ("tower", "blocks", "attention", which, "w")
        after, before = (dict(nnx.to_flat_state(p))[of][...] for p in (merged, loaded.params))
        got = (after - before)[1].reshape(32, 32)
        np.testing.assert_allclose(got, delta[32 * n : 32 * (n + 1)].T, atol=1e-5)


def test_a_family_without_names_of_modules_says_so(monkeypatch, tmp_path):
    loaded, _, params = noisy(SETTINGS["some"])
    nameless = dataclasses.replace(hf.family_of(loaded.cfg), module_name=None)
    monkeypatch.setattr(hf, "FAMILIES", (nameless,))
    with pytest.raises(ValueError, match="does not say what transformers calls its modules"):
        peft.save(tmp_path / "a", loaded.cfg, params, SETTINGS["some"])
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "family", [f for f in hf.FAMILIES if f.module_name is not None], ids=lambda f: f.name
)
def test_names_of_modules_are_a_spelling_of_the_files(family):
    """Every tensor of every family that transformers has: what PEFT is told, `load` knows."""
    for place in family.places(hf.tiny_config(family.name)).values():
        name = family.module_name(place.name)
        assert family.hub_name(name) == place.name
        assert name.startswith(("model.", "lm_head."))
