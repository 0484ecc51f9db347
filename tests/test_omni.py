"""Qwen2.5-Omni's thinker against transformers' own: states, positions, gradients, folders."""

import dataclasses
import json
import types

import jax
import numpy as np
import prompts
import pytest
import safetensors.numpy
from flax import nnx
from omni import BUDGET, CFG, EARS, FILM, SOUND, TOWER, fresh, published
from prompts import CLIP, MUTE, QUICK, filled, model, rows, run_theirs, tree, worst

from jaxvid.models import audio, hf, omni
from jaxvid.prompting import Medium

LOUD = ((FILM,), (SOUND,), (SOUND, FILM))


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    torch = pytest.importorskip("torch", reason="the oracle: pip install jaxvid[oracle]")
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    folder = tmp_path_factory.mktemp("ours") / "model"
    loaded = fresh()
    hf.save(folder, loaded.cfg, loaded.params, dtype="float32")
    theirs = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return torch, theirs.eval()


def their_inputs(trees, media, cfg=CFG):
    """One left-padded batch of trees with their media."""
    import torch

    out = prompts.their_inputs(cfg, trees, media)
    out["use_audio_in_video"] = any(m.kind == "video" and m.sound for ms in media for m in ms)
    if seconds := [m.seconds for ms in media for m in ms if m.kind == "video"]:
        out["video_second_per_grid"] = torch.tensor(seconds)
    frames = [m.sound for ms in media for m in ms if m.sound]
    if frames:
        heard = np.concatenate([t.sound[: len(t.sound)] for t in trees])
        lengths = np.concatenate([t.lengths for t in trees])
        flat = np.concatenate([x[:n] for x, n in zip(heard, lengths)])
        each = np.split(flat, np.cumsum(frames)[:-1])
        wide = [np.pad(x, ((0, max(frames) - len(x)), (0, 0))).T for x in each]
        mask = np.arange(max(frames))[None] < np.array(frames)[:, None]
        out["input_features"] = torch.tensor(np.stack(wide))
        out["feature_attention_mask"] = torch.tensor(mask.astype(np.int64))
    return out


@pytest.mark.parametrize("media", [MUTE, LOUD], ids=["mute", "loud"])
def test_hidden_states_and_logits_equal_transformers(oracle, media):
    """Left-padded batches and single sequences of theirs, rows of ours: 3e-6 apart at most."""
    theirs, trees = oracle[1], [tree(CFG, *ms, seed=i) for i, ms in enumerate(media)]
    ours = model(fresh())
    got = prompts.states(ours, BUDGET, trees)
    logits = [x @ np.asarray(ours.unembedding()).T for x in got]
    want = run_theirs(theirs, their_inputs(trees, media), trees)
    assert worst(got, want[0]) < 1e-4 and worst(logits, want[1]) < 1e-4
    for i, ms in enumerate(media[:3]):
        alone = run_theirs(theirs, their_inputs(trees[i : i + 1], [ms]), trees[i : i + 1])
        assert worst(got[i : i + 1], alone[0]) < 1e-4


def test_towers_equal_transformers(oracle):
    torch, theirs = oracle
    trees, media = [tree(CFG, FILM), tree(CFG, CLIP, seed=1)], [(FILM,), (CLIP,)]
    ours, (_, seen, heard) = model(fresh()), rows(BUDGET, *trees)
    inputs = their_inputs(trees, media)
    with torch.no_grad():
        patches, grids = inputs["pixel_values_videos"], inputs["video_grid_thw"]
        film, clip = theirs.model.get_video_features(patches, grids).pooler_output
        sound = theirs.model.get_audio_features(
            inputs["input_features"], inputs["feature_attention_mask"]
        ).last_hidden_state
    frames = np.asarray(prompts.quick(lambda m, x: m.tower(x))(ours, seen)).reshape(2, 4, 9, 32)
    ears = np.asarray(prompts.quick(lambda m, x: m.ears(x))(ours, heard))
    film, clip = film.numpy().reshape(3, 4, 32), clip.numpy().reshape(2, 9, 32)
    apart = worst([frames[0, :3, :4], frames[1, :2]], [film, clip])
    assert apart < 1e-4 and worst([ears[0, : len(sound)]], [sound.numpy()]) < 1e-4
    assert len(sound) == audio.features(FILM.sound) == 17 and np.isfinite(ears).all()


def test_packed_rows_equal_rows_of_one(oracle):
    """A film and a sound in one row, after one another: neither sees the other."""
    trees, media = [tree(CFG, FILM), tree(CFG, SOUND, seed=1)], [(FILM,), (SOUND,)]
    want = run_theirs(oracle[1], their_inputs(trees, media), trees)[0]
    budget = dataclasses.replace(BUDGET, scored=2, branches=2)
    assert worst(prompts.packed_states(model(fresh()), budget, trees), want) < 1e-4


def test_gradients_equal_transformers(oracle):
    """Of the mean log-prob of the text after a film with sound: every parameter, by its place.
    4e-6 of its largest apart at most."""
    film = tree(CFG, FILM, text=6)
    inputs = their_inputs([film], [(FILM,)])
    apart, none = prompts.gradients_apart(oracle[1], inputs, fresh(), film, BUDGET)
    assert none == {"audio_tower.audio_bos_eos_token.weight"}
    assert max(apart.values()) < 1e-3


def test_greedy_generation_equals_transformers(oracle):
    film = tree(CFG, FILM, seed=2)
    want = prompts.generate(oracle[1], their_inputs([film], [(FILM,)]), 32)
    assert prompts.greedy(model(fresh()), BUDGET, [film], 32) == want


# --- configs


@pytest.mark.parametrize("size", ["7B", "3B"])
def test_published_configs_have_the_size_of_transformers_modules(size):
    cfg = omni.Config.from_hf(published(size))
    count = sum(x.size for x in jax.tree.leaves(hf.abstract(cfg)[1]))
    if size == "7B":
        assert count == 8_931_813_888  # as the checkpoint's index says
        parts = {"text": cfg.text, "vision": cfg.vision, "audio": cfg.audio}
        assert cfg == omni.Config(**parts, bos_token_id=151644, pad_token_id=151643)
    torch = pytest.importorskip("torch", reason="the oracle: pip install jaxvid[oracle]")
    import transformers

    config = transformers.Qwen2_5OmniThinkerConfig(**published(size)["thinker_config"])
    with torch.device("meta"):
        theirs = transformers.Qwen2_5OmniThinkerForConditionalGeneration(config)
    assert count == sum(p.numel() for p in theirs.parameters())


def test_thinkers_configs_are_read_alone_and_round_trip():
    full, thinker = published(), published()["thinker_config"]
    cfg = omni.Config.from_hf(full)
    assert omni.Config.from_hf(thinker) == cfg
    tiny = hf.tiny_config("qwen2_5_omni_thinker")
    for one in (cfg, CFG, dataclasses.replace(tiny, longest_sound=30, tied=False)):
        read = omni.Config.from_hf(json.loads(json.dumps(one.to_hf())))
        assert dataclasses.replace(read, compute=one.compute) == one


def test_tiny_config_is_small_and_has_the_true_sound():
    cfg = hf.tiny_config("qwen2_5_omni_thinker")
    assert sum(x.size for x in jax.tree.leaves(hf.abstract(cfg)[1])) < 4.6e6
    assert (cfg.audio.mels, cfg.audio.chunk, cfg.vision.tokens_per_second) == (128, 200, 25)
    assert len({getattr(cfg, name) for name in omni.TOKEN_NAMES}) == 9  # begin and pad are one


def test_config_names_every_problem():
    config = published(mystery=1)
    config["surprise"] = 2
    thinker = config["thinker_config"]
    thinker["audio_config"] |= {"activation_function": "relu", "strange": 3}
    del thinker["audio_config"]["n_window"], thinker["text_config"]["vocab_size"]
    thinker["vision_config"]["deepstack"] = [1]
    with pytest.raises(ValueError) as e:
        omni.Config.from_hf(config)
    for part in (
        "thinker_config.mystery=1 is not known",
        "surprise=2",
        "activation_function is 'relu'; only 'gelu'",
        "audio_config.strange=3",
        "n_window is missing",
        "vocab_size is missing",
        "vision_config.deepstack=[1]",
    ):
        assert part in str(e.value)
    with pytest.raises(ValueError, match="the audio tower gives width 16; the decoder has 32"):
        dataclasses.replace(CFG, audio=dataclasses.replace(EARS, out=16))


# --- folders


def test_folders_of_transformers_and_full_checkpoints_are_read(oracle, tmp_path):
    """The hub's names, with and without the prefix of full checkpoints, and transformers' own."""
    torch, theirs = oracle
    theirs.save_pretrained(tmp_path / "theirs")
    read = hf.load(tmp_path / "theirs")
    assert dataclasses.replace(read.cfg, compute=CFG.compute) == CFG
    jax.tree.map(np.testing.assert_array_equal, read.params, fresh().params)

    tensors = safetensors.numpy.load_file(tmp_path / "theirs/model.safetensors")
    own = {k: v.numpy() for k, v in theirs.state_dict().items()}
    assert set(own) != set(tensors) and {omni.hub_name(k) for k in own} == set(tensors)
    full = {"model_type": "qwen2_5_omni", "thinker_config": CFG.to_hf(), "talker_config": {}}
    speech = {"talker.model.norm.weight": np.ones(3), "token2wav.code2wav.x": np.ones(3)}
    for name, spelling, config in (
        ("own", own, CFG.to_hf()),
        ("full", {f"thinker.{k}": v for k, v in tensors.items()} | speech, full),
    ):
        (tmp_path / name).mkdir()
        safetensors.numpy.save_file(spelling, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path / name).params, read.params)

    del tensors["audio_tower.layers.1.fc1.weight"]
    tensors["visual.surprise"] = np.ones(3)
    safetensors.numpy.save_file(tensors, tmp_path / "own/model.safetensors")
    with pytest.raises(ValueError, match="visual.surprise is in the files") as e:
        hf.load(tmp_path / "own")
    assert "audio_tower.layers.1.fc1.weight is missing" in str(e.value)


# --- prompting


TRUE = dataclasses.replace(CFG, vision=dataclasses.replace(TOWER, tokens_per_second=25))


def test_positions_and_tokens_equal_transformers():
    """Integer for integer. The reference is the same in transformers 4.57 and 5.23."""
    torch = pytest.importorskip("torch", reason="the oracle: pip install jaxvid[oracle]")
    from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as modeling
    from transformers.models.qwen2_5_omni import processing_qwen2_5_omni as processing

    parent = modeling.Qwen2_5OmniPreTrainedModelForConditionalGeneration
    config = {name: getattr(TRUE, name) for name in omni.TOKEN_NAMES}
    stub = type("Stub", (), {n: vars(parent)[n] for n in vars(parent) if n.startswith("get_")})()
    stub.config = types.SimpleNamespace(position_id_per_seconds=25, seconds_per_chunk=2, **config)
    stub.spatial_merge_size = 2
    parent = processing.Qwen2_5OmniProcessor
    writer = type("Stub", (), {"get_chunked_index": parent.get_chunked_index})()
    writer.video_processor = types.SimpleNamespace(merge_size=2)
    writer.audio_bos_token, writer.audio_eos_token = chr(7), chr(8)
    writer.video_token, writer.audio_token = chr(5), chr(6)
    how = {"position_id_per_seconds": 25, "seconds_per_chunk": 2.0}
    r, prompting = np.random.default_rng(0), TRUE.prompting
    for trial in range(60):
        both = bool(trial % 2)
        media = prompts.some_media(r, ["image", "video", "audio"], loud=both)
        pieces = [r.integers(10, 64, 3)]
        for m in media:
            placed = prompting.expand(m, lambda text: [])
            pieces += [placed.ids, r.integers(10, 64, r.integers(0, 3))]
            if m.kind == "video" and m.sound:
                seen = {"video_grid_thw": [np.array(m.grid)], "video_second_per_grid": [m.seconds]}
                heard = {"num_audio_tokens": [audio.features(m.sound)]}
                text = parent.replace_video_with_audio_token(writer, seen, 0, heard, 0, **how)
                assert placed.ids.tolist() == [2, *map(ord, text), 3]
        ids = np.concatenate([*pieces, r.integers(10, 64, 2)]).astype(np.int32)
        grids = lambda kind, of=media: torch.tensor([m.grid for m in of if m.kind == kind])
        sounds = [m.sound for m in media if m.sound]
        want, _ = stub.get_rope_index(
            torch.tensor(ids[None].astype(np.int64)),
            grids("image"),
            grids("video"),
            torch.ones(1, len(ids), dtype=torch.long),
            both,
            torch.tensor(sounds),
            torch.tensor([m.seconds for m in media if m.kind == "video"]),
        )
        np.testing.assert_array_equal(prompting.positions(ids, media), want[:, 0].numpy())


def test_a_film_by_hand():
    """Chunks of 8 positions: two frames, 8 features of sound, a frame, 8 more, the last."""
    placed = CFG.prompting.expand(FILM, lambda text: [])
    frames, sound = [5] * 4, [6] * 8
    assert placed.ids.tolist() == [2, 7, *frames * 2, *sound, *frames, *sound, 6, 8, 3]
    assert placed.vision[2:10].tolist() == list(range(1, 9)) and placed.vision.max() == 12
    assert placed.sound[placed.sound > 0].tolist() == list(range(1, 18))
    at = CFG.prompting.positions(np.array([9, *placed.ids, 9], np.int32), [FILM])
    assert at[0].tolist() == [
        *[0, 1, 1, *[2] * 4, *[8] * 4, *range(2, 10), *[14] * 4, *range(10, 18), 18, 19, 19, 20]
    ]
    assert at[1, 3:7].tolist() == [2, 2, 3, 3] and at[2, 3:7].tolist() == [2, 3, 2, 3]


def test_sounds_that_cannot_be_had_are_refused():
    prompting, encode = CFG.prompting, lambda text: []
    with pytest.raises(ValueError, match="'audio' has a sound of 0 s.*give a clip that has sound"):
        prompting.expand(Medium("audio"), encode)
    with pytest.raises(ValueError, match="a sound of 0.02 s, which gives no feature"):
        prompting.expand(FILM._replace(sound=2), encode)
    with pytest.raises(ValueError, match="a sound of 300.01 s; this model hears at most 300 s"):
        prompting.expand(FILM._replace(sound=30_001), encode)
    prompting.expand(FILM._replace(sound=30_000), encode)


def test_positions_refuse_tokens_of_other_media():
    prompting = CFG.prompting
    ids = prompting.expand(FILM, lambda text: []).ids
    with pytest.raises(ValueError, match="a medium of kind 'video' wants .*from token 0"):
        prompting.positions(ids[:-3], [FILM])
    with pytest.raises(ValueError, match="something else there"):
        prompting.positions(ids, [FILM._replace(sound=0)])
    with pytest.raises(ValueError, match="after the last of 0 media"):
        prompting.positions(ids, [])


# --- at true size


def test_one_layer_of_everything_at_true_width_equals_transformers():
    """Decoder 3584 / 18944, vision 1280 / 3420, audio 1280 / 5120: 9e-6 apart at most."""
    pytest.importorskip("torch", reason="the oracle: pip install jaxvid[oracle]")
    import transformers

    full = omni.Config.from_hf(published())
    cfg = dataclasses.replace(
        full,
        text=dataclasses.replace(full.text, layers=1, vocab=64),
        vision=dataclasses.replace(full.vision, layers=1, full=(0,)),
        audio=dataclasses.replace(
            full.audio, encoder=dataclasses.replace(full.audio.encoder, layers=1)
        ),
        compute=CFG.compute,
        **{name: getattr(CFG, name) for name in omni.TOKEN_NAMES},
    )
    graph, shapes = hf.abstract(cfg)
    params = filled(shapes, 0.07, np.asarray)  # a standard deviation of 0.02
    config = transformers.Qwen2_5OmniThinkerConfig(**cfg.to_hf())
    build = lambda: transformers.Qwen2_5OmniThinkerForConditionalGeneration(config)
    theirs = prompts.assigned(build, cfg, params)
    for module in theirs.modules():  # made on the meta device too
        if isinstance(module, type(theirs.model.audio_tower.positional_embedding)):
            module.positional_embedding = module.compute_default_singular_positional_embedding()
    film = tree(cfg, FILM)
    budget = dataclasses.replace(BUDGET, rows=1, tokens=48, frames=3, patches=16, chunks=1)
    run = jax.jit(lambda p, *x: nnx.merge(graph, p).hidden(*x), compiler_options=QUICK)
    got = run(params, *rows(budget, film))[0, : len(film.prompt)]
    want = run_theirs(theirs, their_inputs([film], [(FILM,)], cfg), [film])[0]
    assert worst([got], want) < 1e-4
