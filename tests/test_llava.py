"""LLaVA-NeXT-Video (Vicuna, Mistral) and LLaVA-OneVision against transformers' own."""

import dataclasses
import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from llava import (
    CONFIGS,
    ONEVISION,
    PICTURE,
    QUICK,
    VICUNA,
    B,
    R,
    T,
    frames,
    fresh,
    image,
    prompts,
    rows,
    video,
)
from PIL import Image
from towers import drawn, filled, pixels

from jaxvid.data import chat, layout, media, pipeline
from jaxvid.models import decoder, hf, llava
from jaxvid.models.decoder import empty_branches
from jaxvid.prompting import Vision

# --- transformers is the oracle


class Seen:
    """A family: ours and theirs of the same weights, and the batch both read: a row with a clip,
    and a row with two prompts, of two clips and of an image in tiles."""

    def __init__(self, name, folder):
        import torch
        import transformers

        self.torch, self.cfg, self.name = torch, CONFIGS[name], name
        self.loaded = fresh(self.cfg)
        hf.save(folder, self.cfg, self.loaded.params, dtype="float32")
        self.theirs, self.info = getattr(transformers, self.cfg.architecture).from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        self.theirs.eval()
        first, second, third = prompts(self.cfg)
        self.tokens, self.where = rows(self.cfg, [first], [second, third])
        self.vision = frames(self.cfg)
        self.wanted = [self.theirs(**self.inputs(i), output_hidden_states=True) for i in range(3)]
        weigh = np.random.default_rng(3).standard_normal((B, T, self.cfg.text.vocab))
        self.weigh = np.where(self.tokens.end[..., None] > 0, weigh, 0).astype(np.float32)

    def inputs(self, i):
        """transformers' inputs of the i-th prompt, alone and without padding."""
        row, start, stop, at, count = self.where[i]
        shown = self.torch.tensor(
            pixels(self.cfg.vision, self.vision.patches[row, at : at + count])
        )
        ids = self.torch.tensor(self.tokens.tokens[row, start:stop][None].astype(np.int64))
        given = {"input_ids": ids, "attention_mask": self.torch.ones_like(ids)}
        if i < 2:
            return given | {"pixel_values_videos": shown.unflatten(0, (-1, 2))}
        sizes = self.torch.tensor([PICTURE])
        return given | {"pixel_values": shown[None], "image_sizes": sizes}

    @functools.cached_property
    def ours(self):
        """The weighed sum of logits, (hidden states, logits, tower's, projected), gradients."""

        def run(params):
            model = nnx.merge(self.loaded.graph, params)
            hidden = model.hidden(self.tokens, self.vision)
            logits = hidden @ model.unembedding().T
            features = model.features(self.vision, None).put
            return (logits * self.weigh).sum(), (hidden, logits, model.tower(self.vision), features)

        f = run if self.name == "mistral" else jax.value_and_grad(run, has_aux=True)
        got = jax.jit(f, compiler_options=QUICK)(self.loaded.params)
        return (*got, None) if self.name == "mistral" else (*got[0], got[1])


# Mistral is Vicuna with a sliding window: what the window has no part in is not done twice.
twice = pytest.mark.parametrize("seen", ["vicuna", "onevision"], indirect=True)


@pytest.fixture(scope="module", params=list(CONFIGS))
def seen(request, tmp_path_factory):
    pytest.importorskip("torch", reason="the oracle: pip install jaxvid[oracle]")
    return Seen(request.param, tmp_path_factory.mktemp("ours") / "model")


def close(name, got, want, atol=1e-4):
    got, want = np.asarray(got), want.detach().numpy()
    print(f"{name}: {np.abs(got - want).max():.1e}")
    np.testing.assert_allclose(got, want, atol=atol)


@twice
def test_an_export_has_every_tensor_and_no_other(seen):
    assert not any(seen.info.values()), seen.info


@pytest.mark.parametrize("i", range(3), ids=["clip", "packed-clips", "packed-image"])
def test_hidden_states_and_logits_equal_transformers(seen, i):
    (row, start, stop, *_), (hidden, logits, *_) = seen.where[i], seen.ours[1]
    close("hidden", hidden[row, start:stop], seen.wanted[i].hidden_states[-1][0])
    close("logits", logits[row, start:stop], seen.wanted[i].logits[0])


@twice
def test_left_padding_of_transformers_changes_nothing(seen):
    torch, (row, start, stop, *_) = seen.torch, seen.where[0]
    given = seen.inputs(0)
    pad = lambda x: torch.nn.functional.pad(x, (9, 0))
    padded = {k: pad(v) if v.ndim == 2 else v for k, v in given.items()}
    at = torch.arange(stop - start)[None]
    got = seen.theirs(**padded, position_ids=pad(at), output_hidden_states=True)
    close("padded", seen.ours[1][0][row, start:stop], got.hidden_states[-1][0, 9:])


@twice
def test_tower_and_projected_features_equal_transformers(seen):
    _, _, tower, features = seen.ours[1]
    theirs, layer = seen.theirs.model, -1 - seen.cfg.vision.unused
    for i in range(3):
        row, start, stop, at, count = seen.where[i]
        given = seen.inputs(i)
        shown = given.get("pixel_values_videos", given.get("pixel_values"))
        states = theirs.vision_tower(shown.flatten(0, 1), output_hidden_states=True).hidden_states
        first = 1 if seen.cfg.tower == "clip" else 0
        close("tower", tower[row, at : at + count], states[layer][:, first:])
        if i < 2:
            want = [theirs.get_video_features(x[None]).pooler_output for x in shown]
        else:
            want = theirs.get_image_features(shown, given["image_sizes"]).pooler_output
        want = seen.torch.cat([x.reshape(-1, x.shape[-1]) for x in want])
        media = seen.tokens.media[row, start:stop]
        assert np.count_nonzero(media) == len(want)
        newlines = np.flatnonzero(media[media != 0] < 0)
        assert (want[newlines] == theirs.image_newline).all()
        keep = np.flatnonzero(media[media != 0] > 0)
        close("projected", features[row, media[media > 0] - 1], want[keep])


@twice
def test_gradients_equal_transformers(seen):
    torch = seen.torch
    value = 0
    for (row, start, stop, *_), want in zip(seen.where, seen.wanted):
        value = value + (want.logits[0] * torch.tensor(seen.weigh[row, start:stop])).sum()
    seen.theirs.zero_grad()
    value.backward(retain_graph=True)
    np.testing.assert_allclose(seen.ours[0], value.item(), rtol=1e-4)
    theirs = {llava.hub_name(name): w.grad for name, w in seen.theirs.named_parameters()}
    most = lambda name: theirs[name].abs().max().item()
    far = {}
    for name, got in hf._tensors(seen.cfg, seen.ours[2], "float32"):
        if theirs[name] is None:  # a layer or a norm that nothing reads
            assert not got.any() and ("post_layernorm" in name or "layers.2" in name), name
        elif name.startswith("vision_tower") and name.endswith("k_proj.bias"):
            # softmax does not see a shift of all keys: what is there is rounding
            assert max(np.abs(got).max(), most(name)) < 1e-4 * most(
                name.replace("k_proj", "v_proj")
            )
        else:
            far[name] = np.abs(got - theirs[name].numpy()).max() / most(name)
    print(f"gradients of {len(far)} tensors: {max(far.values()):.1e}")
    assert max(far.values()) < 1e-3 and len(far) > 60


def test_greedy_generation_equals_transformers(seen):
    cfg, (first, _, third) = seen.cfg, prompts(seen.cfg)
    graph, params = seen.loaded.graph, seen.loaded.params
    tokens, _ = rows(cfg, [first], [third])
    vision = seen.vision._replace(patches=seen.vision.patches.copy())
    at, count = seen.where[2][3:]
    vision.patches[1, :count] = seen.vision.patches[1, at : at + count]
    length = jnp.asarray((tokens.end > 0).sum(1), jnp.int32)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params):
        model = nnx.merge(graph, params)
        state, prompt = model.prefill(tokens, vision)

        def one(carry, i):
            state, branch = carry
            token = (state @ model.unembedding().T).argmax(-1).astype(jnp.int32)
            out = model.decode(token, (length + i)[:, None], prompt, length, branch, i)
            return out, token[:, 0]

        start = state[:, None], empty_branches(prompt, 1, R)
        return jax.lax.scan(one, start, jnp.arange(R))[1].T

    got = run(params)
    for row, i in ((0, 0), (1, 2)):
        inputs = seen.inputs(i)
        want = seen.theirs.generate(
            **inputs, max_new_tokens=R, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert got[row].tolist() == want[0, inputs["input_ids"].shape[1] :].tolist()


# --- model folders and configs


@twice
def test_every_spelling_is_read(seen, tmp_path):
    seen.theirs.save_pretrained(tmp_path / "a")
    read = hf.load(tmp_path / "a")
    assert dataclasses.replace(read.cfg, compute=seen.cfg.compute) == seen.cfg
    jax.tree.map(np.testing.assert_array_equal, read.params, seen.loaded.params)
    state = {k: v.numpy() for k, v in seen.theirs.state_dict().items()}  # as it is in memory
    assert "model.language_model.norm.weight" in state
    if seen.cfg.tower == "clip":
        state["model.vision_tower.embeddings.position_ids"] = np.arange(37)  # older files have it
    safetensors.numpy.save_file(state, tmp_path / "a/model.safetensors")
    read = hf.load(tmp_path / "a")
    jax.tree.map(np.testing.assert_array_equal, read.params, seen.loaded.params)


CLIP_L = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
NEXT = {  # as LLaVA-NeXT-Video-7B-hf has it; -DPO is the same
    "architectures": ["LlavaNextVideoForConditionalGeneration"],
    "ignore_index": -100,
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "image_seq_length": 576,
    "image_token_index": 32001,
    "model_type": "llava_next_video",
    "projector_hidden_act": "gelu",
    "spatial_pool_mode": "average",
    "spatial_pool_stride": 2,
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "pad_token_id": 0,
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.0.dev0",
    "use_image_newline_parameter": True,
    "video_seq_length": 288,
    "video_token_index": 32000,
    "vision_config": CLIP_L,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
YI = {  # Nous-Hermes-2-Yi-34B
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 56,
    "num_hidden_layers": 60,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 5000000.0,
    "vocab_size": 64064,
}
MISTRAL_32K = {
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 32064,
}


def qwen2(width, ffn, layers, heads, kv_heads, vocab):
    return {
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_size": width,
        "intermediate_size": ffn,
        "max_window_layers": layers,
        "model_type": "qwen2",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "vocab_size": vocab,
    }


def onevision(text, tied=False):
    return {
        "model_type": "llava_onevision",
        "text_config": text | {"tie_word_embeddings": tied},
        "tie_word_embeddings": tied,
        "vision_aspect_ratio": "anyres_max_9",
    }


PUBLISHED = {
    "next-video-7b": (NEXT, 7_063_431_168),
    "next-video-7b-32k": (NEXT | {"text_config": MISTRAL_32K}, 7_566_747_648),
    "next-video-34b": (NEXT | {"text_config": YI}, 34_752_083_968),
    "onevision-0.5b": (onevision(qwen2(896, 4864, 24, 14, 2, 152000), True), 893_675_552),
    "onevision-7b": (onevision(qwen2(3584, 18944, 28, 28, 4, 152064)), 8_030_348_832),
    "onevision-72b": (onevision(qwen2(8192, 29568, 80, 64, 8, 152064)), 73_180_522_016),
}


def parse(config):
    (family,) = [f for f in llava.FAMILIES if config["model_type"] in f.model_types]
    return family.config.from_hf(config)


def parameters(cfg):
    return sum(x.size for x in jax.tree.leaves(hf.abstract(cfg)[1]))


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_models_have_their_size(name, tmp_path):
    config, size = PUBLISHED[name]
    cfg = parse(config)
    assert parameters(cfg) == size
    assert cfg.text.head == (64 if name == "onevision-0.5b" else 128)
    torch = pytest.importorskip("torch", reason="the oracle: pip install jaxvid[oracle]")
    import transformers

    theirs = getattr(transformers, cfg.architecture)
    with torch.device("meta"):
        model = theirs(theirs.config_class.from_dict(config))
    assert sum(p.numel() for p in model.parameters()) == size
    model.config.save_pretrained(tmp_path)  # in the spelling of transformers 5
    again = parse(json.loads((tmp_path / "config.json").read_text()))
    same = {"bos_token_id": cfg.bos_token_id, "eos_token_id": cfg.eos_token_id}
    assert dataclasses.replace(again, **same) == cfg


def test_frames_of_the_published_models_have_their_tokens():
    one = Vision(patch=14, temporal=1, merge=1, window=0)
    for name, size, fit, pooled, extra in (
        ("next-video-7b", 336, "crop", 144, 0),
        ("onevision-7b", 384, "exact", 196, 1),
    ):
        cfg = parse(PUBLISHED[name][0])
        assert len(cfg.prompting.expand(video(cfg, 8), list).ids) == 8 * pooled + extra
        slots = (size // 14) ** 2 + pooled
        how = {"size": size, "fit": fit, "pooled": slots, "pinpoints": cfg.pinpoints}
        want = dataclasses.replace(one, **how)
        assert cfg.prompting.vision == want


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=list(CONFIGS))
def test_config_round_trip(cfg):
    read = type(cfg).from_hf(json.loads(json.dumps(cfg.to_hf())))
    assert dataclasses.replace(read, compute=cfg.compute) == cfg


@pytest.mark.parametrize("name", ["llava_next_video", "llava_onevision"])
def test_tiny_configs(name):
    cfg = hf.tiny_config(name)
    read = type(cfg).from_hf(cfg.to_hf())
    assert dataclasses.replace(read, compute=cfg.compute) == cfg
    assert parameters(cfg) < 3.5e6 and cfg.pooled == 3


def test_config_names_every_problem():
    text = NEXT["text_config"] | {
        "attention_bias": True,
        "mystery": 1,
        "eos_token_id": [1, 2],
        "rope_scaling": {"type": "linear", "factor": 2.0},
    }
    tower = CLIP_L | {"hidden_act": "relu", "image_size": [336, 300], "attention_dropout": 0.1}
    changes = {
        "text_config": text,
        "vision_config": tower,
        "vision_feature_layer": [-2, -5],
        "spatial_pool_mode": "max",
        "projector_hidden_act": "relu",
        "surprise": 2,
    }
    with pytest.raises(ValueError) as e:
        parse(NEXT | changes)
    for part in (
        "text_config.attention_bias is True",
        "text_config.mystery=1 is not known",
        "text_config.eos_token_id is [1, 2]",
        "rope type is 'linear'",
        "vision_config.hidden_act is 'relu'",
        "vision_config.image_size is [336, 300]",
        "vision_config.attention_dropout is 0.1",
        "vision_feature_layer is [-2, -5]",
        "spatial_pool_mode is 'max'",
        "projector_hidden_act is 'relu'",
        "surprise=2 is not known",
    ):
        assert part in str(e.value)
    with pytest.raises(ValueError, match="supported is anyres_max_N"):
        parse(onevision({}) | {"vision_aspect_ratio": "pad"})
    with pytest.raises(ValueError, match="text_config.model_type is 'gemma'"):
        parse(NEXT | {"text_config": {"model_type": "gemma"}})
    with pytest.raises(ValueError, match="vision_config.vision_use_head is True"):
        parse(onevision({}) | {"vision_config": {"model_type": "siglip_vision_model"}})


def test_configs_refuse_what_does_not_fit():
    for change, said in (
        ({"vision": ONEVISION.vision}, "a siglip tower; llava_next_video has a clip one"),
        ({"pinpoints": ((24, 40),)}, "no multiples of the tower's 24 pixels"),
        ({"decoder_kind": "qwen2"}, "Qwen2 has one, others have none"),
    ):
        with pytest.raises(ValueError, match=said):
            dataclasses.replace(VICUNA, **change)


def test_layers_are_counted_from_either_end():
    for layer, unused in ((-2, 1), (23, 1), (24, 0), (-24, 23)):
        assert parse(NEXT | {"vision_feature_layer": layer}).vision.unused == unused
    for layer in (0, 25, -25):
        with pytest.raises(ValueError, match="supported is one layer of 24"):
            parse(NEXT | {"vision_feature_layer": layer})


# --- images in tiles


SIZES = [(20, 46), (46, 20), (300, 301), (1, 1000), (37, 37), (999, 640), (337, 1009), (480, 640)]


@pytest.mark.parametrize("name", ["next-video-7b", "onevision-7b"])
def test_tiles_and_tokens_equal_transformers(name):
    pytest.importorskip("torch", reason="the oracle: pip install jaxvid[oracle]")
    from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
    from transformers.models.llava_onevision.modeling_llava_onevision import unpad_image

    cfg = parse(PUBLISHED[name][0])
    side, prompting = cfg.vision.side, cfg.prompting
    for size in SIZES:
        got = prompting.tiles(size)
        assert got.canvas == select_best_resolution(size, cfg.pinpoints)
        resized = get_patch_output_size(np.zeros((3, *size)), got.canvas, "channels_first")
        assert got.resized == resized
        assert got.at == tuple((c - r) // 2 for c, r in zip(got.canvas, resized))
        import torch

        index = torch.arange(np.prod(got.grid) * side**2).view(*got.grid, side, side)
        index = index.permute(0, 2, 1, 3).flatten(0, 1).flatten(1, 2)[None]
        want = unpad_image(index, size)[0].numpy()
        placed = prompting.expand(image(cfg, 1 + int(np.prod(got.grid)))._replace(size=size), list)
        line = want.shape[1] + 1
        seen = placed.vision[side**2 :].reshape(-1, line)
        tile, place = np.divmod(want, side**2)
        np.testing.assert_array_equal(
            seen[:, :-1], 1 + (1 + tile) * prompting.vision.slots(side**2) + place
        )
        assert (seen[:, -1] == -1).all() and (placed.ids == cfg.image_token_id).all()


def test_an_image_of_one_tile_and_a_clip_by_hand():
    slots = ONEVISION.prompting.vision.slots(49)
    assert slots == 49 + 16
    placed = ONEVISION.prompting.expand(image(ONEVISION, 1), list)
    assert placed.vision.tolist() == [*range(1, 50), -1]
    placed = ONEVISION.prompting.expand(video(ONEVISION), list)
    assert placed.vision.tolist() == [*range(50, 66), *range(65 + 50, 65 + 66), -1]
    placed = VICUNA.prompting.expand(video(VICUNA), list)
    assert placed.vision.tolist() == [*range(37, 46), *range(45 + 37, 45 + 46)]
    assert placed.ids.tolist() == [VICUNA.video_token_id] * 18 and not placed.sound.any()


def test_media_that_do_not_fit_are_refused():
    prompting = ONEVISION.prompting
    with pytest.raises(ValueError, match="came as 5 tiles; wanted is one, or the whole and a grid"):
        prompting.expand(image(ONEVISION, 5), list)
    with pytest.raises(ValueError, match="takes videos and images"):
        prompting.expand(video(ONEVISION)._replace(kind="audio"), list)
    with pytest.raises(ValueError, match="takes 7 x 7. Bring frames to 28 pixels"):
        prompting.expand(video(VICUNA), list)
    cfg = parse(PUBLISHED["onevision-7b"][0])
    size = (1536, 1536)
    medium = image(cfg, 1 + int(np.prod(cfg.prompting.tiles(size).grid)))._replace(size=size)
    with pytest.raises(ValueError, match="has 108 x 108 features; .* Turn down the image size"):
        cfg.prompting.expand(medium, list)


@pytest.mark.parametrize("cfg", [VICUNA, ONEVISION], ids=["next-video", "onevision"])
def test_data_puts_the_features_in_place(cfg, tmp_path):
    special = (*chat.SPECIAL, "<image>", "<video>")
    video_id, image_id = special.index("<video>"), special.index("<image>")
    prompting = dataclasses.replace(cfg.prompting, video_token_id=video_id, image_token_id=image_id)
    chat.build_tokenizer(["a b"], 320, tmp_path, special=special, markers=prompting.markers)
    said = chat.Chat(tmp_path, prompting.markers)
    side, square = cfg.vision.side, cfg.vision.side**2
    budget = layout.Budget(rows=1, tokens=320, scored=0, branches=0, frames=5, patches=square)
    sampling = media.Sampling(frames=2, height=cfg.vision.image, width=cfg.vision.image)
    how = pipeline.Data(shards=("none",), tasks=("policy",), budget=budget, sampling=sampling)
    build = pipeline.Builder(said, prompting, how)
    shown = np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3)).astype(np.uint8)
    Image.fromarray(shown[0]).save(file := io.BytesIO(), "PNG")
    for count, data, token in (
        (2, media.encode(shown, 2.0), video_id),
        (1 + int(np.prod(prompting.tiles((40, 60)).grid)), file.getvalue(), image_id),
    ):
        clip = build.clip(data, "clip", how)
        assert clip.medium.grid == (count, side, side) and clip.medium.size == (40, 60)
        tokens, vision, _ = layout.prompts([build.tree("r", clip, "a b", ())], budget)
        at = tokens.tokens[0] == token
        want = prompting.expand(clip.medium, list).vision
        assert tokens.media[0, at].tolist() == want.tolist() and not tokens.media[0, ~at].any()
        assert vision.patches.shape == (1, 5, square, cfg.vision.patch_values)
        assert vision.window[0].sum(1).tolist() == [square] * count + [0] * (5 - count)


# --- one layer of the decoder at true width


@pytest.mark.parametrize("name", ["next-video-7b", "onevision-7b"])
def test_a_layer_of_true_width_equals_transformers(name):
    torch = pytest.importorskip("torch", reason="the oracle: pip install jaxvid[oracle]")
    import transformers

    cfg = parse(PUBLISHED[name][0])
    config = getattr(transformers, cfg.architecture).config_class.from_dict(PUBLISHED[name][0])
    config = config.text_config
    config.num_hidden_layers, config.vocab_size, config.layer_types = 1, 8, ["full_attention"]
    config.pad_token_id = None
    with torch.device("meta"):
        theirs = transformers.AutoModel.from_config(config)
    state = drawn(theirs.state_dict())
    theirs.load_state_dict({k: torch.from_numpy(x) for k, x in state.items()}, assign=True)
    theirs.rotary_emb = type(theirs.rotary_emb)(config)  # its frequencies are no parameters
    n, text = 9, dataclasses.replace(cfg.text, layers=1, vocab=8)
    x = np.random.default_rng(1).standard_normal((1, n, text.width), np.float32)
    with torch.no_grad():
        want = theirs(inputs_embeds=torch.tensor(x)).last_hidden_state
    where = {path[1:]: place for path, place in llava.places(cfg).items() if path[0] == "decoder"}
    ours = filled(
        lambda: decoder.Decoder(text, cfg.compute, rngs=nnx.Rngs(0)),
        where,
        lambda name: state[name.removeprefix("language_model.model.")],
    )
    at, end = jnp.broadcast_to(jnp.arange(n), (1, 3, n)), jnp.full((1, n), n)
    run = nnx.jit(lambda model, x: model(x, at, end, at[:, 0])[0])
    close("true width", run(ours, x), want)
