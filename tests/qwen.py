"""The smallest Qwen2.5-VL of the real classes, and its inputs in one shape, which tests share."""

import dataclasses
import functools

import numpy as np
import prompts
from prompts import filled, quick

from jaxvid.batch import TokenBatch, VisionBatch
from jaxvid.data.packing import Budget
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
# As transformers 5 places tokens, whose models find the positions themselves.
FIVE = dataclasses.replace(CFG, text_after_video="hf5", fractional_seconds=True)
BUDGET = Budget(rows=2, tokens=64, scored=0, branches=0, frames=4, patches=36, chunks=0)
GRID = (2, 6, 6)  # windows of 2 x 2 merged tokens on 3 x 3: full, two kinds of partial, a corner
PADS = 2 * 3 * 3
B, T, G, R = 2, 36, 2, 6  # one shape for all tests: each compiles once


@functools.cache
def fresh(tied=False, window=0):
    cfg = dataclasses.replace(CFG, tied=tied, text=dataclasses.replace(TEXT, window=window))
    graph, shapes = hf.abstract(cfg)
    return hf.Loaded(cfg, graph, filled(shapes, 0.9))


tower = quick(lambda model, seen: model.tower(seen))


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


def their_inputs(trees, media, cfg=FIVE):
    """One left-padded batch of trees with their media."""
    import torch

    out = prompts.their_inputs(cfg, trees, media)
    ids = out["input_ids"]
    out["mm_token_type_ids"] = (ids == cfg.image_token_id) + 2 * (ids == cfg.video_token_id)
    if seconds := [m.seconds for ms in media for m in ms if m.kind == "video"]:
        out["second_per_grid_ts"] = torch.tensor(seconds)
    return out


def published(size="7B", **changes):
    """config.json of Qwen2.5-VL as the hub has it."""
    layers, width, ffn, heads, kv, vocab, inner = {
        "3B": (36, 2048, 11008, 16, 2, 151936, 3420),
        "7B": (28, 3584, 18944, 28, 4, 152064, 3420),
        "32B": (64, 5120, 27648, 40, 8, 152064, 3456),
        "72B": (80, 8192, 29568, 64, 8, 152064, 3456),
    }[size]
    tower = {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": inner,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": width,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    }
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "max_position_embeddings": 128000,
        "max_window_layers": layers,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": size == "3B",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": tower,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vocab_size": vocab,
    } | changes
