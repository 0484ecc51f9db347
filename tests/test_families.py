"""Every family through every door: a tiny twin is made, asked, trained on a mesh and exported."""

import dataclasses
import io
import json
import pathlib
import re
import sys
import types
import wave

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy import mesh_of

from jaxvid import config, main, sharding
from jaxvid.data import layout, media, pipeline
from jaxvid.models import hf
from jaxvid.models.layers import Compute
from jaxvid.objectives.sft import SFT
from jaxvid.train import optimizers, step
from jaxvid.train import state as states

NAMES = [f.name for f in hf.FAMILIES]
QUESTION, REPLY = "What happens?", "The ball moves left"


def clip(seconds: float = 1.0, size: int = 64) -> bytes:
    """A grey clip that gets brighter, and a tone."""
    frames = np.full((round(8 * seconds), size, size, 3), 40, np.uint8)
    frames += (4 * np.arange(len(frames), dtype=np.uint8))[:, None, None, None]
    tone = np.sin(np.arange(round(16_000 * seconds)) / 9).astype(np.float32)
    return media.encode(frames, 8.0, tone)


def wav(seconds: float) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, 16_000, 0, "NONE", ""))
        out.writeframes((8000 * np.sin(np.arange(round(16_000 * seconds)) / 9)).astype("<i2"))
    return file.getvalue()


class Twin:
    """A family's tiny twin in a folder, and what reads a clip for it."""

    def __init__(self, name, folder):
        assert main.main(["tiny", name, str(folder)]) == 0
        self.folder, self.loaded = folder, hf.load(folder)
        vision = self.loaded.cfg.prompting.vision
        side = vision.size or 4 * vision.patch * vision.merge
        self.sampling = media.Sampling(frames=4, height=side, width=side)
        hears = self.loaded.cfg.prompting.sound is not None
        self.seen = pipeline.Seen(self.sampling, sound=hears)
        self.builder = config.make_builder(folder, self.loaded.cfg, None)

    def tree(self, reply=REPLY, **how):
        taken = self.builder.clip(clip(), "clip", self.seen, **how)
        tokens = self.builder.chat.response(reply)
        branch = layout.Branch(tokens, np.ones(len(tokens), bool))
        return self.builder.tree("clip", taken, QUESTION, (branch,))

    def budget(self, tree, rows=1):
        need = layout.size(tree)
        return layout.Budget(
            rows=rows,
            tokens=need.tokens + 5,
            scored=need.scored,
            branches=1,
            frames=need.frames,
            patches=layout.most_patches(tree),
            chunks=need.chunks,
        )


@pytest.fixture(scope="module", params=NAMES)
def twin(request, tmp_path_factory):
    return Twin(request.param, tmp_path_factory.mktemp(request.param) / "model")


def test_a_twin_answers(twin, tmp_path, capsys):
    file = tmp_path / "clip.mp4"
    file.write_bytes(clip())
    (twin.folder / "sampling.json").write_text(json.dumps(dataclasses.asdict(twin.sampling)))
    ask = ["ask", str(twin.folder), str(file), QUESTION, "--max-tokens", "2"]
    assert main.main(ask) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("sizes", [(2, 2), (2, 1, 2)], ids=["tensor", "context"])
def test_a_twin_learns_on_a_mesh_as_on_one_device(twin, sizes):
    """The same first step, and a loss that falls: the clip, its sound and the reply reach it."""
    tree = twin.tree()
    budget = twin.budget(tree)
    budget = dataclasses.replace(budget, rows=2, tokens=-(-budget.tokens // 4) * 4)
    (batch,) = layout.pack([[tree], [tree]], budget)
    batch = layout.stack([batch])
    alone = step.make_eval(twin.loaded.graph, SFT())(twin.loaded.params, batch)
    mesh, found = mesh_of(*sizes), []
    with jax.set_mesh(mesh):
        loaded = hf.load(twin.folder, mesh=mesh)
        graph = hf.abstract(dataclasses.replace(loaded.cfg, compute=Compute(remat="none")))[0]
        tx = optimizers.AdamW(lr=3e-3).build(10, loaded.params)
        state = states.create(loaded.params, tx, mesh)
        update = step.make_step(graph, SFT(), tx)
        placed = jax.device_put(batch, sharding.row_sharding(mesh, 2, 1))
        for _ in range(3):
            state, metrics = update(state, placed)
            found.append(float(metrics["loss"]))
    np.testing.assert_allclose(found[0], alone.numerator / alone.denominator, rtol=1e-5)
    assert found[2] < found[0] - 0.1


def test_a_twin_sees_and_hears(twin):
    """Another picture, or another sound, gives another reply's log-prob."""
    tree = twin.tree()
    tokens, vision, audio = layout.prompts([tree], twin.budget(tree))
    model = nnx.merge(twin.loaded.graph, twin.loaded.params)
    hidden = nnx.jit(lambda m, *x: m.hidden(*x))
    last = len(tree.prompt) - 1
    plain = hidden(model, tokens, vision, audio)[0, last]
    dark = vision._replace(patches=vision.patches // 2)
    assert jnp.abs(hidden(model, tokens, dark, audio)[0, last] - plain).max() > 1e-4
    if twin.seen.sound:
        quiet = audio._replace(features=audio.features * 0.5)
        assert jnp.abs(hidden(model, tokens, vision, quiet)[0, last] - plain).max() > 1e-4


def test_a_twin_comes_back_from_its_folder(twin, tmp_path):
    """bfloat16, written and read: every bit, every setting, and what stands beside the weights."""
    loaded = twin.loaded
    hf.save(tmp_path / "a", loaded.cfg, loaded.params, like=twin.folder)
    first = hf.load(tmp_path / "a", dtype="bfloat16")
    hf.save(tmp_path / "b", first.cfg, first.params, like=tmp_path / "a")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_a_family_cannot_take_is_said_before_decoding(twin):
    family, data = twin.loaded.cfg.prompting, clip()
    if family.sound is None:
        with pytest.raises(ValueError, match="sound is asked for .* and this model does not hear"):
            twin.builder.clip(data, "clip", dataclasses.replace(twin.seen, sound=True))
    else:
        mute = media.encode(np.zeros((8, 64, 64, 3), np.uint8), 8.0)
        with pytest.raises(media.MediaError, match="has no sound, and sound is wanted"):
            twin.builder.clip(mute, "clip", twin.seen, kind="video")
    with pytest.raises(media.MediaError, match="a video came where an image is wanted"):
        twin.builder.clip(data, "clip", twin.seen, kind="image")
    short = dataclasses.replace(twin.builder, context=9)
    with pytest.raises(ValueError, match="'clip', media 0 is .* tokens .* context is 9. Take few"):
        short.clip(data, "clip", twin.seen)


def test_sound_alone(twin):
    """Of the families, those that hear take it; its tokens are those of the plan."""
    track = wav(1.3)
    if twin.loaded.cfg.prompting.sound is None:
        with pytest.raises(ValueError, match="is audio, which this model does not take"):
            twin.builder.clip(track, "track", twin.seen)
        return
    taken = twin.builder.clip(track, "track", twin.seen, kind="audio")
    tree = twin.builder.tree("track", taken, QUESTION, ())
    assert not tree.clips and len(tree.sound) and taken.medium.sound == 130
    assert (np.unique(tree.heard[tree.heard > 0]) == np.arange(1, tree.heard.max() + 1)).all()


def test_the_family_of_its_page_is_one(tmp_path, monkeypatch):
    """The page's code, run: a twin is made, read back, and learns."""
    page = pathlib.Path(__file__).parent.parent / "docs/model.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    there: dict = {"__name__": "glimpse"}
    monkeypatch.setitem(sys.modules, "glimpse", types.ModuleType("glimpse"))
    exec(code, there)
    monkeypatch.setattr(hf, "FAMILIES", (*hf.FAMILIES, there["FAMILY"]))
    twin = Twin("glimpse", tmp_path / "model")
    jax.tree.map(
        np.testing.assert_array_equal,
        twin.loaded.params,
        hf.initialise(twin.loaded.cfg, 0).params,
    )
    tree = twin.tree()
    assert (tree.seen > 0).sum() == 4  # a token a frame
    batch = layout.stack(layout.pack([[tree]], twin.budget(tree)))
    tx = optimizers.AdamW(lr=1e-2).build(10, twin.loaded.params)
    update = step.make_step(twin.loaded.graph, SFT(), tx)
    state, found = states.create(twin.loaded.params, tx), []
    for _ in range(4):
        state, metrics = update(state, batch)
        found.append(float(metrics["loss"]))
    assert found[-1] < found[0] - 0.1
