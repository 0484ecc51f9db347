"""The smallest Qwen2.5-VL of the real classes, and its inputs in one shape, which tests share."""

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx

from jaxvid.batch import TokenBatch, VisionBatch
from jaxvid.models import decoder, hf, qwen25vl, vision
from jaxvid.models.layers import Compute

VIDEO = 5
TEXT = decoder.Config(
    layers=2, width=32, ffn=48, heads=4, kv_heads=2, vocab=64, rope_sections=(1, 1, 2)
)
TOWER = vision.Config(
    layers=3, width=32, ffn=48, heads=2, out=32, full=(1,), patch=4, window=16, tokens_per_second=4
)
CFG = qwen25vl.Config(
    text=TEXT,
    vision=TOWER,
    image_token_id=4,
    video_token_id=VIDEO,
    vision_start_token_id=2,
    vision_end_token_id=3,
    bos_token_id=0,
    eos_token_id=1,
    compute=Compute(remat="none"),
)
QUICK = {"xla_backend_optimization_level": 0}  # for programs that run once
GRID = (2, 6, 6)  # windows of 2 x 2 merged tokens on 3 x 3: full, two kinds of partial, a corner
PADS = 2 * 3 * 3
B, T, G, R = 2, 36, 2, 6  # one shape for all tests: each compiles once


@functools.cache
def fresh(tied=False, window=0):
    cfg = dataclasses.replace(CFG, tied=tied, text=dataclasses.replace(TEXT, window=window))
    graph, _ = hf.abstract(cfg)
    r = np.random.default_rng(7)  # biases and norms too, so that a lost one shows
    noisy = lambda x: x + 0.2 * r.standard_normal(x.shape).astype(np.float32)
    return hf.Loaded(cfg, graph, jax.tree.map(noisy, hf.initialise(cfg, 0).params))


def model(loaded):
    return nnx.merge(loaded.graph, loaded.params)


hidden = nnx.jit(lambda model, *inputs: model.hidden(*inputs))
prefill = nnx.jit(lambda model, *inputs: model.prefill(*inputs))
decode = nnx.jit(lambda model, *inputs: model.decode(*inputs))
tower = nnx.jit(lambda model, seen: model.tower(seen))


def frames(seed=0):
    """The same geometry in every row; windows by HF's rule, written out for this grid."""
    patches = np.random.default_rng(seed).integers(0, 256, (B, 2, 36, 96)).astype(np.uint8)
    at = np.indices((3, 3, 2, 2)).reshape(4, -1)  # merge order: row, column, then inside
    at = np.stack([2 * at[0] + at[2], 2 * at[1] + at[3]], 1)
    window = 1 + 2 * (at[:, 0] // 4) + at[:, 1] // 4
    spread = lambda x: np.broadcast_to(np.asarray(x, np.int32), (B, 2, *np.shape(x)))
    return VisionBatch(patches, spread(at), spread(window))


def sequence(text, seed=0):
    ids = np.random.default_rng(seed).integers(6, 64, 3 + text)
    return np.concatenate([ids[:2], [2], [VIDEO] * PADS, [3], ids[2:]]).astype(np.int32)


def rows(*each):
    """TokenBatch of one sequence a row, (tokens, positions [3, n], end), padded; a row missing is
    a copy of the first."""
    pad = lambda x: np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, T - x.shape[-1])]).astype(np.int32)
    each = (*each, *each[:1] * (B - len(each)))
    tokens, positions, end = (np.stack([pad(np.asarray(x)) for x in xs]) for xs in zip(*each))
    at = tokens == VIDEO
    none = np.zeros((B, 1), np.int32)
    media = np.where(at, np.cumsum(at, 1), 0).astype(np.int32)
    depth = np.where(end > 0, np.arange(T, dtype=np.int32)[None], 0)
    return TokenBatch(tokens, positions, end, depth, media, none, none, none)


def plain(ids, cfg=CFG):
    return ids, qwen25vl.positions(ids, [GRID], [0.5], cfg), np.full(len(ids), len(ids))
