"""video-SALMONN-o1 against the same model made of transformers' parts, its prompts and folders."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from salmonn import (
    ASKED,
    BUDGET,
    CFG,
    EARS,
    FILM,
    IMAGE,
    MUTE,
    QUICK,
    SOUND,
    TOWER,
    Theirs,
    compiled,
    encode,
    fresh,
    generate,
    model,
    modules,
    rows,
    run,
    tree,
)
from towers import drawn
from towers import filled as taken

from jaxvid.batch import AudioBatch
from jaxvid.data import layout, media, pipeline
from jaxvid.data.chat import Chat, build_tokenizer
from jaxvid.models import assemble, hf, qformer, salmonn, text_config, whisper
from jaxvid.models.family import Places
from jaxvid.models.layers import Compute
from jaxvid.prompting import Medium, Sound

# --- transformers' parts are the oracle


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("torch", reason="the oracle: pip install jaxvid[oracle]")
    return Theirs(CFG, dict(hf._tensors(CFG, fresh().params, "float32")))


def worst(got, want):
    return float(np.abs(np.asarray(got) - want.detach().numpy()).max())


PROMPTS = ((FILM,), (SOUND,), (MUTE,), (IMAGE, SOUND))


def test_hidden_states_and_logits_equal_transformers(theirs):
    trees = [tree(*ms, seed=i) for i, ms in enumerate(PROMPTS)]
    for i in range(0, len(trees), 2):
        got = run(*rows(*trees[i : i + 2]))[0]
        for t, x in zip(trees[i : i + 2], got):
            x = x[: len(t.prompt)]
            states, logits = theirs.run(theirs.embedded(t))
            apart = worst(x, states), worst(x @ model().unembedding().T, logits)
            print(f"{t.prompt.shape}: {apart}")
            assert max(apart) < 1e-4


def test_towers_equal_transformers(theirs):
    """The two films of different rows, and a second sound in a row, whose segments begin anew."""
    film, both = tree(FILM), tree(SOUND, FILM, seed=1)
    inputs = rows(film, both)
    _, frames, sound = run(*inputs)
    assert frames.shape == (2, 4 * 9, 32) and sound.shape == (2, 5 * 8, 32)
    assert inputs[2].order.tolist() == [[0, 1, 0, 0, 0], [0, 1, 2, 0, 1]]
    for row, t in enumerate((film, both)):
        patches, count = t.clips[0].patches, len(t.sound)
        apart = worst(frames[row, : 3 * 9], theirs.seen(patches))
        assert apart < 1e-4
        apart = worst(sound[row, : count * 8], theirs.heard(t.sound, t.order))
        assert apart < 1e-4
    assert np.isfinite(frames).all() and np.isfinite(sound).all()


def test_packed_rows_equal_rows_of_one(theirs):
    """A film and a sound in one row, after one another: neither sees the other."""
    trees = [tree(FILM), tree(SOUND, seed=1)]
    word = lambda t: layout.Branch(t.prompt[-1:], np.ones(1, bool))
    split = [
        t._replace(
            prompt=t.prompt[:-1],
            seen=t.seen[:-1],
            heard=t.heard[:-1],
            positions=t.positions[:, :-1],
            branches=(word(t),),
        )
        for t in trees
    ]
    budget = dataclasses.replace(BUDGET, scored=2, branches=2)
    (batch,) = layout.pack([[t] for t in split], budget)
    assert (batch.tokens.end[1] == 0).all()  # both in the first row
    got, at = run(batch.tokens, batch.vision, batch.audio)[0][0], 0
    for t in trees:
        states, _ = theirs.run(theirs.embedded(t))
        assert worst(got[at : (at := at + len(t.prompt))], states) < 1e-4


def test_gradients_equal_transformers(theirs):
    """Of the mean log-prob of the text after a film with sound: every tensor, by its name."""
    film, loaded = tree(FILM, text=6), fresh()
    n = len(film.prompt)
    target = film.prompt[n - 6 :].astype(np.int64)
    theirs.parts.zero_grad()
    logits = theirs.run(theirs.embedded(film))[1][n - 7 : n - 1]
    theirs.torch.nn.functional.cross_entropy(logits, theirs.torch.tensor(target)).backward()
    want = theirs.gradients()

    def loss(params):
        ours = nnx.merge(loaded.graph, params)
        logits = ours.hidden(*rows(film))[0, n - 7 : n - 1] @ ours.unembedding().T
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), target[:, None], 1).mean()

    got = jax.jit(jax.grad(loss), compiler_options=QUICK)(loaded.params)
    got = dict(hf._tensors(CFG, got, "float32"))
    assert set(got) == set(want)
    apart = {}
    for name, x in got.items():
        if want[name] is None:  # the layer and the norm that nothing reads
            assert not x.any() and ("layers.2" in name or "post_layernorm" in name), name
        elif name.endswith(("k_proj.bias", "key.bias")) and "language_model" not in name:
            # softmax does not see a shift of all keys: what is there is rounding
            values = name.replace("k_proj", "v_proj").replace("key", "value")
            assert max(np.abs(x).max(), np.abs(want[name]).max()) < 1e-4 * np.abs(got[values]).max()
        else:
            apart[name] = np.abs(x - want[name]).max() / np.abs(want[name]).max()
    print(f"gradients of {len(apart)} tensors: {max(apart.values()):.1e}")
    assert max(apart.values()) < 1e-3 and len(apart) > 100


def test_greedy_generation_equals_transformers_and_a_full_pass(theirs):
    film, count = tree(FILM, seed=2), 32
    embedded = theirs.embedded(film)
    llm = theirs.parts["language_model"]
    how = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = llm.generate(inputs_embeds=embedded, **how)[0]
    got = compiled(lambda model: generate(model, film, rows(film), count))()
    assert got.tolist() == want.tolist()
    replied = theirs.torch.cat([embedded, llm.get_input_embeddings()(want[None])], dim=1)
    logits = theirs.run(replied)[1][len(film.prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == want.tolist()


def test_what_a_segment_says_depends_on_its_place():
    film = tree(SOUND)
    tokens, seen, heard = rows(film)
    same = heard._replace(features=np.repeat(heard.features[:, :1], 5, axis=1))
    got = run(tokens, seen, same)[2][0].reshape(5, 8, -1)
    assert np.abs(got[1] - got[0]).max() > 0.01
    got = run(tokens, seen, same._replace(order=np.zeros_like(heard.order)))[2][0].reshape(5, 8, -1)
    np.testing.assert_allclose(got[1], got[0], atol=1e-6)


# --- parts at true width


def true_part(theirs, where, build, prefix):
    """Our module with the same numbers as theirs."""
    import torch

    state = drawn(theirs.state_dict())
    theirs.load_state_dict({k: torch.from_numpy(x) for k, x in state.items()}, assign=True)
    return taken(build, where, lambda name: state[name.removeprefix(prefix)])


def true_width():
    """Whisper-large-v3's and its Q-Former's widths, a layer of each, one second of sound."""
    full = salmonn.Config.from_hf(published())
    blocks = dataclasses.replace(full.audio.encoder, layers=1)
    return dataclasses.replace(
        CFG,
        audio=dataclasses.replace(full.audio, encoder=blocks, positions=50),
        qformer=dataclasses.replace(full.qformer, layers=1),
    )


def test_parts_of_true_width_equal_transformers():
    torch = pytest.importorskip("torch", reason="the oracle: pip install jaxvid[oracle]")
    cfg = true_width()
    assert (cfg.audio.encoder.width, cfg.audio.encoder.ffn, cfg.audio.encoder.heads) == (
        *(1280, 5120, 20),
    )
    with torch.device("meta"):
        parts = modules(cfg)
    ears, asks = parts["speech_encoder"].eval(), parts["qformer"].eval()
    where = Places()
    whisper.places(where, cfg.audio, (), "ears")
    build = lambda: whisper.Tower(cfg.audio, Compute(remat="none"), rngs=nnx.Rngs(0))
    ours = true_part(ears, where, build, "ears.")
    x = np.random.default_rng(1).standard_normal((1, 2, 100, 128), np.float32)
    sound = AudioBatch(x, np.full((1, 2), 100, np.int32), np.zeros((1, 2), np.int32))
    with torch.no_grad():
        want = ears(torch.tensor(x[0]).transpose(1, 2)).last_hidden_state
    call = nnx.jit(lambda m, x: m(x))
    got = call(ours, sound)
    print(f"Whisper at true width: {worst(got, want):.1e}")
    assert worst(got, want) < 1e-4

    queries = 0.02 * np.random.default_rng(2).standard_normal((1, 1, 1280)).astype(np.float32)
    where = Places()
    qformer.places(where, (), "asks")
    state = {"query_tokens": queries, **drawn(asks.state_dict())}
    own = {k: torch.from_numpy(x) for k, x in state.items() if k != "query_tokens"}
    asks.load_state_dict(own, assign=True)
    build = lambda: qformer.QFormer(cfg.qformer, Compute(remat="none"), rngs=nnx.Rngs(0))
    ours = taken(build, where, lambda name: state[name.removeprefix("asks.")])
    windows = want.reshape(10, 10, 1280)
    with torch.no_grad():
        told = asks(torch.tensor(queries).expand(10, 1, -1), encoder_hidden_states=windows)
    got = call(ours, jnp.asarray(want.numpy()))
    apart = worst(got.reshape(10, 1, -1), told.last_hidden_state)
    print(f"Q-Former at true width: {apart:.1e}")
    assert apart < 1e-4


# --- configs


def published(**changes):
    """config.json of the published sizes, its sections as the parts' folders have them."""
    vision = {
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    }
    speech = {
        "_name_or_path": "openai/whisper-large-v3",
        "activation_dropout": 0.0,
        "activation_function": "gelu",
        "apply_spec_augment": False,
        "architectures": ["WhisperForConditionalGeneration"],
        "attention_dropout": 0.0,
        "begin_suppress_tokens": [220, 50257],
        "bos_token_id": 50257,
        "classifier_proj_size": 256,
        "d_model": 1280,
        "decoder_attention_heads": 20,
        "decoder_ffn_dim": 5120,
        "decoder_layerdrop": 0.0,
        "decoder_layers": 32,
        "decoder_start_token_id": 50258,
        "dropout": 0.0,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "encoder_layerdrop": 0.0,
        "encoder_layers": 32,
        "eos_token_id": 50257,
        "init_std": 0.02,
        "is_encoder_decoder": True,
        "mask_feature_length": 10,
        "mask_feature_min_masks": 0,
        "mask_feature_prob": 0.0,
        "mask_time_length": 10,
        "mask_time_min_masks": 2,
        "mask_time_prob": 0.05,
        "max_length": 448,
        "max_source_positions": 1500,
        "max_target_positions": 448,
        "median_filter_width": 7,
        "model_type": "whisper",
        "num_hidden_layers": 32,
        "num_mel_bins": 128,
        "pad_token_id": 50256,
        "scale_embedding": False,
        "torch_dtype": "float16",
        "transformers_version": "4.36.0.dev0",
        "use_cache": True,
        "use_weighted_layer_sum": False,
        "vocab_size": 51866,
    }
    text = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "initializer_range": 0.02,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 152064,
    }
    tokens = {f"{which}_token_index": 151646 + i for i, which in enumerate(salmonn.TOKENS)}
    return assemble.config(vision, speech, text) | tokens | changes


SIZES = {
    "vision_tower": 412_442_352,
    "speech_encoder": 636_968_960,
    "qformer": 52_480_000,
    "language_model": 7_615_616_512,
}


def test_published_parts_have_the_size_of_transformers_modules():
    cfg = salmonn.Config.from_hf(published())
    where, sizes = salmonn.places(cfg), dict.fromkeys(SIZES, 0)
    for path, shape in hf.shapes(cfg).items():
        part = where[path].name.split(".")[0]
        sizes[part] = sizes.get(part, 0) + int(np.prod(shape))
    assert sizes.pop("query_tokens") == 1280 and sizes.pop("segment_embedding") == 120 * 1280
    assert sizes.pop("language_projection") == 1281 * 3584
    assert sizes.pop("multi_modal_projector") == 1153 * 3584 + 3585 * 3584
    torch = pytest.importorskip("torch", reason="the oracle: pip install jaxvid[oracle]")
    with torch.device("meta"):
        found = modules(cfg)
    want = {name: sum(p.numel() for p in part.parameters()) for name, part in found.items()}
    assert sizes == want
    assert (cfg.slots, cfg.pooled, cfg.vision.unused, cfg.text.head) == (150, 13, 1, 128)


def test_config_round_trip():
    true, tiny = salmonn.Config.from_hf(published()), hf.tiny_config("video_salmonn_o1")
    for cfg in (CFG, true, tiny, dataclasses.replace(CFG, tied=True, time_stamp="")):
        read = salmonn.Config.from_hf(json.loads(json.dumps(cfg.to_hf())))
        assert dataclasses.replace(read, compute=cfg.compute) == cfg
    assert sum(int(np.prod(x)) for x in hf.shapes(tiny).values()) < 4e6
    assert len({getattr(tiny, name) for name in (*text_config.TOKENS, "video_token_id")}) == 3


def test_config_names_every_problem():
    config = published(surprise=1, spatial_pool_mode="average", vision_feature_layer=3)
    config["vision_config"] |= {"hidden_act": "relu", "vision_use_head": True}
    config["speech_config"] |= {"strange": 2, "scale_embedding": True}
    del config["speech_config"]["d_model"], config["max_segments"]
    config["qformer_config"] |= {"cross_attention_frequency": 2, "hidden_dropout_prob": 0.1}
    config["text_config"] |= {"model_type": "llama", "mystery": 3}
    with pytest.raises(ValueError) as e:
        salmonn.Config.from_hf(config)
    for part in (
        "surprise=1 is not known",
        "spatial_pool_mode is 'average'; only 'max'",
        "vision_feature_layer is 3; supported is one layer of 27",
        "vision_config.hidden_act is 'relu'",
        "vision_config.vision_use_head is True",
        "speech_config.strange=2",
        "speech_config.scale_embedding is True",
        "speech_config.d_model is missing",
        "max_segments is missing",
        "qformer_config.cross_attention_frequency is 2; only 1",
        "qformer_config.hidden_dropout_prob is 0.1",
        "text_config.model_type is 'llama'; only 'qwen2'",
        "text_config.mystery=3",
    ):
        assert part in str(e.value), part


def test_configs_refuse_what_does_not_fit():
    other = dataclasses.replace
    for change, said in (
        ({"vision": other(TOWER, kind="clip")}, "a clip tower of 7 patches a side; .* a siglip"),
        ({"qformer": other(ASKED, source=16)}, "asks for width 16; Whisper gives 24"),
        ({"qformer": other(ASKED, window=6)}, "20 states does not divide into windows of 6"),
        ({"segments": 0}, "segments=0"),
        ({"time_stamp": "{second}"}, "time_stamp='{second}' is no format: KeyError"),
        ({"time_stamp": "now"}, "'now' does not say the time"),
    ):
        with pytest.raises(ValueError, match=said):
            other(CFG, **change)
    with pytest.raises(ValueError, match="width=16 is not a multiple of heads=3"):
        other(ASKED, heads=3)
    with pytest.raises(ValueError, match="activation='relu' is not known"):
        other(ASKED, activation="relu")
    with pytest.raises(ValueError, match="queries=0: each must be at least 1"):
        other(ASKED, queries=0)
    with pytest.raises(ValueError, match="Whisper's keys have no bias"):
        other(EARS, encoder=other(EARS.encoder, key_bias=True))
    with pytest.raises(ValueError, match="positions=0 must be"):
        other(EARS, positions=0)
    asks = nnx.eval_shape(lambda: qformer.QFormer(ASKED, Compute(), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="sequences of 7 frames of width 24; .* multiple of 5"):
        asks(jnp.zeros((1, 7, 24)))
    _, _, heard = rows(tree(SOUND))
    with pytest.raises(ValueError, match="chunks of 30 frames of 16 mel bins; this tower wants 40"):
        model().heard(heard._replace(features=heard.features[:, :, :30]))


# --- prompts


def test_a_film_by_hand():
    """Windows of 0.1 s, frames at 0, 0.25 and 0.5: the window at 0.2 is the first frame's."""
    placed = CFG.prompting.expand(FILM, encode)
    frames, said = [5] * 9, [encode(text) for text in ("0.0", "0.2", "0.5")]
    want = [*said[0], *frames, *[6] * 6, *said[1], *frames, *[6] * 4, *said[2], *frames, *[6] * 4]
    assert placed.ids.tolist() == want
    assert placed.vision[3:12].tolist() == list(range(1, 10)) and placed.vision.max() == 27
    assert placed.sound[12:18].tolist() == list(range(1, 7)) and placed.sound.max() == 14
    at = CFG.prompting.positions(placed.ids, [FILM])
    np.testing.assert_array_equal(at, np.tile(np.arange(len(want)), (3, 1)))


seconds = st.one_of(st.sampled_from([0.1, 0.2, 0.5, 0.6, 1.0, 1 / 3, 0.7]), st.floats(0.01, 5.0))


@given(
    st.integers(0, 9),
    seconds,
    st.integers(0, 160),
    st.integers(1, 2),
    st.sampled_from(["", "{seconds:.0f}s"]),
    st.lists(st.floats(0.0, 3.0), min_size=9, max_size=9),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_frames_and_sound_stand_as_time_goes(frames, seconds, sound, queries, stamp, when, even):
    """Every frame's features and every window with sound in it once, in order, each window
    between its frames, whichever of the two is longer."""
    cfg = dataclasses.replace(
        CFG, qformer=dataclasses.replace(ASKED, queries=queries), time_stamp=stamp
    )
    at = np.arange(frames) * seconds if even else np.sort(when[:frames])
    times = () if even else tuple(at.tolist())
    medium = Medium("video", (frames, 7, 7), seconds, sound, times=times)
    if not frames:
        medium = Medium("audio", sound=max(sound, 1))
    placed, windows = cfg.prompting.expand(medium, encode), -(-medium.sound // 10)
    seen, heard = placed.vision[placed.vision > 0], placed.sound[placed.sound > 0]
    assert seen.tolist() == list(range(1, 1 + 9 * frames))
    assert heard.tolist() == list(range(1, 1 + queries * windows))
    assert heard.size <= cfg.slots * -(-medium.sound // 40)
    assert (placed.vision > 0).sum() == (placed.ids == 5).sum()
    assert ((placed.vision > 0) <= (placed.ids == 5)).all()
    assert ((placed.sound > 0) == (placed.ids == 6)).all()
    of_frame = np.append(at, 0.0)[(placed.vision - 1) // 9]  # -1 is of no frame
    of_window = (placed.sound - 1) // queries * 0.1
    times = np.where(placed.vision > 0, of_frame, np.where(placed.sound > 0, of_window, np.nan))
    times = times[~np.isnan(times)]
    assert (np.diff(times) >= -1e-6).all()
    last = np.maximum.accumulate(placed.vision)  # the frame that stands before each token
    for i in np.flatnonzero(placed.sound) if frames else ():
        frame = (last[i] - 1) // 9  # -1: before the first
        assert frame < 0 or at[frame] <= of_window[i] + 1e-6
        assert frame == frames - 1 or of_window[i] < at[frame + 1] + 1e-6
    words = placed.ids[(placed.vision == 0) & (placed.sound == 0)].tolist()
    said = [encode(stamp.format(seconds=x)) for x in at.tolist()] if stamp else []
    assert words == [token for text in said for token in text]


def test_media_that_cannot_be_had_are_refused():
    expand = lambda medium: CFG.prompting.expand(medium, encode)
    with pytest.raises(ValueError, match="a sound of 0 s; give a clip that has sound"):
        expand(Medium("audio"))
    expand(FILM._replace(sound=160))
    with pytest.raises(ValueError, match="a sound of 1.61 s; this model hears at most 1.6 s"):
        expand(FILM._replace(sound=161))
    with pytest.raises(ValueError, match="7 x 6 patches a frame; this tower takes 7 x 7"):
        expand(FILM._replace(grid=(3, 7, 6)))
    image = expand(IMAGE._replace(sound=50))  # an image has no sound
    assert image.ids.tolist() == [4] * 9 and not image.sound.any()


def test_tokens_of_the_published_model():
    cfg = salmonn.Config.from_hf(published())
    film = Medium("video", (60, 27, 27), 0.5, 3001)  # 30.01 s: a window of the second segment
    placed = cfg.prompting.expand(film, encode)
    assert len(placed.ids) == 60 * 169 + 151
    assert cfg.prompting.sound == Sound(chunk=3000, slots=150, mels=128, pad=True)


# --- folders


def test_folder_round_trip_in_bfloat16(tmp_path):
    loaded = fresh()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), loaded.params)
    hf.save(tmp_path / "a", loaded.cfg, loaded.params)
    read = hf.load(tmp_path / "a", dtype="bfloat16")
    assert dataclasses.replace(read.cfg, compute=CFG.compute) == CFG
    jax.tree.map(np.testing.assert_array_equal, read.params, half)
    hf.save(tmp_path / "b", read.cfg, read.params)
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders that transformers saves: SigLIP with its text model, Whisper with its decoder, Qwen2
    with a tokenizer."""
    torch = pytest.importorskip("torch", reason="the oracle: pip install jaxvid[oracle]")
    import transformers as hub

    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    small = {"num_hidden_layers": 1, "hidden_size": 24, "num_attention_heads": 2}
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 4}
    text = small | {"intermediate_size": 40, "vocab_size": 16, "bos_token_id": 1, "eos_token_id": 2}
    siglip = hub.SiglipModel(hub.SiglipConfig(vision_config=vision, text_config=text))
    ears = {
        "d_model": 24,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 40,
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 40,
        "num_mel_bins": 16,
        "max_source_positions": 50,
        "vocab_size": 16,
        "max_target_positions": 8,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1),
        **{"decoder_start_token_id": 1, "begin_suppress_tokens": [1]},
    }
    whole = hub.WhisperForConditionalGeneration(hub.WhisperConfig(**ears))
    section = dataclasses.replace(CFG.text, vocab=640)
    qwen = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": None}
    qwen = hub.Qwen2Config(**text_config.write(section, "qwen2", qwen))
    llm = hub.Qwen2ForCausalLM(qwen)
    for name, part in (("vision", siglip), ("speech", whole), ("text", llm)):
        part.save_pretrained(folder / name)
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    build_tokenizer(["what happens? it rings"], 300, folder / "text", special=special, markers={})
    state = {}
    for prefix, module in (
        ("vision_tower.vision_model.", siglip.vision_model),
        ("speech_encoder.", whole.model.encoder),
        ("language_model.", llm),
    ):
        state |= {f"{prefix}{k}": v.numpy() for k, v in module.state_dict().items()}
    return folder, {k: v for k, v in state.items() if ".head." not in k}


def put_together(parts, out, **how):
    assemble.video_salmonn_o1(*(parts[0] / x for x in ("vision", "speech", "text")), out, **how)


def test_a_start_folder_has_its_parts_weights(parts, tmp_path):
    out = [tmp_path / str(i) for i in range(3)]
    for folder, seed in zip(out, (1, 1, 2)):
        put_together(parts, folder, seed=seed, dtype="float32")
    stored = [(folder / "model.safetensors").read_bytes() for folder in out[:2]]
    assert stored[0] == stored[1]
    first, other = hf.load(out[0]), hf.load(out[2])
    tensors = dict(hf._tensors(first.cfg, first.params, "float32"))
    anew = dict(hf._tensors(other.cfg, other.params, "float32"))
    for name, x in parts[1].items():
        np.testing.assert_array_equal(tensors.pop(name), x)
    same = {k for k, x in tensors.items() if (x == anew[k]).all()}
    assert all(k.endswith("bias") or "norm" in k.lower() or "segment" in k for k in same)
    assert len(tensors) > len(same) > 0 and all(np.isfinite(x).all() for x in tensors.values())
    asked = first.cfg.qformer
    assert (asked.layers, asked.width, asked.ffn, asked.heads) == (2, 24, 96, 2)
    assert 0.01 < tensors["query_tokens"].std() < 0.03
    assert tensors["language_projection.weight"].std() > 0.1


def test_a_start_folder_reads_clips(parts, tmp_path):
    """From bytes to hidden states: a film, the film mute, its sound alone. Tokens are counted
    before anything is decoded."""
    put_together(parts, tmp_path / "m")
    loaded = hf.load(tmp_path / "m")
    cfg = dataclasses.replace(loaded.cfg, compute=CFG.compute)
    chat = Chat(tmp_path / "m", cfg.prompting.markers)
    frames = np.random.default_rng(0).integers(0, 256, (12, 32, 48, 3)).astype(np.uint8)
    noise = np.random.default_rng(1).standard_normal(48_000).astype(np.float32)
    film = media.encode(frames, 10.0, noise)  # 1.2 s: two segments, the second a fifth full
    sampling = media.Sampling(frames=4, height=28, width=28)
    data = pipeline.Data(shards=("none",), tasks=("policy",), budget=BUDGET, sampling=sampling)
    builder = pipeline.Builder(chat, cfg.prompting, data)
    budget = dataclasses.replace(BUDGET, chunks=2, tokens=120)
    trees = []
    for loud in (True, False):
        clip = builder.clip(film, "film", pipeline.Seen(sampling, sound=loud))
        told = cfg.prompting.expand(clip.medium, chat.encode)
        assert (told.vision > 0).sum() == 36 and (told.sound > 0).sum() == 6 * loud
        trees.append(builder.tree("film", clip, "what happens?", ()))
        text = (
            chat.prefix(("video",), [told.ids]).size + chat.suffix("what happens?", ("video",)).size
        )
        assert len(trees[-1].prompt) == text
    assert len(trees[0].prompt) == len(trees[1].prompt) + 6
    graph, params = nnx.split(nnx.eval_shape(lambda: salmonn.Salmonn(cfg, rngs=nnx.Rngs(0))))
    inputs = layout.prompts(trees, budget)
    go = jax.jit(lambda p, *x: nnx.merge(graph, p).hidden(*x), compiler_options=QUICK)
    got = go(loaded.params, *inputs)
    assert np.isfinite(got).all() and np.abs(got[0] - got[1]).max() > 0.1


def test_parts_that_do_not_fit_are_named_together(parts, tmp_path):
    folders = {}
    for name in ("vision", "speech", "text"):
        shutil.copytree(parts[0] / name, tmp_path / name)
        folders[name] = tmp_path / name / "config.json"
    edit = lambda name, **changes: folders[name].write_text(
        json.dumps(json.loads(folders[name].read_text()) | changes)
    )
    go = lambda: put_together((tmp_path,), tmp_path / "out")
    edit("speech", encoder_layers=3)
    edit("text", num_hidden_layers=3)
    with pytest.raises(ValueError) as e:
        go()
    assert "speech_encoder.layers.2.fc1.weight is missing" in str(e.value)
    assert "language_model.model.layers.2.input_layernorm.weight is missing" in str(e.value)
    edit("text", vocab_size=100)
    with pytest.raises(ValueError, match="table of 100 rows, which has none for .*<video>"):
        go()
    edit("speech", activation_function="relu")
    edit("text", vocab_size=640, mystery=1)
    with pytest.raises(ValueError, match="activation_function is 'relu'") as e:
        go()
    assert "text_config.mystery=1" in str(e.value)
    (tmp_path / "text/tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer.json"):
        go()
    folders["vision"].unlink()
    with pytest.raises(FileNotFoundError, match="vision has no config.json"):
        go()
    assert not (tmp_path / "out").exists()
