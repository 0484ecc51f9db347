"""Qwen2.5-VL against transformers' own: states, positions, gradients, tokens, folders, sizes."""

import dataclasses
import json
import types

import jax
import numpy as np
import peers
import prompts
import pytest
import safetensors.numpy
from flax import nnx
from prompts import CLIP, IMAGE, MUTE, QUICK, filled, model, rows, run_theirs, tree, worst
from qwen import BUDGET, CFG, FIVE, TOWER, fresh, published, their_inputs, tower

from jaxvid import sharding
from jaxvid.data import layout
from jaxvid.models import hf, qwen25vl, weights
from jaxvid.prompting import Medium

NO_TORCH = "the oracle: pip install jaxvid[oracle]"


class Exported:
    """Our model, and transformers' of the folder that ours was saved to."""

    def __init__(self, folder, **changes):
        torch = pytest.importorskip("torch", reason=NO_TORCH)
        from transformers import Qwen2_5_VLForConditionalGeneration as Theirs

        self.loaded = fresh(**changes)
        self.ours = model(self.loaded)
        hf.save(folder, self.loaded.cfg, self.loaded.params, dtype="float32")
        self.theirs, self.info = Theirs.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        self.theirs.eval()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return Exported(tmp_path_factory.mktemp("whole") / "m")


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    """Each token sees 7; and the unembedding is the embedding table."""
    return Exported(tmp_path_factory.mktemp("window") / "m", tied=True, window=7)


@pytest.fixture(scope="module", params=["whole", "window"])
def oracle(request):
    return request.getfixturevalue(request.param)


# --- states


def test_hidden_states_and_logits_equal_transformers(oracle):
    """Left-padded batches and single sequences of theirs, rows of ours: 1.1e-5 apart at most."""
    trees = [tree(FIVE, *ms, seed=i) for i, ms in enumerate(MUTE)]
    got = prompts.states(oracle.ours, BUDGET, trees)
    logits = [x @ np.asarray(oracle.ours.unembedding()).T for x in got]
    want = run_theirs(oracle.theirs, their_inputs(trees, MUTE), trees)
    assert worst(got, want[0]) < 1e-4 and worst(logits, want[1]) < 1e-4
    for i, ms in enumerate(MUTE[:3]):
        alone = run_theirs(oracle.theirs, their_inputs(trees[i : i + 1], [ms]), trees[i : i + 1])
        assert worst(got[i : i + 1], alone[0]) < 1e-4


def test_hidden_states_at_the_positions_of_transformers_4_equal_transformers(oracle):
    torch, both = pytest.importorskip("torch", reason=NO_TORCH), tree(CFG, *MUTE[-1])
    inputs = their_inputs([both], MUTE[-1:])
    inputs["position_ids"] = torch.tensor(both.positions[:, None].astype(np.int64))
    want, _ = run_theirs(oracle.theirs, inputs, [both])
    (got,) = prompts.states(oracle.ours, BUDGET, [both])
    assert worst([got], want) < 1e-4
    assert (both.positions != tree(FIVE, *MUTE[-1]).positions).any()


def test_tower_equals_transformers(whole):
    """An image and clips of several shapes: windows that are whole, and cut off. 2.3e-5 apart at
    most, of features up to 20."""
    import torch

    small, wide = CLIP._replace(grid=(2, 4, 4)), CLIP._replace(grid=(1, 2, 12))
    media = ((IMAGE, small), (CLIP, wide))
    trees = [tree(CFG, *ms, seed=i) for i, ms in enumerate(media)]
    got = np.asarray(tower(whole.ours, rows(BUDGET, *trees)[1])).reshape(2, 4, 9, 32)
    inputs = their_inputs(trees, media)
    with torch.no_grad():
        see = lambda *of: whole.theirs.model.visual(*(inputs[k] for k in of)).pooler_output.numpy()
        image = see("pixel_values", "image_grid_thw")
        videos = see("pixel_values_videos", "video_grid_thw")
    ours = [got[0, 0], *got[0, 1:3, :4], *got[1, :2], got[1, 2, :6]]
    assert worst(ours, np.split(np.concatenate([image, videos]), [9, 13, 17, 26, 35])) < 1e-4
    assert np.isfinite(got).all()


def test_packed_rows_equal_rows_of_one(oracle):
    """Two trees in one row, after one another: neither sees the other."""
    media = ((CLIP,), (IMAGE,))
    trees = [tree(FIVE, *ms, seed=i, text=4) for i, ms in enumerate(media)]
    want = run_theirs(oracle.theirs, their_inputs(trees, media), trees)[0]
    budget = dataclasses.replace(BUDGET, scored=2, branches=2)
    assert worst(prompts.packed_states(oracle.ours, budget, trees), want) < 1e-4


def test_gradients_equal_transformers(oracle):
    """Of the mean log-prob of the text after an image and a clip: every parameter, by its place.
    5e-6 of its largest apart at most."""
    both = tree(FIVE, *MUTE[-1], text=6)
    apart, none = prompts.gradients_apart(
        oracle.theirs, their_inputs([both], MUTE[-1:]), oracle.loaded, both, BUDGET
    )
    assert not none and max(apart.values()) < 1e-3


def test_greedy_generation_equals_transformers(oracle):
    """Of an image and of a clip whose last frame is further on than the text after it: what is
    generated goes on from the text."""
    media = ((IMAGE,), (CLIP._replace(seconds=3.0),))
    trees = [tree(FIVE, *ms, seed=i) for i, ms in enumerate(media)]
    assert trees[1].positions.max() > layout.next_position(trees[1])
    want = prompts.generate(oracle.theirs, their_inputs(trees, media), 32)
    assert prompts.greedy(oracle.ours, BUDGET, trees, 32) == want
    assert all(len(set(row)) > 8 for row in want)


# --- positions


def test_positions_equal_transformers_5():
    """Integer for integer."""
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    from transformers import Qwen2_5_VLModel as Theirs

    names = ("get_rope_index", "get_vision_position_ids")
    stub = type("Stub", (), {name: vars(Theirs)[name] for name in names})()
    r = np.random.default_rng(0)
    for _ in range(120):
        rate, media = int(r.choice([2, 4, 25])), prompts.some_media(r, ["image", "video"])
        cfg = dataclasses.replace(FIVE, vision=dataclasses.replace(TOWER, tokens_per_second=rate))
        pieces = [r.integers(10, 64, 3)]
        for m in media:
            placed = cfg.prompting.expand(m, lambda text: [])
            pieces += [placed.ids, r.integers(10, 64, r.integers(0, 3))]
        ids = np.concatenate([*pieces, r.integers(10, 64, 2)]).astype(np.int32)
        stub.config = types.SimpleNamespace(
            vision_config=types.SimpleNamespace(spatial_merge_size=2, tokens_per_second=rate)
        )
        grids = lambda kind, of=media: torch.tensor([m.grid for m in of if m.kind == kind])
        want, _ = stub.get_rope_index(
            torch.tensor(ids[None].astype(np.int64)),
            torch.tensor((ids == cfg.image_token_id) + 2 * (ids == cfg.video_token_id))[None],
            grids("image"),
            grids("video"),
            torch.tensor([m.seconds for m in media if m.kind == "video"]),
        )
        np.testing.assert_array_equal(cfg.prompting.positions(ids, media), want[:, 0].numpy())


def test_positions_equal_transformers_4():
    """Integer for integer, and where generation begins; numbers of transformers 4.57."""
    found, meta = peers.load("qwen_positions")
    assert {k: v for k, v in meta["ids"].items() if v != dataclasses.asdict(CFG)[k]} == {}
    cut = lambda x, by, axis=-1: np.split(x, np.cumsum(found[by])[:-1], axis)
    tokens, positions = cut(found["tokens"], "lengths"), cut(found["positions"], "lengths")
    each = zip(tokens, positions, cut(found["media"], "counts", 0), found["tokens_per_second"])
    for i, (ids, want, table, rate) in enumerate(each):
        cfg = dataclasses.replace(
            CFG, vision=dataclasses.replace(TOWER, tokens_per_second=int(rate))
        )
        media = [
            Medium("video" if video else "image", tuple(map(int, grid)), float(seconds))
            for video, *grid, seconds in table
        ]
        got = cfg.prompting.positions(ids, media)
        np.testing.assert_array_equal(got, want)
        assert got[:, -1].max() + 1 == found["after"][i]
    assert len(tokens) == 120


# --- folders


def test_the_exported_folder_is_loaded_whole(oracle):
    assert not any(oracle.info.values()), oracle.info
    tied = oracle.loaded.cfg.tied
    assert (oracle.theirs.lm_head.weight is oracle.theirs.get_input_embeddings().weight) == tied


def test_folder_of_transformers_is_read(oracle, tmp_path):
    oracle.theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    read = hf.load(tmp_path)
    assert dataclasses.replace(read.cfg, compute=CFG.compute) == oracle.loaded.cfg
    jax.tree.map(np.testing.assert_array_equal, read.params, oracle.loaded.params)


def stored(folder):
    """Every tensor of a folder: dtype, shape and bytes by name; and in how many files."""
    files = sorted(folder.glob("*.safetensors"))
    each = {k: v for file in files for k, v in safetensors.numpy.load_file(file).items()}
    return {k: (v.dtype, v.shape, v.tobytes()) for k, v in each.items()}, len(files)


@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_folder_comes_back_bit_for_bit(tied, tmp_path, monkeypatch):
    """Every finite number that bfloat16 has, read in either precision and from a mesh."""
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    loaded, r = fresh(tied), np.random.default_rng(5)
    hf.save(tmp_path / "m", loaded.cfg, loaded.params)
    for file in (tmp_path / "m").glob("*.safetensors"):
        tensors = safetensors.numpy.load_file(file)
        for name, x in tensors.items():
            bits = r.integers(0, 2**16, x.shape, np.uint16)
            bits[bits & 0x7F80 == 0x7F80] = 0x8001  # no NaN, no infinity: a subnormal number
            tensors[name] = bits.view(x.dtype)
        safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    want, files = stored(tmp_path / "m")
    assert files > 3 and ("lm_head.weight" in want) != tied
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    for how in ({"dtype": "bfloat16"}, {}, {"dtype": "bfloat16", "mesh": mesh}):
        read = hf.load(tmp_path / "m", **how)
        hf.save(tmp_path / "again", read.cfg, read.params)
        assert stored(tmp_path / "again") == (want, files)
        config = [
            json.loads((tmp_path / name / "config.json").read_text()) for name in ("m", "again")
        ]
        assert config[0] == config[1]


# --- at true size


@pytest.mark.parametrize("size", ["3B", "7B", "32B", "72B"])
def test_published_configs_have_the_size_of_transformers_modules(size):
    """And both the hub's config and the one that is written again say the same to transformers."""
    cfg = qwen25vl.Config.from_hf(published(size))
    read = qwen25vl.Config.from_hf(json.loads(json.dumps(cfg.to_hf())))
    assert read == cfg and cfg.tied == (size == "3B")
    count = sum(x.size for x in jax.tree.leaves(hf.abstract(cfg)[1]))
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    import transformers

    for config in (published(size), cfg.to_hf()):
        with torch.device("meta"):
            theirs = transformers.Qwen2_5_VLForConditionalGeneration(
                transformers.Qwen2_5_VLConfig(**config)
            )
        assert count == sum(p.numel() for p in theirs.parameters())


def test_one_layer_of_everything_at_true_width_equals_transformers():
    """Decoder 3584 / 18944, vision 1280 / 3420: 9e-6 apart at most."""
    pytest.importorskip("torch", reason=NO_TORCH)
    import transformers

    full = qwen25vl.Config.from_hf(published())
    cfg = dataclasses.replace(
        full,
        text=dataclasses.replace(full.text, layers=1, vocab=64),
        vision=dataclasses.replace(full.vision, layers=1, full=(), tokens_per_second=4),
        text_after_video="hf5",
        fractional_seconds=True,
        compute=CFG.compute,
        **{name: getattr(CFG, name) for name in qwen25vl.TOKEN_NAMES},
    )
    graph, shapes = hf.abstract(cfg)
    params = filled(shapes, 0.07, np.asarray)  # a standard deviation of 0.02
    config = transformers.Qwen2_5_VLConfig(**cfg.to_hf())
    build = lambda: transformers.Qwen2_5_VLForConditionalGeneration(config)
    theirs = prompts.assigned(build, cfg, params)
    wide = CLIP._replace(
        grid=(2, 4, 12)
    )  # windows of 4 x 4 merged tokens: one of 2 x 4, one of 2 x 2
    one, budget = tree(cfg, wide), dataclasses.replace(BUDGET, rows=1, tokens=32, patches=48)
    run = jax.jit(lambda p, *x: nnx.merge(graph, p).hidden(*x), compiler_options=QUICK)
    got = run(params, *rows(budget, one))[0, : len(one.prompt)]
    want = run_theirs(theirs, their_inputs([one], [(wide,)], cfg), [one])[0]
    assert worst([got], want) < 1e-4
