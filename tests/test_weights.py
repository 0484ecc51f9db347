"""What is wrong with a folder's files is said at once, all of it, with what to do."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import Mesh
from qwen import fresh

from jaxvid import sharding
from jaxvid.models import hf, weights


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model folder of several files."""
    monkeypatch.setattr(weights, "SHARD_BYTES", 60_000)
    loaded = fresh()
    hf.save(tmp_path / "m", loaded.cfg, loaded.params, dtype="float32")
    return tmp_path / "m"


def said(folder) -> str:
    with pytest.raises(ValueError, match="do not fit") as error:
        hf.load(folder)
    return str(error.value)


def test_every_damaged_file_is_named_in_one_error(folder):
    first, second, third, *_ = sorted(folder.glob("model-*.safetensors"))
    size = first.stat().st_size
    first.write_bytes(first.read_bytes()[:-7])
    second.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    third.unlink()
    text = said(folder)
    assert f"{first.name} has {size - 7} bytes and its header says {size}" in text
    assert f"{second.name} is a pointer of Git LFS" in text and "git lfs pull" in text
    assert f"{third.name} is not there" in text
    first.write_bytes(first.read_bytes()[:5])
    second.write_bytes(b"\x08\0\0\0\0\0\0\0not json")
    text = said(folder)
    assert f"{first.name} is cut off or no safetensors file: it has 5 bytes" in text
    assert "its header is not JSON" in text


def test_an_index_is_held_to_its_word(folder):
    index = folder / weights.INDEX
    found = json.loads(index.read_text())
    name = next(iter(found["weight_map"]))
    last = sorted(folder.glob("model-*.safetensors"))[-1].name
    wrong = found | {"weight_map": found["weight_map"] | {name: last}}
    index.write_text(json.dumps(wrong))
    assert f"{name} is not in {last}, where {weights.INDEX} has it" in said(folder)
    # Files that the index does not name are of another kind (Mistral's consolidated.safetensors).
    index.write_text(json.dumps(found))
    safetensors.numpy.save_file({"other": np.zeros(3)}, folder / "consolidated.safetensors")
    jax.tree.map(np.testing.assert_array_equal, hf.load(folder).params, fresh().params)
    index.write_text(json.dumps(found | {"weight_map": {name: "../model.safetensors"}}))
    with pytest.raises(ValueError, match="names files outside of its folder"):
        hf.load(folder)


def test_a_tensor_twice_or_of_packed_integers_is_refused(tmp_path):
    loaded, folder = fresh(), tmp_path / "m"
    hf.save(folder, loaded.cfg, loaded.params, dtype="float32")
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    twice = {"model.language_model.norm.weight": tensors["model.norm.weight"].copy()}
    packed = {"lm_head.weight": np.zeros(tensors["lm_head.weight"].shape, np.int8)}
    safetensors.numpy.save_file(tensors | twice | packed, file)
    text = said(folder)
    assert "model.norm.weight is there twice, as model.norm.weight" in text
    assert "lm_head.weight has numbers of kind I8" in text


def test_folders_that_are_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        hf.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="model_type 'gpt2', which no family here reads.*qwen2_5"):
        hf.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(fresh().cfg.to_hf()))
    with pytest.raises(FileNotFoundError, match="no .safetensors file.*can run code"):
        hf.load(tmp_path)


def test_a_piece_that_devices_share_is_read_once(tmp_path, monkeypatch):
    loaded, folder = fresh(), tmp_path / "m"
    hf.save(folder, loaded.cfg, loaded.params, dtype="float32")
    read, block = [], weights.Files.block

    def counted(self, name, rows, columns):
        x = block(self, name, rows, columns)
        read.append(x.size)
        return x

    monkeypatch.setattr(weights.Files, "block", counted)
    auto = (jax.sharding.AxisType.Auto,) * 4
    devices = np.array(jax.devices()).reshape(1, 4, 2, 1)
    parts = hf.load(folder, mesh=Mesh(devices, sharding.AXES, axis_types=auto))
    total = sum(x.size for x in jax.tree.leaves(loaded.params))
    assert sum(read) < 1.2 * total  # biases and norms are read whole for each piece of them
    jax.tree.map(np.testing.assert_array_equal, parts.params, loaded.params)
