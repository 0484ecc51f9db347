"""The smallest LLaVAs of the real classes, and one batch of all kinds of media for each."""

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx

from jaxvid.batch import TokenBatch, VisionBatch
from jaxvid.models import decoder, hf, llava, vit
from jaxvid.models.layers import Compute
from jaxvid.prompting import Medium

IMAGE, VIDEO = 62, 63
TEXT = decoder.Config(
    layers=2,
    width=32,
    ffn=48,
    heads=4,
    kv_heads=2,
    vocab=64,
    rope_sections=(4, 0, 0),
    qkv_bias=False,
    rope_theta=1e4,
)
CLIP = vit.Config(layers=3, width=24, ffn=40, heads=2, image=24, patch=4, unused=1)
SIGLIP = dataclasses.replace(
    CLIP,
    image=28,  # 7 patches a side: half of it is rounded up
    kind="siglip",
    activation="gelu_tanh",
    norm_eps=1e-6,
    unused=0,
    image_mean=vit.SIGLIP_MEAN,
    image_std=vit.SIGLIP_STD,
)
COMMON = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "compute": Compute(remat="none"),
}
VICUNA = llava.NextVideo(
    text=TEXT,
    vision=CLIP,
    decoder_kind="llama",
    pinpoints=((24, 48), (48, 24), (48, 48)),
    **COMMON,
)
MISTRAL = dataclasses.replace(
    VICUNA, decoder_kind="mistral", text=dataclasses.replace(TEXT, window=30)
)
ONEVISION = llava.OneVision(
    text=dataclasses.replace(TEXT, qkv_bias=True, norm_eps=1e-5),
    vision=SIGLIP,
    decoder_kind="qwen2",
    pinpoints=((28, 28), (28, 56), (56, 28), (56, 56)),
    **COMMON,
)
CONFIGS = {"vicuna": VICUNA, "mistral": MISTRAL, "onevision": ONEVISION}
QUICK = {"xla_backend_optimization_level": 0}  # for programs that run once
B, T, E, R = 2, 256, 7, 32
PICTURE = (20, 46)  # pixels: a grid of 1 x 2 tiles, wider than they are


@functools.cache
def fresh(cfg):
    graph, _ = hf.abstract(cfg)
    r = np.random.default_rng(7)  # biases and norms too, so that a lost one shows
    noisy = lambda x: x + 0.2 * r.standard_normal(x.shape).astype(np.float32)
    return hf.Loaded(cfg, graph, jax.tree.map(noisy, hf.initialise(cfg, 0).params))


def model(loaded):
    return nnx.merge(loaded.graph, loaded.params)


def video(cfg, frames=2):
    return Medium("video", (frames, cfg.vision.side, cfg.vision.side), 0.5, 0, (30, 30))


def image(cfg, tiles=3):
    return Medium("image", (tiles, cfg.vision.side, cfg.vision.side), 0.0, 0, PICTURE)


def text(n, seed):
    return np.random.default_rng(seed).integers(2, 60, n).astype(np.int32)


def prompts(cfg):
    """One clip; two clips; an image of a base and two tiles."""
    clip = video(cfg)
    return (
        [text(3, 1), clip, text(5, 2)],
        [text(2, 3), clip, text(3, 4), clip, text(4, 5)],
        [text(4, 6), image(cfg), text(5, 7)],
    )


def sequence(cfg, parts, frames=0):
    """(tokens, media) of text and media one after the other, whose frames begin at `frames`."""
    prompting, ids, seen = cfg.prompting, [], []
    for part in parts:
        if isinstance(part, Medium):
            placed = prompting.expand(part, list)
            first = frames * prompting.vision.slots(cfg.vision.side**2)
            seen.append(np.where(placed.vision > 0, placed.vision + first, placed.vision))
            ids.append(placed.ids)
            frames += part.grid[0]
        else:
            ids.append(part)
            seen.append(np.zeros(len(part), np.int32))
    return np.concatenate(ids), np.concatenate(seen), frames


def rows(cfg, *trees):
    """TokenBatch of B rows; each of `trees` lists the prompts of one row. And where each stands:
    (row, start, stop, first frame, frames)."""
    zero = lambda *shape: np.zeros(shape, np.int32)
    tokens, end, depth, media = (zero(B, T) for _ in range(4))
    positions, where = zero(B, 3, T), []
    for row, each in enumerate(trees):
        at = frame = 0
        for parts in each:
            ids, seen, after = sequence(cfg, parts, frame)
            stop = at + len(ids)
            tokens[row, at:stop], media[row, at:stop], end[row, at:stop] = ids, seen, stop
            depth[row, at:stop] = np.arange(len(ids))
            positions[row, :, at:stop] = cfg.prompting.positions(ids, ())
            where.append((row, at, stop, frame, after - frame))
            at, frame = stop, after
    return TokenBatch(tokens, positions, end, depth, media, *[zero(B, 1)] * 3), where


def frames(cfg, seed=0):
    side, values = cfg.vision.side, cfg.vision.patch_values
    patches = np.random.default_rng(seed).integers(0, 256, (B, E, side**2, values))
    at = np.indices((side, side)).reshape(2, -1).T.astype(np.int32)
    coords = np.broadcast_to(at, (B, E, *at.shape))
    return VisionBatch(patches.astype(np.uint8), coords, np.ones((B, E, side**2), np.int32))
