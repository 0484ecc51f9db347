"""Qwen3-VL against transformers' own; its prompts, positions, configs; one tree beside others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from qwen3 import (
    BUDGET,
    CFG,
    FILM,
    MEDIA,
    PICTURE,
    QUICK,
    STILL,
    TEXT,
    TOWER,
    B,
    G,
    R,
    decode,
    encode,
    fresh,
    hidden,
    model,
    prefill,
    prompt,
    published,
    run_once,
    their_inputs,
    tower,
)

from jaxvid import sharding
from jaxvid.data import chat, layout, media, pipeline
from jaxvid.models import decoder, hf, qwen3_vision, qwen3vl
from jaxvid.models.layers import Compute
from jaxvid.prompting import Medium

PROMPTS = [prompt(m, seed) for seed, m in enumerate(MEDIA)]
TOKENS, SEEN, _ = layout.prompts([p.tree for p in PROMPTS], BUDGET)
# Of the logits of the prompts' own tokens, for gradients.
WEIGHT = np.random.default_rng(3).standard_normal((*TOKENS.tokens.shape, TEXT.vocab))
WEIGHT = (WEIGHT * (TOKENS.end > 0)[..., None]).astype(np.float32)


@pytest.fixture(scope="module")
def ours():
    """Our model, and its hidden states of the four prompts."""
    net = model(fresh())
    return net, np.asarray(hidden(net, TOKENS, SEEN))


# --- transformers is the oracle


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    torch = pytest.importorskip("torch", reason="the oracle: pip install jaxvid[oracle]")
    from transformers import Qwen3VLForConditionalGeneration

    folder = tmp_path_factory.mktemp("ours") / "model"
    hf.save(folder, fresh().cfg, fresh().params, dtype="float32")
    theirs = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return torch, theirs


def test_tower_equals_transformers(oracle):
    """Merged features of the last block, and of the deeper ones: between them, every block."""
    torch, theirs = oracle
    got = tower(model(fresh()), SEEN)
    for row, p in enumerate(PROMPTS):
        flat = np.concatenate([x.reshape(-1, x.shape[-1]) for x in p.patches])
        pixels = torch.tensor((flat.astype(np.float32) / 255 - 0.5) / 0.5)
        with torch.no_grad():
            want = theirs.model.visual(pixels, torch.tensor([m.grid for m in p.media]))
        at = TOKENS.media[row][TOKENS.media[row] > 0] - 1
        np.testing.assert_allclose(got[0][row, at], want.pooler_output.numpy(), atol=1e-4)
        for i, deep in enumerate(want.deepstack_features):
            np.testing.assert_allclose(got[1][i, row, at], deep.numpy(), atol=1e-4)


def test_hidden_states_and_logits_equal_transformers(oracle, ours):
    """A batch of transformers is padded on the left, and every prompt is also run alone."""
    torch, theirs = oracle
    net, got = ours
    head = np.asarray(net.unembedding())
    with torch.no_grad():
        batch = theirs(**their_inputs(torch, PROMPTS), output_hidden_states=True)
        alone = [theirs(**their_inputs(torch, [p]), output_hidden_states=True) for p in PROMPTS]
    for row, p in enumerate(PROMPTS):
        n = len(p.ids)
        for want, at in ((batch, row), (alone[row], 0)):
            state, logits = want.hidden_states[-1][at, -n:].numpy(), want.logits[at, -n:].numpy()
            np.testing.assert_allclose(got[row, :n], state, atol=1e-4)
            np.testing.assert_allclose(got[row, :n] @ head.T, logits, atol=1e-4)


def test_positions_equal_transformers(oracle):
    torch, theirs = oracle
    inputs = their_inputs(torch, PROMPTS)
    grids = {k: v for k, v in inputs.items() if k.endswith("thw")}
    want, _ = theirs.model.get_rope_index(
        input_ids=inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        attention_mask=inputs["attention_mask"],
        **grids,
    )
    for row, p in enumerate(PROMPTS):
        np.testing.assert_array_equal(p.tree.positions, want[:, row, -len(p.ids) :].numpy())


def test_greedy_generation_equals_transformers_and_the_full_pass(oracle, ours):
    """32 tokens after each prompt; deepstack acts on the prompt alone, and the cache knows it."""
    torch, theirs = oracle
    want = theirs.generate(
        **their_inputs(torch, PROMPTS),
        max_new_tokens=R,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[:, -R:].numpy()
    net, head = ours[0], ours[0].unembedding()
    state, kv = prefill(net, TOKENS, SEEN)
    state, cache = jnp.stack([state] * G, 1), decoder.empty_branches(kv, G, R)
    length = jnp.asarray((TOKENS.end > 0).sum(1), jnp.int32)
    after = jnp.asarray([[layout.next_position(p.tree)] * G for p in PROMPTS], jnp.int32)
    states, out = [], []
    for i in range(R):
        out.append((state @ head.T).argmax(-1).astype(jnp.int32))
        state, cache = decode(net, out[-1], after + i, kv, length, cache, jnp.int32(i))
        states.append(np.asarray(state[:, 0]))
    out = np.stack([x[:, 0] for x in out], 1)
    np.testing.assert_array_equal(out, want)
    longer = [prompt(m, seed, out[seed]) for seed, m in enumerate(MEDIA)]
    tokens, seen, _ = layout.prompts([p.tree for p in longer], BUDGET)
    full = hidden(net, tokens, seen)
    for row, p in enumerate(PROMPTS):
        new = full[row, len(p.ids) : len(p.ids) + R]
        np.testing.assert_allclose(new, np.stack(states, 1)[row], atol=1e-4)


def test_gradients_equal_transformers(oracle):
    """Of every weight, under the names it has in the files."""
    torch, theirs = oracle
    inputs = their_inputs(torch, PROMPTS)
    n = inputs["input_ids"].shape[1]
    weight = np.zeros((B, n, TEXT.vocab), np.float32)
    for row, p in enumerate(PROMPTS):
        weight[row, -len(p.ids) :] = WEIGHT[row, : len(p.ids)]
    theirs(**inputs).logits.mul(torch.tensor(weight)).sum().backward()
    want = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    theirs.zero_grad()

    def loss(params):
        net = nnx.merge(fresh().graph, params)
        return (net.hidden(TOKENS, SEEN) @ net.unembedding().T * WEIGHT).sum()

    grads = jax.jit(jax.grad(loss), compiler_options=QUICK)(fresh().params)
    got = dict(hf._tensors(CFG, grads, "float32"))
    assert got.keys() == want.keys()
    for name, x in got.items():
        off = np.linalg.norm(x - want[name]) / np.linalg.norm(want[name])
        assert off < 1e-3, (name, off)


def test_folder_of_transformers_is_read(oracle, tmp_path):
    _, theirs = oracle
    theirs.save_pretrained(tmp_path)
    read = hf.load(tmp_path)
    assert dataclasses.replace(read.cfg, compute=CFG.compute) == CFG
    jax.tree.map(np.testing.assert_array_equal, read.params, fresh().params)


def test_tied_folder_is_read_by_transformers_and_back(oracle, tmp_path):
    torch, _ = oracle
    from transformers import Qwen3VLForConditionalGeneration

    loaded = fresh(tied=True)
    hf.save(tmp_path, loaded.cfg, loaded.params, dtype="float32")
    theirs = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    table = np.asarray(loaded.params["decoder"]["table"][...])
    np.testing.assert_array_equal(theirs.lm_head.weight.detach().numpy(), table)
    read = hf.load(tmp_path)
    assert read.cfg.tied
    jax.tree.map(np.testing.assert_array_equal, read.params, loaded.params)


def drawn(cfg):
    """A model of uniform numbers, which are quickly drawn, such that products keep their size."""
    (graph, shapes), where, r = hf.abstract(cfg), qwen3vl.places(cfg), np.random.default_rng(0)

    def draw(path, v):
        place = where[hf._path(path)]
        first = "{}" in place.name
        n = np.prod(v.shape[first : first + place.inputs]) if place.inputs else 100
        x = (r.random(v.shape, np.float32) - 0.5) * np.float32(12 / n) ** 0.5
        return v.replace(jnp.asarray(x + ("scale" in hf._path(path))))

    is_weight = lambda v: isinstance(v, nnx.Variable)
    return hf.Loaded(cfg, graph, jax.tree.map_with_path(draw, shapes, is_leaf=is_weight))


def test_true_width_equals_transformers(oracle):
    """A decoder layer and a vision block as wide as those of the 8B model."""
    torch, _ = oracle
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    config = published("8B")
    config["text_config"] |= {"num_hidden_layers": 1, "vocab_size": 64}
    config["vision_config"] |= {"depth": 1, "deepstack_visual_indexes": [0]}
    cfg = dataclasses.replace(
        qwen3vl.Config.from_hf(config), image_token_id=4, compute=Compute(remat="none")
    )
    loaded = drawn(cfg)
    with torch.device("meta"):
        theirs = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**cfg.to_hf()))
    tensors = hf._tensors(cfg, loaded.params, "float32")
    state = {name: torch.from_numpy(x) for name, x in tensors}
    theirs.load_state_dict(state, assign=True)
    for rope in (theirs.model.visual.rotary_pos_emb, theirs.model.language_model.rotary_emb):
        fresh_rope = type(rope)(rope.config)  # its frequencies are not in the files
        rope.inv_freq = fresh_rope.inv_freq
    r, grid = np.random.default_rng(0), (1, 6, 4)
    ids = np.array([9, 2, *[4] * 6, 3, 7], np.int32)
    patches = r.integers(0, 256, (1, 24, 1536)).astype(np.uint8)
    tree = layout.tree(
        "wide",
        ids,
        qwen3vl.positions(ids, [grid], cfg),
        cfg.prompting.vision,
        clips=[layout.Clip(patches, grid)],
        seen=layout.in_order(ids == 4),
    )
    budget = dataclasses.replace(BUDGET, rows=1, tokens=len(ids), frames=1)
    tokens, seen, _ = layout.prompts([tree], budget)
    with torch.no_grad():
        want = theirs(
            input_ids=torch.tensor(ids[None].astype(np.int64)),
            mm_token_type_ids=torch.tensor((ids == 4)[None].astype(np.int64)),
            pixel_values=torch.tensor((patches[0].astype(np.float32) / 255 - 0.5) / 0.5),
            image_grid_thw=torch.tensor([grid]),
            output_hidden_states=True,
        )
    got = run_once(loaded, loaded.params, tokens, seen)[0]
    np.testing.assert_allclose(got, want.hidden_states[-1][0].numpy(), atol=1e-4)


# --- one tree beside others, and a mesh


def test_packed_rows_equal_rows_of_their_own(ours):
    net, alone = ours
    (packed,) = layout.pack([[p.tree] for p in PROMPTS], BUDGET)
    tokens, seen = packed.tokens, packed.vision
    got, used = np.asarray(hidden(net, tokens, seen)), set()
    for row, p in enumerate(PROMPTS):
        n = len(p.ids)
        starts = np.lib.stride_tricks.sliding_window_view(tokens.tokens, n, axis=1)
        ((at, start),) = np.argwhere((starts == p.ids).all(-1))
        used.add(int(at))
        np.testing.assert_allclose(got[at, start : start + n], alone[row, :n], atol=1e-5)
    assert len(used) < B  # some row holds two trees


def test_frames_of_other_sizes_and_padding_do_not_matter(ours):
    """The position table is stretched over each frame's own patches."""
    want = tower(ours[0], SEEN)
    grown = SEEN._replace(
        patches=np.pad(SEEN.patches, [(0, 0)] * 2 + [(0, 4), (0, 0)], constant_values=9),
        coords=np.pad(SEEN.coords, [(0, 0)] * 2 + [(0, 4), (0, 0)], constant_values=30),
        window=np.pad(SEEN.window, [(0, 0)] * 2 + [(0, 4)]),
    )
    got = tower(ours[0], grown)
    per = lambda x: x.reshape(*x.shape[:-2], BUDGET.frames, -1, x.shape[-1])
    for a, b in zip(got, want):
        np.testing.assert_allclose(per(a)[..., :6, :], per(b), atol=1e-5)


def test_a_mesh_changes_nothing(ours):
    loaded = fresh()
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    params = jax.device_put(loaded.params, sharding.parameter_shardings(loaded.params, mesh))
    rows = sharding.row_sharding(mesh, B)
    tokens, seen = jax.device_put((TOKENS, SEEN), rows)
    with jax.set_mesh(mesh):
        got = run_once(loaded, params, tokens, seen)
    np.testing.assert_allclose(got, ours[1], atol=1e-5)


def test_no_media_needs_no_frames(ours):
    plain = [p._replace(tree=layout.tree("t", p.ids[:4], np.tile(np.arange(4), (3, 1)),
                                         CFG.prompting.vision)) for p in PROMPTS]  # fmt: skip
    tokens, none, _ = layout.prompts([p.tree for p in plain], dataclasses.replace(BUDGET, frames=0))
    got = hidden(ours[0], tokens, none)
    np.testing.assert_allclose(got[:, :4], ours[1][:, :4], atol=1e-5)


def test_remat_changes_nothing_and_bfloat16_little():
    params = fresh().params["tower"]
    r = np.random.default_rng(4)
    weights = [r.standard_normal(x.shape).astype(np.float32) for x in tower(model(fresh()), SEEN)]

    def gradient(**settings):
        build = lambda: qwen3_vision.Tower(TOWER, Compute(**settings), rngs=nnx.Rngs(0))
        graph, _ = nnx.split(nnx.eval_shape(build))

        def loss(params):
            out = nnx.merge(graph, params)(SEEN)
            return sum((w * x.astype(jnp.float32)).sum() for w, x in zip(weights, out))

        return jax.jit(jax.grad(loss), compiler_options=QUICK)(params)

    want, got = gradient(remat="none"), gradient(remat="full")
    off = lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b)
    assert max(jax.tree.leaves(jax.tree.map(off, got, want))) < 1e-5
    rough = gradient(remat="full", dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(rough)} == {jnp.dtype("float32")}
    assert max(jax.tree.leaves(jax.tree.map(off, rough, want))) < 0.1


# --- the position table


def test_the_table_is_stretched_as_torch_does_it():
    torch = pytest.importorskip("torch", reason="the oracle: pip install jaxvid[oracle]")
    table = np.random.default_rng(0).standard_normal((25, 3)).astype(np.float32)
    grids = np.array([(4, 6), (9, 2), (1, 1), (5, 5)])
    coords = np.zeros((4, 25, 2), np.int32)
    for frame, grid in zip(coords, grids):
        frame[: grid.prod()] = np.indices(grid).reshape(2, -1).T
    some = jax.jit(qwen3_vision.stretched, static_argnums=2)(coords, grids, 5)
    np.testing.assert_allclose(some.sum(-1), 1, atol=1e-6)
    source = torch.tensor(table.T.reshape(1, 3, 5, 5))
    for grid, got in zip(grids.tolist(), np.asarray(some)):
        want = torch.nn.functional.interpolate(
            source, size=grid, mode="bilinear", align_corners=True
        )
        want = want[0].reshape(3, -1).T.numpy()
        np.testing.assert_allclose(got[: len(want)] @ table, want, atol=1e-6)


# --- prompts


def test_prompt_by_hand():
    placed = CFG.prompting.expand(FILM, encode)  # half a second between patches of two frames
    first, second = encode("<0.1 seconds>"), encode("<0.6 seconds>")
    assert placed.ids.tolist() == [*first, 2, *[5] * 6, 3, *second, 2, *[5] * 6, 3]
    assert placed.vision.tolist() == [*[0] * 3, *range(1, 7), *[0] * 4, *range(7, 13), 0]
    assert not placed.sound.any()
    image = CFG.prompting.expand(PICTURE, encode)
    assert image.ids.tolist() == [2, 4, 4, 4, 4, 3] and image.vision.tolist() == [0, 1, 2, 3, 4, 0]
    stamp = CFG.prompting.expand(STILL, encode).ids[:2].tolist()
    assert stamp == encode(f"<{2.35:.1f} seconds>")
    with pytest.raises(ValueError, match="1 temporal patches has 2 times"):
        CFG.prompting.expand(STILL._replace(times=(0.0, 1.0)), encode)
    with pytest.raises(ValueError, match="a medium is 'audio'; qwen3_vl takes"):
        CFG.prompting.expand(Medium("audio", sound=3), encode)


def test_positions_by_hand():
    ids = np.array([9, *CFG.prompting.expand(FILM, encode).ids, 8])
    got = qwen3vl.positions(ids, [FILM.grid], CFG)
    grid = [[0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]]  # merged: 2 x 3, so text goes on 3 further
    assert got[0].tolist() == [0, 1, 2, 3, *[4] * 6, 7, 8, 9, 10, *[11] * 6, 14, 15]
    for axis, inside in enumerate(grid, 1):
        here = [[start + i for i in inside] for start in (4, 11)]
        assert got[axis].tolist() == [0, 1, 2, 3, *here[0], 7, 8, 9, 10, *here[1], 14, 15]
    assert (qwen3vl.positions(np.arange(6, 10), [], CFG) == np.arange(4)).all()
    with pytest.raises(ValueError, match="12 placeholder tokens, and 0 grids that want 0"):
        qwen3vl.positions(ids, [], CFG)
    with pytest.raises(ValueError, match="something stands between them"):
        qwen3vl.positions(np.array([4, 4, 9, 4, 4]), [(1, 4, 4)], CFG)


FRAMES = np.random.default_rng(0).integers(0, 256, (13, 48, 48, 3)).astype(np.uint8)


def test_prompts_are_those_of_transformers(tmp_path):
    """Text, tokens and time stamps of a decoded clip, from bytes on."""
    processing = pytest.importorskip("transformers.models.qwen3_vl.processing_qwen3_vl")
    texts = ["what moves at <12.3 seconds> or <0.9 seconds>"] * 3
    chat.build_tokenizer(texts, 400, tmp_path / "m")
    talk = chat.Chat(tmp_path / "m")
    cfg = hf.tiny_config("qwen3_vl", tmp_path / "m")
    sampling = media.Sampling(frames=5, policy="qwen3_vl")  # the last frame fills its patch alone
    data = pipeline.Data(shards=("none",), tasks=("sft",), budget=BUDGET, sampling=sampling)
    builder = pipeline.Builder(talk, cfg.prompting, data)
    clip = builder.clip(media.encode(FRAMES, 7.0), "clip", data)
    tree = builder.tree("clip", clip, "what moves?", ())

    class Processor:
        video_token, vision_start_token, vision_end_token = (
            "<|video_pad|>",
            "<|vision_start|>",
            "<|vision_end|>",
        )
        _calculate_timestamps = processing.Qwen3VLProcessor._calculate_timestamps
        video_processor = type("P", (), {"merge_size": 2, "temporal_patch_size": 2})

    indices = media.frame_indices(13, 7.0, sampling)
    metadata = type("M", (), {"fps": 7.0, "frames_indices": indices})
    seen = {"video_grid_thw": np.array([clip.medium.grid]), "video_metadata": [metadata]}
    said = processing.Qwen3VLProcessor.replace_video_token(Processor(), seen, 0)
    want = f"<|im_start|>user\n{said}what moves?<|im_end|>\n<|im_start|>assistant\n"
    assert tree.prompt.tolist() == talk._parsed(want)
    assert said.count(" seconds>") == 3 and "<1.7 seconds>" in said  # frame 12, twice


def test_a_tower_without_deep_blocks_and_wrong_patches():
    cfg = dataclasses.replace(CFG, vision=dataclasses.replace(TOWER, deep=()))
    graph, shapes = hf.abstract(cfg)
    run = lambda seen: jax.eval_shape(lambda p: nnx.merge(graph, p).tower(seen), shapes)
    put, deep = run(SEEN)
    assert put.shape == (B, 18, 32) and deep is None and "deep" not in shapes["tower"]
    with pytest.raises(ValueError, match="patches of 95 values; this tower wants 96"):
        run(SEEN._replace(patches=SEEN.patches[..., 1:]))
