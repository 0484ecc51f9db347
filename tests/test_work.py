"""What an update is for the model: counted from its forward pass, against formulas written by hand
for its shapes; for every family, weights that are frozen, adapters and references."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pairs
import pytest
import qwen
from flax import nnx
from toy import batch as toy_batch
from toy import mesh_of, toy

from jaxvid import config, flops, paths, runs
from jaxvid.batch import AudioBatch, Batch, Branches
from jaxvid.data import pipeline
from jaxvid.models import hf, lora
from jaxvid.objectives.sft import SFT
from jaxvid.train import optimizers, policy, step, work
from jaxvid.train import state as states

EXACT = {"rel": 1e-6}  # sums are float32


def batch():
    """Two rows: a tree of a prompt with a clip and two branches, and a single sequence; padding."""
    tokens = qwen.rows(qwen.plain(qwen.sequence(4)), qwen.plain(qwen.sequence(2, seed=1)))
    whole = len(qwen.sequence(4))
    end, depth = tokens.end.copy(), tokens.depth.copy()
    fork = whole - 4
    end[0, fork : fork + 2], end[0, fork + 2 : whole] = fork + 2, whole  # two branches of two
    depth[0, fork + 2 : whole] -= 2
    slot = np.zeros((qwen.B, 3), np.int32)
    slot[0, :2], slot[1, 0] = (1, 2), 1
    tokens = tokens._replace(end=end, depth=depth, sources=slot, targets=slot, slot=slot)
    vision = qwen.frames()
    window = vision.window.copy()
    window[1, 1] = 0  # the second row has a frame less
    vision = vision._replace(window=window)
    none = np.zeros((qwen.B, 0), np.int32)
    sound = AudioBatch(np.zeros((qwen.B, 0, 0, 0), np.float32), none, none)
    table = Branches(*(np.zeros((qwen.B, 2), np.int32) for _ in Branches._fields))
    reals = [np.zeros((qwen.B, 3), np.float32)] * 3
    return Batch(tokens, vision, sound, table, *reals)


def by_hand(cfg, batch, text=3, head=3, tower=3, pixels=2):
    """FLOPs of a step; how many times each part's products are made, the pixels' patches apart:
    they have no gradient."""
    t, v = cfg.text, cfg.vision
    D, F, N, K, H, V, L = t.width, t.ffn, t.heads, t.kv_heads, t.head, t.vocab, t.layers
    tokens, windows = batch.tokens, batch.vision.window
    real = (tokens.end > 0).sum()
    at = np.arange(tokens.end.shape[1])
    mask = (at[None, None, :] <= at[None, :, None]) & (at[None, :, None] < tokens.end[:, None, :])
    if t.window:
        mask &= tokens.depth[:, :, None] - tokens.depth[:, None, :] < t.window
    layer = 2 * D * (N + 2 * K) * H + 2 * N * H * D + 3 * 2 * D * F
    total = text * L * (real * layer + 2 * 2 * N * H * mask.sum())
    total += head * 2 * V * D * (tokens.slot > 0).sum()
    W, merged = v.width, v.width * v.merge**2
    patches = (windows > 0).sum()
    own = lambda ids: ((ids[..., None] == ids[..., None, :]) & (ids > 0)[..., None]).sum()
    frame, window = own(np.minimum(windows, 1)), own(windows)
    assert frame > window > 0
    for i in range(v.layers):
        total += tower * patches * (4 * 2 * W * W + 3 * 2 * W * v.ffn)
        total += tower * 4 * W * (frame if i in v.full else window)
    total += tower * patches / v.merge**2 * 2 * merged * (merged + v.out)
    return total + pixels * patches * 2 * v.patch_values * W


def measured(cfg, graph, params, **how):
    trained, frozen = states.split(params, **how)
    return work.measure(cfg, graph, trained, frozen)


def test_a_step_of_all_weights():
    """Each weight's product three times, attention by the pairs that see one another."""
    data = batch()
    for window in (0, 3):
        model = qwen.fresh(window=window)
        found = measured(model.cfg, model.graph, model.params)
        assert float(found(data)) == pytest.approx(by_hand(model.cfg, data), **EXACT)
        leading = jax.tree.map(lambda x: np.stack([x, x]), data)  # micro-batches
        assert float(found(leading)) == pytest.approx(2 * by_hand(model.cfg, data), **EXACT)


def attention(data, cfg):
    """FLOPs of the decoder's attention, forward."""
    t = cfg.text
    return 4 * t.heads * t.head * t.layers * int((data.tokens.depth + 1)[data.tokens.end > 0].sum())


def test_frozen_weights_count_less():
    """Behind what is trained twice, before it once; attention behind it three times, as both of its
    sides are learnt."""
    data, model = batch(), qwen.fresh()
    count = lambda **how: float(measured(model.cfg, model.graph, model.params, **how)(data))
    want = lambda more=0, **how: pytest.approx(by_hand(model.cfg, data, **how) + more, **EXACT)
    assert count(freeze=("tower",)) == want(tower=1, pixels=1)
    behind = attention(data, model.cfg)
    assert count(train=("tower",)) == want(behind, text=2, head=2)
    assert count(train=("head",)) == want(text=1, head=2, tower=1, pixels=1)
    forward = work.measure(model.cfg, model.graph, states.NONE, model.params)
    assert float(forward(data)) == want(text=1, head=1, tower=1, pixels=1)


def test_adapters():
    """Three times; the weights that they stand beside twice, the tower before them once."""
    data, model, rank = batch(), qwen.fresh(), 3
    settings = lora.LoRA(rank=rank, targets=("decoder.blocks.attention.q", "decoder.blocks.mlp"))
    graph, params = lora.attach(model.graph, model.params, settings, 0)
    found = measured(model.cfg, graph, params, train=lora.TRAINED)
    t = model.cfg.text
    wide = 2 * rank * (t.width + t.heads * t.head + 3 * (t.width + t.ffn)) * t.layers
    want = by_hand(model.cfg, data, text=2, head=2, tower=1, pixels=1)
    want += 3 * wide * (data.tokens.end > 0).sum()
    want += attention(data, model.cfg)
    assert float(found(data)) == pytest.approx(want, **EXACT)


@pytest.mark.parametrize("family", [f.name for f in hf.FAMILIES])
def test_every_family(family):
    """Forward: as much as the counter finds on the row that is traced; a step: three times the
    decoder's weights and table. On a mesh the same."""
    cfg = hf.tiny_config(family)
    graph, params = hf.abstract(cfg)
    tokens, vision, audio = work._row(cfg)
    hidden = lambda params, **row: nnx.merge(graph, params).hidden(**row)
    row = {"tokens": tokens, "vision": vision, "audio": audio}
    listed, _ = flops.products(hidden, {"params": params} | row)
    counted = flops.count(lambda params, row: hidden(params, **row), params, row)
    assert sum(p.flops for p in listed) == counted
    whole = sum(p.flops for p in listed if p.left and p.right)
    assert 0.99 * counted < whole <= counted  # without what turns positions by constant angles
    found = work.measure(cfg, graph, states.NONE, params)
    pixels = vision.patches.shape[2]
    sum_of = found.token * work.TOKENS + found.pair * work.TOKENS**2 + found.chunk
    assert sum_of + found.patch * pixels + found.sight * pixels**2 == pytest.approx(whole)
    assert (found.chunk > 0) == (cfg.prompting.sound is not None)
    with jax.set_mesh(mesh_of(4, 2)):
        learn = work.measure(cfg, graph, params)
    flat = [(paths.join(path), math.prod(v.shape)) for path, v in nnx.to_flat_state(params)]
    weights = [x for name, x in flat if re.match(r"decoder\.blocks\..*\.w$", name)]
    assert learn.token == pytest.approx(6 * sum(weights))
    assert learn.pair == pytest.approx(3 * found.pair)
    assert learn.scored == 6 * cfg.text.vocab * cfg.text.width
    assert 2 * found.patch < learn.patch <= 3 * found.patch


def run_of(kind, **given):
    some = {"sampling": pairs.SAMPLING, "budget": qwen.BUDGET}
    data = pipeline.Data(shards=("none",), tasks=("sft",), **some)
    return kind(model="none", data=data, steps=1, **given)


def test_steps_of_every_kind_of_run():
    """SFT and policy: the step. DPO: also the reference, where it is computed in the step."""
    data, model = batch(), qwen.fresh()
    once, step_alone = dict(text=1, head=1, tower=1, pixels=1), by_hand(model.cfg, data)
    for run, want in (
        (run_of(config.SFTRun), step_alone),
        (run_of(config.PolicyRun), step_alone),
        (run_of(config.PreferenceRun), step_alone + by_hand(model.cfg, data, **once)),
        (run_of(config.PreferenceRun, sidecar="there"), step_alone),
    ):
        found = runs._work(run, model, model.params, states.NONE)
        assert float(found(data)) == pytest.approx(want, **EXACT)


def test_the_step_tells_it_and_an_update_sums_it():
    graph, params = toy()
    tx = optimizers.AdamW(lr=1e-2).build(2, params)
    train_step = step.make_step(graph, SFT(), tx, work=lambda batch: jnp.float32(3e15))
    values = train_step(states.create(params, tx), toy_batch([1, 2], rows=2))[1]
    assert float(values["flops"]) == pytest.approx(3e15)
    laps = jax.device_get([values, values])
    assert policy._over_laps(laps)["flops"] == pytest.approx(6e15)
